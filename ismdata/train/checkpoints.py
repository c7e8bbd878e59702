"""The checkpoints of a run, and whether an interrupted run may be resumed from them.

A run writes into `.NAME.partial` beside its output and renames that last. There `run.json` records what the run's
result depends on, and `checkpoints/checkpoint-N` has the state after step N. A checkpoint is good once its
`index.json`, which is written last, names each of its files with size and hash. A crash leaves one without, which is
removed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from ismdata.data import (
    INDEX_NAME,
    ShardFile,
    describe_file,
    entries,
    load_index,
    open_output,
    run_difference,
    sync_path,
    write_index,
)
from ismdata.display import Reporter
from ismdata.errors import DataError, UsageError
from ismdata.train.metrics import METRICS_NAME

RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
CHECKPOINT_FORMAT = "ismdata.checkpoint/1"

#: Content that a run depends on, and what to say if it differs.
_CONTENT = {
    "data": "the shards of PACKED have changed",
    "weights": "the model that it starts from has changed",
}


def training_folder(
    final: Path, *, inputs: Sequence[Path], overwrite: bool, reporter: Reporter
) -> AbstractContextManager[Path]:
    """Open the output folder of a run. Whatever ends the run, the unfinished folder is kept if it has a checkpoint.

    Args:
        final: The output folder.
        inputs: Folders that the output must not replace.
        overwrite: Whether to replace an older output.
        reporter: Receives a note if the file system has no locks.

    Returns:
        A context manager that yields the folder to write into, as `open_output` does.
    """
    leftovers = _CheckpointLeftovers(overwrite=overwrite)
    return open_output(
        final, overwrite=overwrite, marker=METRICS_NAME, inputs=inputs, leftovers=leftovers, reporter=reporter
    )


class _CheckpointLeftovers:
    """Keeps an unfinished folder if it has a good checkpoint."""

    def __init__(self, *, overwrite: bool) -> None:
        self._overwrite = overwrite

    def can_resume(self, partial: Path) -> bool:
        if (partial / RUN_NAME).is_file():
            return True
        if checkpoints(partial) and not self._overwrite:
            raise UsageError(
                f"{partial}: has checkpoints but no {RUN_NAME} that says of which run; expected both. Name another "
                "output, or pass --overwrite to replace it"
            )
        return False

    def keeps(self, partial: Path, error: BaseException) -> bool:
        return bool(_sealed(partial))

    def describe(self, partial: Path) -> str:
        return what_is_left(partial)


def find_checkpoint(partial: Path, identity: Mapping[str, Any], *, overwrite: bool) -> tuple[Path | None, list[str]]:
    """Find the checkpoint to resume from. Removes unfinished and damaged ones, and writes run.json for a new run.

    Args:
        partial: The run's unfinished folder.
        identity: What the run's result depends on.
        overwrite: Whether to remove the checkpoints of another run instead of raising.

    Returns:
        The checkpoint, None to start from the beginning; and lines for the user.

    Raises:
        UsageError: if the checkpoints are of a run with other options.
        DataError: if they are of a run with other data or another initial model.
    """
    notes = []
    good: Path | None = None
    for path in reversed(checkpoints(partial)):
        try:
            check_checkpoint(path)
        except DataError as error:
            notes.append(f"skipped a checkpoint: {error}")
            continue
        good = path
        break
    if good is not None:
        different = _difference(partial, good, identity)
        if different is not None and not overwrite:
            raise different
        if different is not None:
            notes.append(f"starting over, since --overwrite was given: {different}")
            good = None
    for path in checkpoints(partial):
        if path != good and (good is None or step_of(path) > step_of(good)):
            shutil.rmtree(path)
    if good is None:
        _write_json(partial / RUN_NAME, dict(identity))
    return good, notes


def _difference(partial: Path, checkpoint: Path, identity: Mapping[str, Any]) -> DataError | UsageError | None:
    """The error that says how the run that wrote `checkpoint` differs from this one; None if it does not."""
    former = json.loads((partial / RUN_NAME).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dict(identity)))
    name = f"{partial}: the run interrupted after step {step_of(checkpoint)}"
    return run_difference(_as_run(former), _as_run(now), name=name, content=_CONTENT)


def _as_run(identity: Mapping[str, Any]) -> dict[str, Any]:
    """An identity as `run_difference` takes it; all that is not content comes from options."""
    options = {name: value for name, value in identity.items() if name not in (*_CONTENT, "sequences")}
    content = {name: identity.get(name) for name in _CONTENT}
    return {**content, "number of sequences (--steps, --epochs)": identity.get("sequences"), "options": options}


def checkpoints(partial: Path) -> list[Path]:
    """A run's checkpoint folders, good or not, sorted by step."""
    found = [path for path in (partial / CHECKPOINTS_NAME).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step that a checkpoint folder's name gives."""
    return int(checkpoint.name.rpartition("-")[2])


def seal_checkpoint(checkpoint: Path) -> None:
    """Write a checkpoint's index, which names all its files and makes it good."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    described = []
    for path in files:
        sync_path(path)
        described.append({**entries([describe_file(path, 0)])[0], "name": str(path.relative_to(checkpoint))})
    write_index(checkpoint, {"format": CHECKPOINT_FORMAT, "step": step_of(checkpoint), "files": described})
    for path in (checkpoint / INDEX_NAME, checkpoint, checkpoint.parent):
        sync_path(path)


def check_checkpoint(checkpoint: Path) -> None:
    """Raise DataError unless a checkpoint is complete and unchanged since it was sealed."""
    if not (checkpoint / INDEX_NAME).is_file():
        raise DataError(f"{checkpoint}: no {INDEX_NAME}; the run was interrupted while writing it")
    for entry in load_index(checkpoint)["files"]:
        file = ShardFile(**entry)
        file.check_size(checkpoint)
        file.check_hash(checkpoint)


def remove_old_checkpoints(partial: Path, keep: int) -> None:
    """Remove all but the last `keep` checkpoints."""
    for path in checkpoints(partial)[:-keep]:
        shutil.rmtree(path)


def _sealed(partial: Path) -> list[Path]:
    """A run's checkpoints that were written completely, sorted by step."""
    return [path for path in checkpoints(partial) if (path / INDEX_NAME).is_file()]


def what_is_left(partial: Path) -> str:
    """A sentence for the user: from where a run that stops now can be resumed."""
    found = _sealed(partial)
    if not found:
        return "There was no checkpoint yet, so nothing is kept"
    return f"The checkpoint of step {step_of(found[-1])} is kept; the same command resumes from it"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file atomically."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_path(beside)
    beside.replace(path)
    sync_path(path.parent)
