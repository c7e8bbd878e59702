"""BLEU, chrF and ROUGE-L of generated answers.

BLEU and chrF are sacrebleu's, with its signatures. ROUGE-L is the F1 of the longest common subsequence of words (Lin,
2004), the mean over answers: ten lines here, since the package `rouge-score` finds no words in other scripts than
Latin. On English it gives what `rouge-score` gives without stemming.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from ismdata.errors import UsageError

if TYPE_CHECKING:
    from ismdata.eval.bootstrap import FloatArray

#: How BLEU cuts text into words.
TOKENIZERS = ("13a", "zh", "char")

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
#: Scripts without blanks between words for which sacrebleu brings no words: kana, Thai, Lao, Burmese, Khmer.
_UNSPACED = "\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
#: A word of ROUGE: a run of letters and digits; each character by itself where no blanks part words.
_WORDS = re.compile(f"[{_HAN}{_UNSPACED}]|[^\\W_{_HAN}{_UNSPACED}]+")


def tokenizer_for(texts: Sequence[str]) -> str:
    """sacrebleu's tokenizer for these texts, by the script of most of their letters.

    `char` where more than a tenth are of a script that writes no blanks and is not Chinese (half of Japanese is Han),
    else `zh` where at least half are Han characters, else `13a`, mteval's words.

    >>> tokenizer_for(["Hello, 你好"]), tokenizer_for(["你好吗, Anna?"]), tokenizer_for(["日本語です"])
    ('13a', '13a', 'char')
    >>> tokenizer_for(["你好吗? ok"])
    'zh'
    """
    joined = "".join(texts)
    letters = sum(map(str.isalpha, joined))
    if len(re.findall(f"[{_UNSPACED}]", joined)) > letters / 10:
        return "char"
    return "zh" if letters and len(re.findall(f"[{_HAN}]", joined)) >= letters / 2 else "13a"


@dataclass(frozen=True, kw_only=True)
class TextScores:
    """Scores of generated answers, BLEU and chrF from 0 to 100, ROUGE-L too."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    rouge_l: float
    tokenizer: str


def text_scores(generated: Sequence[str], references: Sequence[str], tokenizer: str) -> TextScores:
    """Of generated answers against one reference each, over the corpus. UsageError where sacrebleu is not installed."""
    metrics = require_sacrebleu()
    bleu, chrf = metrics.BLEU(tokenize=tokenizer, force=True), metrics.CHRF()
    bleu_score = bleu.corpus_score(list(generated), [list(references)])
    chrf_score = chrf.corpus_score(list(generated), [list(references)])
    return TextScores(
        bleu=float(bleu_score.score),
        bleu_signature=str(bleu.get_signature()),
        chrf=float(chrf_score.score),
        chrf_signature=str(chrf.get_signature()),
        rouge_l=100 * float(np.mean([rouge_l(*pair) for pair in zip(generated, references, strict=True)])),
        tokenizer=tokenizer,
    )


def bleu_counts(generated: Sequence[str], references: Sequence[str], tokenizer: str) -> FloatArray:
    """What BLEU is computed from, for each answer, float64[A, 10]: matches and n-grams of 1 to 4 words, both lengths.

    They add up: `bleu` of the sum is the corpus's BLEU.
    """
    metric = require_sacrebleu().BLEU(
        tokenize=tokenizer, effective_order=True
    )  # the order changes the score, not the counts
    scores = [metric.sentence_score(text, [reference]) for text, reference in zip(generated, references, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return np.array(rows, np.float64).reshape(-1, 10)


def bleu(counts: FloatArray) -> FloatArray:
    """BLEU of summed counts, [R, 10] to [R], as sacrebleu computes it of a corpus."""
    compute = require_sacrebleu().BLEU.compute_bleu
    rows = counts.astype(np.int64).tolist()
    return np.array([compute(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows], np.float64)


def rouge_l(generated: str, reference: str) -> float:
    """F1 of the longest common subsequence of words, 0 to 1; case does not count.

    >>> round(rouge_l("the cat sat there", "The cat sat."), 3)
    0.857
    """
    mine, true = (_WORDS.findall(text.lower()) for text in (generated, reference))
    if not mine or not true:
        return 0.0
    return 2 * common_subsequence(mine, true) / (len(mine) + len(true))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Length of the longest common subsequence, by bits: one addition a word (Hyyrö, 2004).

    >>> common_subsequence("abcbdab", "bdcaba")
    4
    """
    places: dict[str, int] = {}
    for at, word in enumerate(first):
        places[word] = places.get(word, 0) | 1 << at
    everywhere = (1 << len(first)) - 1
    row = everywhere
    for word in second:
        matched = row & places.get(word, 0)
        row = (row + matched | row - matched) & everywhere
    return (row ^ everywhere).bit_count()


def require_sacrebleu() -> Any:
    """sacrebleu's metrics. Raises UsageError where it is not installed."""
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UsageError(f"--generate needs sacrebleu ({error}). Install it: pip install 'ismdata[eval]'") from error
    return metrics
