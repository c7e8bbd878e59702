"""A run that dies at any step and is started again writes the bytes of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any

import pytest

import ismdata.convert.job
import ismdata.data.conversations
import ismdata.data.journal
import ismdata.pack.pipeline
import ismdata.pack.report
import ismdata.pack.shard_writer
import ismdata.pack.tokenize
from ismdata.convert.pipeline import convert
from ismdata.data.index import GrowingFile
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack.pipeline import pack
from ismdata.pack.report import PackReport
from ismdata.pack.template_check import Comparison, SkeletonMismatch
from ismdata.rendering.encoding import load_encoding
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer
from tests.support.reporters import Recorder

pytestmark = pytest.mark.slow  # kills convert and pack at every step

SEQ_LEN = 256


class Death(BaseException):
    """Stands for the end of the process."""


class DeathAfter:
    """Replaces os.fsync: dies after a number of calls. What was not synced is lost."""

    def __init__(self, calls: int) -> None:
        self.left = calls

    def __call__(self, handle: int) -> None:
        if self.left == 0:
            raise Death
        self.left -= 1


def talk(number: int) -> list[dict[str, Any]]:
    words = random.Random(number).choices(["apple", "river", "你好", "seven", "blue"], k=4 + number * 7 % 60)
    turns = [{"role": "user", "content": " ".join(words)}, {"role": "assistant", "content": " ".join(words[::-1])}]
    return turns * (1 + number % 3)


def write_corpus(path: Path, count: int) -> None:
    records: list[dict[str, Any]] = [{"id": f"c{k}", "messages": talk(k)} for k in range(count)]
    for k in range(5, count, 9):  # nothing to train, then too long
        records[k]["messages"] = [{"role": "user", "content": "alone"}]
    records[7]["messages"] = [*talk(1), {"role": "user", "content": "long " * 400}, *talk(2)[1:]]
    path.write_text("".join(json.dumps(record) + "\n" for record in records), encoding="utf-8")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.mktemp("crash")
    write_corpus(base / "chats.jsonl", 60)
    convert([str(base / "chats.jsonl")], base / "converted")
    return base / "converted"


def record_always(monkeypatch: pytest.MonkeyPatch) -> None:
    """Record after each batch, and do not wait for the disk: what was written survives a death inside the process."""
    monkeypatch.setattr(ismdata.data.journal, "_EVERY", 0.0)
    monkeypatch.setattr(ismdata.data.journal, "_SHARE", 0)
    monkeypatch.setattr("os.fsync", lambda handle: None)


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch, bytes_tokenizer: Path) -> None:
    """Many batches, checkpoints and shards in little data, and the tokenizer loaded once."""
    monkeypatch.setattr(ismdata.data.conversations, "_BATCH_CONVERSATIONS", 16)
    monkeypatch.setattr(ismdata.pack.shard_writer, "SHARD_TOKENS", 8 * SEQ_LEN)
    monkeypatch.setattr(ismdata.pack.shard_writer, "BATCH_TOKENS", 4 * SEQ_LEN)
    record_always(monkeypatch)
    loaded = load_encoding(str(bytes_tokenizer))
    monkeypatch.setattr(ismdata.pack.pipeline, "load_pretrained", lambda name: loaded.tokenizer.pretrained)
    monkeypatch.setattr(ismdata.pack.pipeline, "load_pretrained", lambda name: loaded.tokenizer.pretrained)
    monkeypatch.setattr(ismdata.pack.pipeline, "probe_encoding", lambda *arguments, **options: loaded)


def packed(converted: Path, output: Path, **options: Any) -> PackReport:
    # The reference backend, whose batches are counted here; tests/rendering/test_tokenizer_backends.py has the others.
    options = {"tokenizer": "bytes", "seq_len": SEQ_LEN, "tokenizer_backend": "hf"} | options
    return pack([converted], output, **options)


@pytest.fixture
def expected(converted: Path, tmp_path: Path, small_parts: None) -> dict[str, bytes]:
    folder = tmp_path / "expected"
    packed(converted, folder)
    assert verify(folder).ok
    index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    assert len(index["shards"]) >= 3
    assert set(index["counts"]["quarantined"]) == {"no_target", "over_long"}
    found = files_of(folder)
    shutil.rmtree(folder)
    return found


def alone(folder: Path) -> bool:
    return [path.name for path in folder.parent.iterdir()] == [folder.name]


# ---- death inside the process, at every step ----


def test_death_at_every_sync(
    converted: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every record, shard and rename syncs first: what was not synced before it is lost."""
    output = tmp_path / "out" / "packed"
    n, died = 0, True
    while died:
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", DeathAfter(n))
            try:
                packed(converted, output)
                died = False
            except Death:
                assert not output.exists() or files_of(output) == expected
        if output.exists():
            with pytest.raises(UsageError, match="is in use"):  # and removes what the crash left beside it
                packed(converted, output)
        else:
            packed(converted, output)
        assert files_of(output) == expected
        assert alone(output)
        shutil.rmtree(output)
        n += 1 if n < 4 else 11  # a record syncs 12 files: each of them has its turn
    assert n > 50


