"""The corpus formats one by one: what a record of each becomes, that it is taken for no other, and that nothing but a
refusal comes of any JSON value."""

from __future__ import annotations

import copy
import json
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from ismdata.conversation import REASONS, ROLE_NAMES
from ismdata.convert.canonical import Rules, canonicalize
from ismdata.convert.corpus_format import Choices, Place, SourceBlock, with_choices
from ismdata.convert.formats.registry import FORMATS, detect
from ismdata.convert.read_block import read_block, read_records
from ismdata.convert.sources.blocks import LineBlock
from ismdata.convert.sources.framing import line_block
from ismdata.errors import Refused
from tests.conftest import DATA, needs_data
from tests.support.paths import ROOT
from tests.support.shapes import QA, SHAPES, A, Q, R, S, T, U, chat, spoken

PLACE = Place(prefix="corpus:", stem="corpus")
FORMAT_NAMES = ("preference", "kto", "utterances", "moss", "pairs", "dailydialog", "lists", "separated")
FORMAT_NAMES += ("prompt_completion", "personachat", "tsv_pairs", "gemini", "claude_export", "chatgpt_export")
FORMAT_NAMES += ("question_lists", "convai")


def conversations(name, record, **choices):
    """The canonical conversations of a record. Raises Refused."""
    corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, **choices))
    return [canonicalize(draft, Rules(roles=ROLE_NAMES)) for draft in corpus_format.parse_record(record)]


def said(conversation):
    return [(message["role"], message["content"]) for message in conversation["messages"]]


def read(name, record, **choices):
    return [said(conversation) for conversation in conversations(name, record, **choices)]


def refusal(name, record, **choices):
    with pytest.raises(Refused) as caught:
        conversations(name, record, **choices)
    return caught.value.reason, caught.value.detail


HH = "Human: a\n\nAssistant: b"
BY_NAME = [("Ann", "Hi"), ("Bo", "Hm"), ("Bo", "Hi")]
IN_ORDER = [(U, "Hi"), (A, "Hm"), (A, "Hi")]

