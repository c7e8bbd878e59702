"""Kill `convert` and `pack` with signal 9 again and again, and compare what comes out with a run that was left alone.

    python benchmarks/kills.py [SOURCE...] --tokenizer TOKENIZER [--kills 200] [--command both] [--workers 1,2]

A corpus is generated beside the sources given. Each command runs once undisturbed; then it is started, its whole
process group killed, and started again with the same words (the number of workers aside, which is drawn each time)
until it is done. Kills fall at random: somewhere in the time a whole run takes, somewhere in the time it works once it
has begun, or just as it finishes. After every kill the output is absent or complete; at the end every byte is
compared, and nothing may lie beside the output. Shards are small and records frequent here, so that a few megabytes
have many of them. Each run is a process forked from this one, which spares it the time to import libraries.

Prints one JSON object for each command. `repeated`: the processor time of the runs at work, beyond that of undisturbed
ones, for each kill, as a share of one; it holds going on as well as what is done twice.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import transformers

from ismdata.cli import main as cli
from ismdata.cli.views import folders as view
from ismdata.convert import job as conversion
from ismdata.convert import pipeline as convert
from ismdata.convert.sources import framing
from ismdata.data import conversations as conversation_files
from ismdata.data import journal
from ismdata.pack import shard_writer

#: Imported here for the runs to find them; `AutoTokenizer` is loaded late by its package.
IMPORTED = (convert, view, transformers.AutoTokenizer)

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
    """What happened to one command. `whole`, `working`: seconds of the last run that nothing happened to."""

    whole: float
    working: float
    kills: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    resumed: int = 0
    work: float = 0.0
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


def make_small() -> None:
    """Many blocks, batches, records and shards in a few megabytes."""
    framing.ByteQueue.more.__defaults__ = (100_000,)
    conversion._BATCH_BYTES = 100_000
    conversation_files.SHARD_BYTES = 1_000_000
    shard_writer.SHARD_TOKENS, shard_writer.BATCH_TOKENS = 200_000, 50_000
    conversation_files._BATCH_BYTES = 100_000
    journal._EVERY = 0.05


class Command:
    """One command with its words, run into `output`."""

    def __init__(self, name: str, inputs: Sequence[str], output: Path, options: Sequence[str]) -> None:
        self.name, self.output = name, output
        self.words = [name, *inputs, "-o", str(output), *options]
        self.said = output.parent.parent / "stderr"
        self.partial = output.parent / f".{output.name}.partial"

    def start(self, workers: int) -> int:
        """Start it in a process and a process group of its own; the process id."""
        self.said.unlink(missing_ok=True)
        pid = os.fork()
        if pid:
            return pid
        os.setsid()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(os.open(self.said, os.O_WRONLY | os.O_CREAT, 0o666), 2)
        code = 70
        try:
            make_small()
            sys.argv = ["ismdata", *self.words, "--workers", str(workers)]
            cli.main()
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)

    def stamp(self) -> int:
        """Changes when a run begins to work: its first line in the journal, or that it goes on."""
        with contextlib.suppress(FileNotFoundError):
            return (self.partial / "journal.jsonl").stat().st_mtime_ns
        return 0

    def finishing(self) -> bool:
        return (self.partial / "index.json").exists() or self.output.exists()


class Watch:
    """A running command: since when it has worked, since when it has been finishing, what it has cost."""

    def __init__(self, command: Command, workers: int) -> None:
        self.command = command
        self.before = command.stamp()
        self.started, self.began, self.finishing = time.monotonic(), 0.0, 0.0
        self.pid = command.start(workers)
        self.code: int | None = None
        self.cost = self.cost_before = 0.0

    def running(self) -> bool:
        """Look, and wait a moment. False once the process has ended."""
        if os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT):
            return False
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        self.cost = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        if not self.began and self.command.stamp() != self.before:
            self.began, self.cost_before = time.monotonic(), self.cost
        if not self.finishing and self.command.finishing():
            self.finishing = time.monotonic()
        time.sleep(0.002)
        return True

    @property
    def work(self) -> float:
        """Seconds of processor time since it began to work."""
        return self.cost - self.cost_before if self.began else 0.0

    @property
    def seconds(self) -> tuple[float, float]:
        """How long it has run, and worked."""
        now = time.monotonic()
        return now - self.started, now - (self.began or now)

    def end(self) -> str:
        """What it said on stderr, once it has ended; `code` is its exit code, below 0 the signal that ended it."""
        self.code = os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])
        return self.command.said.read_text() if self.command.said.exists() else ""


def undisturbed(command: Command, workers: int) -> Watch:
    """A run that is left alone."""
    watch = Watch(command, workers)
    while watch.running():
        pass
    said = watch.end()
    if watch.code:
        raise SystemExit(said)
    return watch


def attempt(command: Command, workers: int, draw: random.Random, tally: Tally) -> None:
    """Start the command, and kill it at a random moment unless it ends before."""
    moment = draw.choice(["any", "any", "working", "working", "working", "finishing"])
    delay = draw.uniform(0, {"any": tally.whole, "working": tally.working, "finishing": 0.05}[moment])
    watch = Watch(command, workers)
    while watch.running():
        since = {"any": watch.started, "working": watch.began, "finishing": watch.finishing}[moment]
        if since and time.monotonic() - since >= delay:
            # Its group, unless it has not come to make one.
            own = os.getpgid(watch.pid) == watch.pid
            (os.killpg if own else os.kill)(watch.pid, signal.SIGKILL)
            break
    said = watch.end()
    tally.runs += 1
    tally.resumed += bool(watch.before and watch.began)
    tally.work += watch.work
    if watch.code == -signal.SIGKILL:
        tally.kills += 1
        tally.moments[moment] += 1
    elif watch.code:
        raise SystemExit(f"{command.name} ended with {watch.code}: {said}")
    elif watch.began and not watch.before:  # how long a run takes changes with what else the machine does
        tally.whole, tally.working = watch.seconds


def check(command: Command, expected: dict[str, bytes]) -> None:
    found = files_of(command.output)
    differing = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
    if differing:
        raise SystemExit(f"{command.name}: differs from the undisturbed run in {differing}; see {command.output}")


def torture(command: Command, kills: int, workers: Sequence[int], draw: random.Random) -> dict[str, object]:
    first = undisturbed(command, workers[0])
    whole, working = first.seconds
    expected = files_of(command.output)
    shutil.rmtree(command.output)
    tally = Tally(whole=whole, working=working)
    while tally.kills < kills:
        while not command.output.exists():
            attempt(command, draw.choice(workers), draw, tally)
        check(command, expected)
        if [path.name for path in command.output.parent.iterdir()] != [command.output.name]:
            # Killed between the last rename and the end: the next run refuses, and tidies.
            again = Watch(command, workers[0])
            said = again.end()
            if again.code != 2 or "is in use" not in said:
                raise SystemExit(f"{command.name} ended with {again.code}: {said}")
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
        "of them at work": round(working, 2),
        "repeated": round((tally.work - tally.outputs * first.work) / first.work / tally.kills, 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="*", help="corpora to convert beside the generated one")
    parser.add_argument("-n", "--kills", type=int, default=200, help="for each command")
    parser.add_argument("-c", "--command", choices=["convert", "pack", "both"], default="both")
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--tokenizer", help="for pack")
    parser.add_argument("-m", "--megabytes", type=float, default=8, help="of the generated corpus")
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
            undisturbed(Command("convert", sources, converted, []), workers[0])
            options = ["--tokenizer", arguments.tokenizer, "--seq-len", "1024"]
            command = Command("pack", [str(converted)], base / "pack" / "out", options)
            print(json.dumps(torture(command, arguments.kills, workers, draw)), flush=True)


if __name__ == "__main__":
    main()
