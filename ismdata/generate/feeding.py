"""What a conversation feeds a model, and feeding it: `pack`'s own rendering in, keys in the cache and logits out.

A block is a run of tokens of one kind: a context, which is all there before the model answers, or an answer. Contexts
come of the encoder that `pack` shares (`encoder.Encoding`); answers are fed as the model wrote them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ismdata.errors import DataError
from ismdata.rendering import ANY_ANSWER, CannotRender, ConversationEncoder, GlmTokens, Message, Piece, probe_encoding
from ismdata.rendering import glm_tokens as glm_layout


class Block(NamedTuple):
    """Tokens of one kind. `message` is the number of the message that they answer with, -1 for a context."""

    ids: list[int]
    message: int = -1

    @property
    def is_answer(self) -> bool:
        return self.message >= 0


class Documents(Protocol):
    """What is needed of `encoder.Encoding`."""

    def document(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Sequence[Piece]: ...


class Encoder(Protocol):
    """What a session needs of `encoder.ConversationEncoder`."""

    @property
    def encoding(self) -> Documents: ...

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The tokens that together end an answer; empty where the template writes none."""

    @property
    def next_turn_end_ids(self) -> frozenset[int]:
        """The tokens of which one ends an answer as soon as another message follows; empty for most templates."""

    def turn_end(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Of such a template, the token that ends the last answer, which other messages follow."""

    @property
    def glm(self) -> GlmTokens | None:
        """In the GLM layout, the tokens to put before answers."""

    @property
    def history(self) -> str:
        """`append`: what was fed stays. `expand`: the conversation is rendered anew each turn."""

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """Tokens to feed before the model answers, all through the last answer's end of turn having been fed."""

    def blocks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[tuple[bool, list[int]]]:
        """Under `expand`: the whole conversation up to where the model answers, as (is an answer, tokens) in order."""

    def decode(self, ids: Sequence[int]) -> str: ...


def as_encoder(tokenizer: Encoder | PreTrainedTokenizerBase) -> Encoder:
    """A tokenizer of transformers with its chat template, ready to encode conversations; an encoder as it is.

    Raises DataError for a template or tokenizer that cannot be used.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        name = tokenizer.name_or_path or type(tokenizer).__name__
        return ConversationEncoder(probe_encoding(tokenizer, name=name))  # type: ignore[arg-type]
    return tokenizer


def conversation_blocks(
    encoder: Encoder,
    messages: Sequence[Message],
    tools: list[Any] | None,
    written: Mapping[int, list[int]] | None = None,
) -> list[Block]:
    """All that comes before the model answers `messages`, whose last one is not its own.

    written: the tokens of answers that the model wrote, by number of the message; an answer that is not there is
    encoded as `pack` does. Under `expand` all is as it is rendered now, and answers do not say their number (0).
    Raises DataError where the template does not take the conversation.
    """
    if encoder.history == "expand":
        with refusals_explained():
            return [Block(ids, 0 if is_answer else -1) for is_answer, ids in encoder.blocks(messages, tools)]
    answered = max((k for k, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
    blocks = _finished_blocks(encoder, messages[:answered], tools, written or {}) if answered else []
    with refusals_explained():
        end = encoder.turn_end(messages, tools) if answered else []
        ended = [Block(end, answered - 1)] if end else []
        return [*blocks, *ended, Block(encoder.next_context(messages, tools))]


def with_markers(blocks: Sequence[Block], glm: GlmTokens) -> list[Block]:
    """Blocks in the GLM layout: `[MASK]` at the end of each context, `[START]` before each answer, but for the one to
    come: that is fed when the answer begins.
    """
    marked = glm_layout.marked([(block.is_answer, block.ids) for block in blocks], glm)[:-1]
    answers = (block.message for block in blocks if block.is_answer)
    return [Block(ids, next(answers) if is_answer else -1) for is_answer, ids in marked]


def _finished_blocks(
    encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None, written: Mapping[int, list[int]]
) -> list[Block]:
    """The blocks of a conversation that ends with an answer, under `append`, as `pack` makes them."""
    blocks: list[Block] = []
    with refusals_explained():
        pieces = encoder.encoding.document(messages, tools)
    for piece in pieces:
        if not blocks or blocks[-1].message != piece.message:
            if blocks and blocks[-1].message == len(messages) - 1:
                break  # what follows the last answer begins the next context
            blocks.append(Block([], piece.message))
        blocks[-1].ids.extend(piece.ids or ())
    ends = encoder.next_turn_end_ids
    return [Block(_as_written(block, written, ends), block.message) for block in blocks]


def _as_written(block: Block, written: Mapping[int, list[int]], ends: frozenset[int]) -> list[int]:
    """The tokens of an answer as the model wrote them, if it did, with the end that only the next message brought."""
    ids = written.get(block.message, block.ids)
    brought = block.ids[-1:] if ids is not block.ids and block.ids and block.ids[-1] in ends else []
    return [*ids, *brought]


def answer_lead(encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None) -> str:
    """What the template writes between the generation prompt and the text of an answer, so that it is the model's to
    write: a blank, an empty reasoning block, a channel. Read off the first answer to `messages`.
    """
    first = next((k for k, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    with refusals_explained():
        pieces = encoder.encoding.document([*messages[:first], {"role": "assistant", "content": ANY_ANSWER}], tools)
    text = encoder.decode([id for piece in pieces if piece.message == first for id in piece.ids or ()])
    return text.partition(ANY_ANSWER)[0]


@contextmanager
def refusals_explained() -> Iterator[None]:
    """Make a DataError of what a template does not take."""
    try:
        yield
    except CannotRender as error:
        raise DataError(f"the chat template does not take this conversation: {error}") from error


@torch.no_grad()
def feed(
    model: PreTrainedModel,
    ids: Sequence[int],
    cache: DynamicCache,
    *,
    bidirectional: bool,
    rows: int = 1,
    positions: tuple[Sequence[int], Sequence[int]] | None = None,
) -> Tensor:
    """Run `ids` after what the cache holds and extend the cache by them.

    Every token sees all the cache; among themselves they see all (`bidirectional`, a context block) or what is before
    them. A single token is the same either way. positions: position 1 and 2 of each token, in the GLM layout; without
    them positions count on from the cache. Returns the logits [V] of the last token or, where `rows` is more than
    1, [rows, V] of the last `rows` tokens.
    """
    past = int(cache.get_seq_length())
    end = past + len(ids)
    tokens = torch.tensor([list(ids)], device=model.device)
    if bidirectional:
        kv_end = torch.full(tokens.shape, end, dtype=torch.int32, device=model.device)
    else:
        kv_end = torch.arange(past + 1, end + 1, dtype=torch.int32, device=model.device)[None]
    named = {}
    if positions is not None:
        for name, places in zip(("position_ids", "position_ids_2"), positions, strict=True):
            named[name] = torch.tensor([list(places)], device=model.device)
    output = model(
        input_ids=tokens,
        doc_start=torch.zeros_like(kv_end),
        kv_end=kv_end,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=rows,
        **named,
    )
    logits: Tensor = output.logits[0]
    return logits if rows > 1 else logits[-1]


#: Rows of logits that are held at once while every token is scored.
_SCORED_ROWS = 256


def feed_scored(
    model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache, before: Tensor | None
) -> tuple[Tensor, list[float]]:
    """As `feed` with a causal block, and the entropy of each token: -log p, in nats, of it when it came.

    before: logits [V] of the token before the first one; None where there is none, and its entropy counts as 0.
    """
    entropies: list[float] = []
    for start in range(0, len(ids), _SCORED_ROWS):
        piece = ids[start : start + _SCORED_ROWS]
        logits = feed(model, piece, cache, bidirectional=False, rows=len(piece)).reshape(len(piece), -1)
        if before is None:
            entropies.append(0.0)
            predicted, targets = logits[:-1], piece[1:]
        else:
            predicted, targets = torch.cat([before[None], logits[:-1]]), piece
        entropies += token_entropies(predicted, targets)
        before = logits[-1]
    assert before is not None
    return before, entropies


def token_entropies(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """-log p, in nats, of each token under the logits [n, V] that came before it, computed in float32."""
    at = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
    losses: list[float] = torch.nn.functional.cross_entropy(logits.float(), at, reduction="none").tolist()
    return losses