@contextmanager
def death_at_line(number: int) -> Iterator[list[int]]:
    """Die at the n-th executed line of the modules that write; yields the number of executed lines."""
    names = ["data/journal", "data/column_file", "data/output_folder", "data/conversations", "data/quarantine"]
    names += ["pack/pipeline", "pack/tokenize", "pack/spool", "convert/job", "convert/position", "convert/filters"]
    files = {str(Path(ismdata.__file__).parent / f"{name}.py") for name in names}
    assert all(Path(file).is_file() for file in files)
    count = [0]

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        if frame.f_code.co_filename not in files:
            return None
        if event == "line":
            count[0] += 1
            if count[0] == number:
                raise Death
        return trace

    sys.settrace(trace)
    try:
        yield count
    finally:
        sys.settrace(None)


# A death between the opening of a file and the block that closes it leaves it to Python, which says so.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_death_after_death_at_any_line(converted: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """Killed at random lines again and again, also while it resumes."""
    with death_at_line(0) as count:
        packed(converted, tmp_path / "measured")
    lines = count[0]
    assert lines > 1000
    output = tmp_path / "out" / "packed"
    draw = random.Random(3)
    deaths = 0
    for _ in range(8):
        while not output.exists():
            with suppress(Death), death_at_line(draw.randrange(1, lines)):
                deaths += 1
                packed(converted, output)
                deaths -= 1
        if not alone(output):
            with pytest.raises(UsageError, match="is in use"):
                packed(converted, output)
        assert files_of(output) == expected
        assert alone(output)
        shutil.rmtree(output)
    assert deaths > 8


