"""Turn a conversation into blocks of tokens, and run them through a model that extends its cache.

A block is a run of tokens of one kind: a context (everything before an answer) or an answer. Contexts come from the
encoding that `pack` uses too; answers are fed as the model generated them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from ismdata.errors import DataError
from ismdata.rendering import (
    ANY_ANSWER,
    CannotRender,
    ConversationEncoder,
    GlmTokens,
    Message,
    Piece,
    insert_glm_tokens_in_blocks,
    probe_encoding,
)


class Block(NamedTuple):
    """Tokens of one kind. `message` is the index of the message that is the answer, -1 for a context."""

    ids: list[int]
    message: int = -1

    @property
    def is_answer(self) -> bool:
        return self.message >= 0


class DocumentEncoding(Protocol):
    """The part of `rendering.Encoding` that a session uses."""

    def document(self, messages: Sequence[Message], tools: list[Any] | None = None) -> Sequence[Piece]: ...


class Encoder(Protocol):
    """The part of `rendering.ConversationEncoder` that a session uses."""

    @property
    def encoding(self) -> DocumentEncoding:
        """The encoding of whole conversations."""

    @property
    def end_of_turn_ids(self) -> list[int]:
        """The tokens that together end an answer; empty if the template writes none."""

    @property
    def next_turn_end_ids(self) -> frozenset[int]:
        """Tokens of the next turn's header that end an answer, e.g. `<|user|>` of GLM-4.6; empty for most templates."""

    def turn_end(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The token among `next_turn_end_ids` that ends the last answer, if there is one."""

    @property
    def glm(self) -> GlmTokens | None:
        """In the GLM layout, the tokens to insert before answers."""

    @property
    def history(self) -> str:
        """`append`: tokens that were fed stay as they are. `expand`: the conversation is rendered anew at each turn."""

    def next_context(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[int]:
        """The tokens to feed after the last answer's end of turn and before the next answer."""

    def blocks(self, messages: Sequence[Message], tools: list[Any] | None = None) -> list[tuple[bool, list[int]]]:
        """Under `expand`: the conversation up to the next answer, as pairs of (is an answer, tokens)."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of tokens."""


def as_encoder(tokenizer: Encoder | PreTrainedTokenizerBase) -> Encoder:
    """Make an encoder from a Hugging Face tokenizer with a chat template; return an encoder unchanged.

    Raises:
        DataError: If the template or the tokenizer cannot be used.
    """
    if isinstance(tokenizer, PreTrainedTokenizerBase):
        name = tokenizer.name_or_path or type(tokenizer).__name__
        return ConversationEncoder(probe_encoding(tokenizer, name=name))  # type: ignore[arg-type]
    return tokenizer


def conversation_blocks(
    encoder: Encoder,
    messages: Sequence[Message],
    tools: list[Any] | None,
    generated: Mapping[int, list[int]] | None = None,
) -> list[Block]:
    """Encode a whole conversation up to the next answer.

    Args:
        encoder: The encoder.
        messages: The conversation; the last message is not the model's.
        tools: The tools for the template.
        generated: The tokens of answers that the model generated, by index of the message. Other answers are encoded
            as `pack` does.

    Returns:
        The blocks, the last of which is a context. Under `expand` all of them are as rendered now, and answers have
        the message index 0, since which message they come from is not needed.

    Raises:
        DataError: If the template does not accept the conversation.
    """
    if encoder.history == "expand":
        with template_errors():
            return [Block(ids, 0 if is_answer else -1) for is_answer, ids in encoder.blocks(messages, tools)]
    answered = max((k for k, message in enumerate(messages, 1) if message["role"] == "assistant"), default=0)
    blocks = _answered_blocks(encoder, messages[:answered], tools, generated or {}) if answered else []
    return [*blocks, *next_blocks(encoder, messages, tools, answered)]


def next_blocks(encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None, answered: int) -> list[Block]:
    """Encode what follows the last answer, under `append`: a token that ends it, if there is one, and the context.

    answered: how many messages there are up to the last answer, including it.
    """
    with template_errors():
        end = encoder.turn_end(messages, tools) if answered else []
        context = Block(encoder.next_context(messages, tools))
        return [Block(end, answered - 1), context] if end else [context]


def arrange_blocks(blocks: Sequence[Block], glm: GlmTokens | None, mask: str) -> list[Block]:
    """Arrange the blocks before an answer for the model's layout and mask.

    In the GLM layout `[MASK]` ends each context and `[START]` begins each answer. The `[START]` of the next answer is
    left out: it is fed when the answer begins. Under `prefix` all blocks become one context.
    """
    if glm is not None:
        marked = insert_glm_tokens_in_blocks([(block.is_answer, block.ids) for block in blocks], glm)[:-1]
        answers = (block.message for block in blocks if block.is_answer)
        blocks = [Block(ids, next(answers) if is_answer else -1) for is_answer, ids in marked]
    if mask == "prefix":
        return [Block([id for block in blocks for id in block.ids])]
    return list(blocks)


def _answered_blocks(
    encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None, generated: Mapping[int, list[int]]
) -> list[Block]:
    """The blocks of a conversation that ends with an answer, under `append`, as `pack` makes them."""
    blocks: list[Block] = []
    with template_errors():
        pieces = encoder.encoding.document(messages, tools)
    for piece in pieces:
        if not blocks or blocks[-1].message != piece.message:
            if blocks and blocks[-1].message == len(messages) - 1:
                break  # what follows the last answer belongs to the next context
            blocks.append(Block([], piece.message))
        blocks[-1].ids.extend(piece.ids or ())
    ends = encoder.next_turn_end_ids
    return [Block(_answer_ids(block, generated, ends), block.message) for block in blocks]


def _answer_ids(block: Block, generated: Mapping[int, list[int]], ends: frozenset[int]) -> list[int]:
    """A block's tokens; for a generated answer those, and the end that the template wrote before the next message."""
    ids = generated.get(block.message, block.ids)
    end = block.ids[-1:] if ids is not block.ids and block.ids and block.ids[-1] in ends else []
    return [*ids, *end]


def answer_lead(encoder: Encoder, messages: Sequence[Message], tools: list[Any] | None) -> str:
    """Find the text that the template writes between the generation prompt and the text of an answer.

    Examples are a space, an empty reasoning block, a channel. The model has to generate it, so it belongs to the
    answer's tokens but not to the message. It is read off the first answer to `messages`.
    """
    first = next((k for k, message in enumerate(messages) if message["role"] == "assistant"), len(messages))
    with template_errors():
        pieces = encoder.encoding.document([*messages[:first], {"role": "assistant", "content": ANY_ANSWER}], tools)
    text = encoder.decode([id for piece in pieces if piece.message == first for id in piece.ids or ()])
    return text.partition(ANY_ANSWER)[0]


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn an error of the chat template into a DataError."""
    try:
        yield
    except CannotRender as error:
        raise DataError(
            f"the chat template does not accept this conversation: {error}. `ismdata template MODEL` lists what it "
            "accepts"
        ) from error


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
    """Run tokens through the model after those in the cache, and append their keys and values to it.

    Every token sees the whole cache.

    Args:
        model: An attached model in evaluation mode.
        ids: The tokens.
        cache: The cache, changed in place.
        bidirectional: Whether the tokens see all of each other (a context block) or only their predecessors.
        rows: Number of tokens at the end whose logits are returned.
        positions: Position 1 and position 2 of each token, in the GLM layout. Otherwise positions continue from the
            cache.

    Returns:
        The logits of the last token, [V]; if `rows` is above 1, those of the last `rows` tokens, [rows, V].
    """
    past = int(cache.get_seq_length())
    end = past + len(ids)
    tokens = torch.tensor([list(ids)], device=model.device)
    if bidirectional:
        kv_end = torch.full(tokens.shape, end, dtype=torch.int32, device=model.device)
    else:
        kv_end = torch.arange(past + 1, end + 1, dtype=torch.int32, device=model.device)[None]
    position_inputs = {}
    if positions is not None:
        for name, values in zip(("position_ids", "position_ids_2"), positions, strict=True):
            position_inputs[name] = torch.tensor([list(values)], device=model.device)
    output = model(
        input_ids=tokens,
        doc_start=torch.zeros_like(kv_end),
        kv_end=kv_end,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=rows,
        **position_inputs,
    )
    logits: Tensor = output.logits[0]
    return logits if rows > 1 else logits[-1]


#: Rows of logits in memory at a time while tokens are scored.
_SCORED_ROWS = 256


def feed_scored(
    model: PreTrainedModel, ids: Sequence[int], cache: DynamicCache, before: Tensor | None
) -> tuple[Tensor, list[float]]:
    """Feed a causal block and compute the entropy of each token: its -log p in nats, given what preceded it.

    Args:
        model: An attached model in evaluation mode.
        ids: The tokens.
        cache: The cache, changed in place.
        before: The logits of the token before the first one, [V]; None if there is none: its entropy is 0.

    Returns:
        The logits of the last token, [V], and the entropies.
    """
    entropies: list[float] = []
    for start in range(0, len(ids), _SCORED_ROWS):
        chunk = ids[start : start + _SCORED_ROWS]
        logits = feed(model, chunk, cache, bidirectional=False, rows=len(chunk)).reshape(len(chunk), -1)
        if before is None:
            entropies.append(0.0)
            predicted, targets = logits[:-1], chunk[1:]
        else:
            predicted, targets = torch.cat([before[None], logits[:-1]]), chunk
        entropies += token_entropies(predicted, targets)
        before = logits[-1]
    assert before is not None
    return before, entropies


def token_entropies(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Compute -log p in nats of each token under the logits before it, [n, V], in float32."""
    targets = torch.tensor(list(tokens), dtype=torch.long, device=logits.device)
    losses: list[float] = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="none").tolist()
    return losses