#: Format, record, its one conversation under `--preference chosen`, and the other formats that its fields fit.
RECORDS = [
    ("utterances", {"utterances": spoken("speaker", "text", ("USER", Q), ("ASSISTANT", R))}, QA, ()),
    ("utterances", {"content": spoken("agent", "message", ("agent_1", Q + " "), ("agent_2", R + "\n"))}, QA, ()),
    ("utterances", {"dialog": spoken("speaker", "content", ("listener", R), ("speaker", Q))}, QA[::-1], ()),
    ("utterances", {"messages": chat(("usr", Q), ("sys", R))}, QA, ("messages",)),
    ("utterances", {"turns": spoken("speaker", "utterance", ("USER", Q), ("SYSTEM", R))}, QA, ()),
    ("utterances", {"id": "D1", "goal": {}, "log": [{"text": Q, "metadata": {}}, {"text": R}]}, QA, ()),
    ("utterances", {"dialogue": spoken("speaker", "text", (7, Q), (3, R))}, QA, ()),
    ("utterances", {"dialogue": spoken("speaker", "text", *BY_NAME)}, IN_ORDER, ()),
    ("utterances", {"conversation": chat(("X", " a\n"), ("Y", "b "))}, [(U, " a\n"), (A, "b ")], ()),
    ("pairs", {"conversation": [{"human": Q, "assistant": R}]}, QA, ()),
    ("pairs", {"history": [[Q, R]]}, QA, ()),
    ("pairs", [[Q, R], ["And", "so"]], [*QA, (U, "And"), (A, "so")], ()),
    ("pairs", {"system": "Be brief.", "dialog": [{"question": Q, "answer": R}]}, [(S, "Be brief."), *QA], ()),
    ("prompt_completion", {"prompt": Q, "completion": R}, QA, ()),
    ("prompt_completion", {"prompt": chat((U, Q)), "completion": chat((A, R))}, QA, ()),
    ("prompt_completion", {"system_prompt": "", "question": Q, "response": R}, QA, ()),
    ("prompt_completion", {"query": "a", "response": "b", "history": [[Q, R]]}, [*QA, (U, "a"), (A, "b")], ()),
    ("prompt_completion", {"instruction": "x", "context": "y", "response": "z"}, [(U, "x\ny"), (A, "z")], ()),
    ("prompt_completion", {"input": Q, "output": R}, QA, ()),
    ("separated", {"conversation": "Teacher: (focus)2:1?|EOM|Ann: 2: "}, [(A, "(focus)2:1?"), (U, "2:")], ()),
    ("separated", {"dialogue": "Ann: Hi|EOM|Bo: Hm|EOM|Bo: Hi|EOM| "}, IN_ORDER, ()),
    ("separated", {"text": f"\n\nHuman: {Q}\n\nAssistant: {R}"}, QA, ()),
    ("separated", {"text": f"### Human: {Q}### Assistant: {R}"}, QA, ()),
    ("lists", [Q, R], QA, ()),
    ("dailydialog", f"{Q} __eou__ {R} __eou__", QA, ()),
    ("dailydialog", f"{Q}__eou__{R}\t1\t2 1\t0 0", QA, ()),
    ("tsv_pairs", f"{Q}\t{R}", QA, ()),
    ("tsv_pairs", f"{Q}\t {R} \tAnd then?", [*QA, (U, "And then?")], ()),
    (
        "preference",
        {"conversations": [{"from": "human", "value": Q}], "chosen": {"from": "gpt", "value": R}, "rejected": {}},
        QA,
        ("sharegpt",),
    ),
    (
        "preference",
        {"prompt": Q, "chosen": chat(*QA), "rejected": chat((U, Q), (A, "No.")), "messages": chat(*QA)},
        QA,
        ("messages",),
    ),
    ("preference", {"prompt": chat((U, Q)), "chosen": chat((A, R)), "rejected": []}, QA, ()),
    ("preference", {"prompt": chat((U, Q)), "chosen": chat(*QA), "rejected": []}, QA, ()),
    ("preference", {"chosen_messages": chat(*QA), "rejected_messages": []}, QA, ()),
    ("preference", {"prompt": Q, "chosen": R, "rejected": "No."}, QA, ()),
    ("preference", {"instruction": "a", "input": "b", "chosen": R, "rejected": ""}, [(U, "a\nb"), (A, R)], ()),
    ("preference", {"chosen": f"\n\nHuman: {Q}\n\nAssistant: {R}", "rejected": ""}, QA, ()),
    ("preference", {"prompt": f"\n\nHuman: {Q}\n\nAssistant:", "chosen": f" {R}", "rejected": " No."}, QA, ()),
    ("preference", {"prompt": f"Human: {Q}", "chosen": R, "rejected": "No."}, QA, ()),
    ("preference", {"prompt": f"### Human: {Q}### Assistant: Until", "chosen": " six.", "rejected": ""}, QA, ()),
    ("preference", {"prompt": Q, "chosen": HH, "rejected": ""}, [(U, Q), (A, HH)], ()),
    ("kto", {"messages": chat(*QA), "label": True}, QA, ("messages",)),
    ("kto", {"prompt": Q, "completion": R, "label": True}, QA, ("prompt_completion",)),
    ("kto", {"instruction": Q, "input": "", "output": R, "kto_tag": True}, QA, ("alpaca",)),
    ("moss", {"chat": {"turn_1": {"Human": f"<|Human|>: {Q}<eoh>\n", "MOSS": f"<|MOSS|>: {R}<eom>\n"}}}, QA, ()),
]
RECORDS += SHAPES
IDS = [f"{name}-{at}" for at, (name, *_) in enumerate(RECORDS)]

