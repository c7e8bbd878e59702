"""Document lengths to a plan: which documents share a sequence, in which order. It sees nothing but integers.

Two plans are made, the one with fewer sequences is taken (best-fit at a tie):

- best-fit-decreasing, over the histogram of lengths instead of over the documents. Bins that hold the same lengths are
  one class with a count, so the work grows with the number of distinct lengths and not with the number of documents,
  while the bins are those of the item-by-item algorithm.
- exact completion: documents drawn as the corpus has them, then one, two or three that fill the sequence to the last
  token. It wins where lengths are alike and best-fit, left with nothing short, finds nothing to close its gaps with.

Which documents of one length go where, the order of the documents inside a sequence, and the order of the sequences are
then shuffled, so that neither lengths nor the order of the corpus shape the order of training.

>>> plan([5, 3, 2, 6], seq_len=8, seed=0).row_documents.tolist()
[2, 2]

Shape legend: D documents, R rows (sequences), T = seq_len.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ismdata.errors import UsageError

#: Best-fit within this factor of the lower bound is taken as it is: no other plan can save more.
_GOOD_ENOUGH = 1.0001

#: Exact completion draws this often for one bin before it fills it as well as it can.
_DRAWS = 4

#: A pattern found by exact completion is used for one part in so many of the remaining documents at once.
_PATTERN_SHARE = 1024

#: How many lengths are tried as the first of three that fill a bin.
_TRIPLES = 64

#: Keys to sort are built in pieces of this many, so that temporaries stay small beside them.
_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every document goes. Row r holds the documents `order[offsets[r] : offsets[r + 1]]`, laid end to end."""

    order: NDArray[np.uint32]  # [D] document numbers, in the order in which they are laid down
    row_documents: NDArray[np.int32]  # [R] documents per sequence, at least 1

    @property
    def rows(self) -> int:
        """How many sequences there are."""
        return len(self.row_documents)

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where in `order` each row starts, int64[R + 1]; the last is D."""
        return np.concatenate([[0], np.cumsum(self.row_documents, dtype=np.int64)])

    def documents(self, row: int) -> NDArray[np.uint32]:
        """The documents of one row, in order."""
        start = int(self.row_documents[:row].sum(dtype=np.int64))
        return self.order[start : start + int(self.row_documents[row])]


@dataclass(frozen=True, kw_only=True)
class _Bins:
    """Classes of identical bins. Class c stands for `count[c]` bins; entry i puts `times[i]` documents of length
    `length[i]` into every bin of class `owner[i]`."""

    count: NDArray[np.int64]  # [C]
    owner: NDArray[np.int64]  # [E]
    length: NDArray[np.int64]  # [E]
    times: NDArray[np.int64]  # [E]

    @property
    def rows(self) -> int:
        return int(self.count.sum())


def lower_bound(lengths: ArrayLike, seq_len: int) -> int:
    """The fewest sequences that hold that many tokens, ceil(sum / T), were documents liquid."""
    return -(-int(np.asarray(lengths).sum(dtype=np.int64)) // seq_len)


def plan(lengths: ArrayLike, *, seq_len: int, seed: int) -> Plan:
    """Lay documents into sequences of `seq_len` tokens. The same arguments give the same plan.

    lengths: integers[D], 1 to seq_len each. Raises UsageError for a length outside that range, naming the document.
    """
    lengths = np.asarray(lengths)
    if lengths.size == 0:
        return Plan(order=np.zeros(0, np.uint32), row_documents=np.zeros(0, np.int32))
    _check_lengths(lengths, seq_len)
    bins = _best_bins(_histogram(lengths, seq_len), seq_len)
    return _assign(lengths, bins, np.random.Generator(np.random.PCG64(seed)))


def _check_lengths(lengths: NDArray[Any], seq_len: int) -> None:
    if lengths.ndim != 1 or not np.issubdtype(lengths.dtype, np.integer):
        raise UsageError(f"lengths are {lengths.dtype} of shape {lengths.shape}; expected one integer per document")
    if len(lengths) > np.iinfo(np.uint32).max:
        raise UsageError(f"{len(lengths)} documents; expected fewer than 2^32. Pack the corpus in parts")
    for bad in (int(lengths.argmin()), int(lengths.argmax())):
        if not 1 <= lengths[bad] <= seq_len:
            raise UsageError(
                f"document {bad} has {lengths[bad]} tokens; expected 1 to seq_len = {seq_len}. "
                "Split or drop over-long documents first"
            )


def _histogram(lengths: NDArray[Any], seq_len: int) -> NDArray[np.int64]:
    """How many documents have each length, int64[T + 1]. In pieces: numpy counts int64, which narrow lengths become."""
    counts = np.zeros(seq_len + 1, np.int64)
    for start in range(0, len(lengths), _CHUNK):
        counts += np.bincount(lengths[start : start + _CHUNK].astype(np.int64), minlength=seq_len + 1)
    return counts


def _best_bins(histogram: NDArray[np.int64], seq_len: int) -> _Bins:
    """The plan with fewer sequences of the two; best-fit at a tie."""
    best_fit = _best_fit_decreasing(histogram, seq_len)
    tokens = int(histogram @ np.arange(len(histogram)))
    if best_fit.rows <= -(-tokens // seq_len) * _GOOD_ENOUGH:
        return best_fit
    exact = _exact_completion(histogram, seq_len)
    return exact if exact.rows < best_fit.rows else best_fit


def _best_fit_decreasing(histogram: NDArray[np.int64], seq_len: int) -> _Bins:
    """Longest documents first, each into the fullest bin that still has room for it.

    All bins of one class take the same documents, so a length is laid down in a few steps however many documents have
    it: the fullest bins with room r take floor(r / L) documents of length L each before any other bin is looked at,
    for each documents makes its bin fuller still. A class that is filled leaves room r mod L < r / 2, hence is
    visited at most log2(T) times.
    """
    # What a class holds is a linked list, newest entry first: bins of one origin share their tail.
    entry_length: list[int] = []
    entry_times: list[int] = []
    entry_before: list[int] = []

    def put(times: int, length: int, before: int) -> int:
        entry_length.append(length)
        entry_times.append(times)
        entry_before.append(before)
        return len(entry_length) - 1

    # Classes are (room, newest entry, bins). Those with room for the present length are on a stack, the fullest on top.
    # The others wait by their room; as the length sinks they come to have room again, and less of it than all on the
    # stack: so the stack stays sorted without being searched.
    roomy: list[tuple[int, int, int]] = []
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in range(seq_len)]
    above = seq_len
    for length in np.flatnonzero(histogram)[::-1].tolist():
        for room in range(above - 1, length - 1, -1):
            roomy.extend(waiting[room])
            waiting[room].clear()
        above = length
        left = int(histogram[length])
        while left:
            room, newest, bins = roomy.pop() if roomy else (seq_len, -1, left)
            fits = room // length
            filled = min(bins, left // fits)
            if filled:
                rest = room - fits * length
                waiting[rest].append((rest, put(fits, length, newest), filled))
                left -= filled * fits
            if filled < bins:
                untouched = bins - filled - (left > 0)
                if untouched and newest >= 0:
                    roomy.append((room, newest, untouched))
                if left:  # fewer than one bin takes
                    roomy.append((room - left * length, put(left, length, newest), 1))
                    left = 0
    classes = roomy + [class_ for row in waiting for class_ in row]
    newest_of = np.array([newest for _, newest, _ in classes], np.int64)
    before_of = np.array(entry_before, np.int64)
    # Unroll all lists side by side, one entry of each a step.
    owners, entries = [], []
    owner = np.arange(len(classes))
    at = newest_of
    while len(at):
        owners.append(owner)
        entries.append(at)
        at = before_of[at]
        owner, at = owner[at >= 0], at[at >= 0]
    entry = np.concatenate(entries)
    return _Bins(
        count=np.array([bins for _, _, bins in classes], np.int64),
        owner=np.concatenate(owners),
        length=np.array(entry_length, np.int64)[entry],
        times=np.array(entry_times, np.int64)[entry],
    )


def _exact_completion(histogram: NDArray[np.int64], seq_len: int) -> _Bins:
    """Bins filled to the last token, as long as that can be; then whatever is left.

    Drawing documents in proportion to the histogram keeps its shape, so exact ends can be found nearly to the last bin.
    What remains after each quarter of the documents is also packed best-fit, and the shortest of these plans is
    returned. A pattern is used for a small share of the remaining documents at once: their number grows with the
    logarithm of the corpus.
    """
    rng = np.random.Generator(np.random.PCG64(seq_len))  # part of the algorithm: no seed may change the number of bins
    stock = histogram.astype(np.int64)
    patterns: list[tuple[NDArray[np.int64], NDArray[np.int64], int]] = []
    rows, documents = 0, int(stock.sum())
    best, best_rows, best_patterns, checkpoint = stock, np.iinfo(np.int64).max, 0, documents
    while documents:
        if documents <= checkpoint:
            checkpoint = documents * 3 // 4
            with_rest = rows + _best_fit_decreasing(stock, seq_len).rows
            if with_rest < best_rows:
                best, best_rows, best_patterns = stock.copy(), with_rest, len(patterns)
        pattern = _fill_bin(stock, seq_len, rng)
        length, times = np.unique(pattern, return_counts=True)
        bins = min(int((stock[length] // times).min()), 1 + documents // (len(pattern) * _PATTERN_SHARE))
        stock[length] -= times * bins
        patterns.append((length, times, bins))
        rows += bins
        documents -= len(pattern) * bins
    if rows < best_rows:
        best, best_patterns = stock, len(patterns)
    return _with_patterns(_best_fit_decreasing(best, seq_len), patterns[:best_patterns])


def _fill_bin(stock: NDArray[np.int64], seq_len: int, rng: np.random.Generator) -> list[int]:
    """Lengths for one bin, at least one, out of the stock (int64[T + 1], documents per length; left as it was)."""
    present = np.flatnonzero(stock)
    up_to = np.cumsum(stock[present])
    documents = int(up_to[-1])
    mean = float(present @ stock[present]) / documents
    picked: list[int] = []
    stock = stock.copy()
    for attempt in range(_DRAWS):
        draw = rng.choice(documents, size=min(documents, int(seq_len / mean) + 1), replace=False)
        head = present[np.searchsorted(up_to, draw, side="right")]
        # The end is found most often where it is two or three documents long.
        kept = int(np.searchsorted(np.cumsum(head), seq_len - (2.2 + attempt % 2) * mean, side="right"))
        picked = head[:kept].tolist()
        np.subtract.at(stock, head[:kept], 1)
        room = seq_len - sum(picked)
        end = _exact_end(stock, room, present)
        if end or not room:
            return picked + end
        if attempt < _DRAWS - 1:
            np.add.at(stock, head[:kept], 1)
    while True:  # nothing fits exactly: the longest that fits, until something does
        fitting = np.flatnonzero(stock[: room + 1])
        if not len(fitting):
            return picked
        longest = int(fitting[-1])
        picked.append(longest)
        stock[longest] -= 1
        room -= longest
        end = _exact_end(stock, room, present)
        if end:
            return picked + end


def _exact_end(stock: NDArray[np.int64], room: int, present: NDArray[np.int64]) -> list[int]:
    """One, two or three lengths from the stock that sum to `room`, the fewest first; empty if none were found."""
    if room < len(stock) and stock[room]:
        return [room]
    pair = _exact_pair(stock, room)
    if pair:
        return pair
    for third in present[: np.searchsorted(present, room)][::-1][:_TRIPLES].tolist():
        if stock[third]:
            stock[third] -= 1
            pair = _exact_pair(stock, room - third)
            stock[third] += 1
            if pair:
                return [third, *pair]
    return []


def _exact_pair(stock: NDArray[np.int64], room: int) -> list[int]:
    """Two lengths from the stock that sum to `room`, as unequal as can be; empty if there are none."""
    longest = min(room - 1, len(stock) - 1)
    shortest = room - longest
    if longest < shortest:
        return []
    in_stock = stock[shortest : longest + 1] > 0
    both = in_stock & in_stock[::-1]
    if room % 2 == 0 and stock[room // 2] < 2:
        both[room // 2 - shortest] = False
    found = np.flatnonzero(both)
    return [int(found[-1]) + shortest, room - int(found[-1]) - shortest] if len(found) else []


def _with_patterns(bins: _Bins, patterns: list[tuple[NDArray[np.int64], NDArray[np.int64], int]]) -> _Bins:
    """The same bins and, after them, a class for each pattern of lengths, times and number of bins."""
    entries = [len(length) for length, _, _ in patterns]
    return _Bins(
        count=np.concatenate([bins.count, np.array([count for _, _, count in patterns], np.int64)]),
        owner=np.concatenate([bins.owner, np.repeat(np.arange(len(patterns)) + len(bins.count), entries)]),
        length=np.concatenate([bins.length, *(length for length, _, _ in patterns)]),
        times=np.concatenate([bins.times, *(times for _, times, _ in patterns)]),
    )


def _assign(lengths: NDArray[Any], bins: _Bins, rng: np.random.Generator) -> Plan:
    """Documents into bins, bins into rows, all at random within what the bins prescribe.

    Both shuffles are sorts of 64-bit keys that end in the document's number: by (length, random), which groups the
    documents of one length in random order, and by (row, random), which groups those of one row in random order. A sort
    is what numpy does fastest, and of distinct keys it has one outcome on any machine.
    """
    documents, rows = len(lengths), bins.rows
    low = max(documents - 1, 1).bit_length()
    key = np.empty(documents, np.uint64)

    top = int(lengths.max()).bit_length()
    for start in range(0, documents, _CHUNK):
        stop = min(start + _CHUNK, documents)
        key[start:stop] = np.arange(start, stop, dtype=np.uint64)
        _add_high_bits(key[start:stop], lengths[start:stop], top, low, rng)
    key.sort()
    key &= np.uint64((1 << low) - 1)

    # Sorted by length, documents come in the order in which `fill`, sorted likewise, asks for them.
    fill = np.argsort(bins.length, kind="stable")
    owner, times = bins.owner[fill], bins.times[fill]
    wanted = bins.count[owner] * times
    first_row = (np.cumsum(bins.count) - bins.count)[owner]
    place = rng.permutation(rows)
    row_documents = np.zeros(rows, np.int32)
    row_documents[place] = np.repeat(
        np.bincount(bins.owner, weights=bins.times, minlength=len(bins.count)).astype(np.int32), bins.count
    )
    top = max(rows - 1, 1).bit_length()
    ends = np.cumsum(wanted)
    for start in range(0, documents, _CHUNK):
        stop = min(start + _CHUNK, documents)
        entries = np.arange(np.searchsorted(ends, start, side="right"), np.searchsorted(ends, stop) + 1)
        inside = np.minimum(ends[entries], stop) - np.maximum(ends[entries] - wanted[entries], start)
        within = np.arange(start, stop) - np.repeat(ends[entries] - wanted[entries], inside)
        row = np.repeat(first_row[entries], inside) + within // np.repeat(times[entries], inside)
        _add_high_bits(key[start:stop], place[row], top, low, rng)
    key.sort()
    key &= np.uint64((1 << low) - 1)
    return Plan(order=key.astype(np.uint32), row_documents=row_documents)


def _add_high_bits(key: NDArray[np.uint64], group: NDArray[Any], top: int, low: int, rng: np.random.Generator) -> None:
    """Put `group` (of `top` bits) above the `low` bits that keys hold, and random bits into the gap between the two."""
    gap = 64 - top - low
    noise = rng.integers(0, 1 << gap, size=len(key), dtype=np.uint64)
    key |= (group.astype(np.uint64) << np.uint64(64 - top)) | (noise << np.uint64(low))
