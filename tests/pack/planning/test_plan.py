"""Plans against the algorithm on single documents, and properties that every plan must have."""

from __future__ import annotations

import bisect
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.errors import UsageError
from ismdata.pack.planning import best_fit as bins
from ismdata.pack.planning import grouping, placement, work
from ismdata.pack.planning.exact_completion import exact_completion
from ismdata.pack.planning.plan import lower_bound, plan


def best_fit_decreasing(lengths, seq_len):
    """The oracle: one document at a time, longest first, into the fullest bin with room; the room left in each bin."""
    rooms = []
    for length in sorted(lengths, reverse=True):
        at = bisect.bisect_left(rooms, length)
        room = rooms.pop(at) if at < len(rooms) else seq_len
        bisect.insort(rooms, room - length)
    return rooms


def fewest_bins(lengths, seq_len):
    """By exhaustive search, for a handful of documents."""
    lengths = sorted(lengths, reverse=True)

    def fits(at, rooms):
        if at == len(lengths):
            return True
        for number in {room: number for number, room in enumerate(rooms)}.values():
            if rooms[number] >= lengths[at]:
                rooms[number] -= lengths[at]
                if fits(at + 1, rooms):
                    return True
                rooms[number] += lengths[at]
        return False

    return next(bins for bins in range(1, len(lengths) + 1) if fits(0, [seq_len] * bins))


def histogram(lengths, seq_len):
    return np.bincount(np.asarray(lengths, np.int64), minlength=seq_len + 1)


def rooms_of(bins, seq_len):
    """The room left in each bin, sorted."""
    used = np.bincount(bins.owner, weights=bins.length * bins.times, minlength=len(bins.count)).astype(int)
    return sorted(np.repeat(seq_len - used, bins.count).tolist())


def contents(plan, lengths):
    """The lengths in each row, in order."""
    return [np.asarray(lengths)[row].tolist() for row in np.split(plan.order, plan.offsets[1:-1])]


def check(plan, lengths, seq_len):
    """The properties of every plan."""
    assert plan.order.dtype == np.uint32
    assert plan.row_documents.dtype == np.int32
    assert sorted(plan.order.tolist()) == list(range(len(lengths)))
    assert plan.row_documents.sum() == len(lengths)
    assert plan.offsets[-1] == len(lengths)
    rows = contents(plan, lengths)
    assert len(rows) == plan.rows
    assert all(0 < sum(row) <= seq_len for row in rows)
    assert lower_bound(lengths, seq_len) <= plan.rows <= len(best_fit_decreasing(lengths, seq_len))


@st.composite
def corpora(draw):
    """Lengths and a seq_len: any lengths, equal, similar, of two kinds, or all at the limit."""
    seq_len = draw(st.sampled_from([1, 2, 7, 8, 30, 100, 128]))
    low = draw(st.integers(1, seq_len))
    high = draw(st.integers(low, seq_len))
    return draw(st.lists(st.integers(low, high), min_size=1, max_size=120)), seq_len


@given(corpora())
@settings(max_examples=300, deadline=None)
def test_bins_equal_those_of_single_documents(corpus):
    lengths, seq_len = corpus
    found = bins.best_fit_decreasing(histogram(lengths, seq_len), seq_len)
    assert rooms_of(found, seq_len) == best_fit_decreasing(lengths, seq_len)


@pytest.mark.parametrize("seq_len", [256, 2048])
@pytest.mark.parametrize("spread", [0.1, 1.0, 2.0])
def test_bins_equal_those_of_single_documents_in_large_corpora(seq_len, spread):
    lengths = np.random.default_rng(0).lognormal(4.5, spread, 20_000).clip(1, seq_len).astype(int).tolist()
    found = bins.best_fit_decreasing(histogram(lengths, seq_len), seq_len)
    assert rooms_of(found, seq_len) == best_fit_decreasing(lengths, seq_len)