def test_finished_work_is_not_done_again(
    converted: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output = tmp_path / "out" / "packed"
    made: list[int] = []
    make, describe = ismdata.pack.tokenize.make_documents, GrowingFile.describe
    described: list[str] = []

    def counted(*arguments: Any) -> Any:
        if len(made) == 2:
            raise Death
        made.append(1)
        return make(*arguments)

    def third(file: GrowingFile, rows: int) -> Any:
        if len(described) == 2:
            raise Death
        described.append(file.path.name)
        return describe(file, rows)

    monkeypatch.setattr(ismdata.pack.tokenize, "make_documents", counted)
    with pytest.raises(Death):
        packed(converted, output)
    made.clear()
    monkeypatch.setattr(ismdata.pack.tokenize, "make_documents", lambda *a: made.append(1) or make(*a))
    monkeypatch.setattr(GrowingFile, "describe", third)
    recorder = Recorder()
    with pytest.raises(Death):
        packed(converted, output, reporter=recorder)
    assert len(made) == 3  # of four: the second had been made, but not spooled
    assert any("16 of 60 conversations tokenized, shards written: 0" in note for note in recorder.notes)
    monkeypatch.setattr(ismdata.pack.tokenize, "make_documents", lambda *a: pytest.fail("tokenized again"))
    monkeypatch.setattr(
        GrowingFile, "describe", lambda file, rows: described.append(file.path.name) or describe(file, rows)
    )
    packed(converted, output, reporter=recorder)
    assert any("60 of 60 conversations tokenized, shards written: 2" in note for note in recorder.notes)
    shards = [name for name in described if name.startswith("shard")]
    assert shards == sorted(set(shards))
    assert files_of(output) == expected


def test_the_decision_to_render_one_by_one_is_kept(
    converted: Path, expected: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A template that skeletons cannot render is detected once; after a crash the run resumes without skeletons."""
    output = tmp_path / "out" / "packed"
    prepare, used = ismdata.pack.tokenize.template_check.prepare_comparison, []

    def differs(encoder: Any, requests: Any) -> Comparison:
        used.append(encoder.cache.use_skeletons)
        if encoder.cache.use_skeletons and len(used) == 3:
            raise SkeletonMismatch("chats.jsonl:40")
        if len(used) == 6:
            raise Death
        return prepare(encoder, requests)

    monkeypatch.setattr(ismdata.pack.tokenize.template_check, "prepare_comparison", differs)
    with pytest.raises(Death):
        packed(converted, output)
    packed(converted, output)
    assert used == [True, True, True, False, False, False, False, False, False]
    assert files_of(output) == expected


# ---- disks ----


@contextmanager
def small_disk(folder: Path, options: str) -> Iterator[Path]:
    # Only a real file system behaves like a full one.
    if os.geteuid() != 0 or sys.platform != "linux":
        pytest.skip("mounting a small file system takes root on Linux")
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)], check=False).returncode:
        pytest.skip("no file system can be mounted here")  # root in a container may lack the right to
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def test_a_disk_that_fills_up(converted: Path, expected: dict[str, bytes], tmp_path: Path) -> None:
    """While spooling, writing shards or saving the tokenizer: one error, and nothing is left, until everything fits."""
    full = 0
    with small_disk(tmp_path / "small", "size=16k") as disk:
        while True:
            try:
                packed(converted, disk / "packed")
                break
            except DataError as error:
                assert re.search(r"packed: writing failed \(No space left on device.*\. Nothing was kept", str(error))
            assert list(disk.iterdir()) == []
            full += 1
            size = f"remount,size={16 + 24 * full}k"
            subprocess.run(["mount", "-o", size, str(disk)], check=True)
        assert files_of(disk / "packed") == expected
    assert full > 5


def test_a_disk_that_cannot_be_written(converted: Path, tmp_path: Path, small_parts: None) -> None:
    with (
        small_disk(tmp_path / "fixed", "ro") as disk,
        pytest.raises(DataError, match=r"packed: cannot be written \(Read-only file system\)\. Name another output"),
    ):
        packed(converted, disk / "packed")


# ---- kill -9 and SIGTERM from outside ----

#: The command, with many records and a pause after each.
SLOW = """
import sys, time
import ismdata.data.journal, ismdata.pack.tokenize
from ismdata.cli import main

ismdata.data.conversations._BATCH_CONVERSATIONS = 8
ismdata.data.journal._EVERY = ismdata.data.journal._SHARE = 0
record = ismdata.data.journal.Journal.record
ismdata.data.journal.Journal.record = lambda *arguments: (record(*arguments), time.sleep(0.3))
main()
"""


@contextmanager
def running(*words: object) -> Iterator[subprocess.Popen[str]]:
    """The command in its own process."""
    with subprocess.Popen(
        [sys.executable, "-c", SLOW, *map(str, words)], stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        yield process
        if process.poll() is None:
            process.kill()


def wait_for_records(partial: Path, count: int) -> None:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        journal = partial / "journal.jsonl"
        if journal.exists() and journal.read_bytes().count(b'{"state"') >= count:
            return
        time.sleep(0.01)
    pytest.fail("no record within a minute")


def test_killed_terminated_and_two_at_once(converted: Path, bytes_tokenizer: Path, tmp_path: Path) -> None:
    output, partial = tmp_path / "out" / "packed", tmp_path / "out" / ".packed.partial"
    words = ("pack", converted, "-o", output, "--tokenizer", bytes_tokenizer, "--seq-len", SEQ_LEN)
    with running(*words) as process:
        wait_for_records(partial, 2)
        with pytest.raises(UsageError, match=rf"packed: process {process.pid} is writing it"):
            pack([converted], output, tokenizer=str(bytes_tokenizer), seq_len=SEQ_LEN)
        os.killpg(process.pid, signal.SIGKILL)
    assert not output.exists()
    with running(*words) as process:
        wait_for_records(partial, 4)
        process.terminate()
        _, said = process.communicate(timeout=60)
        assert process.returncode == 143
        assert "Resuming the interrupted run" in said
        assert "terminated" in said
    assert partial.exists()
    assert not (output.parent / ".packed.lock").exists()
    pack([converted], output, tokenizer=str(bytes_tokenizer), seq_len=SEQ_LEN, workers=1)
    pack([converted], tmp_path / "direct", tokenizer=str(bytes_tokenizer), seq_len=SEQ_LEN)
    assert files_of(output) == files_of(tmp_path / "direct")
    assert alone(output)
