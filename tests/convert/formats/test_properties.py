"""Properties of all formats: any JSON value is read or refused, and what is written in a format is read back."""

from __future__ import annotations

import copy

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ismdata.conversation import REASONS, ROLE_NAMES
from ismdata.convert.canonical import canonicalize
from ismdata.convert.corpus_format import Choices, with_choices
from ismdata.convert.formats.registry import FORMATS
from ismdata.errors import Refused
from tests.support.records import PLAIN_TEXTS, RULES, read
from tests.support.shapes import COVERED_FORMATS, RECORDS, A, U, chat, moss_turn, spoken

NAMES = """
messages conversations conversation utterances dialog dialogue log content turns choices history chat text speaker role
agent message human assistant prompt completion response query question answer instruction input output system tools
system_prompt chosen rejected chosen_messages rejected_messages label kto_tag from value id turn_1 Human MOSS Commands
"""


TEXTS = [
    "user", "assistant", "gpt", "Ann", "a|EOM|b", "Ann: a|EOM|Bo: b", "\ud800", "Human: a\n\nAssistant: b", "None",
    "### Human: a### Assistant: b", "1 a\tb", "2 your persona: x", "a\tb", "a __eou__ b\t1", 'Search("x")',
]  # fmt: skip


names = st.sampled_from(NAMES.split())


leaves = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 10**25), st.floats(), st.text(max_size=5), st.sampled_from(TEXTS)
)


values = st.recursive(
    leaves,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.one_of(names, st.text(max_size=3)), inner, max_size=4)
    ),
    max_leaves=12,
)


def paths_of(value, path=()):
    """Every place inside a JSON value."""
    yield path
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in entries:
        yield from paths_of(inner, (*path, key))


@st.composite
def mutated(draw):
    """A sound record with one or two places in it replaced, doubled or taken away."""
    record = copy.deepcopy(draw(st.sampled_from([row[1] for row in RECORDS])))
    for _ in range(draw(st.integers(1, 2))):
        *inside, last = [None, *draw(st.sampled_from(list(paths_of(record))))]
        if not inside:
            return draw(values)
        holder = record
        for key in inside[1:]:
            holder = holder[key]
        action = draw(st.sampled_from(["replace", "remove", "add"]))
        if action == "replace":
            holder[last] = draw(values)
        elif action == "remove":
            del holder[last]
        elif isinstance(holder, dict):
            holder[draw(names)] = draw(values)
        else:
            holder.insert(last, draw(values))
    return record


def read_or_refused(corpus_format, record):
    try:
        for draft in corpus_format.parse_record(record):
            canonicalize(draft, RULES)
    except Refused as refused:
        assert refused.reason in REASONS and refused.detail


def check_any(record):
    for name in COVERED_FORMATS:
        assert isinstance(FORMATS[name].matches(record), bool)
        read_or_refused(with_choices(FORMATS[name], Choices(roles=ROLE_NAMES)), record)
        both = Choices(roles=ROLE_NAMES, assistant="both", preference="chosen")
        read_or_refused(with_choices(FORMATS[name], both), record)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(record=values)
@example(record={"messages": [{"role": ["sys"], "content": "a"}]})
@example(record={"log": [{"text": "a", "speaker": {}}]})
def test_any_value_is_read_or_refused(record):
    check_any(record)


@pytest.mark.slow
@settings(deadline=None, max_examples=400)
@given(record=mutated())
def test_any_broken_record_is_read_or_refused(record):
    check_any(record)


# ---- there and back ----


exchanges = st.lists(st.tuples(PLAIN_TEXTS, PLAIN_TEXTS), min_size=1, max_size=4)


def turns_of_pairs(pairs):
    return [turn for question, answer in pairs for turn in ((U, question), (A, answer))]


BUILDERS = {
    "utterances": lambda pairs: {"utterances": spoken("speaker", "text", *turns_of_pairs(pairs))},
    "pairs": lambda pairs: {"conversation": [{"human": q, "assistant": a} for q, a in pairs]},
    "prompt_completion": lambda pairs: {
        "query": pairs[-1][0],
        "response": pairs[-1][1],
        "history": list(map(list, pairs[:-1])),
    },
    "separated": lambda pairs: {"text": "".join(f"\n\nHuman: {q}\n\nAssistant: {a}" for q, a in pairs)},
    "lists": lambda pairs: [text for pair in pairs for text in pair],
    "dailydialog": lambda pairs: " __eou__ ".join(text for pair in pairs for text in pair),
    "tsv_pairs": lambda pairs: "\t".join(text for pair in pairs for text in pair),
    "moss": lambda pairs: {"chat": {f"turn_{n}": moss_turn(q, a) for n, (q, a) in enumerate(pairs, 1)}},
    "personachat": lambda pairs: [f"{n} {q}\t{a}" for n, (q, a) in enumerate(pairs, 1)],
    "kto": lambda pairs: {"label": True, "messages": chat(*turns_of_pairs(pairs))},
    "preference": lambda pairs: {
        "chosen": chat(*turns_of_pairs(pairs)),
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
}


@pytest.mark.parametrize("name", BUILDERS)
@settings(deadline=None, max_examples=60)
@given(pairs=exchanges)
def test_there_and_back(name, pairs):
    assert read(name, BUILDERS[name](pairs), preference="chosen") == [turns_of_pairs(pairs)]