@given(corpora())
@settings(max_examples=150, deadline=None)
def test_exact_completion_places_every_document(corpus):
    lengths, seq_len = corpus
    found = exact_completion(histogram(lengths, seq_len), seq_len)
    laid = Counter()
    for owner, length, times in zip(found.owner.tolist(), found.length.tolist(), found.times.tolist(), strict=True):
        laid[length] += times * int(found.count[owner])
    assert +laid == Counter(lengths)
    rooms = rooms_of(found, seq_len)
    assert rooms[0] >= 0
    assert rooms[-1] < seq_len
    assert len(rooms) <= len(best_fit_decreasing(lengths, seq_len))


@given(corpora(), st.integers(0, 2**32))
@settings(max_examples=200, deadline=None)
def test_every_document_once_and_no_row_over_full(corpus, seed):
    lengths, seq_len = corpus
    check(plan(lengths, seq_len=seq_len, seed=seed), lengths, seq_len)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=9))
@settings(max_examples=100, deadline=None)
def test_between_the_optimum_and_little_more(lengths):
    fewest = fewest_bins(lengths, 12)
    assert fewest <= plan(lengths, seq_len=12, seed=0).rows <= max(fewest, fewest * 11 / 9 + 6 / 9)


def two_thresholds(lengths, seq_len):
    """The oracle of the bound L2: its definition, one threshold at a time."""
    bounds = []
    for threshold in range(seq_len // 2 + 1):
        long = [length for length in lengths if length > seq_len / 2]
        with_room = [length for length in long if length <= seq_len - threshold]
        small = sum(length for length in lengths if threshold <= length <= seq_len / 2)
        beside = sum(seq_len - length for length in with_room)
        bounds.append(len(long) + max(0, math.ceil((small - beside) / seq_len)))
    return max(bounds)


@given(corpora())
@settings(max_examples=150, deadline=None)
def test_fewest_bins_is_the_bound_as_defined(corpus):
    lengths, seq_len = corpus
    assert bins.fewest_bins(histogram(lengths, seq_len), seq_len) == two_thresholds(lengths, seq_len)


@given(st.lists(st.integers(1, 12), max_size=9))
@settings(max_examples=150, deadline=None)
def test_fewest_bins_is_between_the_tokens_and_the_optimum(lengths):
    found = bins.fewest_bins(histogram(lengths, 12), 12)
    assert lower_bound(lengths, 12) <= found <= (fewest_bins(lengths, 12) if lengths else 0)


def test_fewest_bins_counts_documents_that_leave_no_room():
    """Documents just above half a sequence need a sequence each, whatever their sum."""
    assert lower_bound([65] * 100, 128) == 51
    assert bins.fewest_bins(histogram([65] * 100, 128), 128) == 100


@pytest.mark.parametrize(
    ("lengths", "rows"),
    [
        ([128] * 50, 50),
        ([65] * 50, 50),
        ([64] * 51, 26),
        ([1] * 1000, 8),
        ([128, *[1] * 128], 2),
        ([127] * 10 + [1] * 10, 10),
        ([128], 1),
        ([1], 1),
    ],
    ids=["full", "half-and-one", "half", "ones", "giant-and-ones", "full-but-one", "one-full", "one-short"],
)
def test_hostile_histograms(lengths, rows):
    found = plan(lengths, seq_len=128, seed=0)
    check(found, lengths, 128)
    assert found.rows == rows


def test_sequences_may_be_longer_than_16_bits_can_count():
    """From 65,536 tokens on, lengths are sorted as wider integers."""
    lengths = np.random.default_rng(0).integers(1, 1 << 17, 60)
    check(plan(lengths, seq_len=1 << 17, seed=0), lengths.tolist(), 1 << 17)


@pytest.fixture(params=["whole", "chunks"])
def chunks(request, monkeypatch):
    """Work in one chunk, as for small corpora, and in many, as for large ones."""
    if request.param == "chunks":
        monkeypatch.setattr(grouping, "_CHUNK", 128)
        monkeypatch.setattr(grouping, "_DOCUMENTS_PER_LENGTH", 0)
        monkeypatch.setattr(grouping, "_NEIGHBOURS", 4)
        monkeypatch.setattr(placement, "_DOCUMENTS_PER_COPY", 16)
        monkeypatch.setattr(placement, "_SECTION_ROWS", 32)
        monkeypatch.setattr(placement, "_BINS_PER_DEAL", 4)
        monkeypatch.setattr(placement, "_MAX_ORDERED_PLACES", 0)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_any_chunk_size_gives_valid_plans(monkeypatch, size):
    lengths = np.random.default_rng(3).integers(1, 100, 500)
    monkeypatch.setattr(grouping, "_CHUNK", size)
    monkeypatch.setattr(grouping, "_DOCUMENTS_PER_LENGTH", 0)
    monkeypatch.setattr(grouping, "_NEIGHBOURS", size)
    monkeypatch.setattr(placement, "_DOCUMENTS_PER_COPY", size)
    monkeypatch.setattr(placement, "_SECTION_ROWS", size)
    monkeypatch.setattr(placement, "_BINS_PER_DEAL", size)
    monkeypatch.setattr(placement, "_MAX_ORDERED_PLACES", size)
    monkeypatch.setattr(placement, "_MIN_ORDERS", 1)
    check(plan(lengths, seq_len=128, seed=5), lengths.tolist(), 128)


@pytest.mark.parametrize("documents", [1, 3, 4, 127, 128, 129, 1000, 4099])
def test_each_document_is_dealt_to_one_chunk_with_its_values(monkeypatch, documents):
    monkeypatch.setattr(grouping, "_CHUNK", 128)
    monkeypatch.setattr(grouping, "_DOCUMENTS_PER_LENGTH", 0)
    monkeypatch.setattr(grouping, "_NEIGHBOURS", 4)
    chunks = grouping.Chunks.deal(documents, 16, seed=1)
    numbers, dealt = np.arange(documents), []
    for chunk in range(len(chunks.sizes)):
        own = chunks.documents_of(chunk).tolist()
        assert chunks.shuffle(chunk, chunks.take(chunk, numbers)).tolist() == own
        dealt += own
    assert len(chunks.sizes) == -(-documents // 128)
    assert sorted(dealt) == numbers.tolist()


def test_documents_are_sorted_by_length(monkeypatch):
    """Chunk after chunk, starting with a different one per length, each in its shuffled order."""
    monkeypatch.setattr(grouping, "_CHUNK", 128)
    monkeypatch.setattr(grouping, "_DOCUMENTS_PER_LENGTH", 0)
    lengths = np.random.default_rng(0).integers(1, 20, 3000)
    chunks = grouping.Chunks.deal(len(lengths), 20, seed=1)
    by_length = np.empty(len(lengths), np.uint32)
    monkeypatch.setattr(work, "thread_count", lambda: 3)
    with work.worker_threads() as run:
        before = grouping.sort_chunks(lengths, by_length, 20, chunks, run)
        found = grouping.merge_chunks(by_length, before, chunks, 1, run)
    in_turn = [chunks.documents_of(chunk) for chunk in range(len(chunks.sizes))]
    expected = sorted(np.concatenate(in_turn).tolist(), key=lambda document: lengths[document])
    firsts = set()
    for length in range(1, 20):
        start, end = np.searchsorted(lengths[expected], [length, length + 1])
        own, same = found[start:end].tolist(), expected[start:end]
        firsts.add(same.index(own[0]))
        assert own[0] in [documents[lengths[documents] == length][:1] for documents in in_turn]
        assert own == same[same.index(own[0]) :] + same[: same.index(own[0])]
    assert len(firsts) > 10  # lengths begin with different chunks
    for turn, documents in enumerate(in_turn):
        assert (before[turn + 1] - before[turn]).tolist() == histogram(lengths[documents], 20).tolist()
    assert before[-1].tolist() == histogram(lengths, 20).tolist()


@pytest.mark.parametrize("threads", [1, 5])
def test_any_number_of_threads_gives_the_same_plan(monkeypatch, chunks, threads):
    lengths = np.random.default_rng(3).integers(1, 100, 5000)
    expected = plan(lengths, seq_len=128, seed=5)
    monkeypatch.setattr(work, "thread_count", lambda: threads)
    found = plan(lengths, seq_len=128, seed=5)
    assert found.order.tolist() == expected.order.tolist()
    assert found.row_documents.tolist() == expected.row_documents.tolist()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "seq_len"),
    [
        ((5.9, 0.35, 60, 900), 2048),
        ((5.9, 0.35, 60, 900), 8192),
        ((4.9, 0.6, 15, 1000), 2048),
        ((7, 1.2, 10, 8192), 8192),
    ],
    ids=["kdconv-2048", "kdconv-8192", "dailydialog-2048", "sharegpt-8192"],
)
def test_dialogue_lengths_fill_sequences_within_two_per_mille(shape, seq_len):
    middle, spread, low, high = shape
    lengths = np.random.default_rng(1).lognormal(middle, spread, 6_000).clip(low, high).astype(int)
    assert lower_bound(lengths, seq_len) >= 100
    assert plan(lengths, seq_len=seq_len, seed=0).rows <= 1.002 * lower_bound(lengths, seq_len)