#: Records of the formats that tests/convert/formats/test_readers.py looks after.
OTHERS = [
    ("messages", {"messages": chat(*QA)}),
    ("messages", {"messages": chat((S, "s"), *QA)}),
    ("sharegpt", {"conversations": spoken("from", "value", ("human", Q), ("gpt", R))}),
    ("alpaca", {"instruction": Q, "input": "", "output": R, "history": [["b", "c"]]}),
    ("alpaca", {"instruction": f"Human:{Q}\nAssistant:{R}\nHuman:b\nAssistant:", "input": "", "output": "c"}),
    ("kdconv", {"name": "n", "messages": [{"message": "q"}, {"message": "a", "attrs": []}]}),
]


@pytest.mark.parametrize(("name", "record", "expected", "also"), RECORDS, ids=IDS)
def test_what_a_record_becomes(name, record, expected, also):
    before = copy.deepcopy(record)
    assert read(name, record, preference="chosen") == [expected]
    assert record == before


@pytest.mark.parametrize(("name", "record", "expected", "also"), RECORDS, ids=IDS)
def test_a_record_is_taken_for_its_own_format_only(name, record, expected, also):
    assert detect(record) == name
    assert {other for other, corpus_format in FORMATS.items() if corpus_format.matches(record)} == {name, *also}


@pytest.mark.parametrize(("name", "record"), OTHERS, ids=[f"{name}-{at}" for at, (name, _) in enumerate(OTHERS)])
def test_records_of_the_older_formats_fit_no_other(name, record):
    assert [other for other, corpus_format in FORMATS.items() if corpus_format.matches(record)] == [name]


NOTHING = [
    None, True, 3, 0.5, "", "Hello!", "1 day ago", "7\t12", "1\tnumbers only", [], {}, [[]], [{}], [["a"]],
    {"text": "Human: only one side"}, {"text": "Just words."}, {"conversation": "No speaker|EOM|here"},
    {"messages": []}, {"messages": [{"text": "q"}]}, {"turns": [{"speaker": "a"}]}, {"turns": [], "choices": []},
    {"content": [{"type": "text", "text": "q"}]}, {"log": [{"speaker": None, "text": "q"}]}, {"chat": {}},
    {"chosen": "a"}, {"label": True}, {"prompt": "q"}, {"prompt": "q", "completion": 3},
    {"question": "q", "answers": ["a"]},
]  # fmt: skip


@pytest.mark.parametrize("record", NOTHING, ids=repr)
def test_what_is_no_conversation_is_taken_for_none(record):
    assert [name for name in FORMAT_NAMES if FORMATS[name].matches(record)] == []


# ---- what the documentation says ----

SECTION = re.compile(r"^### `(\w+)`.*?^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def test_the_documented_records_are_of_their_formats():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").partition("\n## Roles")[0]
    found = SECTION.findall(text)
    assert set(FORMAT_NAMES) <= {name for name, *_ in found}
    for name, language, body in found:
        if language == "json" and name in {*FORMAT_NAMES, "messages", "sharegpt", "alpaca", "kdconv"}:
            record = json.loads(body)
            whole = detect(record) == name
            assert whole or {detect(one) for one in record} == {name}, name
        elif language == "text" and name in FORMAT_NAMES:
            assert detect(body.partition("\n")[0]) == name


def test_the_documented_roles_are_those_of_the_table():
    text = (ROOT / "docs" / "formats.md").read_text("utf-8").partition("\n## Roles")[2]
    rows = re.findall(r"^\| `(system|user|assistant|tool)` \| (`.*`) \|$", text, re.MULTILINE)
    assert {name: role for role, names in rows for name in re.findall(r"`(\w+)`", names)} == ROLE_NAMES


# ---- who is the assistant ----


