"""Chat against a scripted model: what is fed when, where answers end, what is said when something goes wrong.

That its logits are right is law 3: test_laws_cache.py.
"""

from __future__ import annotations

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import LlamaConfig

from ismdata.chat import Chat, Sampling, run_terminal
from ismdata.errors import DataError, UsageError

END = 90


class ScriptedModel(nn.Module):
    """Says the tokens of `script`, one whenever it is asked for the next; records each call as (ids, past, kv_end)."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=99)

    def __init__(self, script, max_positions=1000):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=max_positions)
        self.script = list(script)
        self.calls = []

    def forward(self, input_ids, doc_start, kv_end, past_key_values, **kwargs):
        past = past_key_values.get_seq_length()
        assert doc_start.tolist() == [[0] * input_ids.shape[1]]
        self.calls.append((input_ids[0].tolist(), past, kv_end[0].tolist()))
        states = torch.zeros(1, 1, input_ids.shape[1], 1)
        past_key_values.update(states, states, 0)
        # A token of an answer asks for the one after it, so the script goes by how many were fed since the context.
        logits = torch.zeros(1, 1, 100)
        logits[0, 0, self.script.pop(0) if self.script else 50] = 1
        return SimpleNamespace(logits=logits)


class CharacterEncoder:
    """A user's text is one token a character, between 80 and 81; answers end in `ending`."""

    def __init__(self, ending=(END,)):
        self.end_of_turn_ids = list(ending)
        self.asked = []

    history = "append"

    def next_context(self, messages):
        self.asked.append([dict(message) for message in messages])
        return [80, *(ord(character) - ord("a") for character in messages[-1]["content"]), 81]

    def decode(self, ids):
        """Tokens 40 and 41 are the halves of one character."""
        text = "".join(chr(ord("a") + token) if token < 26 else {40: "½", 41: "¾"}.get(token, "?") for token in ids)
        return text.replace("½¾", "é").replace("½", "\N{REPLACEMENT CHARACTER}")


def chat_of(script, *, mask="ism", ending=(END,), **options):
    positions = options.pop("max_positions", 1000)
    model, encoder = ScriptedModel(script, positions), CharacterEncoder(ending)
    return Chat(model, encoder, mask=mask, **options), model, encoder


# A context asks for the first token of its answer, each token for the next; what END asks for is not looked at.
TWO_TURNS = [7, 8, END, 0, 9, END, 0]


class AnewEncoder(CharacterEncoder):
    """Renders history anew each turn, and earlier answers without their last character."""

    history = "expand"

    def blocks(self, messages):
        found = []
        for message in messages:
            ids = [ord(character) - ord("a") for character in message["content"]]
            answer = message["role"] == "assistant"
            found.append((answer, [*ids[:-1], END] if answer else [80, *ids, 81]))
        return found


@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_history_rendered_anew_is_fed_anew(mask):
    """Under `expand` each turn feeds contexts and earlier answers as they are rendered now, each under its own mask."""
    model, encoder = ScriptedModel([7, 8, END, 0, 0, 0, 9, END, 0], 1000), AnewEncoder()
    chat = Chat(model, encoder, mask=mask)
    assert chat.reply("ab") == "hi"
    first = len(model.calls)
    chat.reply("c")
    again = [80, 0, 1, 81, 7, END, 80, 2, 81]
    assert chat.fed[: len(again)] == again
    fed = model.calls[first:]
    if mask == "prefix":
        assert fed[0] == (again, 0, [9] * 9)
    else:
        wide = mask == "ism"
        assert fed[0] == ([80, 0, 1, 81], 0, [4] * 4 if wide else [1, 2, 3, 4])
        assert fed[1] == ([7, END], 4, [5, 6])
        assert fed[2] == ([80, 2, 81], 6, [9] * 3 if wide else [7, 8, 9])


def test_ism_feeds_each_token_once_and_contexts_whole():
    chat, model, encoder = chat_of(TWO_TURNS)
    assert chat.reply("ab") == "hi"
    assert chat.reply("c") == "j"
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
    assert chat.fed == [80, 0, 1, 81, 7, 8, END, 80, 2, 81, 9, END]


def test_causal_differs_in_the_prefill_alone():
    chat, model, _ = chat_of(TWO_TURNS, mask="causal")
    chat.reply("ab")
    chat.reply("c")
    assert model.calls[0] == ([80, 0, 1, 81], 0, [1, 2, 3, 4])
    assert model.calls[4] == ([80, 2, 81], 7, [8, 9, 10])


def test_prefix_feeds_the_whole_conversation_anew():
    chat, model, _ = chat_of(TWO_TURNS, mask="prefix")
    chat.reply("ab")
    chat.reply("c")
    assert model.calls[0] == ([80, 0, 1, 81], 0, [4] * 4)
    assert model.calls[4] == ([80, 0, 1, 81, 7, 8, END, 80, 2, 81], 0, [10] * 10)
    assert model.calls[5] == ([9], 10, [11])


def test_an_answer_cut_short_gets_its_end_of_turn():
    chat, model, _ = chat_of([7, 8, 9, 10], max_new_tokens=2)
    assert chat.reply("a") == "hi"
    assert chat.fed == [80, 0, 81, 7, 8, END]
    assert model.calls[-1] == ([END], 5, [6])
    assert chat.messages[-1] == {"role": "assistant", "content": "hi"}


