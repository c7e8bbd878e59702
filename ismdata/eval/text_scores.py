"""BLEU, chrF and ROUGE-L of generated answers.

BLEU and chrF come from sacrebleu, with its signatures. ROUGE-L (Lin, 2004) is the mean over answers of the F1 score of
the longest common subsequence of words. It is implemented here because the package `rouge-score` finds words in Latin
script only. On English it equals `rouge-score` without stemming.
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

#: The tokenizers of sacrebleu that are used here.
TOKENIZERS = ("13a", "zh", "char")

_HAN = "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
#: Scripts without spaces between words that no tokenizer of sacrebleu splits: kana, Thai, Lao, Burmese, Khmer.
_UNSPACED = "\u3040-\u30ff\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff"
#: A word of ROUGE: a run of letters and digits, or one character of a script without spaces.
_WORDS = re.compile(f"[{_HAN}{_UNSPACED}]|[^\\W_{_HAN}{_UNSPACED}]+")


def tokenizer_for(texts: Sequence[str]) -> str:
    """Choose sacrebleu's tokenizer by the script of the letters.

    Args:
        texts: The reference texts.

    Returns:
        `char` if more than a tenth of the letters are kana, Thai, Lao, Burmese or Khmer (half of Japanese text is Han);
        else `zh` if at least half are Han; else `13a`, the tokenizer of mteval.

    Example:
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
    """Scores of generated answers; all of them from 0 to 100."""

    bleu: float
    bleu_signature: str
    chrf: float
    chrf_signature: str
    rouge_l: float
    tokenizer: str


def text_scores(generated: Sequence[str], references: Sequence[str], tokenizer: str) -> TextScores:
    """Score generated answers against one reference each, over the corpus.

    Args:
        generated: The generated texts.
        references: The reference texts, in the same order.
        tokenizer: A value of `TOKENIZERS`.

    Returns:
        The scores.

    Raises:
        UsageError: If sacrebleu is not installed.
    """
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
    """Count the n-grams of each answer. `bleu` of the summed counts is the BLEU of the corpus.

    Args:
        generated: The generated texts, A of them.
        references: The reference texts, in the same order.
        tokenizer: A value of `TOKENIZERS`.

    Returns:
        Counts, float64[A, 10]: matching n-grams for n = 1 to 4, all n-grams for n = 1 to 4, and the lengths of the
        generated text and of the reference in words.
    """
    # Without `effective_order` sentence_score warns. It changes the score, not the counts.
    metric = require_sacrebleu().BLEU(tokenize=tokenizer, effective_order=True)
    scores = [metric.sentence_score(text, [reference]) for text, reference in zip(generated, references, strict=True)]
    rows = [[*score.counts, *score.totals, score.sys_len, score.ref_len] for score in scores]
    return np.array(rows, np.float64).reshape(-1, 10)


def bleu(counts: FloatArray) -> FloatArray:
    """Compute the corpus BLEU of summed counts, [R, 10] to [R], as sacrebleu does."""
    compute = require_sacrebleu().BLEU.compute_bleu
    rows = counts.astype(np.int64).tolist()
    return np.array([compute(row[:4], row[4:8], row[8], row[9], smooth_method="exp").score for row in rows], np.float64)


def rouge_l(generated: str, reference: str) -> float:
    """Compute the F1 score of the longest common subsequence of words, 0 to 1, ignoring case.

    >>> round(rouge_l("the cat sat there", "The cat sat."), 3)
    0.857
    """
    words, reference_words = (_WORDS.findall(text.lower()) for text in (generated, reference))
    if not words or not reference_words:
        return 0.0
    return 2 * common_subsequence(words, reference_words) / (len(words) + len(reference_words))


def common_subsequence(first: Sequence[str], second: Sequence[str]) -> int:
    """Compute the length of the longest common subsequence with bit vectors, one addition per word (Hyyrö, 2004).

    >>> common_subsequence("abcbdab", "bdcaba")
    4
    """
    positions: dict[str, int] = {}
    for index, word in enumerate(first):
        positions[word] = positions.get(word, 0) | 1 << index
    ones = (1 << len(first)) - 1
    row = ones
    for word in second:
        matched = row & positions.get(word, 0)
        row = (row + matched | row - matched) & ones
    return (row ^ ones).bit_count()


def require_sacrebleu() -> Any:
    """Import sacrebleu's metrics. Raises UsageError if it is not installed."""
    try:
        from sacrebleu import metrics
    except ImportError as error:
        raise UsageError(f"--generate needs sacrebleu ({error}). Install it: pip install 'ismdata[eval]'") from error
    return metrics