@pytest.mark.parametrize(
    ("name", "record"),
    [
        ("utterances", {"id": "t", "content": [{"agent": "x", "message": "a"}, {"agent": "y", "message": "b"}]}),
        ("utterances", {"id": "t", "log": [{"text": "a"}, {"text": "b"}]}),
        ("separated", {"id": "t", "dialogue": "Ann: a|EOM|Bo: b"}),
        ("dailydialog", "a __eou__ b"),
        ("tsv_pairs", "a\tb"),
        ("lists", ["a", "b"]),
    ],
    ids=["speakers", "log", "separated", "dailydialog", "tsv_pairs", "lists"],
)
def test_the_assistant_is_whom_the_user_says(name, record):
    second, first = [(U, "a"), (A, "b")], [(A, "a"), (U, "b")]
    assert read(name, record) == [second]
    assert read(name, record, assistant="first") == [first]
    assert read(name, record, assistant="both") == [second, first]
    corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, assistant="both"))
    assert [draft.id_suffix for draft in corpus_format.parse_record(record)] == ["second", "first"]


def test_known_names_win_over_the_order_and_swapped_names_are_swapped_once():
    record = {"dialog": [{"speaker": "bot", "text": "a"}, {"speaker": "Ann", "text": "b"}]}
    assert read("utterances", record) == [[(A, "a"), (U, "b")]]
    record = {"dialog": [{"speaker": "user", "text": "a"}, {"speaker": "assistant", "text": "b"}]}
    swapped = {**ROLE_NAMES, "user": "assistant", "assistant": "user"}
    (draft,) = with_choices(FORMATS["utterances"], Choices(roles=swapped)).parse_record(record)
    assert said(canonicalize(draft, Rules(roles=swapped))) == [(A, "a"), (U, "b")]


def test_more_than_two_speakers_are_refused_with_the_way_out():
    record = {"dialog": [{"speaker": name, "text": "a"} for name in ("Ann", "Bo", "Cy")]}
    reason, detail = refusal("utterances", record)
    assert reason == "many_speakers" and "--role NAME=assistant" in detail


# ---- what is left out is counted ----


def test_annotations_are_counted_and_other_fields_kept():
    record = {
        "conversation_id": "c",
        "goal": {"a": 1},
        "log": [{"text": "a", "metadata": {}}, {"text": "b", "x": None}],
    }
    (draft,) = FORMATS["utterances"].parse_record(record)
    assert (draft.id, draft.extra, list(draft.ignored)) == ("c", {"goal": {"a": 1}}, ["log[].metadata"])


def test_labels_of_a_line_go_to_meta():
    (conversation,) = conversations("dailydialog", "a __eou__ b __eou__\t1\t2 1\t0 0")
    assert json.loads(conversation["meta"]) == {"labels": ["1", "2 1", "0 0"]}
    reason, detail = refusal("dailydialog", "a __eou__ b\tc __eou__ d")
    assert reason == "invalid_row" and "'c __eou__ d'" in detail


# ---- preference data ----


def test_a_side_must_be_asked_for():
    record = {"prompt": "q", "chosen": "good", "rejected": "bad"}
    reason, detail = refusal("preference", record)
    assert reason == "no_preference" and "--preference chosen" in detail
    assert read("preference", record, preference="rejected") == [[(U, "q"), (A, "bad")]]
    (draft,) = with_choices(FORMATS["preference"], Choices(roles=ROLE_NAMES, preference="chosen")).parse_record(record)
    assert list(draft.ignored) == ["rejected"]


def test_a_prompt_that_the_side_does_not_repeat_is_kept():
    side = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    (conversation,) = conversations("preference", {"prompt": "p", "chosen": side, "rejected": []}, preference="chosen")
    assert json.loads(conversation["meta"]) == {"prompt": "p"}


@pytest.mark.parametrize(("label", "preference", "kept"), [
    (True, None, True), (True, "chosen", True), (True, "rejected", False),
    (False, None, False), (False, "chosen", False), (False, "rejected", True),
])  # fmt: skip
def test_marked_answers(label, preference, kept):
    record = {"prompt": "q", "completion": "a", "label": label}
    if kept:
        assert read("kto", record, preference=preference) == [[(U, "q"), (A, "a")]]
    else:
        assert refusal("kto", record, preference=preference)[0] == "rejected"