def test_an_ending_of_several_tokens():
    """A false start of it is content; cut in its middle, the rest is fed."""
    chat, _, _ = chat_of([7, 70, 8, 70, 71, 0], ending=(70, 71))
    assert chat.reply("a") == "h?i"
    assert chat.fed == [80, 0, 81, 7, 70, 8, 70, 71]
    chat, _, _ = chat_of([7, 70, 8], ending=(70, 71), max_new_tokens=2)
    assert chat.reply("a") == "h"
    assert chat.fed == [80, 0, 81, 7, 70, 71]


def test_an_end_of_text_outside_the_template_ends_the_answer_and_is_not_fed():
    chat, _, _ = chat_of([7, 99])
    assert chat.reply("a") == "h"
    assert chat.fed == [80, 0, 81, 7, END]


def test_a_template_without_end_of_turn():
    chat, _, _ = chat_of([7, 8, 99], ending=())
    assert chat.reply("a") == "hi"
    assert chat.fed == [80, 0, 81, 7, 8]


def test_a_character_of_two_tokens_is_shown_once_it_is_whole():
    chat, _, _ = chat_of([7, 40, 41, 8, END])
    assert [piece for piece in chat.stream("a") if piece] == ["h", "é", "i"]
    chat, _, _ = chat_of([7, 40], max_new_tokens=2)
    assert [piece for piece in chat.stream("a") if piece] == ["h", "\N{REPLACEMENT CHARACTER}"]  # never became whole


def test_a_stream_closed_early_leaves_a_conversation_to_go_on_with():
    chat, _, encoder = chat_of([7, 8, 9, 0, 10, END])
    pieces = chat.stream("a")
    assert [next(pieces), next(pieces)] == ["h", "i"]
    pieces.close()
    assert chat.fed == [80, 0, 81, 7, 8, END]
    assert chat.messages[-1]["content"] == "hi"
    assert chat.reply("b") == "k"
    assert len(encoder.asked[-1]) == 3


def test_an_error_inside_the_model_starts_the_conversation_anew():
    chat, model, _ = chat_of([7, 8, END], system="be kind")
    broken = chat.stream("a")
    next(broken)
    model.forward = lambda **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        next(broken)
    assert (chat.fed, chat.cache.get_seq_length()) == ([], 0)
    assert chat.messages == [{"role": "system", "content": "be kind"}]


def test_a_conversation_longer_than_the_model_is_refused_and_kept():
    chat, model, _ = chat_of(TWO_TURNS, max_positions=12)
    chat.reply("ab")
    before = (list(chat.messages), list(chat.fed), len(model.calls))
    with pytest.raises(DataError, match=r"would have 12 tokens; the model has 12 positions.*/new"):
        chat.reply("abc")
    assert (chat.messages, chat.fed, len(model.calls)) == before
    assert chat.reply("c") == "j"  # a shorter one still fits, to the last position
    assert len(chat.fed) == 12


def test_an_answer_ends_where_the_positions_do():
    chat, _, _ = chat_of([7] * 50, max_positions=10)
    assert chat.reply("a") == "h" * 6
    assert len(chat.fed) == 10


def test_restart_keeps_the_system_text():
    chat, model, encoder = chat_of([7, END, 0, 8, END, 0], system="be kind")
    chat.reply("a")
    chat.restart()
    assert chat.reply("b") == "i"
    assert encoder.asked[-1] == [{"role": "system", "content": "be kind"}, {"role": "user", "content": "b"}]
    assert model.calls[-3][1] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -1.0}, "--temperature is -1.0; expected 0 or more"),
        ({"top_p": 0.0}, "--top-p is 0.0"),
        ({"top_p": 1.5}, "--top-p is 1.5"),
    ],
)
def test_refused_sampling(options, message):
    with pytest.raises(UsageError, match=message):
        Sampling(**options)


def test_refused_length():
    with pytest.raises(UsageError, match="--max-new-tokens is 0"):
        chat_of([], max_new_tokens=0)


def terminal(chat, lines):
    """What a terminal shows for these lines; a line that is an exception is raised."""
    written, lines = [], iter(lines)

    def read(prompt):
        line = next(lines, EOFError())
        if isinstance(line, BaseException):
            raise line
        return line

    run_terminal(chat, read=read, write=written.append)
    return "".join(written).split("\n", 1)[1]  # after the greeting


def test_the_terminal_loop():
    chat, _, _ = chat_of([*TWO_TURNS, 4, END, 0])
    assert terminal(chat, ["ab", "  ", "c", "/new", "d", "/exit", "never read"]) == "hi\nj\nA new conversation.\ne\n"
    assert len(chat.messages) == 2


@pytest.mark.parametrize("end", [EOFError(), KeyboardInterrupt()])
def test_the_terminal_loop_ends_with_its_input(end):
    chat, _, _ = chat_of(TWO_TURNS)
    assert terminal(chat, ["ab", end]) == "hi\n\n"


def test_the_terminal_says_when_a_conversation_is_too_long_and_goes_on():
    chat, _, _ = chat_of(TWO_TURNS, max_positions=12)
    shown = terminal(chat, ["ab", "abc", "c"])
    assert "would have 12 tokens" in shown
    assert shown.endswith("j\n\n")


def test_ctrl_c_ends_the_answer_between_two_tokens():
    chat, model, _ = chat_of([7, 8, 9, 10, 11, END])
    former = signal.getsignal(signal.SIGINT)
    forward = model.forward

    def interrupted_forward(**kwargs):
        output = forward(**kwargs)
        if len(model.calls) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return output

    model.forward = interrupted_forward
    assert terminal(chat, ["a"]) == "hi\n\n"
    assert chat.fed == [80, 0, 81, 7, 8, END]
    assert signal.getsignal(signal.SIGINT) is former
