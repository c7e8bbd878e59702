"""`ismdata demo`: convert, pack, verify, inspect, train and chat on the bundled sample. No network, no GPU.

Each step prints the command that does the same. The sample has nine thousand tokens, for which a tokenizer of its own
suffices; so none has to be downloaded.
"""

from __future__ import annotations

import time
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import RenderableType
from rich.text import Text

from ismdata.cli.next_command import command_line
from ismdata.cli.views import folders as view
from ismdata.cli.views import reports
from ismdata.convert import convert
from ismdata.data import ConvertedFolder, open_output, verify
from ismdata.display import draw
from ismdata.errors import DataError, UsageError
from ismdata.pack import pack
from ismdata.rendering import ConversationEncoder, train_tokenizer

if TYPE_CHECKING:
    pass

#: The corpus that comes with the package; its README.md describes it.
SAMPLE = Path(str(resources.files("ismdata") / "sample"))

VOCAB_SIZE = 2000
SEQ_LEN = 512
STEPS = 200
BATCH_SIZE = 4
LEARNING_RATE = 3e-3
MAX_ANSWER = 64

#: System prompt -> questions that the model is asked at the end. The first prompt is that of the sample.
SYSTEM = "You are the assistant of Harbour Lane Hardware, a small shop. Be brief and friendly."
QUESTIONS = {
    SYSTEM: ("Hello!", "When are you open?", "Thank you."),
    None: ("What is two plus two ?", "And four plus four ?"),
}


def sample_files() -> list[Path]:
    """List the corpus files of the bundled sample, in order.

    Raises:
        DataError: If the installation lacks them.
    """
    files = sorted(path for path in SAMPLE.glob("*") if path.suffix in (".json", ".jsonl", ".txt"))
    if not files:
        raise DataError(f"{SAMPLE}: no sample files; expected those of the package. Install ismdata again")
    return files


def run_demo(output: Path, *, steps: int = STEPS, overwrite: bool = False) -> None:
    """Run the whole pipeline on the bundled sample. Takes under a minute on two idle cores.

    Args:
        output: Folder for `converted`, `tokenizer`, `packed` and `model`.
        steps: Training steps.
        overwrite: Replace what `output` holds.

    Raises:
        UsageError: If `output` is not empty and `overwrite` is off.
    """
    if output.exists() and not overwrite and (not output.is_dir() or any(output.iterdir())):
        raise UsageError(
            f"{output}: is not empty; expected an empty or absent folder. Name another one, or pass --overwrite"
        )
    started = time.monotonic()
    stage = _Stage()
    converted, tokenizer, packed, model = (output / name for name in ("converted", "tokenizer", "packed", "model"))

    files = [str(_short(file)) for file in sample_files()]
    stage("Read the bundled sample, with its faulty records", "convert", *files, "-o", converted)
    stage.show(reports.convert_report(convert(files, converted, overwrite=overwrite)))

    size = ("--vocab-size", VOCAB_SIZE)
    stage("Train a tokenizer on it", "tokenizer", "train", converted, "-o", tokenizer, *size)
    with open_output(tokenizer, overwrite=overwrite, marker="tokenizer.json") as folder:
        trained = train_tokenizer(ConvertedFolder(converted).texts(), vocab_size=VOCAB_SIZE)
        trained.save_pretrained(str(folder))
    stage.show(reports.tokenizer_report(tokenizer, trained, wanted=VOCAB_SIZE, converted=[converted]))

    options = ("--tokenizer", tokenizer, "--seq-len", SEQ_LEN)
    stage("Pack it", "pack", converted, "-o", packed, *options)
    packing = pack([converted], packed, tokenizer=str(tokenizer), seq_len=SEQ_LEN, overwrite=overwrite)
    stage.show(reports.pack_report(packing))

    stage("Check every row", "verify", packed)
    verification = verify(packed)
    stage.show(reports.verify_report(verification))
    if not verification.ok:
        raise DataError(f"{packed}: is not sound directly after packing. This is a bug in ismdata; please report it")

    stage("Look at the folder", "inspect", packed)
    stage.show(view.folder_summary(packed))
    stage("Look at one sequence", "inspect", packed, "--row", 0)
    stage.show(view.row(packed, 0, decode=lambda: ConversationEncoder.load(packed / "tokenizer").decode))

    from ismdata.generate import open_chat
    from ismdata.train import TrainOptions, train

    training_options = ("--steps", steps, "--batch-size", BATCH_SIZE, "--learning-rate", LEARNING_RATE)
    title = "Train a model of a million parameters from scratch"
    stage(title, "train", packed, "--model", "tiny", "-o", model, *training_options)
    training = train(
        packed,
        output=model,
        options=TrainOptions(model="tiny", steps=steps, batch_size=BATCH_SIZE, learning_rate=LEARNING_RATE),
        overwrite=overwrite,
        reporter=stage,
    )
    stage.show(reports.train_report(training))

    stage("Talk with it", "chat", model, "--system", SYSTEM)
    for system, questions in QUESTIONS.items():
        chat = open_chat(model, system=system, max_new_tokens=MAX_ANSWER)
        for question in questions:
            stage.show(Text(f"> {question}", style="bold"))
            stage.show(Text(chat.reply(question)))
        stage.show(Text())
    stage.show(_ending(output, time.monotonic() - started))


def _ending(output: Path, seconds: float) -> Text:
    """Say where everything is, and what to type next."""
    return Text(
        f"""Done in {seconds:.0f} s. Everything is in {output}:
  {output / "converted"}: the conversations; quarantine.jsonl lists the refused records with reasons
  {output / "tokenizer"}: the tokenizer
  {output / "packed"}: sequences with spans, targets and block tables
  {output / "model"}: the model, with metrics.csv

Continue the conversation:
  {command_line("chat", output / "model", "--system", SYSTEM)}
Or use your own data:
  {command_line("convert", "YOUR.jsonl", "-o", "converted")}"""
    )


def _short(path: Path) -> Path:
    """A path relative to the working directory, if it is below that."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


class _Stage:
    """Prints each stage: its title, the command that does the same, and its result. It is a Reporter too."""

    def __init__(self) -> None:
        self.number = 0

    def __call__(self, title: str, *words: object) -> None:
        self.number += 1
        self.show(Text())
        self.show(Text(f"{self.number}. {title}", style="bold"))
        self.show(Text(f"$ {command_line(*words)}", style="cyan"))

    def note(self, text: str) -> None:
        self.show(Text(text))

    def progress(self, stage: str, done: int, total: int) -> None:
        pass

    def show(self, what: RenderableType) -> None:
        draw(what, whole_lines=isinstance(what, Text))
