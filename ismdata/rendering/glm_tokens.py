"""The GLM layout (Figure 2 of the paper): `[MASK]` and `[START]` before each answer, and two positions a token.

`[MASK]` is the last token of the context before an answer: what is to be filled in stands there. `[START]` opens the
answer: it is a span of its own of kind answer, never trained, since the model is given it and does not write it.

| token | position 1 | position 2 |
|---|---|---|
| context, `[MASK]` | its 1-based index in the document | 0 |
| `[START]`, answer | that of its `[MASK]` | 1, 2, 3 … from `[START]` on |
| padding | 0 | 0 |

Figure 2 (b) is this under `ism`. Under `prefix` (Figure 2 (a)) a document has one answer, its last; the answers before
it are context there as all else is, with no `[MASK]` of their own, and their spans are of kind query.

>>> spans = [(0, 4, QUERY, 0), (4, 5, ANSWER, 0), (5, 7, ANSWER, 1)]  # three tokens and [MASK], [START], two tokens
>>> first, second = positions([7], spans, seq_len=8)
>>> first.tolist(), second.tolist()
([1, 2, 3, 4, 4, 4, 4, 0], [0, 0, 0, 0, 1, 2, 3, 0])
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ismdata.errors import UsageError
from ismdata.masks import ANSWER, QUERY, Block, IntArray
from ismdata.rendering.control_tokens import AddedToken
from ismdata.rendering.pieces import Piece

#: Names under which tokenizers have the two tokens (ChatGLM, GLM-10B, BERT and RoBERTa), the first that is there wins.
MASK_NAMES = ("[gMASK]", "[MASK]", "<mask>")
START_NAMES = ("<sop>", "<|startofpiece|>", "[START]")


@dataclass(frozen=True, kw_only=True)
class GlmTokens:
    """The ids of `[MASK]` and `[START]`. `every_answer`: before each answer of a document, else before its last alone
    (`prefix`).
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
    """The two tokens among a tokenizer's control tokens, by text: those named, else those it has for this purpose.

    `name` is what errors call the tokenizer. They must be control tokens, so that no text of a message becomes one.
    Raises UsageError with what to do.
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
        lacks = f"{name}: no token for {what} (looked for {', '.join(known)}); expected one for --layout glm"
    else:
        lacks = f"{option} {found}: no control token of {name}, or the one for its end, padding or unknown text"
    raise UsageError(
        f"{lacks}. Name a control token that the chat template does not write with {option} (there are: {have}{more})"
    )


def insert_markers(
    columns: Mapping[str, IntArray], runs: tuple[int, int], *, every_answer: bool
) -> dict[str, IntArray]:
    """Documents as pieces of spans (the columns of tokens.Layout, ordered by request) with the two tokens put in.

    runs: the numbers of the runs that hold `[MASK]` and `[START]`. Answers without tokens get neither. Where not every
    answer gets them, the last one of a document does, and those before it become queries.
    """
    request, span, length, message = (columns[name] for name in ("request", "span", "length", "message"))
    kind = columns["kind"].copy()
    starts = np.ones(len(request), bool)
    starts[1:] = (request[1:] != request[:-1]) | (span[1:] != span[:-1])
    opening = np.flatnonzero(starts)
    has_tokens = np.add.reduceat(length, opening) > 0 if len(opening) else np.zeros(0, bool)
    opening = opening[has_tokens & (kind[opening] == ANSWER)]
    if not every_answer:
        opening = opening[np.append(request[opening[1:]] != request[opening[:-1]], np.ones(min(len(opening), 1), bool))]
        last_span = np.full(int(request.max(initial=-1)) + 1, -1)
        last_span[request[opening]] = span[opening]
        kind[(kind == ANSWER) & (span != last_span[request])] = QUERY
    joins = np.zeros(len(request), bool)  # [MASK] lies in the context before it, which is the same document's
    joins[1:] = (request[1:] == request[:-1]) & (kind[:-1] == QUERY) & (message[:-1] < 0)

    places = np.repeat(opening, 2)
    of = np.insert(np.arange(len(request)), places, places)  # a marker belongs to the first piece of its answer
    marker = np.insert(np.zeros(len(request), np.int64), places, np.tile([1, 2], len(opening)))
    mask, start = marker == 1, marker == 2
    # Numbers of spans are spread, to have room for new ones before each answer.
    number = 4 * span[of] - start
    number[mask] = np.where(joins[of[mask]], 4 * span[of[mask] - 1], 4 * span[of[mask]] - 2)
    return {
        "request": request[of],
        "span": number,
        "kind": np.where(mask, QUERY, kind[of]),
        "message": np.where(marker > 0, -1, message[of]),
        "run": np.select([mask, start], runs, columns["run"][of]),
        "length": np.where(marker > 0, 1, length[of]),
        "controls": np.where(marker > 0, 1, columns["controls"][of]),
    }


def marked(blocks: Sequence[Block], tokens: GlmTokens) -> list[Block]:
    """What to feed before the model answers: blocks of a conversation, ending in a context, with the two tokens in.

    Where not every answer has them (`prefix`), all before `[START]` is one context. The last block is `[START]`, which
    the model answers from.
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


def marked_pieces(pieces: Sequence[Piece], glm: GlmTokens) -> tuple[Piece, ...]:
    """The pieces of a document, all of them known tokens, with `[MASK]` and `[START]` put in: the plain version of
    `glm_layout.insert_markers`, with which a sample of every batch is compared.
    """
    answers = list(dict.fromkeys(piece.span for piece in pieces if piece.kind == ANSWER and piece.ids))
    chosen = answers if glm.every_answer else answers[-1:]
    marked: list[Piece] = []
    for piece in pieces:
        if piece.span in chosen and not any(other.span == 4 * piece.span for other in marked):
            before = marked[-1] if marked else None
            joins = before is not None and before.kind == QUERY and before.message < 0
            span = before.span if before is not None and joins else 4 * piece.span - 2
            marked.append(Piece(span=span, kind=QUERY, message=-1, ids=(glm.mask_id,), controls=1))
            marked.append(Piece(span=4 * piece.span - 1, kind=ANSWER, message=-1, ids=(glm.start_id,), controls=1))
        history = not glm.every_answer and piece.kind == ANSWER and piece.span not in chosen
        kind = QUERY if history else piece.kind
        marked.append(replace(piece, span=4 * piece.span, kind=kind))
    return tuple(marked)