def test_exact_completion_wins_if_lengths_are_similar():
    """60 + 34 + 34 fill 128; best-fit first puts two of 60 together and has nothing to fill the rest."""
    lengths = [60] * 30 + [34] * 60
    assert len(best_fit_decreasing(lengths, 128)) == 35
    assert plan(lengths, seq_len=128, seed=0).rows == 30


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.uint16, np.int32, np.uint32, np.int64, np.uint64])
def test_any_integers_give_the_same_plan(dtype):
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    expected, found = plan(lengths, seq_len=128, seed=1), plan(lengths.astype(dtype), seq_len=128, seed=1)
    assert found.order.tolist() == expected.order.tolist()
    assert found.row_documents.tolist() == expected.row_documents.tolist()


def test_a_seed_gives_one_plan_and_another_seed_another():
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    one, again, other = (plan(lengths, seq_len=128, seed=seed) for seed in (1, 1, 2))
    assert one.order.tolist() == again.order.tolist()
    assert one.row_documents.tolist() == again.row_documents.tolist()
    assert one.order.tolist() != other.order.tolist()
    assert one.rows == other.rows


def test_the_plan_of_a_few_documents_does_not_change():
    """Resumed and repeated runs rely on it: a change here changes the shards of every corpus."""
    found = plan([5, 3, 2, 6, 8, 1, 1, 4], seq_len=8, seed=0)
    assert contents(found, [5, 3, 2, 6, 8, 1, 1, 4]) == [[2, 6], [8], [5, 3], [1, 1, 4]]


