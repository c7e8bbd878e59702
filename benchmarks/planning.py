"""Time and memory of planning, and how near plans come to what is possible.

    python benchmarks/planning.py [--documents 100000000] [--seq-len 8192] [--times 5]
    python benchmarks/planning.py --packed FOLDER...

The first plans lognormal lengths and prints seconds and peak memory, the lengths included. The second plans the
documents of packed folders anew and prints a Markdown row for each, with three bounds that no plan can go below: the
tokens over T, the bound L2 of Martello and Toth, and, where the plan is above both, the linear relaxation of Gilmore
and Gomory.
"""

from __future__ import annotations

import argparse
import resource
import statistics
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).parents[1]))

from ismdata.data.index import read_index
from ismdata.data.shards import FORMAT
from ismdata.pack.planning.best_fit import best_fit_decreasing, fewest_bins
from ismdata.pack.planning.choose import best_bins
from ismdata.pack.planning.plan import lower_bound, plan
from tests.support.relaxed_bound import relaxed_bound

#: Lengths are made in pieces of so many, so that making them takes no more memory than planning them.
_PIECE = 1 << 22

HEADINGS = "folder | T | documents | sequences | best-fit | tokens / T | L2 | relaxation | sequences / best bound"


def lognormal(documents: int, seq_len: int, *, mean: float, deviation: float) -> NDArray[np.int32]:
    rng = np.random.default_rng(0)
    lengths = np.empty(documents, np.int32)
    for start in range(0, documents, _PIECE):
        part = lengths[start : start + _PIECE]
        part[:] = rng.lognormal(mean, deviation, len(part)).clip(1, seq_len)
    return lengths


def gibibytes() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20)


def time_planning(arguments: argparse.Namespace) -> None:
    lengths = lognormal(arguments.documents, arguments.seq_len, mean=arguments.mean, deviation=arguments.deviation)
    before = gibibytes()
    seconds, of_processor = [], []
    for seed in range(arguments.times):
        started, processor = time.perf_counter(), time.process_time()
        rows = plan(lengths, seq_len=arguments.seq_len, seed=seed).rows
        seconds.append(time.perf_counter() - started)
        of_processor.append(time.process_time() - processor)
    print(f"{len(lengths):,} documents of {lengths.mean():.0f} tokens on average, T = {arguments.seq_len}")
    print(f"seconds: median {statistics.median(seconds):.2f} of {', '.join(f'{each:.2f}' for each in seconds)}")
    print(f"seconds of processors: median {statistics.median(of_processor):.2f}")
    print(f"peak memory: {gibibytes():.2f} GiB, {before:.2f} GiB of it before the first plan")
    print(f"sequences / (tokens / T): {rows / lower_bound(lengths, arguments.seq_len):.6f}")


def lengths_of(folder: Path) -> tuple[NDArray[np.int64], int]:
    """The documents' lengths of a packed folder, and T."""
    index = read_index(folder, FORMAT)
    lengths = []
    for shard in index["shards"]:
        with pa.memory_map(str(folder / shard["name"])) as source, pa.ipc.open_stream(source) as reader:
            lengths += [batch.column("seq_lens").flatten().to_numpy() for batch in reader]
    return np.concatenate(lengths).astype(np.int64), index["seq_len"]


def compare(name: str, lengths: NDArray[np.int64], seq_len: int) -> str:
    """A row of the table."""
    histogram = np.bincount(lengths, minlength=seq_len + 1)
    rows, best_fit = best_bins(histogram, seq_len).rows, best_fit_decreasing(histogram, seq_len).rows
    plain, two = lower_bound(lengths, seq_len), fewest_bins(histogram, seq_len)
    relaxed = relaxed_bound(histogram, seq_len) if rows > two else 0
    return (
        f"{name} | {seq_len:,} | {len(lengths):,} | {rows:,} | {best_fit:,} | {plain:,} | {two:,} | "
        f"{format(relaxed, ',') if relaxed else '–'} | {rows / max(two, relaxed):.4f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--packed", type=Path, nargs="+")
    parser.add_argument("--documents", type=int, default=100_000_000)
    parser.add_argument("--seq-len", type=int, default=8192)
    parser.add_argument("--mean", type=float, default=6.0, help="of the logarithm of the lengths")
    parser.add_argument("--deviation", type=float, default=1.0, help="of the logarithm of the lengths")
    parser.add_argument("--times", type=int, default=5)
    arguments = parser.parse_args()
    if not arguments.packed:
        time_planning(arguments)
        return
    print(f"| {HEADINGS} |\n|{'---|' * (HEADINGS.count('|') + 1)}")
    for folder in arguments.packed:
        print(f"| {compare(folder.name, *lengths_of(folder))} |", flush=True)


if __name__ == "__main__":
    main()
