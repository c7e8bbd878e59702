"""A model that says what it is told to, and encoders of a letter a token: for the tests of sessions."""

from __future__ import annotations

from types import SimpleNamespace

import torch
from torch import nn
from transformers import LlamaConfig

from ismdata.attention.backends.registry import BACKENDS
from ismdata.masks.intervals import ANSWER, QUERY
from ismdata.rendering.pieces import Piece

#: What opens a question, what closes it, and the end of turn.
OPEN, CLOSE, END = 80, 81, 90


class ScriptedModel(nn.Module):
    """Says the tokens of `script`, one whenever it is asked for the next; records each call as (ids, past, kv_end)."""

    device = torch.device("cpu")
    generation_config = SimpleNamespace(eos_token_id=99)

    def __init__(self, script, max_positions=1000):
        super().__init__()
        self.config = LlamaConfig(num_hidden_layers=1, max_position_embeddings=max_positions)
        self.config._attn_implementation = next(iter(BACKENDS.values())).name
        self.script = list(script)
        self.calls = []

    def forward(self, input_ids, doc_start, kv_end, past_key_values, logits_to_keep, **kwargs):
        past = past_key_values.get_seq_length()
        assert doc_start.tolist() == [[0] * input_ids.shape[1]]
        self.calls.append((input_ids[0].tolist(), past, kv_end[0].tolist()))
        states = torch.zeros(1, 1, input_ids.shape[1], 1)
        past_key_values.update(states, states, 0)
        # A token of an answer asks for the one after it, so the script goes by how many were fed since the context.
        logits = torch.zeros(1, logits_to_keep, 100)
        logits[0, -1, self.script.pop(0) if self.script else 50] = 1
        return SimpleNamespace(logits=logits)


def letters(text):
    return [ord(character) - ord("a") for character in text]


class CharacterEncoder:
    """A user's text is one token a character, between OPEN and CLOSE; answers end in `ending`."""

    history = "append"
    glm = None
    next_turn_end_ids = frozenset()

    def __init__(self, ending=(END,)):
        self.end_of_turn_ids = list(ending)
        self.asked = []
        self.encoding = SimpleNamespace(document=self.document)

    def document(self, messages, tools=None):
        pieces = []
        for k, message in enumerate(messages):
            if message["role"] == "system":
                continue
            answer = message["role"] == "assistant"
            ids = [*letters(message["content"]), *self.end_of_turn_ids] if answer else self._context(message)
            pieces.append(Piece(span=k, kind=ANSWER if answer else QUERY, message=k if answer else -1, ids=tuple(ids)))
        return tuple(pieces)

    def _context(self, message):
        return [OPEN, *letters(message["content"]), CLOSE]

    def next_context(self, messages, tools=None):
        self.asked.append([dict(message) for message in messages])
        last = max((k for k, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
        return [id for message in messages[last:] if message["role"] != "system" for id in self._context(message)]

    def turn_end(self, messages, tools=None):
        return []

    def decode(self, ids):
        """Tokens 40 and 41 are the halves of one character."""
        text = "".join(chr(ord("a") + token) if token < 26 else {40: "½", 41: "¾"}.get(token, "?") for token in ids)
        return text.replace("½¾", "é").replace("½", "\N{REPLACEMENT CHARACTER}")


class AnewEncoder(CharacterEncoder):
    """Renders history anew each turn, and earlier answers without their last character."""

    history = "expand"

    def blocks(self, messages, tools=None):
        found = []
        for message in messages:
            ids = letters(message["content"])
            answer = message["role"] == "assistant"
            found.append((answer, [*ids[:-1], END] if answer else [OPEN, *ids, CLOSE]))
        return found
