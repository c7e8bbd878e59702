"""Flip single bits of a finished folder, one at a time, and see whether `ismdata verify` reports each.

    python benchmarks/bitflips.py FOLDER --flips 1000 --seed 0

The folder is copied first and stays as it is. Half of the flips fall on bytes wherever they are, which is mostly in
shards; the other half on files in turn, so that the small ones get theirs. Each flip is undone before the next. Prints
one line a file and exits with 1 if a flip went unnoticed, or was blamed on another file.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from ismdata.data.verification import verify


def flip(path: Path, bit: int) -> None:
    """Flip bit number `bit` of a file in place."""
    with path.open("r+b") as file:
        file.seek(bit // 8)
        byte = file.read(1)[0]
        file.seek(bit // 8)
        file.write(bytes([byte ^ 1 << bit % 8]))


def places(files: list[Path], flips: int, seed: int) -> list[tuple[Path, int]]:
    """(file, bit) pairs: even ones by size, odd ones by file in turn."""
    rng = random.Random(seed)
    sizes = [path.stat().st_size for path in files]
    chosen = []
    for number in range(flips):
        at = number // 2 % len(files) if number % 2 else rng.choices(range(len(files)), weights=sizes)[0]
        chosen.append((files[at], rng.randrange(8 * sizes[at])))
    return chosen


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a converted or packed folder")
    parser.add_argument("--flips", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "copy"
        shutil.copytree(arguments.folder, folder)
        sound = verify(folder)
        if not sound.ok:
            print(f"{arguments.folder}: not sound to begin with: {sound.problems[0]}", file=sys.stderr)
            return 1
        files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
        flipped: Counter[Path] = Counter()
        missed: Counter[Path] = Counter()
        started = time.perf_counter()
        for path, bit in places(files, arguments.flips, arguments.seed):
            flip(path, bit)
            problems = verify(folder).problems
            flip(path, bit)
            flipped[path] += 1
            missed[path] += not any(problem.startswith(f"{path}: ") for problem in problems)
        seconds = time.perf_counter() - started
        for path in files:
            name = path.relative_to(folder)
            print(f"{flipped[path]:6} flips, {flipped[path] - missed[path]:6} reported  {name}")
        print(f"{arguments.flips} flips, {arguments.flips - missed.total()} reported, {seconds:.1f} s")
        if not verify(folder).ok:
            raise AssertionError("a flip was not undone")
    return 1 if missed.total() else 0


if __name__ == "__main__":
    sys.exit(main())