def test_all_plans_are_equally_likely():
    """Two rows, each in two orders: 8 plans of 4 documents, 100 times each, give or take 9."""
    found = Counter(str(contents(plan([5, 3, 2, 6], seq_len=8, seed=seed), [5, 3, 2, 6])) for seed in range(800))
    assert len(found) == 8
    assert min(found.values()) > 70


def test_documents_of_one_length_go_to_all_places_equally_often():
    found = Counter(tuple(plan([4, 4, 4], seq_len=4, seed=seed).order.tolist()) for seed in range(600))
    assert len(found) == 6
    assert min(found.values()) > 70


def correlation(one, other):
    return abs(np.corrcoef(one, other)[0, 1])


def test_neither_length_nor_source_order_leaks(chunks):
    """Correlation with the place in the training order and inside the row, over 12 seeds; noise is about 0.007."""
    lengths = np.sort(np.random.default_rng(0).lognormal(4, 0.8, 20_000).clip(1, 1024).astype(int))
    place = np.arange(len(lengths))
    found = []
    for seed in range(12):
        planned = plan(lengths, seq_len=1024, seed=seed)
        length, source = lengths[planned.order], planned.order.astype(float)
        row = np.repeat(np.arange(planned.rows), planned.row_documents)
        inside = (place - planned.offsets[row] + 0.5) / planned.row_documents[row]
        pairs = ((length, inside), (source, inside), (length, row), (source, row))
        # The number of documents in a row depends on their lengths, but not on the place of the row.
        pairs = (*pairs, (planned.row_documents, np.arange(planned.rows)))
        found.append([np.corrcoef(*pair)[0, 1] for pair in pairs])
    assert np.abs(np.mean(found, axis=0)).max() < 0.03