@pytest.mark.parametrize(
    "record",
    [{"question_id": 1, "turns": ["q", "r"]}, {"question_id": 1, "choices": [{"index": 0, "turns": ["a"]}]}],
    ids=["questions", "answers"],
)
def test_half_a_dialogue_is_refused(record):
    assert detect(record) == "lists"
    reason, detail = refusal("lists", record)
    assert reason == "missing_role" and "only one speaker's turns" in detail


# ---- MOSS ----

META = "You are an AI.\n- Web search: enabled. API: Search(query)\n- Calculator: enabled. API: Calculate(expression)\n"


def moss_turn(human, moss, thoughts="None", commands="None", results="None"):
    return {
        "Human": f"<|Human|>: {human}<eoh>\n",
        "Inner Thoughts": f"<|Inner Thoughts|>: {thoughts}<eot>\n",
        "Commands": f"<|Commands|>: {commands}<eoc>\n",
        "Tool Responses": f"<|Results|>:\n{results}\n<eor>\n",
        "MOSS": f"<|MOSS|>: {moss}<eom>\n",
    }


def test_the_channels_of_a_turn():
    turn = moss_turn("Sum?", "It is 4.", "Add.", 'Search("a, b"), Calculate("1+(3)")', "=> 4")
    record = {"conversation_id": 5, "meta_instruction": META, "num_turns": 1, "category": "x", "chat": {"turn_1": turn}}
    (conversation,) = conversations("moss", record)
    system, user, call, tool, answer = conversation["messages"]
    assert (system["role"], system["content"]) == (S, META.strip())
    assert (user["role"], user["content"]) == (U, "Sum?")
    assert (call["role"], call["content"], call["reasoning_content"]) == (A, None, "Add.")
    assert [one["function"] for one in json.loads(call["tool_calls"])] == [
        {"name": "Search", "arguments": {"query": "a, b"}},
        {"name": "Calculate", "arguments": {"expression": "1+(3)"}},
    ]
    assert (tool["role"], tool["content"]) == (T, "=> 4")
    assert (answer["role"], answer["content"], answer["reasoning_content"]) == (A, "It is 4.", None)
    # The ids of a folder's files begin anew in the next folder.
    assert conversation["id"] is None
    assert json.loads(conversation["meta"]) == {"conversation_id": 5, "category": "x"}


def test_turns_come_by_number_and_thoughts_without_a_command_belong_to_the_answer():
    numbers = [10, 2, 1]
    chat = {f"turn_{number}": moss_turn(f"q{number}", f"a{number}", f"t{number}") for number in numbers}
    (conversation,) = conversations("moss", {"chat": chat})
    assert said(conversation) == [pair for n in (1, 2, 10) for pair in ((U, f"q{n}"), (A, f"a{n}"))]
    assert [message["reasoning_content"] for message in conversation["messages"]] == [
        None,
        "t1",
        None,
        "t2",
        None,
        "t10",
    ]


@pytest.mark.parametrize("commands", ["None", "None.", "Non", "None (nothing to call)", "", " None "])
def test_channels_that_say_none(commands):
    (conversation,) = conversations("moss", {"chat": {"turn_1": moss_turn("q", "a", commands=commands)}})
    assert said(conversation) == [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("commands", "names"),
    [
        ('Search("x")', ["Search"]),
        ('Search("x"), None', ["Search"]),
        ('Search("x") ,\nAdd("y"),', ["Search", "Add"]),
        ('A("")', ["A"]),
        ("Search(x)", None),
        ('Search("x") = 0', None),
        ('Search("x", "y")', None),
        ('1. Search("x")', None),
        ('Search("x".lower())', None),
        ("Nonesuch", None),
    ],
)
def test_commands(commands, names):
    record = {"chat": {"turn_1": moss_turn("q", "a", commands=commands)}}
    if names is None:
        assert refusal("moss", record)[0] == "invalid_tool_call"
    else:
        calls = json.loads(conversations("moss", record)[0]["messages"][1]["tool_calls"])
        assert [call["function"]["name"] for call in calls] == names


