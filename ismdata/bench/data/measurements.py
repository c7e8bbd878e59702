"""The measurements of the data pipeline, one function per row name of the table."""

from __future__ import annotations

import importlib.util
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ismdata.bench.data.corpus import write_corpus
from ismdata.bench.report import Row

PEERS = {"trl": "TRL", "llamafactory": "LLaMA-Factory"}
SEQ_LENS = (2048, 8192, 32768)
#: The peak of memory is compared with that on a corpus this many times smaller.
SMALLER = 8
#: With fewer sequences, the last one, partly empty, dominates the ratio.
_ENOUGH_SEQUENCES = 100
_PLANNED = 100_000_000
_BATCH_SIZE = 4


class Failed(Exception):
    """A measurement failed; the message is the last line of its standard error."""


@dataclass(frozen=True, kw_only=True)
class Bench:
    """What all measurements share.

    Attributes:
        corpora: JSON Lines files of messages.
        scratch: A folder for intermediate files, removed at the end.
        synthetic: Size of the generated corpus of `memory`, in bytes.
        tokenizer: As for `pack`.
        seq_len: Tokens per sequence.
        rounds: How often each measurement is repeated.
        peers: Folder with the peers' scripts.
        peer_python: The Python of an environment with LLaMA-Factory.
    """

    corpora: tuple[Path, ...]
    scratch: Path
    synthetic: int
    tokenizer: str
    seq_len: int
    rounds: int
    peers: Path
    peer_python: str | None

    @property
    def template(self) -> Path:
        return self.scratch / "chatml.jinja"

    @property
    def fast(self) -> str:
        """The backend that `auto` tries first, of those installed."""
        return "gigatoken" if _installed("gigatoken", "awkward") else "hf"

    def packing(self, backend: str) -> dict[str, Any]:
        """The fields of `stages.Packing`."""
        return {
            "tokenizer": self.tokenizer,
            "chat_template": str(self.template),
            "seq_len": self.seq_len,
            "backend": backend,
        }

    def converted(self, corpus: Path) -> Path:
        """The converted folder of a corpus, made once."""
        folder = self.scratch / "inputs" / corpus.stem
        if not folder.exists():
            ismdata_command("convert", corpus, "-o", folder)
        return folder

    def packed(self, corpus: Path, seq_len: int) -> Path:
        """The packed folder of a corpus, made once per length."""
        folder = self.scratch / "inputs" / f"{corpus.stem}-{seq_len}"
        if not folder.exists():
            options = ("--tokenizer", self.tokenizer, "--chat-template", self.template, "--seq-len", seq_len)
            ismdata_command("pack", self.converted(corpus), "-o", folder, *options)
        return folder


def measure(name: str, **arguments: object) -> dict[str, Any]:
    """Run one measurement of `stages.py` in its own process. Raises Failed."""
    output = _run([sys.executable, "-m", "ismdata.bench.data.stages", name, json.dumps(arguments, default=str)])
    return dict(json.loads(output.splitlines()[-1]))


def ismdata_command(*words: object) -> float:
    """Run an ismdata command and return its seconds, including its start. Raises Failed."""
    started = time.perf_counter()
    _run([sys.executable, "-m", "ismdata", *map(str, words)])
    return time.perf_counter() - started


