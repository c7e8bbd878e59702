"""The tokens of the GLM layout (Figure 2 of the ISM paper): `[MASK]` and `[START]` before each answer.

`[MASK]` is the last token of the context before an answer. `[START]` opens the answer: it is a span of its own, of kind
answer and never trained, because the model is given it and does not write it. `masks/glm_positions.py` has the two
positions of each token.

Figure 2 (b) is this under `ism`. Under `prefix` (Figure 2 (a)) a document has one answer, its last. The answers before
it are part of the context: they have no `[MASK]`, and their spans are of kind query.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ismdata.errors import UsageError
from ismdata.masks import ANSWER, QUERY, Block, IntArray
from ismdata.rendering.control_tokens import AddedToken
from ismdata.rendering.pieces import Piece

#: The names of the two tokens in tokenizers (ChatGLM, GLM-10B, BERT, RoBERTa). The first one found is used.
MASK_NAMES = ("[gMASK]", "[MASK]", "<mask>")
START_NAMES = ("<sop>", "<|startofpiece|>", "[START]")


@dataclass(frozen=True, kw_only=True)
class GlmTokens:
    """The ids of `[MASK]` and `[START]`.

    Attributes:
        mask_id: The id of `[MASK]`.
        start_id: The id of `[START]`.
        every_answer: They come before each answer; otherwise only before a document's last answer (`prefix`).
    """

    mask_id: int
    start_id: int
    every_answer: bool


def choose_tokens(
    controls: Mapping[str, AddedToken],
    name: str,
    *,
    mask_token: str | None,
    start_token: str | None,
    every_answer: bool,
) -> GlmTokens:
    """Choose the two tokens among a tokenizer's control tokens, so that no text of a message can become one.

    Args:
        controls: The control tokens that may be used, by text.
        name: What errors call the tokenizer.
        mask_token: The text of `[MASK]`; by default the first of MASK_NAMES that the tokenizer has.
        start_token: The text of `[START]`; by default the first of START_NAMES that the tokenizer has.
        every_answer: Whether each answer gets them.

    Returns:
        The tokens' ids.

    Raises:
        UsageError: If a token is missing or both are the same.
    """
    mask_id = _choose(controls, name, mask_token, MASK_NAMES, "--glm-mask-token", "[MASK]")
    start_id = _choose(controls, name, start_token, START_NAMES, "--glm-start-token", "[START]")
    if mask_id == start_id:
        raise UsageError(f"--glm-mask-token and --glm-start-token are both token {mask_id}; expected two tokens")
    return GlmTokens(mask_id=mask_id, start_id=start_id, every_answer=every_answer)


def _choose(
    controls: Mapping[str, AddedToken], name: str, wanted: str | None, known: Sequence[str], option: str, what: str
) -> int:
    found = wanted if wanted is not None else next((text for text in known if text in controls), None)
    if found is not None and found in controls:
        return controls[found].id
    have = ", ".join(sorted(controls)[:12]) or "none"
    more = f" and {len(controls) - 12} more" if len(controls) > 12 else ""
    if found is None:
        lacks = f"{name}: no token for {what} (looked for {', '.join(known)}); --layout glm needs one"
    else:
        lacks = f"{option} {found}: no control token of {name}, or its token for end, padding or unknown text"
    raise UsageError(
        f"{lacks}. Name a control token that the chat template does not write with {option} (there are: {have}{more})"
    )


def insert_glm_tokens(
    columns: Mapping[str, IntArray], runs: tuple[int, int], *, every_answer: bool
) -> dict[str, IntArray]:
    """Insert the two tokens into documents whose pieces are columns, as `pack` has them.

    Answers without tokens get neither. If not every answer gets them, a document's last one does and the answers before
    it become queries.

    Args:
        columns: `request`, `span`, `kind`, `message`, `run`, `length` and `controls` of the pieces, int64[P] each,
            ordered by request.
        runs: The numbers of the token runs that are `[MASK]` and `[START]`.
        every_answer: Whether each answer gets them.

    Returns:
        The columns, with two more pieces per answer that gets the tokens. Spans are numbered anew.
    """
    request, span, length, message = (columns[name] for name in ("request", "span", "length", "message"))
    kind = columns["kind"].copy()
    starts = np.ones(len(request), bool)
    starts[1:] = (request[1:] != request[:-1]) | (span[1:] != span[:-1])
    first = np.flatnonzero(starts)  # the first piece of each span, then of each answer
    has_tokens = np.add.reduceat(length, first) > 0 if len(first) else np.zeros(0, bool)
    first = first[has_tokens & (kind[first] == ANSWER)]
    if not every_answer:
        first = first[np.append(request[first[1:]] != request[first[:-1]], np.ones(min(len(first), 1), bool))]
        last_span = np.full(int(request.max(initial=-1)) + 1, -1)
        last_span[request[first]] = span[first]
        kind[(kind == ANSWER) & (span != last_span[request])] = QUERY
    joins = np.zeros(len(request), bool)  # [MASK] joins the context before it if the document has one
    joins[1:] = (request[1:] == request[:-1]) & (kind[:-1] == QUERY) & (message[:-1] < 0)

    places = np.repeat(first, 2)
    of = np.insert(np.arange(len(request)), places, places)  # a token belongs to the first piece of its answer
    inserted = np.insert(np.zeros(len(request), np.int64), places, np.tile([1, 2], len(first)))
    mask, start = inserted == 1, inserted == 2
    # Span numbers are multiplied by 4 to make room for new spans before each answer.
    number = 4 * span[of] - start
    number[mask] = np.where(joins[of[mask]], 4 * span[of[mask] - 1], 4 * span[of[mask]] - 2)
    return {
        "request": request[of],
        "span": number,
        "kind": np.where(mask, QUERY, kind[of]),
        "message": np.where(inserted > 0, -1, message[of]),
        "run": np.select([mask, start], runs, columns["run"][of]),
        "length": np.where(inserted > 0, 1, length[of]),
        "controls": np.where(inserted > 0, 1, columns["controls"][of]),
    }


def insert_glm_tokens_in_blocks(blocks: Sequence[Block], tokens: GlmTokens) -> list[Block]:
    """Insert the two tokens into the contexts and answers that are fed before the model answers.

    If not every answer gets them (`prefix`), everything before `[START]` becomes one context.

    Args:
        blocks: (is an answer, ids) in order; the last one is a context.
        tokens: The two tokens.

    Returns:
        The blocks, and at the end one more with `[START]` alone, which the model answers from.

    >>> tokens = GlmTokens(mask_id=1, start_id=2, every_answer=True)
    >>> insert_glm_tokens_in_blocks([(False, [7, 8])], tokens)
    [(False, [7, 8, 1]), (True, [2])]
    """
    if not tokens.every_answer:
        blocks = [(False, [id for _, ids in blocks for id in ids])]
    fed: list[Block] = []
    for is_answer, ids in [*blocks, (True, [])]:
        if not is_answer:
            fed.append((False, list(ids)))
            continue
        if not fed or fed[-1][0]:
            fed.append((False, []))
        fed[-1][1].append(tokens.mask_id)
        fed.append((True, [tokens.start_id, *ids]))
    return fed


def insert_glm_tokens_in_pieces(pieces: Sequence[Piece], glm: GlmTokens) -> tuple[Piece, ...]:
    """Insert the two tokens into one document: the reference for `insert_glm_tokens`, compared on part of every batch.

    Args:
        pieces: The pieces of the document, all with `ids`.
        glm: The two tokens.

    Returns:
        The pieces, with two more per answer that gets the tokens. Spans are numbered anew.
    """
    answers = list(dict.fromkeys(piece.span for piece in pieces if piece.kind == ANSWER and piece.ids))
    chosen = answers if glm.every_answer else answers[-1:]
    result: list[Piece] = []
    for piece in pieces:
        if piece.span in chosen and not any(other.span == 4 * piece.span for other in result):
            before = result[-1] if result else None
            joins = before is not None and before.kind == QUERY and before.message < 0
            span = before.span if before is not None and joins else 4 * piece.span - 2
            result.append(Piece(span=span, kind=QUERY, message=-1, ids=(glm.mask_id,), controls=1))
            result.append(Piece(span=4 * piece.span - 1, kind=ANSWER, message=-1, ids=(glm.start_id,), controls=1))
        history = not glm.every_answer and piece.kind == ANSWER and piece.span not in chosen
        kind = QUERY if history else piece.kind
        result.append(replace(piece, span=4 * piece.span, kind=kind))
    return tuple(result)
