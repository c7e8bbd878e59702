"""Packing folders of splits: each split becomes a packed folder inside the output."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

import ismdata
from ismdata.data import (
    INDEX_NAME,
    PACKED_SPLIT_FORMAT,
    SPLIT_FORMAT,
    ConvertedFolder,
    Journal,
    JournaledLeftovers,
    load_index,
    open_output,
    part_names,
    write_index,
)
from ismdata.display import Reporter
from ismdata.errors import UsageError
from ismdata.pack.options import PackOptions
from ismdata.pack.report import PackReport


def parts_of(converted: Sequence[Path]) -> dict[str, list[Path]]:
    """The converted folders of each split; all under "" if none of them is a folder of splits.

    Raises UsageError if only some of them are, DataError if an index is broken.
    """
    splits = {folder: _splits(Path(folder)) for folder in converted}
    if not any(splits.values()):
        return {"": [Path(folder) for folder in converted]}
    parts: dict[str, list[Path]] = {}
    for folder in converted:
        if not splits[folder]:
            other = next(other for other in converted if splits[other])
            raise UsageError(
                f"{folder}: one folder of conversations beside {other}, which holds splits; expected folders of one "
                f"kind. Name a split, such as {Path(other) / splits[other][0]}"
            )
        for name in splits[folder]:
            parts.setdefault(name, []).append(Path(folder) / name)
    return parts


def _splits(folder: Path) -> list[str]:
    """The splits in a folder, none if it holds no splits."""
    if not (folder / INDEX_NAME).is_file() or load_index(folder).get("format") != SPLIT_FORMAT:
        return []
    return part_names(folder)


def pack_parts(
    parts: Mapping[str, Sequence[Path]],
    output: Path,
    options: PackOptions,
    *,
    overwrite: bool,
    reporter: Reporter,
    pack_part: Callable[[Sequence[Path], Path], PackReport],
) -> PackReport:
    """Pack each split to a folder of its own, or resume an interrupted call with the same arguments.

    Args:
        parts: The converted folders of each split.
        output: The folder to write. It appears when it is complete.
        options: How to pack.
        overwrite: Replace an existing folder.
        reporter: Receives notes.
        pack_part: Packs converted folders to a folder.

    Returns:
        The sum of the reports of all splits, and these.

    Raises:
        UsageError: As `pack` does.
        DataError: As `pack` does.
    """
    started = time.perf_counter()
    folders = [folder for sources in parts.values() for folder in sources]
    run = {
        "command": "pack",
        "version": ismdata.__version__,
        "sources": [{"name": str(folder), "sha256": ConvertedFolder(folder).sha256} for folder in folders],
        "options": _recorded(options),
    }
    reports: dict[str, PackReport] = {}
    with open_output(
        output, overwrite=overwrite, inputs=folders, leftovers=JournaledLeftovers(), reporter=reporter
    ) as folder:
        with closing(Journal.open(folder, run, restart=overwrite)):
            for name, sources in parts.items():
                done = (folder / name / INDEX_NAME).is_file()
                reports[name] = _finished(folder / name) if done else pack_part(sources, folder / name)
        counts = _sum([report.counts for report in reports.values()])
        index = {
            "format": PACKED_SPLIT_FORMAT,
            "version": ismdata.__version__,
            "seq_len": options.seq_len,
            "mask": options.mask,
            "counts": counts,
            "parts": {name: report.totals["sequences"] for name, report in reports.items()},
        }
        write_index(folder, index)
    return PackReport(
        output=output,
        counts=counts,
        totals=_sum([report.totals for report in reports.values()]),
        notes=tuple(dict.fromkeys(note for report in reports.values() for note in report.notes)),
        first_refusals=tuple(refusal for report in reports.values() for refusal in report.first_refusals),
        seconds=time.perf_counter() - started,
        parts=reports,
    )


def _recorded(options: PackOptions) -> dict[str, Any]:
    """The options that the output depends on, as JSON values."""
    values = {name: value for name, value in asdict(options).items() if name != "workers"}
    arguments = values["template_arguments"]
    return {
        **values,
        "template_date": options.template_date.isoformat(),
        "template_arguments": None if arguments is None else dict(arguments),
    }


def _finished(folder: Path) -> PackReport:
    """The report of a split that an interrupted run has packed."""
    index = load_index(folder)
    return PackReport(
        output=folder, counts=index["counts"], totals=index["totals"], notes=(), first_refusals=(), seconds=0.0
    )


def _sum(counts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The sums of numbers, and of numbers by reason, by their names."""
    total: dict[str, Any] = {}
    for each in counts:
        for name, value in each.items():
            if isinstance(value, Mapping):
                total[name] = dict(sorted((Counter(total.get(name, {})) + Counter(value)).items()))
            else:
                total[name] = total.get(name, 0) + value
    return total
