"""Converting survives a death at any step; interrupted folders are refused to other calls."""

from __future__ import annotations

import gzip
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

import ismdata.convert.job
import ismdata.data.conversations
import ismdata.data.journal
import ismdata.pack.pipeline
import ismdata.pack.report
import ismdata.pack.shard_writer
import ismdata.pack.tokenize
from ismdata.convert.options import Cleaning, Selection
from ismdata.convert.pipeline import convert
from ismdata.convert.sources import framing
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from tests.hostile.test_crash import Death as Death
from tests.hostile.test_crash import DeathAfter as DeathAfter
from tests.hostile.test_crash import alone as alone
from tests.hostile.test_crash import converted as converted
from tests.hostile.test_crash import death_at_line as death_at_line
from tests.hostile.test_crash import expected as expected
from tests.hostile.test_crash import files_of as files_of
from tests.hostile.test_crash import packed as packed
from tests.hostile.test_crash import record_always as record_always
from tests.hostile.test_crash import small_parts as small_parts
from tests.hostile.test_crash import write_corpus as write_corpus
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer

pytestmark = pytest.mark.slow  # kills convert and pack at every step

# ---- convert ----

CONVERSIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "cleaned-and-split": {"selection": Selection(cleaning=Cleaning(dedup="exact"), split="0.7/0.3")},
    "sampled": {"selection": Selection(sample=25, seed=1)},
    "splits": {"selection": Selection(cleaning=Cleaning(dedup="exact"), sample=60)},
}