def _run(command: Sequence[str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise Failed(last[0])
    return done.stdout


def _installed(*packages: str) -> bool:
    return all(importlib.util.find_spec(package) is not None for package in packages)


def convert(bench: Bench) -> Iterator[Row]:
    for corpus in bench.corpora:
        timed = measure("convert", corpus=corpus, scratch=bench.scratch, rounds=bench.rounds)
        yield _compared("convert", "convert / pyarrow read_json", corpus, timed)


def pack(bench: Bench) -> Iterator[Row]:
    for corpus in bench.corpora:
        for backend, alone in (("hf", "encode_batch_fast"), ("gigatoken", "encode_batch")):
            what = f"pack, {backend} / {alone} alone"
            if backend == "gigatoken" and not _installed("gigatoken", "awkward"):
                yield _absent("pack", what, corpus, "not installed: pip install 'ismdata[fast]'")
                continue
            timed = measure(
                "pack",
                converted=bench.converted(corpus),
                scratch=bench.scratch,
                rounds=bench.rounds,
                packing=bench.packing(backend),
            )
            yield _compared("pack", f"{what} on messages", corpus, timed)
            yield _compared("pack", f"{what} on the same texts", corpus, timed, yardstick="same")


def road(bench: Bench) -> Iterator[Row]:
    """convert + pack and each peer in alternation: the work alone, then whole commands from start to end."""
    backends = ("gigatoken", "hf") if bench.fast == "gigatoken" else ("hf",)
    for corpus in bench.corpora:
        stages: dict[str, list[dict[str, Any]]] = {}
        commands: dict[str, list[float]] = {}
        missing: dict[str, str] = {}
        for _ in range(bench.rounds):
            for backend in backends:
                packing = bench.packing(backend)
                timed = measure("road", corpus=corpus, scratch=bench.scratch, rounds=1, packing=packing)
                stages.setdefault(backend, []).append(timed)
                commands.setdefault(backend, []).append(_whole_commands(bench, corpus, backend))
            for peer in PEERS.keys() - missing.keys():
                found = _peer(bench, peer, corpus)
                if isinstance(found, str):
                    missing[peer] = found
                else:
                    stages.setdefault(peer, []).append(found[0])
                    commands.setdefault(peer, []).append(found[1])
        for peer, title in PEERS.items():
            for backend in backends:
                what = f"{title}, 2 processes / convert + pack, {backend}"
                if peer in missing:
                    yield _absent("road", what, corpus, missing[peer])
                    continue
                ours = [run["seconds"]["ours"][0] - run["seconds"]["setup"][0] for run in stages[backend]]
                theirs = [run["seconds"] for run in stages[peer]]
                for name, own, other in (
                    (what, ours, theirs),
                    (f"{what}, whole commands", commands[backend], commands[peer]),
                ):
                    yield Row(
                        name="road",
                        what=name,
                        corpus=corpus.name,
                        unit="s",
                        ours=statistics.median(own),
                        yardstick=statistics.median(other),
                        ratio=statistics.median(other) / statistics.median(own),
                        ratio_is="times faster",
                        details={"ours": own, "yardstick": other, "stages": stages[backend], "peer": stages[peer]},
                    )


def _whole_commands(bench: Bench, corpus: Path, backend: str) -> float:
    """Seconds of the commands `ismdata convert` and `ismdata pack`."""
    converted, packed = bench.scratch / "command-converted", bench.scratch / "command-packed"
    options = ("--chat-template", bench.template, "--seq-len", bench.seq_len, "--tokenizer-backend", backend)
    return ismdata_command("convert", corpus, "-o", converted, "--overwrite") + ismdata_command(
        "pack", converted, "-o", packed, "--tokenizer", bench.tokenizer, *options, "--overwrite"
    )


def _peer(bench: Bench, peer: str, corpus: Path) -> tuple[dict[str, Any], float] | str:
    """What a peer's script prints and its total seconds, or why it cannot run."""
    script = bench.peers / f"{peer}_prepare.py"
    if not script.is_file():
        return f"no {script}: run in a checkout of the repository, or name its benchmarks/peers with --peers"
    options = ["--tokenizer", bench.tokenizer, "--seq-len", str(bench.seq_len)]
    python = sys.executable
    if peer == "trl":
        if not _installed("trl"):
            return "not installed: pip install trl"
        options += ["--chat-template", str(bench.template)]
    elif bench.peer_python is None:
        return "needs its own environment: pip install llamafactory there, and name its Python with --peer-python"
    else:
        python = bench.peer_python
    started = time.perf_counter()
    try:
        output = _run([python, str(script), str(corpus), *options])
    except Failed as failed:
        return f"failed: {failed}"
    return json.loads(output.splitlines()[-1]), time.perf_counter() - started


def start(bench: Bench) -> Iterator[Row]:
    """`ismdata pack` of a single conversation: imports, loading the tokenizer, probing the template."""
    path = bench.scratch / "single.jsonl"
    write_corpus(path, 1)
    converted = bench.converted(path)
    options = ("--tokenizer", bench.tokenizer, "--chat-template", bench.template, "--overwrite")
    seconds = [ismdata_command("pack", converted, "-o", bench.scratch / "one", *options) for _ in range(bench.rounds)]
    yield _alone("start", "ismdata pack, one conversation, whole command", "generated", "s", seconds)


def plan(bench: Bench) -> Iterator[Row]:
    timed = measure("plan", documents=_PLANNED, seq_len=bench.seq_len, rounds=bench.rounds)
    note = f"peak {timed['peak_bytes'] / 1e9:.2f} GB, sequences {timed['sequences'] / timed['lower_bound']:.5f} × bound"
    seconds = timed["seconds"]["ours"]
    yield _alone("plan", "planning 100 M lengths", f"lognormal, T = {bench.seq_len}", "s", seconds, note, timed)


def sequences(bench: Bench) -> Iterator[Row]:
    for corpus in bench.corpora:
        for seq_len in SEQ_LENS:
            totals = json.loads((bench.packed(corpus, seq_len) / "index.json").read_text(encoding="utf-8"))["totals"]
            found, bound = totals["sequences"], totals["lower_bound_sequences"]
            yield Row(
                name="sequences",
                what=f"sequences / lower bound, T = {seq_len}",
                corpus=corpus.name,
                unit="sequences",
                ours=found,
                yardstick=bound,
                ratio=found / bound,
                ratio_is="times the bound",
                note="" if found >= _ENOUGH_SEQUENCES else f"fewer than {_ENOUGH_SEQUENCES} sequences",
                details=totals,
            )


def memory(bench: Bench) -> Iterator[Row]:
    peaks = {}
    for size in (bench.synthetic // SMALLER, bench.synthetic):
        path = bench.scratch / f"synthetic-{size}.jsonl"
        write_corpus(path, size)
        converted = bench.converted(path)
        path.unlink()
        packing = bench.packing("auto")
        peaks[size] = measure("memory", converted=converted, scratch=bench.scratch, packing=packing)
        shutil.rmtree(converted)
    small, large = peaks.values()
    for key, what in (("peak_bytes", "peak memory of pack"), ("anonymous_bytes", "of it, without mapped files")):
        yield Row(
            name="memory",
            what=what,
            corpus=f"generated, {bench.synthetic / 1e6:,.0f} MB / {bench.synthetic / 1e6 / SMALLER:,.0f} MB",
            unit="MB",
            ours=large[key] / 1e6,
            yardstick=small[key] / 1e6,
            ratio=large[key] / small[key] if small[key] else None,
            ratio_is="times as much",
            details={"small": small, "large": large},
        )


def loader(bench: Bench) -> Iterator[Row]:
    for corpus in bench.corpora:
        packed = bench.packed(corpus, bench.seq_len)
        timed = measure("loader", packed=packed, rounds=bench.rounds, batch_size=_BATCH_SIZE)
        what = f"DataLoader, one process, T = {bench.seq_len}, batch {_BATCH_SIZE}"
        yield _rate("loader", what, corpus, timed)


def verify(bench: Bench) -> Iterator[Row]:
    for corpus in bench.corpora:
        timed = measure("verify", packed=bench.packed(corpus, bench.seq_len), rounds=bench.rounds)
        yield _rate("verify", "verify", corpus, timed)


def _compared(name: str, what: str, corpus: Path, timed: dict[str, Any], *, yardstick: str = "yardstick") -> Row:
    """Compare ours with a yardstick of the same process. Loading (`setup`) counts on neither side."""
    medians = {job: statistics.median(seconds) for job, seconds in timed["seconds"].items()}
    setup = medians.get("setup", 0.0)
    ours = medians["ours"] - setup
    return Row(
        name=name,
        what=what,
        corpus=corpus.name,
        unit="s",
        ours=ours,
        yardstick=medians[yardstick],
        ratio=ours / medians[yardstick],
        ratio_is="times its time",
        note=f"plus {setup:.2f} s to load and probe the tokenizer" if setup else "",
        details=timed,
    )


def _rate(name: str, what: str, corpus: Path, timed: dict[str, Any]) -> Row:
    rates = [timed["tokens"] / seconds / 1e6 for seconds in timed["seconds"]["ours"]]
    return _alone(name, what, corpus.name, "M tokens/s", rates, details=timed)


def _alone(
    name: str,
    what: str,
    corpus: str,
    unit: str,
    values: list[float],
    note: str = "",
    details: dict[str, Any] | None = None,
) -> Row:
    details = details or {"ours": values}
    return Row(
        name=name, what=what, corpus=corpus, unit=unit, ours=statistics.median(values), note=note, details=details
    )


def _absent(name: str, what: str, corpus: Path, note: str) -> Row:
    return Row(name=name, what=what, corpus=corpus.name, unit="", note=note)


#: In the order of the table.
MEASUREMENTS: dict[str, Callable[[Bench], Iterator[Row]]] = {
    part.__name__: part for part in (convert, pack, road, start, plan, sequences, memory, loader, verify)
}
