"""Files converted in a test: the role and the content of each message, and what was refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pyarrow as pa

from ismdata.convert.pipeline import ConvertReport, convert

Turns = list[tuple[str, str | None]]


class Converted(NamedTuple):
    """The conversations of a converted folder, its refusals as (reason, detail), and the report."""

    talks: list[Turns]
    refusals: list[tuple[str, str]]
    report: ConvertReport


def convert_files(folder: Path, files: dict[str, bytes | str], *named: str, **options: Any) -> Converted:
    """Write files to a folder and convert those that are named, else all of them in order. Raises DataError."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data if isinstance(data, bytes) else data.encode())
    return convert_paths([str(folder / name) for name in named or files], folder / "converted", **options)


def convert_paths(paths: list[str], output: Path, **options: Any) -> Converted:
    """Convert files. Raises DataError."""
    report = convert(paths, output, **options)
    rows: list[dict[str, Any]] = []
    for path in sorted(output.rglob("conversations-*.arrow")):
        with pa.ipc.open_stream(path) as stream:
            rows += stream.read_all().to_pylist()
    lines = [line for path in sorted(output.rglob("quarantine.jsonl")) for line in path.read_text("utf-8").splitlines()]
    refusals = [(one["reason"], one["detail"]) for one in map(json.loads, lines)]
    assert report.read == len(rows) + len(refusals)
    return Converted([[(one["role"], one["content"]) for one in row["messages"]] for row in rows], refusals, report)
