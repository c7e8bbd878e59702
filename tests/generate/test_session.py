"""A session with a scripted model: what it feeds, where answers end, and its error messages.

That its logits are right is law 3: test_laws_cache.py.
"""

from __future__ import annotations

import pytest

from ismdata.attention.attachment import attach
from ismdata.errors import DataError, UsageError
from ismdata.generate.sampling import Sampling
from ismdata.generate.session import Session
from ismdata.rendering.refusals import CannotEscape, HistoryRewritten, TemplateRefused
from tests.support.scripted import END, AnewEncoder, CharacterEncoder, ScriptedModel
from tests.support.tiny import tiny_model


def session_of(script, *, mask="ism", ending=(END,), **options):
    positions = options.pop("max_positions", 1000)
    model, encoder = ScriptedModel(script, positions), CharacterEncoder(ending)
    return Session(model, encoder, mask=mask, **options), model, encoder


# Each call takes one token of the script: a context the first token of its answer, each token the next. The token
# after END is not used.
TWO_TURNS = [7, 8, END, 0, 9, END, 0]


@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_history_rendered_anew_is_fed_again(mask):
    """Under `expand` each turn feeds contexts and earlier answers as they are rendered now, under its mask."""
    model, encoder = ScriptedModel([7, 8, END, 0, 0, 0, 9, END, 0], 1000), AnewEncoder()
    session = Session(model, encoder, mask=mask)
    assert session.reply("ab") == "hi"
    first = len(model.calls)
    session.reply("c")
    again = [80, 0, 1, 81, 7, END, 80, 2, 81]
    assert session.fed[: len(again)] == again
    fed = model.calls[first:]
    if mask == "prefix":
        assert fed[0] == (again, 0, [9] * 9)
    else:
        wide = mask == "ism"
        assert fed[0] == ([80, 0, 1, 81], 0, [4] * 4 if wide else [1, 2, 3, 4])
        assert fed[1] == ([7, END], 4, [5, 6])
        assert fed[2] == ([80, 2, 81], 6, [9] * 3 if wide else [7, 8, 9])


def test_ism_feeds_each_token_once_and_contexts_whole():
    session, model, encoder = session_of(TWO_TURNS)
    assert session.reply("ab") == "hi"
    assert session.reply("c") == "j"
    assert model.calls == [
        ([80, 0, 1, 81], 0, [4, 4, 4, 4]),
        ([7], 4, [5]),
        ([8], 5, [6]),
        ([END], 6, [7]),
        ([80, 2, 81], 7, [10, 10, 10]),
        ([9], 10, [11]),
        ([END], 11, [12]),
    ]
    assert encoder.asked[1] == [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "hi"},
        {"role": "user", "content": "c"},
    ]
    assert session.fed == [80, 0, 1, 81, 7, 8, END, 80, 2, 81, 9, END]


def test_causal_differs_only_in_the_prefill():
    session, model, _ = session_of(TWO_TURNS, mask="causal")
    session.reply("ab")
    session.reply("c")
    assert model.calls[0] == ([80, 0, 1, 81], 0, [1, 2, 3, 4])
    assert model.calls[4] == ([80, 2, 81], 7, [8, 9, 10])


def test_prefix_feeds_the_whole_conversation_each_turn():
    session, model, _ = session_of(TWO_TURNS, mask="prefix")
    session.reply("ab")
    session.reply("c")
    assert model.calls[0] == ([80, 0, 1, 81], 0, [4] * 4)
    assert model.calls[4] == ([80, 0, 1, 81, 7, 8, END, 80, 2, 81], 0, [10] * 10)
    assert model.calls[5] == ([9], 10, [11])


def test_an_answer_cut_short_gets_its_end_of_turn():
    session, model, _ = session_of([7, 8, 9, 10], max_new_tokens=2)
    assert session.reply("a") == "hi"
    assert session.fed == [80, 0, 81, 7, 8, END]
    assert model.calls[-1] == ([END], 5, [6])
    assert session.messages[-1] == {"role": "assistant", "content": "hi"}


def test_an_ending_of_several_tokens():
    """An incomplete end of turn inside an answer is content; one at the length limit is completed."""
    session, _, _ = session_of([7, 70, 8, 70, 71, 0], ending=(70, 71))
    assert session.reply("a") == "h?i"
    assert session.fed == [80, 0, 81, 7, 70, 8, 70, 71]
    session, _, _ = session_of([7, 70, 8], ending=(70, 71), max_new_tokens=2)
    assert session.reply("a") == "h"
    assert session.fed == [80, 0, 81, 7, 70, 71]


def test_an_end_of_text_outside_the_template_ends_the_answer_and_is_not_fed():
    session, _, _ = session_of([7, 99])
    assert session.reply("a") == "h"
    assert session.fed == [80, 0, 81, 7, END]