@pytest.fixture
def corpora(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Two sources with broken and repeated records, which are read in many blocks and written to many shards."""
    monkeypatch.setattr(framing.ByteQueue.more, "__defaults__", (4000,))
    monkeypatch.setattr(ismdata.convert.job, "_BATCH_BYTES", 4000)
    monkeypatch.setattr(ismdata.data.conversations, "SHARD_BYTES", 8000)
    record_always(monkeypatch)
    write_corpus(tmp_path / "a.jsonl", 60)
    lines = (tmp_path / "a.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    lines[3], lines[20] = '{"messages": [\n', lines[1]
    (tmp_path / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write("".join(lines[30:50]))
    return [str(tmp_path / "a.jsonl"), str(tmp_path / "b.jsonl.gz")]


@pytest.mark.parametrize("kind", CONVERSIONS)
def test_convert_dies_at_every_sync_and_at_random_lines(
    kind: str, corpora: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if kind == "splits":
        names = [tmp_path / "train.jsonl", tmp_path / "test.jsonl.gz"]
        corpora = [str(Path(path).rename(name)) for path, name in zip(corpora, names, strict=True)]
    convert(corpora, tmp_path / "direct", **CONVERSIONS[kind])
    expected = files_of(tmp_path / "direct")
    assert sum(name.endswith(".arrow") for name in expected) >= 2
    output = tmp_path / "out" / "converted"
    with death_at_line(0) as count:
        convert(corpora, output, **CONVERSIONS[kind])
    lines = count[0]
    shutil.rmtree(output)
    draw = random.Random(5)
    n, died = 0, True
    while died:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", DeathAfter(n))
            try:
                convert(corpora, output, **CONVERSIONS[kind])
                died = False
            except Death:
                assert not output.exists() or files_of(output) == expected
        while not output.exists():
            with suppress(Death), death_at_line(draw.randrange(1, 2 * lines)):
                convert(corpora, output, workers=1 + n % 2, **CONVERSIONS[kind])
        if not alone(output):
            with pytest.raises(UsageError, match="is in use"):
                convert(corpora, output, **CONVERSIONS[kind])
        assert files_of(output) == expected
        assert alone(output)
        shutil.rmtree(output)
        n += 1 if n < 3 else 9
    assert n > 20


def test_convert_is_refused_a_source_that_changed(corpora: list[str], tmp_path: Path) -> None:
    output = tmp_path / "out" / "converted"
    with pytest.raises(Death), pytest.MonkeyPatch.context() as patch:
        patch.setattr("os.fsync", DeathAfter(12))
        convert(corpora, output)
    before = files_of(output.parent)
    with pytest.raises(UsageError, match=r"b\.jsonl\.gz is not given now"):
        convert(corpora[:1], output)
    with Path(corpora[0]).open("a", encoding="utf-8") as file:
        file.write("{}\n")
    with pytest.raises(
        DataError, match=r"the interrupted run differs from this one: .*a\.jsonl has changed: it is \d+ bytes"
    ):
        convert(corpora, output)
    assert files_of(output.parent) == before
    convert(corpora, output, overwrite=True)
    assert verify(output).ok
    assert alone(output)


# ---- refusals ----


@contextmanager
def interrupted(converted: Path, output: Path, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Iterator[Path]:
    """A folder that an interrupted run left."""

    def die(*arguments: Any) -> None:
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(ismdata.pack.report, "describe_file", die)
        packed(converted, output, **options)
    partial = output.parent / f".{output.name}.partial"
    assert partial.exists()
    yield partial


def test_another_call_is_refused_and_loses_nothing(
    converted: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "packed"
    with interrupted(converted, output, monkeypatch) as partial:
        before = files_of(partial)
        with pytest.raises(UsageError, match=r"--seq-len is 512 and was 256\. .*--overwrite"):
            packed(converted, output, seq_len=512)
        other = tmp_path / "other" / "converted"
        write_corpus(tmp_path / "other.jsonl", 61)
        convert([str(tmp_path / "other.jsonl")], other)
        with pytest.raises(UsageError, match="was not given then"):
            packed(other, output)
        assert files_of(partial) == before
        packed(converted, output, overwrite=True)  # the same call: --overwrite resumes it
    assert files_of(output) == expected
    assert alone(output)


def test_overwrite_starts_over_with_another_call(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    packed(converted, tmp_path / "direct", seq_len=512)
    output = tmp_path / "out" / "packed"
    with interrupted(converted, output, monkeypatch):
        packed(converted, output, seq_len=512, overwrite=True)
    assert files_of(output) == files_of(tmp_path / "direct")
    assert alone(output)


def test_a_source_and_a_tokenizer_that_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small_parts: None
) -> None:
    write_corpus(tmp_path / "chats.jsonl", 30)
    converted, output = tmp_path / "converted", tmp_path / "out" / "packed"
    convert([str(tmp_path / "chats.jsonl")], converted)
    with interrupted(converted, output, monkeypatch):
        write_corpus(tmp_path / "chats.jsonl", 31)
        convert([str(tmp_path / "chats.jsonl")], converted, overwrite=True)
        with pytest.raises(DataError, match=r"converted has changed: it is rows 31"):
            packed(converted, output)
        write_corpus(tmp_path / "chats.jsonl", 30)
        convert([str(tmp_path / "chats.jsonl")], converted, overwrite=True)
        loaded = ismdata.pack.pipeline.probe_encoding(ismdata.pack.pipeline.load_pretrained("bytes"), name="bytes")
        with monkeypatch.context() as patch:
            patch.setitem(loaded.tokenizer.__dict__, "sha256", "another")
            with pytest.raises(UsageError, match=r"the tokenizer is .*another.* and was "):
                packed(converted, output)
        packed(converted, output)
    assert verify(output).ok


@pytest.mark.parametrize("harm", ["shard", "spool", "quarantine"])
def test_an_interrupted_run_that_was_tampered_with(
    harm: str, converted: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "packed"
    finish = ismdata.data.journal.Journal.finish

    def once(journal: Any, *arguments: Any) -> None:
        finish(journal, *arguments)
        raise Death

    with monkeypatch.context() as patch, pytest.raises(Death):
        patch.setattr(ismdata.data.journal.Journal, "finish", once)
        packed(converted, output)
    name = {"shard": "shard-00000.arrow", "spool": "scratch/spans", "quarantine": "quarantine.jsonl"}[harm]
    os.truncate(output.parent / ".packed.partial" / name, 4)
    with pytest.raises(DataError, match=rf"{Path(name).name}: .*run the same command again"):
        packed(converted, output)
    packed(converted, output)
    assert files_of(output) == expected
