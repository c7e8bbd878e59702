"""Law 3: fed turn by turn with a KV cache by a session, a conversation has the logits of one forward."""

from __future__ import annotations

import random
from contextlib import closing
from types import SimpleNamespace

import pytest
import torch
from transformers import DynamicCache

from ismdata import masks
from ismdata.attention.attachment import attach
from ismdata.attention.backends.registry import BACKENDS
from ismdata.attention.models.glm import IsmdataGlmConfig, IsmdataGlmForCausalLM
from ismdata.data.collate import Collator
from ismdata.generate.feeding import feed
from ismdata.generate.sampling import Sampling
from ismdata.generate.session import Session
from ismdata.masks import glm_positions
from ismdata.rendering.glm_tokens import GlmTokens
from ismdata.rendering.pieces import Piece
from tests.support.tiny import ANSWER, ARCHITECTURES, QUERY, SIZES, VOCABULARY, sample, spans_of, tiny_model

CLOSE = {"rtol": 0, "atol": 1e-9}
TURNS = [(QUERY, 5), (ANSWER, 4), (QUERY, 1), (ANSWER, 1), (QUERY, 6), (ANSWER, 5)]


class FixedEncoder:
    """Encodes context k as fixed random tokens; an answer ends with the tokens `ending`."""

    def __init__(self, lengths=(5, 1, 6), ending=(60,)):
        generator = torch.Generator().manual_seed(5)
        self.contexts = [torch.randint(2, 50, (length,), generator=generator).tolist() for length in lengths]
        self.ending = list(ending)

    @property
    def end_of_turn_ids(self):
        return self.ending

    history = "append"
    glm = None
    next_turn_end_ids = frozenset()

    def turn_end(self, messages, tools=None):
        return []

    @property
    def encoding(self):
        return SimpleNamespace(document=self.document)

    def document(self, messages, tools=None):
        """Answers get no tokens here: the session has those that the model generated."""
        return [
            Piece(span=k, kind=ANSWER, message=k, ids=())
            if message["role"] == "assistant"
            else Piece(span=k, kind=QUERY, message=-1, ids=tuple(self.contexts[k // 2]))
            for k, message in enumerate(messages)
        ]

    def next_context(self, messages, tools=None):
        return list(self.contexts[sum(message["role"] == "user" for message in messages) - 1])

    def decode(self, ids):
        return "".join(chr(0x100 + token) for token in ids)


def full_logits(model, document, tokens, mask):
    batch = Collator()([sample([document], mask=mask, tokens=tokens)])
    batch.pop("labels")
    with torch.no_grad():
        return model(**batch).logits[0, : len(tokens)]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("mask", ["ism", "causal"])
def test_law_3_turn_by_turn_equals_the_full_forward(architecture, mask):
    model = attach(tiny_model(architecture))
    tokens = sample([TURNS], seed=11).sequence.input_ids.tolist()
    expected = full_logits(model, TURNS, tokens[: sum(length for _, length in TURNS)], mask)
    cache, at = DynamicCache(config=model.config), 0
    for kind, length in TURNS:
        if kind == QUERY:
            logits = feed(model, tokens[at : at + length], cache, bidirectional=mask == "ism")
            torch.testing.assert_close(logits, expected[at + length - 1], **CLOSE)
        else:
            for place in range(at, at + length):
                logits = feed(model, [tokens[place]], cache, bidirectional=False)
                torch.testing.assert_close(logits, expected[place], **CLOSE)
        at += length
    assert cache.get_seq_length() == at


def test_a_causal_prefill_of_ism_contexts_is_another_model():
    """The law's test can fail: the wrong prefill gives other logits."""
    model = attach(tiny_model())
    tokens = sample([TURNS], seed=11).sequence.input_ids[:5].tolist()
    expected = full_logits(model, TURNS[:1], tokens, "ism")[-1]
    wrong = feed(model, tokens, DynamicCache(config=model.config), bidirectional=False)
    assert (wrong - expected).abs().max() > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "backend"),
    [(each, "sdpa") for each in ARCHITECTURES] + [("llama", each) for each in BACKENDS if each != "sdpa"],
)
@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_law_3_a_whole_chat(architecture, backend, mask):
    """Three greedy turns: every token was chosen by the logits that one full forward of the mask gives."""
    model = attach(tiny_model(architecture), backend=backend)
    encoder = FixedEncoder()
    chat = Session(model, encoder, mask=mask, max_new_tokens=4)
    seen = []
    choose = chat._choose
    chat._choose = lambda logits, ids: seen.append(logits) or choose(logits, ids)
    document, at = [], 0
    for context in encoder.contexts:
        seen.clear()
        chat.reply("…")
        document.append((QUERY, len(context)))
        at += len(context)
        document.append((ANSWER, len(chat.fed) - at))
        assert chat.fed[at - len(context) : at] == context
        expected = full_logits(model, document, chat.fed, mask)
        torch.testing.assert_close(torch.stack(seen), expected[at - 1 : at - 1 + len(seen)], **CLOSE)
        at = len(chat.fed)
        assert chat.fed[-1] == 60  # the end of turn was fed, even after max_new_tokens
    assert [message["role"] for message in chat.messages] == ["user", "assistant"] * 3


def test_sampling_is_reproducible_and_greedy_at_the_limit():
    model = attach(tiny_model())

    def said(**options):
        return Session(model, FixedEncoder(), mask="ism", max_new_tokens=8, sampling=Sampling(**options)).reply("…")

    assert said(temperature=1.5, seed=1) == said(temperature=1.5, seed=1)
    assert said(temperature=1.5, seed=1) != said(temperature=1.5, seed=2)
    assert said(temperature=5.0, top_p=1e-6) == said()


MASK_ID, START_ID = 58, 59


class TextEncoder(FixedEncoder):
    """Encodes a user's text as random tokens, seeded by it."""

    def __init__(self, glm=None):
        super().__init__()
        self.glm = glm

    def context(self, text):
        made = random.Random(text)
        return [made.randrange(2, 50) for _ in range(made.randrange(1, 7))]

    def next_context(self, messages, tools=None):
        return self.context(messages[-1]["content"])

    def document(self, messages, tools=None):
        return [
            Piece(span=k, kind=ANSWER, message=k, ids=())
            if message["role"] == "assistant"
            else Piece(span=k, kind=QUERY, message=-1, ids=tuple(self.context(message["content"])))
            for k, message in enumerate(messages)
        ]


def glm_model(dtype):
    torch.manual_seed(0)
    return IsmdataGlmForCausalLM(IsmdataGlmConfig(**SIZES)).to(dtype).eval()


def one_forward(model, turns, ids, mask):
    """The logits [T, V] of one forward over whole turns of (context, answer) lengths, the layout built from scratch."""
    glm = isinstance(model, IsmdataGlmForCausalLM)
    document = []
    for number, (context, answer) in enumerate(turns, 1):
        if glm and mask == "prefix" and number < len(turns):
            document += [(QUERY, context), (QUERY, answer)]  # only the newest answer has the two markers
        else:
            document += [(QUERY, context + glm)] + [(ANSWER, 1)] * glm + [(ANSWER, answer)]
    seq_lens, spans = spans_of([document])
    assert seq_lens == [len(ids)]
    doc_start, kv_end = masks.intervals(seq_lens, spans, seq_len=len(ids), mask=mask)
    named = {"doc_start": doc_start, "kv_end": kv_end}
    if glm:
        first, second = glm_positions.positions(seq_lens, spans, seq_len=len(ids))
        named |= {"position_ids": first, "position_ids_2": second}
    with torch.no_grad():
        tensors = {name: torch.from_numpy(array)[None] for name, array in named.items()}
        tensors |= {name: tensors[name].long() for name in named if name.startswith("position")}
        return model(input_ids=torch.tensor([ids]), **tensors).logits[0]


@pytest.mark.slow
@pytest.mark.parametrize("architecture", ["llama", "qwen3", "glm"])
@pytest.mark.parametrize("mask", ["ism", "causal", "prefix"])
def test_law_3_twenty_random_turns_with_undo_and_stop(architecture, mask):
    """Every token was chosen by the logits of one forward over the remaining turns, in float32 to 1e-5."""
    glm = architecture == "glm"
    model = attach(glm_model(torch.float32) if glm else tiny_model(architecture, dtype=torch.float32))
    tokens = GlmTokens(mask_id=MASK_ID, start_id=START_ID, every_answer=True) if glm else None
    session = Session(model, TextEncoder(tokens), mask=mask, max_new_tokens=5)
    seen = []
    choose = session._choose
    session._choose = lambda logits, ids: seen.append(logits) or choose(logits, ids)
    made = random.Random(mask + architecture)
    turns, undone, stopped, asked = [], 0, 0, 0
    while asked < 20:
        if turns and made.random() < 0.25:
            assert len(session.undo()) == 2
            turns.pop()
            undone += 1
            continue
        text = str(made.random())
        context = session.encoder.context(text)
        asked += 1
        seen.clear()
        stop = made.randrange(1, 4) if made.random() < 0.3 else None
        with closing(session.ask(text)) as pieces:
            for number, _ in enumerate(pieces, 1):
                if number == stop:
                    stopped += 1
                    break
        markers = glm * (1 if mask == "prefix" else len(turns) + 1)
        before = sum(map(sum, turns)) + len(context) + 2 * markers
        turns.append((len(context), len(session.fed) - before))
        assert turns[-1][1] >= 1
        at = before - glm  # the first choice is made at the last token before the answer
        if not glm:
            assert session.fed[at - len(context) : at] == context
        expected = one_forward(model, turns, session.fed, mask)
        first = before - 1
        torch.testing.assert_close(torch.stack(seen), expected[first : first + len(seen)], rtol=0, atol=1e-5)
    assert undone > 2
    assert stopped > 2
    assert VOCABULARY > START_ID