def test_a_template_without_end_of_turn():
    session, _, _ = session_of([7, 8, 99], ending=())
    assert session.reply("a") == "hi"
    assert session.fed == [80, 0, 81, 7, 8]


def test_a_character_of_two_tokens_is_shown_once_it_is_whole():
    session, _, _ = session_of([7, 40, 41, 8, END])
    assert [piece for piece in session.ask("a") if piece] == ["h", "é", "i"]
    session, _, _ = session_of([7, 40], max_new_tokens=2)
    assert [piece for piece in session.ask("a") if piece] == ["h", "\N{REPLACEMENT CHARACTER}"]  # never became whole


def test_a_conversation_continues_after_a_stream_closed_early():
    session, _, encoder = session_of([7, 8, 9, 0, 10, END])
    pieces = session.ask("a")
    assert [next(pieces), next(pieces)] == ["h", "i"]
    pieces.close()
    assert session.fed == [80, 0, 81, 7, 8, END]
    assert session.messages[-1]["content"] == "hi"
    assert session.reply("b") == "k"
    assert len(encoder.asked[-1]) == 3


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_an_error_inside_the_model_keeps_the_conversation(error):
    """The cache is cleared, and the next turn feeds the whole conversation with the tokens as generated."""
    session, model, _ = session_of([*TWO_TURNS[:4], 1, 2, END, 0], system="be kind")
    session.reply("ab")
    broken, forward = session.ask("c"), model.forward

    def break_down(**kwargs):
        raise error

    next(broken)
    model.forward = break_down
    with pytest.raises(error):
        next(broken)
    assert session.fed == []
    assert [message["content"] for message in session.messages] == ["be kind", "ab", "hi"]
    model.forward = forward
    model.calls.clear()
    model.script = [0, 0, 1, 2, END]
    assert session.reply("d") == "bc"
    assert model.calls[:3] == [
        ([80, 0, 1, 81], 0, [4] * 4),
        ([7, 8, END], 4, [5, 6, 7]),
        ([80, 3, 81], 7, [10] * 3),
    ]


def test_a_conversation_longer_than_the_model_is_refused_and_kept():
    session, model, _ = session_of(TWO_TURNS, max_positions=12)
    session.reply("ab")
    before = (list(session.messages), list(session.fed), len(model.calls))
    with pytest.raises(DataError, match=r"would have 12 tokens before the answer; the model has 12 positions.*/new"):
        session.reply("abc")
    assert (session.messages, session.fed, len(model.calls)) == before
    assert session.reply("c") == "j"  # a shorter one still fits, to the last position
    assert len(session.fed) == 12


def test_an_answer_ends_where_the_positions_do():
    session, _, _ = session_of([7] * 50, max_positions=10)
    assert session.reply("a") == "h" * 6
    assert len(session.fed) == 10


