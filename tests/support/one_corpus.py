"""A small corpus, converted: its conversations, and what was refused."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from ismdata.convert import ConvertReport, convert
from tests.support.records import turns_of


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The rows and the lines of the quarantine of a converted folder, and the report."""

    rows: list[dict[str, Any]]
    quarantine: list[dict[str, Any]]
    report: ConvertReport

    @property
    def turns(self) -> list[list[tuple[str, str | None]]]:
        """The role and the content of each message of each conversation."""
        return [turns_of(row) for row in self.rows]

    @property
    def answers(self) -> list[str | None]:
        """The last message of each conversation."""
        return [turns[-1][1] for turns in self.turns]

    @property
    def reasons(self) -> list[str]:
        """Why each other record was refused."""
        return [entry["reason"] for entry in self.quarantine]


def lines(*records: Any) -> str:
    """Records as JSON Lines."""
    return "".join(json.dumps(record) + "\n" for record in records)


def convert_text(folder: Path, data: str | bytes | pa.Table, name: str = "corpus.jsonl", **options: Any) -> Converted:
    """Write a corpus into a folder and convert it. A table becomes `corpus.parquet`."""
    path = folder / ("corpus.parquet" if isinstance(data, pa.Table) else name)
    if isinstance(data, pa.Table):
        pq.write_table(data, path)
    else:
        path.write_bytes(data.encode() if isinstance(data, str) else data)
    output = folder / "converted"
    report = convert([str(path)], output, overwrite=True, workers=1, **options)
    rows: list[dict[str, Any]] = []
    for shard in sorted(output.glob("conversations-*.arrow")):
        with pa.ipc.open_stream(shard) as stream:
            rows += stream.read_all().to_pylist()
    quarantine = (output / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()
    assert report.read == len(rows) + len(quarantine)
    return Converted(rows=rows, quarantine=[json.loads(line) for line in quarantine], report=report)