def test_marks_go_at_the_ends_only():
    record = {"chat": {"turn_1": moss_turn("What does <eoh> mean?", "<|MOSS|>: is a mark <|1|> <eor>")}}
    assert read("moss", record) == [[(U, "What does <eoh> mean?"), (A, "<|MOSS|>: is a mark <|1|>")]]
    bare = {"chat": {"turn_1": {"Human": "<|Human|>:<eoh>", "MOSS": "<|MOSS|>:<eoh><eoh>a <eom> \n<eor><eom>"}}}
    assert read("moss", bare) == [[(U, ""), (A, "<eoh><eoh>a")]]


# ---- PersonaChat ----


def dialogues(text, **choices):
    """The rows and refusals of a file of numbered lines."""
    block, _ = line_block(text.encode(), 1, plain_text=True)
    corpus_format = with_choices(FORMATS["personachat"], Choices(roles=ROLE_NAMES, **choices))
    readings = [
        read_block(SourceBlock(group, place, corpus_format), Rules(roles=ROLE_NAMES))
        for group, place in corpus_format.regroup([(block, PLACE)])
    ]
    return (
        [row for reading in readings for row in reading.rows.to_pylist()],
        [entry for reading in readings for entry in reading.quarantined],
    )


PERSONAS = """1 your persona: i cook.
2 partner's persona: i sing.
3 hi !\thello .\t\tone|two
4 who ?\tme .
1 your persona: i run.
2 hi !\thello .
1 hi !\tno persona .
2 bye
"""


def test_numbered_lines():
    rows, refused = dialogues(PERSONAS)
    assert refused == []
    assert [said(row) for row in rows] == [
        [(S, "i cook.\npartner's persona: i sing."), (U, "hi !"), (A, "hello ."), (U, "who ?"), (A, "me .")],
        [(S, "i run."), (U, "hi !"), (A, "hello .")],
        [(U, "hi !"), (A, "no persona ."), (U, "bye")],
    ]
    assert [row["source"] for row in rows] == ["corpus:1", "corpus:5", "corpus:7"]


def test_the_system_prompt_is_the_persona_of_the_trained_side():
    rows, _ = dialogues(PERSONAS, assistant="first")
    assert said(rows[0])[:2] == [(S, "i sing.\npartner's persona: i cook."), (A, "hi !")]
    assert said(rows[1])[:2] == [(S, "partner's persona: i run."), (A, "hi !")]
    rows, _ = dialogues(PERSONAS, assistant="both")
    assert [row["id"] for row in rows][:2] == ["corpus-1/second", "corpus-1/first"]


def test_a_dialogue_with_a_missing_line_is_refused_and_its_neighbours_are_not():
    rows, refused = dialogues("1 a\tb\n2 c\td\n1 e\tf\n3 g\th\n1 i\tj\n1 your persona: alone\n")
    assert [said(row)[0] for row in rows] == [(U, "a"), (U, "i")]
    assert [(entry.source, entry.reason, entry.record) for entry in refused] == [
        ("corpus:3", "invalid_row", ["1 e\tf", "3 g\th"]),
        ("corpus:6", "no_messages", ["1 your persona: alone"]),
    ]


def test_which_line_opens_a_file_of_numbered_lines():
    assert detect("1 your persona: i cook.") == detect("1 partner's persona: i sing.") == "personachat"
    assert detect("1 hi !\thello .") == "personachat"
    assert detect("1 2 monkeys\ta film") == detect("2 hi\thello") == "tsv_pairs"


# ---- any JSON value ----

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
            canonicalize(draft, Rules(roles=ROLE_NAMES))
    except Refused as refused:
        assert refused.reason in REASONS and refused.detail


def check_any(record):
    for name in FORMAT_NAMES:
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

word = st.text(st.characters(codec="utf-8", exclude_characters="\t\r\n\0"), max_size=6).map(lambda text: f"w{text}w")
plain = st.one_of(word, st.sampled_from(["a: b", "x #1 y", "你好", "None", "e|EO M|f"]))
exchanges = st.lists(st.tuples(plain, plain), min_size=1, max_size=4)


