"""End `train` again and again at random moments, and compare its curve and its model with those of a run left alone.

    python benchmarks/kills_train.py [--kills 50] [--processes 1,2,mixed] [--steps 40] [--seed 0]

A small corpus of made-up sequences is packed by hand, and a model of some ten thousand parameters trained on it, on
CPU, with a checkpoint every third step. Each run is one process, or two that train together (gloo). It is ended by
signal 9, SIGTERM or SIGINT, sent to all its processes or, for signal 9, to one of them alone, at a random moment: any
time, or just as a checkpoint is being written. Then the same command starts again, until it is done, and anew until
all kills have fallen. After every kill the output is absent or complete. At the end metrics.csv must be the one of the
undisturbed run but for the seconds, and the weights the same to the last bit. `mixed`: each start draws one or two
processes, with the same global batch; there the losses may differ by rounding, at most 1e-5 of them.

Runs are forked from this process, which spares them the time to import libraries. Prints one JSON object a kind.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import hashlib
import json
import os
import random
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

import matplotlib.figure
import torch
from transformers.models.llama import modeling_llama

sys.path.insert(0, str(Path(__file__).parents[1]))

from ismdata.display import TerminalReporter
from ismdata.errors import Terminated
from ismdata.train.options import TrainOptions
from ismdata.train.pipeline import train
from tests.support.tiny import tiny_model, write_packed
from tests.support.training_shards import copying_rows, word_tokenizer

BATCH = 4

#: Imported here for the runs to find them; libraries load these late.
IMPORTED = (matplotlib.figure, modeling_llama)


def start(processes: int, folder: Path, output: Path, steps: int) -> list[int]:
    """Process ids of a run that was just forked."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ids = []
    for rank in range(processes):
        child = os.fork()
        if child == 0:
            os._exit(run(rank, processes, port, folder, output, steps))
        ids.append(child)
    return ids


def run(rank: int, processes: int, port: int, folder: Path, output: Path, steps: int) -> int:
    """What the child does; its exit code. 70 is a failure of its own."""
    if processes > 1:
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(processes),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
    log = (folder / "log.txt").open("a")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)

    def terminate(number: int, frame: object) -> None:
        raise Terminated

    signal.signal(signal.SIGTERM, terminate)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        train(
            folder / "packed",
            output=output,
            options=TrainOptions(
                model=str(folder / "model"),
                steps=steps,
                batch_size=1,
                global_batch=BATCH,
                learning_rate=3e-3,
                warmup=3,
                log_every=2,
                save_every=3,
            ),
            reporter=TerminalReporter(),
        )
    except (KeyboardInterrupt, Terminated):
        return 1
    except BaseException:
        traceback.print_exc()
        return 70
    return 0


def end(ids: list[int], output: Path, draw: random.Random, longest: float) -> str:
    """Wait for a random moment and end the run. What was done; `done` where it ended by itself before."""
    partial = output.parent / f".{output.name}.partial"
    before = set(partial.glob("checkpoints/*"))
    kind = draw.choice(["SIGKILL", "SIGKILL", "SIGKILL one", "SIGTERM", "SIGINT"])
    at_checkpoint = draw.random() < 0.4
    moment = time.monotonic() + draw.uniform(0, longest)
    while time.monotonic() < moment or at_checkpoint:
        if any(done(process) for process in ids):
            wait(ids)
            return "done"
        if at_checkpoint and set(partial.glob("checkpoints/*")) - before:
            time.sleep(draw.uniform(0, 0.05))
            break
        time.sleep(0.002)
    number = getattr(signal, kind.split()[0])
    chosen = [draw.choice(ids)] if kind.endswith("one") else ids
    for process in chosen:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)
    if kind.endswith("one"):  # as torchrun does with the others
        time.sleep(0.2)
        for process in set(ids) - set(chosen):
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
    wait(ids)
    return f"{kind} at a checkpoint" if at_checkpoint else kind


def done(process: int) -> bool:
    """Whether a child has ended, without taking its exit code away."""
    return os.waitid(os.P_PID, process, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def wait(ids: list[int]) -> list[int]:
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in ids]


def curve(output: Path) -> list[dict[str, str]]:
    with (output / "metrics.csv").open(newline="") as file:
        return [{name: value for name, value in row.items() if name != "seconds"} for row in csv.DictReader(file)]


def weights(output: Path) -> str:
    return hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest()


def alike(found: list[dict[str, str]], expected: list[dict[str, str]]) -> bool:
    """Whether two curves are the same but for rounding."""
    if len(found) != len(expected):
        return False
    for one, other in zip(found, expected, strict=True):
        for name in one:
            a, b = float(one[name] or 0), float(other[name] or 0)
            if abs(a - b) > 1e-5 * abs(b):
                return False
    return True


def trial(kind: str, folder: Path, kills: int, steps: int, seed: int) -> dict[str, object]:
    """One kind of run, ended `kills` times in all."""
    draw = random.Random(f"{kind} {seed}")
    processes = {"1": [1], "2": [2], "mixed": [1, 2]}[kind]
    expected_output = folder / f"undisturbed-{kind}"
    started = time.monotonic()
    codes = wait(start(processes[-1], folder, expected_output, steps))
    assert not any(codes), f"the undisturbed run failed: see {folder / 'log.txt'}"
    longest = time.monotonic() - started
    expected = curve(expected_output)
    happened: Counter[str] = Counter()
    outputs = same_curves = same_weights = 0
    while happened.total() < kills:
        output = folder / f"killed-{kind}-{outputs}"
        while not output.exists():
            ids = start(draw.choice(processes), folder, output, steps)
            if happened.total() < kills:
                what = end(ids, output, draw, longest)
                if what != "done":
                    happened[what] += 1
            else:
                wait(ids)
            assert not output.exists() or (output / "model.safetensors").exists(), "a half-written output"
        outputs += 1
        found = curve(output)
        same_curves += alike(found, expected) if kind == "mixed" else found == expected
        same_weights += weights(output) == weights(expected_output)
    return {
        "processes": kind,
        "kills": happened.total(),
        "by": dict(happened),
        "outputs": outputs,
        "curves_the_same": same_curves,
        "weights_the_same": same_weights,
        "seconds_of_an_undisturbed_run": round(longest, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="of each kind")
    parser.add_argument("--processes", default="1,2,mixed")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="a folder to work in, which stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    with contextlib.ExitStack() as stack:
        folder = options.keep or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        word_tokenizer(write_packed(folder / "packed", copying_rows(30)) / "tokenizer")
        tiny_model(dtype=torch.float32).save_pretrained(folder / "model")
        failed = False
        for kind in options.processes.split(","):
            result = trial(kind, folder, options.kills, options.steps, options.seed)
            print(json.dumps(result), flush=True)
            failed |= result["curves_the_same"] != result["outputs"]
            failed |= kind != "mixed" and result["weights_the_same"] != result["outputs"]
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