@pytest.mark.slow
@pytest.mark.parametrize("distinct", [1, 10, 300])
def test_neighbours_in_the_corpus_are_not_neighbours_in_training(monkeypatch, chunks, distinct):
    """Neither the next document nor one dealt to the next chunk, however many documents have the same length.

    Random rows are a third of all rows apart on average; one pair in fifty is closer than a hundredth of them.
    """
    monkeypatch.setattr(grouping, "_CHUNK", 1024)
    random = np.random.default_rng(0)
    near = Counter()
    for seed in range(6):
        lengths = random.integers(40, 40 + distinct, 20_000)
        planned = plan(lengths, seq_len=512, seed=seed)
        row = np.empty(len(lengths), np.int64)
        row[planned.order] = np.repeat(np.arange(planned.rows), planned.row_documents)
        share = planned.row_documents @ (planned.row_documents - 1) / len(lengths) ** 2
        for lag in (1, 2, 4, 8, 64):
            apart = np.abs(row[lag:] - row[:-lag]) / planned.rows
            assert apart.mean() == pytest.approx(1 / 3, abs=0.015)
            assert (apart < 0.01).mean() == pytest.approx(0.02, abs=0.006)
            near[lag] += (apart == 0).mean() / share / 6
    assert max(near.values()) < 4


def test_documents_of_one_length_are_shuffled_among_their_places(chunks):
    """Source order is not correlated with the order of rows, places inside rows, or neighbouring places."""
    found = plan(np.full(20_000, 100), seq_len=1000, seed=0)
    assert found.row_documents.tolist() == [10] * 2000
    rows = found.order.reshape(2000, 10).astype(float)
    assert correlation(rows.mean(1), np.arange(2000)) < 0.08
    assert correlation(rows.ravel(), np.tile(np.arange(10), 2000)) < 0.03
    assert correlation(rows[:, :-1].ravel(), rows[:, 1:].ravel()) < 0.03
    assert (rows.argmax(1) == np.arange(2000) % 10).mean() < 0.15


@pytest.mark.parametrize("where", [0, 3])
@pytest.mark.parametrize("length", [0, -1, 129])
def test_lengths_out_of_range_are_refused(where, length):
    lengths = [5, 5, 5, 5]
    lengths[where] = length
    with pytest.raises(UsageError, match=f"document {where} has {length} tokens; expected 1 to seq_len = 128"):
        plan(lengths, seq_len=128, seed=0)


def test_of_many_lengths_out_of_range_the_first_is_named(monkeypatch):
    monkeypatch.setattr(grouping, "_CHUNK", 16)
    lengths = np.full(1000, 5)
    lengths[[321, 400, 999]] = 70_005, 0, 200  # the first would be 4,469 in 16 bits
    with pytest.raises(UsageError, match="document 321 has 70005 tokens"):
        plan(lengths, seq_len=128, seed=0)


@pytest.mark.parametrize("lengths", [[1.5, 2.0], [[1, 2], [3, 4]], ["a"]])
def test_anything_but_a_list_of_integers_is_refused(lengths):
    with pytest.raises(UsageError, match="expected one integer per document"):
        plan(lengths, seq_len=128, seed=0)


def test_no_documents_make_no_rows():
    found = plan([], seq_len=128, seed=0)
    assert found.rows == 0
    assert found.offsets.tolist() == [0]
    assert lower_bound([], 128) == 0