def turns_of(pairs):
    return [turn for question, answer in pairs for turn in ((U, question), (A, answer))]


BUILDERS = {
    "utterances": lambda pairs: {"utterances": [{"speaker": role, "text": text} for role, text in turns_of(pairs)]},
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
    "kto": lambda pairs: {"label": True, "messages": [{"role": r, "content": t} for r, t in turns_of(pairs)]},
    "preference": lambda pairs: {
        "chosen": [{"role": r, "content": t} for r, t in turns_of(pairs)],
        "rejected": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "bad"}],
    },
}


@pytest.mark.parametrize("name", BUILDERS)
@settings(deadline=None, max_examples=60)
@given(pairs=exchanges)
def test_there_and_back(name, pairs):
    assert read(name, BUILDERS[name](pairs), preference="chosen") == [turns_of(pairs)]


@settings(deadline=None, max_examples=60)
@given(turns=st.lists(st.tuples(st.sampled_from(["Ann", "Bo"]), plain), min_size=2, max_size=6))
def test_neighbours_of_one_speaker_stay_apart_and_in_order(turns):
    opener = turns[0][0]
    expected = [(U if name == opener else A, text) for name, text in turns]
    record = {"conversation": "|EOM|".join(f"{name}: {text}" for name, text in turns)}
    assert read("separated", record) == [expected]
    record = {"dialog": [{"speaker": name, "text": text} for name, text in turns]}
    assert read("utterances", record) == [expected]


@settings(deadline=None, max_examples=100)
@given(
    lines=st.lists(
        st.lists(st.sampled_from(["a", " b ", "\t", "\u3000", "你", "", "__eou__"]), max_size=6).map("".join),
        max_size=6,
    )
)
@example(lines=["a\tb", "a", "\t", "a\t\tb", "a\tb\tc\t"])
def test_both_roads_agree_on_lines_with_tabs(lines):
    block, _ = line_block("\n".join(lines).encode(), 1, plain_text=True)
    assert isinstance(block, LineBlock)
    for name in ("tsv_pairs", "dailydialog"):
        for assistant in ("second", "first", "both"):
            corpus_format = with_choices(FORMATS[name], Choices(roles=ROLE_NAMES, assistant=assistant))
            fast = read_block(SourceBlock(block, PLACE, corpus_format), Rules(roles=ROLE_NAMES))
            general = read_records(SourceBlock(block, PLACE, corpus_format), Rules(roles=ROLE_NAMES))
            assert fast.rows.to_pylist() == general.rows.to_pylist()
            assert fast.quarantined == general.quarantined


# ---- real corpora: the counts of their READMEs ----


@needs_data
@pytest.mark.parametrize(
    ("path", "name", "messages", "assistants"),
    [
        ("esconv/FailedESConv.json", "utterances", 5_230, 2_377),
        ("taskmaster-4/data_00.json", "utterances", 1_883, None),
        ("firefly/dummy_data.jsonl", "pairs", 308, 154),
        ("mathdial/test.jsonl", "separated", 7_028, 1_259 + 952 + 890 + 598),
        ("lccc/toy_valid.txt", "tsv_pairs", 4_000, 2_000),
        ("xdailydialog/zh_dev_human.txt", "dailydialog", 8_025, None),
        ("llamafactory/dpo_zh_demo.json", "preference", 300 + 364, 300),
    ],
)
def test_counts_of_real_corpora(path, name, messages, assistants):
    text = (DATA / path).read_text("utf-8")
    if path.endswith(".json"):
        records = json.loads(text)
    else:
        lines = [line for line in text.split("\n") if line]
        records = [json.loads(line) for line in lines] if path.endswith(".jsonl") else lines
    assert detect(records[0]) == name
    found = [message for record in records for turns in read(name, record, preference="chosen") for message in turns]
    assert len(found) == messages
    assert assistants is None or sum(role == A for role, _ in found) == assistants
