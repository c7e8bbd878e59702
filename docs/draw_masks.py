"""Draw docs/masks.svg: the three masks on one conversation, computed by `ismdata.masks`.

The conversation is that of the paper's figure 1: prompt 2, query 3, answer 2, query 2, answer 3.

    python docs/draw_masks.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ismdata.masks.intervals import ANSWER, PROMPT, QUERY, dense, intervals, targets

SPANS = [(0, 2, PROMPT, 0), (2, 5, QUERY, 0), (5, 7, ANSWER, 1), (7, 9, QUERY, 0), (9, 12, ANSWER, 1)]
TOKENS = SPANS[-1][1]
NAMES = {
    "causal": "causal: only what came before",
    "ism": "ism: each context sees all of itself",
    "prefix": "prefix: all before the last answer sees itself",
}

CELL = 20
PANEL = CELL * TOKENS
GAP = 52
LEFT, TOP = 40, 62
COLOUR = {PROMPT: "#6b7280", QUERY: "#2563eb", ANSWER: "#ea580c"}
LABEL = {PROMPT: "p", QUERY: "q", ANSWER: "a"}
INK, PALE, FONT = "#1f2937", "#e5e7eb", 'font-family="system-ui, sans-serif"'


def kinds() -> list[int]:
    """The span kind of each token."""
    return [kind for start, end, kind, _ in SPANS for _ in range(start, end)]


def rect(x: float, y: float, width: float, height: float, fill: str, opacity: float = 1.0) -> str:
    return f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" fill="{fill}" fill-opacity="{opacity:g}"/>'


def text(
    x: float, y: float, words: str, *, size: int, fill: str = INK, anchor: str = "middle", weight: str = "400"
) -> str:
    style = f'font-size="{size}" font-weight="{weight}" fill="{fill}" text-anchor="{anchor}"'
    return f'<text x="{x:g}" y="{y:g}" {FONT} {style}>{words}</text>'


def panel(mask: str, left: int) -> list[str]:
    """One mask: rows are the tokens that look, columns the tokens that are seen."""
    visible = dense(*intervals([TOKENS], SPANS, seq_len=TOKENS, mask=mask))
    is_target = targets([TOKENS], SPANS, seq_len=TOKENS, mask=mask)
    kind = kinds()
    name, _, explanation = NAMES[mask].partition(": ")
    parts = [
        text(left + PANEL / 2, 22, name, size=16, weight="700"),
        text(left + PANEL / 2, 39, explanation, size=12),
    ]
    for row, key in np.ndindex(TOKENS, TOKENS):
        x, y = left + key * CELL, TOP + row * CELL
        if not visible[row, key]:
            parts.append(rect(x + 0.5, y + 0.5, CELL - 1, CELL - 1, PALE, 0.55))
            continue
        parts.append(rect(x + 0.5, y + 0.5, CELL - 1, CELL - 1, COLOUR[kind[key]], 0.85 if key > row else 0.5))
        if key > row:  # what a causal mask would hide
            parts.append(f'<circle cx="{x + CELL / 2:g}" cy="{y + CELL / 2:g}" r="2.5" fill="white"/>')
    for token in range(TOKENS):
        middle = token * CELL + CELL / 2
        colour = COLOUR[kind[token]]
        parts.append(text(left + middle, TOP - 7, LABEL[kind[token]], size=12, fill=colour, weight="700"))
        parts.append(text(left - 10, TOP + middle + 4, LABEL[kind[token]], size=12, fill=colour, weight="700"))
        if is_target[token]:
            parts.append(rect(left + token * CELL + 4, TOP - 4, CELL - 8, 2, colour))
    return parts


def draw() -> str:
    """The whole picture as SVG text."""
    width = LEFT + 3 * PANEL + 2 * GAP + 20
    bottom = TOP + PANEL
    parts = [f'<rect width="{width}" height="{bottom + 46}" rx="8" fill="white"/>']
    for number, mask in enumerate(NAMES):
        parts += panel(mask, LEFT + number * (PANEL + GAP))
    legend = [(PROMPT, "p prompt"), (QUERY, "q query"), (ANSWER, "a answer (underlined: a target of training)")]
    x = LEFT
    for kind, words in legend:
        parts += [
            rect(x, bottom + 18, 12, 12, COLOUR[kind], 0.7),
            text(x + 18, bottom + 28, words, size=12, anchor="start"),
        ]
        x += 40 + 7 * len(words)
    note = "dot: sees a later token, which a causal mask hides"
    parts.append(text(width - 20, bottom + 28, note, size=12, anchor="end"))
    body = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {bottom + 46}" width="{width}" '
        f'height="{bottom + 46}" role="img" aria-label="The causal, ism and prefix masks side by side">\n{body}\n'
        "</svg>\n"
    )


if __name__ == "__main__":
    path = Path(__file__).with_name("masks.svg")
    path.write_text(draw(), encoding="utf-8")
    print(path)