def test_restart_keeps_the_system_text():
    session, model, encoder = session_of([7, END, 0, 8, END, 0], system="be kind")
    session.reply("a")
    session.restart()
    assert session.reply("b") == "i"
    assert encoder.asked[-1] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "b"}]
    assert model.calls[-3][1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0; expected 0 or more"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
        ({"temperature": float("nan")}, "--temperature is nan"),
        ({"top_k": -1}, "--top-k is -1; expected 0"),
        ({"min_p": 1.1}, "--min-p is 1.1; expected 0 to 1"),
        ({"repetition_penalty": 0.0}, "--repetition-penalty is 0.0"),
    ],
)
def test_refused_sampling(options, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


def test_refused_length():
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        session_of([], max_new_tokens=0)


def test_undo_crops_the_cache():
    session, model, _ = session_of([*TWO_TURNS, 3, END, 0])
    session.reply("ab")
    session.reply("c")
    assert session.undo() == [{"role": "user", "content": "c"}, {"role": "assistant", "content": "j"}]
    assert session.fed == [80, 0, 1, 81, 7, 8, END]
    assert session.reply("de") == "d"
    assert model.calls[7] == ([80, 3, 4, 81], 7, [11] * 4)
    assert [message["content"] for message in session.messages] == ["ab", "hi", "de", "d"]


def test_undo_to_the_beginning_and_beyond():
    session, model, _ = session_of([*TWO_TURNS, 3, END, 0], system="s")
    assert session.undo() == []
    session.reply("ab")
    session.reply("c")
    assert [len(session.undo()) for _ in range(3)] == [2, 2, 0]
    assert (session.fed, session.messages) == ([], [{"role": "system", "content": "s"}])
    assert session.reply("de") == "d"
    assert model.calls[-3] == ([80, 3, 4, 81], 0, [4] * 4)


def test_undo_of_a_stopped_answer_and_of_a_question_without_answer():
    session, _, _ = session_of(TWO_TURNS)
    session.reply("ab")
    pieces = session.ask("c")
    next(pieces)
    pieces.close()
    assert session.fed[7:] == [80, 2, 81, 9, END]
    session.give([{"role": "user", "content": "d"}])
    assert session.undo() == [{"role": "user", "content": "d"}]
    assert len(session.fed) == 12
    assert [message["content"] for message in session.undo()] == ["c", "j"]
    assert session.fed == [80, 0, 1, 81, 7, 8, END]


@pytest.mark.parametrize(("mask", "encoder"), [("prefix", CharacterEncoder), ("ism", AnewEncoder)])
def test_undo_where_no_cache_survives(mask, encoder):
    session = Session(ScriptedModel([7, 8, END, 0, 9, END, 0, 3, END, 0]), encoder(), mask=mask)
    session.reply("ab")
    session.reply("c")
    session.undo()
    former = [7, 8, END] if encoder is CharacterEncoder else [7, END]
    session.model.script = [3, END] if mask == "prefix" else [0, 0, 3, END]
    assert session.reply("d") == "d"
    assert session.fed == [80, 0, 1, 81, *former, 80, 3, 81, 3, END]


def test_results_of_tools():
    session, model, encoder = session_of([*TWO_TURNS, 3, END, 0])
    session.reply("ab")
    assert session.reply("c", role="tool") == "j"
    assert encoder.asked[-1][-1] == {"role": "tool", "content": "c"}
    assert len(session.undo()) == 2  # the result and the answer to it; the model's call stays
    session.give([{"role": "tool", "content": "c"}, {"role": "tool", "content": "d"}])
    assert "".join(session.answer()) == "d"
    assert model.calls[-3] == ([80, 2, 81, 80, 3, 81], 7, [13] * 6)


def test_given_turns_are_fed_as_pack_encodes_them():
    session, model, _ = session_of([7, END, 0, 0, 0, 3, END, 0])
    session.reply("ab")
    given = [("user", "c"), ("assistant", "xy"), ("user", "d"), ("assistant", "z")]
    session.give([{"role": role, "content": content} for role, content in given])
    model.script = [0, 0, 0, 0, 3, END]
    assert session.reply("e") == "d"
    assert [(ids, past) for ids, past, _ in model.calls[3:8]] == [
        ([80, 2, 81], 6),
        ([23, 24, END], 9),
        ([80, 3, 81], 12),
        ([25, END], 15),
        ([80, 4, 81], 17),
    ]
    assert model.calls[4][2] == [10, 11, 12]  # answers are causal
    session.undo()
    assert len(session.fed) == 17
    session.undo()
    assert len(session.fed) == 12


def test_wrong_questions():
    session, _, _ = session_of([])
    with pytest.raises(UsageError, match="nothing to answer"):
        session.answer()
    with pytest.raises(UsageError, match="role is 'assistant'; expected user or tool"):
        session.ask("a", role="assistant")
    with pytest.raises(UsageError, match="message 1 has role 'narrator'; expected system, user, assistant or tool"):
        session.give([{"role": "narrator", "content": "a"}])
    with pytest.raises(UsageError, match=r"message 1 \(user\) has neither content nor tool calls"):
        session.give([{"role": "user", "content": None}])
    assert session.messages == []


@pytest.mark.parametrize(
    "refusal", [TemplateRefused("no system role"), HistoryRewritten("no"), CannotEscape("U+10FFFF")]
)
def test_conversations_that_the_template_does_not_accept(refusal):
    session, _, encoder = session_of(TWO_TURNS)
    session.reply("ab")

    def refuse(messages, tools=None):
        raise refusal

    encoder.next_context = refuse
    with pytest.raises(
        DataError, match=f"the chat template does not accept this conversation: {refusal}".replace("+", ".")
    ):
        session.reply("c")
    assert len(session.messages) == 2
    assert len(session.fed) == 7


def test_a_model_that_would_ignore_the_mask_is_refused():
    model = tiny_model()
    with pytest.raises(UsageError, match=r"LlamaForCausalLM is not attached.*attach"):
        Session(model, CharacterEncoder(), mask="ism")
    with pytest.raises(UsageError, match="config records no mask"):
        Session(attach(model), CharacterEncoder())
    with pytest.raises(UsageError, match="mask is 'slanted'; expected one of ism, causal, prefix"):
        Session(model, CharacterEncoder(), mask="slanted")
    model.config.ismdata_mask = "causal"
    assert Session(model, CharacterEncoder()).mask == "causal"
    assert Session(model, CharacterEncoder(), mask="prefix").mask == "prefix"
