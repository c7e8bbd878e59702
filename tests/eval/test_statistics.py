"""Compare the bootstrap with loops and scipy, BLEU with sacrebleu on the corpus, ROUGE-L with a table."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sacrebleu.metrics import BLEU

from ismdata.errors import UsageError
from ismdata.eval import bootstrap
from ismdata.eval.bootstrap import Bootstrap, estimate, paired_difference, ratio
from ismdata.eval.text_scores import bleu, bleu_counts, common_subsequence, rouge_l, text_scores, tokenizer_for


def values(groups, *, seed=0, shift=0.0):
    generator = np.random.default_rng(seed)
    counts = generator.integers(1, 30, groups)
    return np.stack([counts * (2 + shift) + generator.normal(size=groups), counts], axis=1)


def test_sums_are_those_of_the_drawn_groups(monkeypatch):
    table = values(7)
    expected = []
    generator = np.random.default_rng(5)
    for _ in range(20):
        drawn = generator.multinomial(7, [1 / 7] * 7)
        assert drawn.sum() == 7
        expected.append(sum(count * row for count, row in zip(drawn, table, strict=True)))
    settings = Bootstrap(resamples=20, seed=5)
    assert settings.sums(table) == pytest.approx(np.array(expected))
    monkeypatch.setattr(bootstrap, "_CHUNK", 21)
    assert settings.sums(table) == pytest.approx(np.array(expected))


def test_the_interval_is_scipys():
    from scipy import stats

    table = values(60)
    found = estimate(table, ratio, Bootstrap(resamples=4000))
    theirs = stats.bootstrap(
        (table[:, 0], table[:, 1]),
        lambda x, y, axis: x.sum(axis) / y.sum(axis),
        paired=True,
        vectorized=True,
        n_resamples=4000,
        method="percentile",
        random_state=np.random.default_rng(1),
    ).confidence_interval
    assert found.value == pytest.approx(table[:, 0].sum() / table[:, 1].sum())
    width = theirs.high - theirs.low
    assert found.interval == pytest.approx((theirs.low, theirs.high), abs=0.1 * width)


def test_intervals_have_their_coverage():
    """About 95 % of the intervals of 200 samples from a known distribution contain its mean."""
    generator = np.random.default_rng(0)
    covering = 0
    for _ in range(200):
        table = np.stack([generator.normal(3, 1, 50), np.ones(50)], axis=1)
        low, high = estimate(table, ratio, Bootstrap(resamples=200)).interval
        covering += low <= 3 <= high
    assert 178 <= covering <= 198


def test_equal_systems_do_not_differ_and_others_do():
    settings = Bootstrap(resamples=500)
    table = values(40)
    same = paired_difference(table, table, ratio, settings)
    assert (same.value, same.interval, same.p_value) == (0, (0, 0), 1)
    worse = paired_difference(values(40, shift=0.5), table, ratio, settings)
    assert worse.value == pytest.approx(0.5)
    assert worse.interval == pytest.approx((0.5, 0.5))
    assert worse.p_value == pytest.approx(2 / 501)
    back = paired_difference(table, values(40, shift=0.5), ratio, settings)
    assert back.value == -worse.value and back.p_value == worse.p_value


def test_pairing_cancels_the_difficulty_of_conversations():
    """Conversations differ more than systems: single intervals overlap, but the paired one excludes 0."""
    generator = np.random.default_rng(2)
    hard = generator.normal(3, 1, 50)
    left = np.stack([hard, np.ones(50)], axis=1)
    right = np.stack([hard + 0.1 + generator.normal(0, 0.02, 50), np.ones(50)], axis=1)
    settings = Bootstrap(resamples=400)
    assert estimate(left, ratio, settings).interval[1] > estimate(right, ratio, settings).interval[0]
    assert paired_difference(right, left, ratio, settings).interval[0] > 0.08


def test_few_groups_prove_little():
    one = values(1)
    assert estimate(one, ratio, Bootstrap()).interval is None
    lonely = paired_difference(one, values(1, shift=1), ratio, Bootstrap())
    assert lonely.interval is None and lonely.p_value is None
    assert paired_difference(values(3, shift=1), values(3), ratio, Bootstrap()).p_value == 0.25
    with pytest.raises(UsageError, match="--resamples is 0"):
        Bootstrap(resamples=0)


def test_a_statistic_that_most_resamples_lack_has_no_interval():
    rare = np.array([[1.0, 1.0]] + [[0.0, 0.0]] * 9)
    assert ratio(np.zeros((1, 2))).tolist() != ratio(np.ones((1, 2))).tolist()
    assert math.isnan(ratio(np.zeros((1, 2)))[0])
    settings = Bootstrap(resamples=100)
    assert settings.interval(np.where(np.arange(100) < 60, np.nan, 1.0)) is None
    assert estimate(rare, ratio, settings).interval == (1, 1)  # two in three resamples contain the one group


# ---- texts ----

WORDS = ["the", "cat", "sat", "on", "a", "mat", ".", "猫", "坐", "there", ",", "'s"]
TEXTS = st.lists(st.sampled_from(WORDS), max_size=9)


@given(st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5), st.sampled_from(["13a", "zh", "char"]))
def test_summed_counts_give_the_corpus_bleu(pairs, tokenizer):
    generated, references = ([" ".join(words) for words in side] for side in zip(*pairs, strict=True))
    expected = BLEU(tokenize=tokenizer, force=True).corpus_score(generated, [references]).score
    counts = bleu_counts(generated, references, tokenizer)
    assert bleu(counts.sum(0, keepdims=True))[0] == pytest.approx(expected)
    assert text_scores(generated, references, tokenizer).bleu == pytest.approx(expected)


def subsequence_by_table(first, second):
    table = [[0] * (len(second) + 1) for _ in range(len(first) + 1)]
    for i, x in enumerate(first):
        for j, y in enumerate(second):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@given(st.text("abc", max_size=80), st.text("abcd", max_size=80))
def test_the_longest_common_subsequence(first, second):
    assert common_subsequence(first, second) == subsequence_by_table(first, second)


def test_rouge_words():
    assert rouge_l("The CAT-sat, 42!", "the cat sat 42") == 1
    assert rouge_l("我喜欢猫", "我喜欢狗") == 0.75
    assert rouge_l("", "words") == rouge_l("?!", "words") == 0


def test_scores_of_perfect_and_of_no_answers():
    texts = ["a perfect answer to the question", "and another one of the kind"]
    perfect = text_scores(texts, texts, "13a")
    assert (perfect.bleu, perfect.chrf, perfect.rouge_l) == pytest.approx((100, 100, 100))
    assert "tok:13a" in perfect.bleu_signature and "version:" in perfect.chrf_signature
    empty = text_scores(["", ""], texts, "13a")
    assert (empty.bleu, empty.chrf, empty.rouge_l) == (0, 0, 0)
    assert "tok:zh" in text_scores(["好"], ["好的"], "zh").bleu_signature


@pytest.mark.parametrize(
    ("text", "tokenizer"),
    [
        ("Just English.", "13a"),
        ("Привет, как дела?", "13a"),
        ("你喜欢看什么电影？ Titanic!", "zh"),
        ("I said 你好 to her", "13a"),
        ("猫が好きです", "char"),
        ("สวัสดีครับ", "char"),
        ("안녕하세요 여러분", "13a"),
        ("", "13a"),
        ("?!", "13a"),
    ],
    ids=["english", "russian", "chinese", "mixed", "japanese", "thai", "korean", "empty", "signs"],
)
def test_the_tokenizer_follows_the_script(text, tokenizer):
    assert tokenizer_for([text]) == tokenizer
