"""Kill `convert` and `pack` with signal 9 again and again, and compare what comes out with a run that was left alone.

    python benchmarks/kills.py [SOURCE...] --tokenizer TOKENIZER [--kills 200] [--command both] [--workers 1,2]

A corpus is generated beside the sources given. Each command runs once undisturbed; then it is started, its whole
process group killed, and started again with the same words (the number of workers aside, which is drawn each time)
until it is done. Kills fall at random: somewhere in the time a whole run takes, somewhere in the time it works once it
has begun, or just as it finishes. After every kill the output is absent or complete; at the end every byte is
compared, and nothing may lie beside the output. Shards are small and records frequent here, so that a few megabytes
have many of them.

Prints one JSON object for each command. `repeated`: the time that the runs worked, beyond that of an undisturbed run,
for each kill, as a share of it; it holds going on as well as what is done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

#: The command line with small parts: `NAME=VALUE` words up to `--` are set on modules.
CHILD = """
import importlib, sys
words = sys.argv[1 : sys.argv.index("--")]
sys.argv[1:] = sys.argv[sys.argv.index("--") + 1 :]
for word in words:
    name, value = word.split("=")
    module, _, attribute = name.rpartition(".")
    owner = importlib.import_module(module)
    assert hasattr(owner, attribute), name
    setattr(owner, attribute, type(getattr(owner, attribute))(float(value)))
