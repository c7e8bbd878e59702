"""Generate random conversations of realistic lengths as JSON Lines of messages, in a file of any size.

Words are made of syllables and drawn by Zipf's law. Words per message and messages per conversation are log-normal. One
conversation in ten is written in Chinese characters, and one answer in ten contains code. The text is streamed to disk;
the same size and seed give the same bytes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ismdata.errors import UsageError

_WORDS = 30_000
_SIGNS = 2_500  # Chinese characters in use
#: The most frequent words. They are real, so that a tokenizer finds as many long tokens as in real text.
_FREQUENT = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some
what there we can out other were all your when up use word how said an each she which do their time if will way about
many then them would write like so these her long make thing see him two has look more day could go come did my sound
no most number who over know water than call first people may down side been now find any new work part take get place
made live where after back little only round man year came show every good me give our under name very through just
form much great think say help low line before turn cause same mean differ move right boy old too does tell sentence
set three want air well also play small end put home read hand port large spell add even land here must big high such
follow act why ask men change went light kind off need house picture try us again animal point mother world near build
self earth father head stand own page should country found answer school grow study still learn plant cover food sun
four thought let keep eye never last door between city tree cross since hard start might story saw far sea draw left
late run while press close night real life few stop open seem together next white children begin got walk example ease
paper often always music those both mark book letter until mile river car feet care second group carry took rain eat
room friend began idea fish mountain north once base hear horse cut sure watch color face wood main enough plain girl
usual young ready above ever red list though feel talk bird soon body dog family direct leave song measure state
product black short class wind question happen complete ship area half rock order fire south problem piece told knew
pass farm top whole king size
""".split()  # noqa: SIM905
_ONSETS = ["", "b", "br", "c", "ch", "d", "f", "g", "h", "k", "l", "m", "n", "p", "qu", "r", "s", "st", "t", "tr", "v"]
_VOWELS = ["a", "e", "i", "o", "u", "ai", "ea", "ou"]
_CODAS = ["", "", "n", "r", "s", "t", "l", "nd", "ng", "ck"]
#: What follows a word, and how often per hundred words.
_AFTER = [(" ", 84), (", ", 6), (". ", 6), (".\n\n", 1), (": ", 1), ("? ", 1), (" (2) ", 1)]
_AFTER_SIGNS = [("", 84), ("，", 8), ("。", 7), ("？", 1)]
_DRAWN_AT_ONCE = 1 << 18
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9}


def parse_size(text: str) -> int:
    """Parse a size such as 2GB, 250MB or 1.5 GB (decimal units) into bytes. Raises UsageError.

    >>> parse_size("1.5GB")
    1500000000
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?)b?", text.strip().lower())
    size = int(float(found[1]) * _UNITS[found[2]]) if found else 0
    if size < 1:
        raise UsageError(f"size {text!r}: expected a number with B, kB, MB or GB, as in 2GB")
    return size


def write_corpus(path: Path, size: int, *, seed: int = 0) -> int:
    """Write whole conversations until the file has at least `size` bytes. Returns their number."""
    written, count = 0, 0
    with path.open("wb") as lines:
        for messages in conversations(seed):
            if written >= size:
                break
            line = json.dumps({"messages": messages}, ensure_ascii=False).encode() + b"\n"
            lines.write(line)
            written += len(line)
            count += 1
    return count


def conversations(seed: int) -> Iterator[list[dict[str, Any]]]:
    """Yield conversations without end, each a list of messages with role and content."""
    rng = np.random.Generator(np.random.PCG64(seed))
    prose = _Draw(_words(rng), _AFTER, rng)
    signs = _Draw([chr(0x4E00 + at) for at in rng.permutation(0x5000)[:_SIGNS].tolist()], _AFTER_SIGNS, rng)
    while True:
        chinese, with_system, with_code = (rng.random(3) < (0.1, 0.2, 0.1)).tolist()
        draw = signs if chinese else prose
        turns = min(1 + int(rng.lognormal(0.8, 0.8)), 50)
        questions = np.minimum(1 + rng.lognormal(2.8, 1.0, turns), 2000).astype(int).tolist()
        answers = np.minimum(1 + rng.lognormal(4.5, 1.0, turns), 4000).astype(int).tolist()
        messages = [{"role": "system", "content": draw.text(25)}] if with_system else []
        for question, answer in zip(questions, answers, strict=True):
            said = draw.text(answer)
            if with_code:
                said += _code(prose, 1 + answer // 20)
            messages += [{"role": "user", "content": draw.text(question)}, {"role": "assistant", "content": said}]
        yield messages


def _words(rng: np.random.Generator) -> list[str]:
    """Distinct words: the frequent ones first, then invented ones, some of them names or numbers."""
    words: dict[str, None] = dict.fromkeys(_FREQUENT)
    sizes = np.array([len(_ONSETS), len(_VOWELS), len(_CODAS)])
    while len(words) < _WORDS:
        number = len(words)
        syllables = 1 + (number > 500) + (number > 5000)
        word = "".join(
            _ONSETS[onset] + _VOWELS[vowel] + _CODAS[coda]
            for onset, vowel, coda in (rng.random((syllables, 3)) * sizes).astype(int).tolist()
        )
        words[str(number) if number % 50 == 48 else word.capitalize() if number % 10 == 9 else word] = None
    return list(words)


class _Draw:
    """Draws words with the marks between them, many at a time."""

    def __init__(self, words: list[str], after: list[tuple[str, int]], rng: np.random.Generator) -> None:
        self.words = np.array(words, object)
        self.after = np.array([mark for mark, share in after for _ in range(share)], object)
        shares = 1 / np.arange(2.7, 2.7 + len(words))
        self.up_to: NDArray[np.float64] = np.cumsum(shares / shares.sum())
        self.rng = rng
        self.drawn: list[str] = []
        self.at = 0

    def take(self, count: int) -> list[str]:
        if self.at + count > len(self.drawn):
            which = np.searchsorted(self.up_to[:-1], self.rng.random(_DRAWN_AT_ONCE))
            marks = self.after[self.rng.integers(0, len(self.after), _DRAWN_AT_ONCE)]
            self.drawn, self.at = (self.words[which] + marks).tolist(), 0
        self.at += count
        return self.drawn[self.at - count : self.at]

    def text(self, count: int) -> str:
        return "".join(self.take(count)).strip()


def _code(draw: _Draw, lines: int) -> str:
    names = ["".join(filter(str.isalnum, word)).lower() for word in draw.take(3 * lines)]
    body = "\n".join(
        f"    {names[at]}_{names[at + 1]} = {names[at + 2]}({at}, x[{at % 7}])" for at in range(0, len(names), 3)
    )
    return f"\n\n```python\ndef {names[0]}(x):\n{body}\n    return x\n```"
