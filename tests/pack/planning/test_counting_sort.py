"""The counting sort against Python's sort, which is stable too."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.pack.planning import counting_sort
from ismdata.pack.planning.counting_sort import sort_by_key


@st.composite
def keyed(draw):
    """A number of keys, which may exceed 16 bits, and keys: often few different ones, or all equal."""
    keys = draw(st.sampled_from([1, 2, 7, 256, 257, 65_536, 65_537, 131_073]))
    return keys, draw(st.lists(st.integers(0, keys - 1), max_size=60))


@pytest.mark.parametrize("few", [1 << 16, 0], ids=["numpy", "scipy"])
@given(case=keyed())
def test_equals_pythons_sort(few, case):
    keys, key = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(counting_sort, "_FEW", few)
        values = np.arange(len(key), dtype=np.uint32)[::-1].copy()
        counts, found = sort_by_key(np.array(key, np.int32), values, keys=keys)
    pairs = sorted(zip(key, values.tolist(), strict=True), key=lambda pair: pair[0])
    assert found.tolist() == [value for _, value in pairs]
    assert found.dtype == np.uint32
    assert len(counts) == keys
    assert {each: count for each, count in enumerate(counts.tolist()) if count} == Counter(key)


def test_many_values_are_sorted_the_same_way():
    """Enough values to be sorted by scipy, with values that need all 32 bits."""
    random = np.random.default_rng(0)
    key = random.integers(0, 8193, counting_sort._FEW, dtype=np.int32)
    values = random.integers(0, 1 << 32, len(key), dtype=np.uint32)
    counts, found = sort_by_key(key, values, keys=8193)
    assert (found == values[np.argsort(key, kind="stable")]).all()
    assert (counts == np.bincount(key, minlength=8193)).all()
