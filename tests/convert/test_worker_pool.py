"""Processes give the same results as threads, for every format, and none outlives its parent."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from ismdata.conversation import ROLE_NAMES
from ismdata.convert import worker_pool as workers
from ismdata.convert.canonical import Rules
from ismdata.convert.corpus_format import Choices
from ismdata.convert.parts import FormatChoice, open_parts
from ismdata.convert.pipeline import convert
from ismdata.convert.read_block import read_block
from ismdata.convert.sources.arguments import expand
from ismdata.convert.worker_pool import WorkerPool
from ismdata.errors import DataError
from tests.support.paths import ROOT
from tests.support.raw_corpora import ANCHOR, FORMATS, A, S, U, written

TALKS = [ANCHOR, ((U, "What is it?"), (A, "A list.")), ((U, "One"), (A, "Two"), (U, "Three"), (A, "Four"))]


@pytest.mark.parametrize("name", sorted(FORMATS))
def test_blocks_and_results_can_be_pickled(name: str, tmp_path: Path) -> None:
    form = FORMATS[name]
    for layout in form.layouts:
        ending, data = written(form, [talk for talk in TALKS if form.holds(talk)], layout)
        (tmp_path / f"corpus{ending}").write_bytes(data)
        (source,) = expand(str(tmp_path / f"corpus{ending}"))
        rules = Rules(roles=ROLE_NAMES)
        choices = Choices(roles=ROLE_NAMES, preference=form.options.get("preference"))
        blocks = 0
        for part in open_parts(source, FormatChoice(name=name, choices=choices)):
            for block in part.blocks:
                pickled = pickle.dumps(block)
                here = read_block(block, rules)
                there = pickle.loads(pickle.dumps(read_block(pickle.loads(pickled), rules)))
                assert there == here
                blocks += 1
        assert blocks
        (tmp_path / f"corpus{ending}").unlink()


class Sized:
    """A result with a size."""

    def __init__(self, of: Any) -> None:
        self.nbytes, self.of = 1, of


def busy(number: int) -> Sized:
    """Use the CPU in Python, and return the process that did."""
    until = time.thread_time() + 0.02
    while time.thread_time() < until:
        pass
    if number < 0:
        raise DataError(f"{number}: found a number below 0; expected one above it")
    return Sized((number, os.getpid()))


@pytest.mark.slow
def test_processes_take_over_if_threads_are_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_SECONDS", 0.1)
    with WorkerPool(2, processes=True) as pool:
        found = [pool.submit(busy, number).result().of for number in range(20)]
        with pytest.raises(DataError, match="-1: found a number below 0"):
            pool.submit(busy, -1).result()
    assert [number for number, _ in found] == list(range(20))
    assert found[0][1] == os.getpid() != found[-1][1]


@pytest.mark.parametrize(("count", "processes"), [(1, True), (2, False)], ids=["one-worker", "threads-alone"])
def test_no_process_is_started_if_none_is_allowed(count: int, processes: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_SECONDS", 0.0)
    with WorkerPool(count, processes=processes) as pool:
        assert {pool.submit(busy, number).result().of[1] for number in range(4)} == {os.getpid()}


def test_processes_write_the_same_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    form = FORMATS["sharegpt"]
    talks = [
        ((S, f"Be brief, {n}."), (U, f"Question {n}"), (A, "" if n % 50 == 3 else f"Answer {n}")) for n in range(400)
    ]
    _, data = written(form, talks, "lines")
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_bytes(data)
    convert([str(corpus)], tmp_path / "threads")
    monkeypatch.setattr(workers, "_SECONDS", -1.0)
    monkeypatch.setattr(workers, "_BYTES_PER_SECOND", float("inf"))
    monkeypatch.setattr(WorkerPool, "_is_slow", lambda self: True)
    report = convert([str(corpus)], tmp_path / "processes", workers=2, processes=True)
    assert report.quarantined == {"empty_answer": 8}
    for path in (tmp_path / "threads").iterdir():
        assert (tmp_path / "processes" / path.name).read_bytes() == path.read_bytes(), path.name


SCRIPT = """
import os, sys, time
from ismdata.convert import worker_pool as workers
from ismdata.convert.worker_pool import WorkerPool
from tests.convert.test_worker_pool import busy
if __name__ == "__main__":
    workers._SECONDS = -1.0
    with WorkerPool(2, processes=True) as pool:
        pool.submit(busy, 1).result()
        print(*{pool.submit(busy, n).result().of[1] for n in range(20)}, flush=True)
        time.sleep(60)
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="kills a process")
def test_no_process_outlives_a_parent_that_is_killed(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(textwrap.dedent(SCRIPT))
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout is not None
        children = [int(word) for word in parent.stdout.readline().split()]
        parent.kill()
    assert children and parent.pid not in children
    until = time.monotonic() + 20
    while any(_runs(child) for child in children) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(_runs(child) for child in children)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    status = Path(f"/proc/{pid}/stat")
    return not (status.exists() and status.read_text().rpartition(")")[2].split()[0] == "Z")
