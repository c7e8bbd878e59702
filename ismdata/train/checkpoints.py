"""A run's folder and its checkpoints: what a crash leaves, and whether the same command may go on from it.

While a run works it writes into `.NAME.partial` beside its output and renames that last. In it `run.json` says what
decides the run's course, and `checkpoints/checkpoint-N` holds the state after step N. A checkpoint is good when its
`index.json`, written last, names each of its files with size and hash; any other is what a crash left, and is removed.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from ismdata.data import (
    INDEX_NAME,
    ShardFile,
    check_output,
    describe_file,
    entries,
    load_index,
    locked,
    make_partial,
    put_in_place,
    sync_path,
    write_index,
)
from ismdata.errors import DataError, IsmdataError, Terminated, UsageError
from ismdata.train.metrics import METRICS_NAME
from ismdata.train.options import flag

RUN_NAME = "run.json"
CHECKPOINTS_NAME = "checkpoints"
CHECKPOINT_FORMAT = "ismdata.checkpoint/1"

#: What decides a run's course and is no option, and how to speak of it where it has changed.
_CONTENT = {
    "data": "the shards of PACKED are others than they were",
    "weights": "the model that it starts from is another than it was",
    "sequences": "another number of sequences is to be seen in all (--steps or --epochs)",
}


@contextmanager
def training_folder(final: Path, *, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """Yield `.NAME.partial` to write into, alone; on success it is renamed to `final`.

    What an earlier run left there is kept, for `go_on` to look at. On an error the folder stays where it holds a
    checkpoint, else it is removed. Raises UsageError as `check_output` does and where another run writes there,
    DataError where the disk refuses.
    """
    partial = partial_folder(final)
    with locked(final):
        check_output(final, overwrite=overwrite, marker=METRICS_NAME, inputs=inputs)
        if not (partial / RUN_NAME).is_file():
            if checkpoints(partial) and not overwrite:
                raise UsageError(
                    f"{partial}: holds checkpoints of a run, but no {RUN_NAME} that says of which; name another "
                    "output, or pass --overwrite to replace it"
                )
            make_partial(partial, final)
        try:
            yield partial
            for path in partial.iterdir():
                if path.is_file():
                    sync_path(path)
            put_in_place(partial, final)
        except BaseException as error:
            if not checkpoints(partial):
                shutil.rmtree(partial, ignore_errors=True)
            elif isinstance(error, Terminated):
                error.kept = partial
            if isinstance(error, OSError):
                cause = os.strerror(error.errno) if error.errno else str(error)
                raise DataError(f"{final}: writing failed ({cause}). {what_is_left(partial)}") from error
            raise


def partial_folder(final: Path) -> Path:
    return final.parent / f".{final.name}.partial"


def go_on(partial: Path, identity: Mapping[str, Any], *, overwrite: bool) -> tuple[Path | None, list[str]]:
    """The checkpoint to go on from, None to begin; and what the user should be told.

    identity: all that decides the run's course. Where the run that left a checkpoint had another, raises UsageError (an
    option differs) or DataError (the data or the model), unless `overwrite`: then it is removed. Writes run.json.
    """
    told = []
    good: Path | None = None
    for path in reversed(checkpoints(partial)):
        try:
            check_checkpoint(path)
        except DataError as error:
            told.append(f"left aside: {error}")
            continue
        good = path
        break
    if good is not None:
        refusal = _refusal(partial, good, identity)
        if refusal is not None and not overwrite:
            raise refusal
        if refusal is not None:
            told.append(f"started anew, since --overwrite was given: {refusal}")
            good = None
    for path in checkpoints(partial):
        if path != good and (good is None or step_of(path) > step_of(good)):
            shutil.rmtree(path)
    if good is None:
        _write_json(partial / RUN_NAME, dict(identity))
    return good, told


def _refusal(partial: Path, checkpoint: Path, identity: Mapping[str, Any]) -> IsmdataError | None:
    """Why the run that left `checkpoint` is another than this one."""
    former = json.loads((partial / RUN_NAME).read_text(encoding="utf-8"))
    now = json.loads(json.dumps(dict(identity)))
    changed = sorted(name for name in former.keys() | now.keys() if former.get(name) != now.get(name))
    if not changed:
        return None
    options = [name for name in changed if name not in _CONTENT]
    reasons = [_CONTENT[name] for name in changed if name in _CONTENT]
    reasons += [f"{flag(name)} is {_shown(now.get(name))} and was {_shown(former.get(name))}" for name in options]
    if changed == ["sequences"]:
        options = changed
    text = (
        f"{partial}: the run that broke off there after step {step_of(checkpoint)} was another one: "
        f"{'; '.join(reasons)}. Give what it had to go on, or pass --overwrite to begin anew"
    )
    return UsageError(text) if options else DataError(text)


def _shown(value: Any) -> str:
    return "not given" if value is None else str(value)


def checkpoints(partial: Path) -> list[Path]:
    """The checkpoint folders of a run, good or not, by step."""
    found = [path for path in (partial / CHECKPOINTS_NAME).glob("checkpoint-*") if path.name[11:].isdecimal()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def seal_checkpoint(checkpoint: Path) -> None:
    """Name all files of a checkpoint in its index, written last: from then on it is good."""
    files = sorted(path for path in checkpoint.rglob("*") if path.is_file())
    described = []
    for path in files:
        sync_path(path)
        described.append({**entries([describe_file(path, 0)])[0], "name": str(path.relative_to(checkpoint))})
    write_index(checkpoint, {"format": CHECKPOINT_FORMAT, "step": step_of(checkpoint), "files": described})
    for path in (checkpoint / INDEX_NAME, checkpoint, checkpoint.parent):
        sync_path(path)


def check_checkpoint(checkpoint: Path) -> None:
    """Raise DataError unless a checkpoint is as it was sealed."""
    if not (checkpoint / INDEX_NAME).is_file():
        raise DataError(f"{checkpoint}: not finished; a crash fell into writing it")
    for entry in load_index(checkpoint)["files"]:
        file = ShardFile(**entry)
        file.check_size(checkpoint)
        file.check_hash(checkpoint)


def remove_old_checkpoints(partial: Path, keep: int) -> None:
    for path in checkpoints(partial)[:-keep]:
        shutil.rmtree(path)


def what_is_left(partial: Path) -> str:
    """A sentence on what a run that stops leaves behind."""
    found = [path for path in checkpoints(partial) if (path / INDEX_NAME).is_file()]
    if not found:
        return "There was no checkpoint yet, so nothing was kept"
    return f"The checkpoint of step {step_of(found[-1])} stays; the same command goes on from there"


def _write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a file that is there whole or not at all."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    sync_path(beside)
    beside.replace(path)
    sync_path(path.parent)
