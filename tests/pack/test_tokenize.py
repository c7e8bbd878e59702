"""The sample on which tokenizer backends are compared: from batches spread over the corpus; others are not read."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ismdata.convert.pipeline import convert
from ismdata.data.conversations import ConvertedFolder
from ismdata.errors import DataError
from ismdata.memory import kept_memory
from ismdata.pack.tokenize import sampled_texts
from ismdata.rendering.tokenizer_backends import choose_sample


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[ConvertedFolder]]:
    """Folders of 400 and 250 conversations, 50 per record batch, two batches per file, 12 per batch of `batches`."""
    folder = tmp_path_factory.mktemp("sampled")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("ismdata.convert.job._BATCH_BYTES", 1)
        patch.setattr("ismdata.data.conversations.SHARD_BYTES", 8_000)
        patch.setattr("ismdata.data.conversations._BATCH_CONVERSATIONS", 12)
        made = []
        for name, count in (("a", 400), ("b", 250)):
            paths = [folder / f"{name}{first}.jsonl" for first in range(0, count, 50)]
            for number, path in enumerate(paths):
                talks = [
                    [("user", f"{name} asks {k}"), ("assistant", "so " * (1 + k % 7))]
                    for k in range(50 * number, 50 * number + 50)
                ]
                lines = [{"messages": [{"role": role, "content": text} for role, text in talk]} for talk in talks]
                path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
            convert([str(path) for path in paths], folder / name)
            made.append(ConvertedFolder(folder / name))
        yield made


def test_the_fixture_has_several_files_and_batches(sources: list[ConvertedFolder]) -> None:
    assert len(sources[0].files) > 2
    assert len(list(sources[0].batches())) > 2 * len(sources[0].files)


@given(st.sets(st.integers(0, 399), max_size=6))
def test_batches_of_some_rows_are_those_of_all(sources: list[ConvertedFolder], rows: set[int]) -> None:
    expected, first = [], 0
    for batch in sources[0].batches():
        if rows & set(range(first, first + len(batch))):
            expected.append(batch)
        first += len(batch)
    found = list(sources[0].batches_of(np.array(sorted(rows), np.int64)))
    assert [batch.to_pylist() for batch in found] == [batch.to_pylist() for batch in expected]


@given(st.integers(0, 450))
def test_batches_from_a_row_on_are_the_rest_of_all(sources: list[ConvertedFolder], start: int) -> None:
    batches = [batch.to_pylist() for batch in sources[0].batches()]
    rest, before = [], 0
    for batch in batches:
        rest.append(batch[max(0, start - before) :])
        before += len(batch)
    assert [batch.to_pylist() for batch in sources[0].batches(start)] == [batch for batch in rest if batch]
    assert sources[0].table().to_pylist() == [row for batch in batches for row in batch]


def test_the_sample_is_from_batches_spread_over_the_corpus(sources: list[ConvertedFolder]) -> None:
    places = {0, 162, 325, 487}  # of 650 rows; the last is in the second folder
    expected: list[str] = []
    first = 0
    for batch in (batch for source in sources for batch in source.batches()):
        if places & set(range(first, first + len(batch))):
            contents = [message["content"] or "" for talk in batch.column("messages").to_pylist() for message in talk]
            texts = pa.array(contents, pa.large_string())
            expected += texts.take(pa.array(choose_sample(texts))).to_pylist()
        first += len(batch)
    assert first == 650
    assert sampled_texts(sources).to_pylist() == expected
    assert sampled_texts([]).to_pylist() == []


def test_a_broken_file_of_the_sample_is_named(sources: list[ConvertedFolder], tmp_path: Path) -> None:
    for path in sources[1].folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    broken = tmp_path / sources[1].files[0].name
    broken.write_bytes(b"\0" * broken.stat().st_size)
    with pytest.raises(DataError, match=f"{broken.name}: not a readable Arrow stream"):
        sampled_texts([ConvertedFolder(tmp_path)])


def test_the_earlier_memory_pool_is_restored(monkeypatch: pytest.MonkeyPatch) -> None:
    used: list[pa.MemoryPool] = []
    monkeypatch.setattr(pa, "set_memory_pool", used.append)
    with pytest.raises(ZeroDivisionError), kept_memory():
        assert [pool.backend_name for pool in used] == ["system"]
        raise ZeroDivisionError
    assert [pool.backend_name for pool in used[1:]] == [pa.default_memory_pool().backend_name]