from ismdata.cli import main
main()
"""
SMALL = {
    "convert": ["ismdata.conversation_files.SHARD_BYTES=1000000", "ismdata.journal._EVERY=0.05"],
    "pack": [
        "ismdata.pack._SHARD_TOKENS=500000",
        "ismdata.pack._BATCH_TOKENS=100000",
        "ismdata.tokenizing._BATCH_BYTES=200000",
        "ismdata.journal._EVERY=0.05",
    ],
}
WORDS = [
    "the",
    "house",
    "river",
    "apple",
    "seven",
    "not",
    "with",
    "你好",
    "世界",
    "привет",
    "là",
    "où",
    "ß",
    "🙂",
    "\n",
]


@dataclass
class Tally:
    """What happened to one command."""

    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0
    worked: float = 0.0
    outputs: int = 0


def generate(path: Path, megabytes: float, seed: int) -> None:
    """Conversations of random words, some of them broken in ways that are quarantined, some twice."""
    draw = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < megabytes * 1e6:
            number += 1
            messages = []
            for _ in range(draw.randint(1, 6)):
                for role in ("user", "assistant"):
                    text = " ".join(draw.choices(WORDS, k=draw.randint(1, 80)))
                    messages.append({"role": role, "content": text})
            if number % 97 == 0:
                messages[0]["role"] = "narrator"
            if number % 89 == 0:
                messages = messages[:1]
            line = json.dumps({"id": f"g{number}", "messages": messages}, ensure_ascii=False)
            file.write(line[: -5 if number % 101 == 0 else None] + "\n")


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


class Command:
    """One command with its words, run into `output`."""

    def __init__(self, name: str, inputs: Sequence[str], output: Path, options: Sequence[str]) -> None:
        self.name, self.output = name, output
        self.words = [*SMALL[name], "--", name, *inputs, "-o", str(output), *options]
        self.partial = output.parent / f".{output.name}.partial"

    def start(self, workers: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-c", CHILD, *self.words, "--workers", str(workers)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )

    def stamp(self) -> int:
        """Changes when a run begins to work: its first line in the journal, or that it goes on."""
        with contextlib.suppress(FileNotFoundError):
            return (self.partial / "journal.jsonl").stat().st_mtime_ns
        return 0

    def finishing(self) -> bool:
        return (self.partial / "index.json").exists() or self.output.exists()


def measured(command: Command, workers: int) -> tuple[float, float]:
    """Seconds of an undisturbed run, and those of them that it worked."""
    started, began = time.monotonic(), 0.0
    process = command.start(workers)
    while process.poll() is None:
        if not began and command.stamp():
            began = time.monotonic()
        time.sleep(0.002)
    assert process.stderr is not None
    if process.returncode:
        raise SystemExit(process.stderr.read().decode())
    ended = time.monotonic()
    return ended - started, ended - began


def attempt(command: Command, workers: int, whole: float, work: float, draw: random.Random, tally: Tally) -> None:
    """Start the command, and kill it at a random moment unless it ends before."""
    moment = draw.choice(["any", "any", "working", "working", "finishing"])
    before = command.stamp()
    started, began, finishing = time.monotonic(), 0.0, 0.0
    delay = {"any": draw.uniform(0, whole), "working": draw.uniform(0, work), "finishing": draw.uniform(0, 0.05)}[
        moment
    ]
    process = command.start(workers)
    tally.runs += 1
    resumed = before != 0
    while process.poll() is None:
        now = time.monotonic()
        if not began and command.stamp() != before:
            began = now
            tally.resumed += resumed
        if not finishing and command.finishing():
            finishing = now
        since = {"any": started, "working": began, "finishing": finishing}[moment]
        if since and now - since >= delay:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            break
        time.sleep(0.001)
    assert process.stderr is not None
    said = process.stderr.read().decode()
    process.stderr.close()
    if began:
        tally.worked += time.monotonic() - began
    if process.returncode == -signal.SIGKILL:
        tally.kills += 1
        tally.moments[moment] += 1
    elif process.returncode:
        raise SystemExit(f"{command.name} ended with {process.returncode}: {said}")


def check(command: Command, expected: dict[str, bytes]) -> None:
    found = files_of(command.output)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        raise SystemExit(f"{command.name}: differs from the undisturbed run in {differing}; see {command.output}")


def torture(command: Command, kills: int, workers: Sequence[int], draw: random.Random) -> dict[str, object]:
    whole, work = measured(command, workers[0])
    expected = files_of(command.output)
    shutil.rmtree(command.output)
    tally = Tally()
    while tally.kills < kills:
        while not command.output.exists():
            attempt(command, draw.choice(workers), whole, work, draw, tally)
        check(command, expected)
        if [path.name for path in command.output.parent.iterdir()] != [command.output.name]:
            # Killed between the last rename and the end: the next run refuses, and tidies.
            again = command.start(workers[0])
            _, said = again.communicate()
            if again.returncode != 2 or b"is in use" not in said:
                raise SystemExit(f"{command.name} ended with {again.returncode}: {said.decode()}")
            check(command, expected)
        beside = sorted(path.name for path in command.output.parent.iterdir())
        if beside != [command.output.name]:
            raise SystemExit(f"{command.name}: left {beside}")
        shutil.rmtree(command.output)
        tally.outputs += 1
        print(f"{command.name}: {tally.kills} kills, {tally.outputs} outputs", file=sys.stderr, flush=True)
    return {
        "command": command.name,
        "workers": list(workers),
        "kills": tally.kills,
        "moments": dict(sorted(tally.moments.items())),
        "runs": tally.runs,
        "runs that went on": tally.resumed,
        "outputs, all identical": tally.outputs,
        "bytes": sum(map(len, expected.values())),
        "shards": sum(name.endswith(".arrow") for name in expected),
        "seconds undisturbed": round(whole, 2),
        "of them at work": round(work, 2),
        "repeated": round((tally.worked - tally.outputs * work) / work / tally.kills, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="corpora to convert beside the generated one")
    parser.add_argument("--kills", type=int, default=200, help="for each command")
    parser.add_argument("--command", choices=["convert", "pack", "both"], default="both")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--tokenizer", help="for pack")
    parser.add_argument("--megabytes", type=float, default=8, help="of the generated corpus")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where to work; default: a temporary folder")
    arguments = parser.parse_args()
    if arguments.command != "convert" and not arguments.tokenizer:
        parser.error("pack needs --tokenizer")
    workers = [int(number) for number in arguments.workers.split(",")]
    draw = random.Random(arguments.seed)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        base = Path(folder)
        generate(base / "generated.jsonl", arguments.megabytes, arguments.seed)
        sources = [str(base / "generated.jsonl"), *arguments.sources]
        if arguments.command != "pack":
            command = Command("convert", sources, base / "convert" / "out", [])
            print(json.dumps(torture(command, arguments.kills, workers, draw)), flush=True)
        if arguments.command != "convert":
            converted = base / "converted"
            measured(Command("convert", sources, converted, []), workers[0])
            options = ["--tokenizer", arguments.tokenizer, "--seq-len", "1024"]
            command = Command("pack", [str(converted)], base / "pack" / "out", options)
            print(json.dumps(torture(command, arguments.kills, workers, draw)), flush=True)


if __name__ == "__main__":
    main()
