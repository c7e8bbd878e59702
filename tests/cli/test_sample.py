"""The bundled sample converts with exactly the counts and refusals that its README states."""

from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from ismdata.cli.demo import SAMPLE, sample_files
from ismdata.convert.pipeline import ConvertReport, convert
from ismdata.data.verification import verify

README = (SAMPLE / "README.md").read_text(encoding="utf-8")


def counts_stated() -> dict[str, tuple[int, int, int]]:
    """From the README's first table: file -> records, written, quarantined; "all" for the sums."""
    rows = re.findall(r"^\| (?:`([\w.]+)`|all) \|.*\| (\d+) \| (\d+) \| (\d+) \|$", README, flags=re.MULTILINE)
    return {name or "all": (int(records), int(written), int(refused)) for name, records, written, refused in rows}


def refusals_stated() -> list[tuple[str, int, str]]:
    """From the README's second table: file, line or record number, reason."""
    rows = re.findall(r"^\| `([\w.]+)` \| (?:line|record) (\d+) \|.*\| `(\w+)` \|$", README, flags=re.MULTILINE)
    return [(name, int(place), reason) for name, place, reason in rows]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ConvertReport]:
    folder = tmp_path_factory.mktemp("sample") / "converted"
    return folder, convert([str(file) for file in sample_files()], folder)


def conversations(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for path in sorted(folder.glob("conversations-*.arrow")):
        with pa.memory_map(str(path)) as source, pa.ipc.open_stream(source) as stream:
            rows += stream.read_all().to_pylist()
    return rows


def quarantined(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "quarantine.jsonl").read_text(encoding="utf-8").splitlines()]


def file_of(source: str) -> str:
    return next(file.name for file in sample_files() if file.name in source)


def test_the_readme_adds_up() -> None:
    stated = counts_stated()
    assert stated.keys() == {"all", *(file.name for file in sample_files())}
    files = [counts for name, counts in stated.items() if name != "all"]
    assert tuple(map(sum, zip(*files, strict=True))) == stated["all"]
    assert all(records == written + refused for records, written, refused in stated.values())
    assert len(refusals_stated()) == stated["all"][2]


def test_counts(converted: tuple[Path, ConvertReport]) -> None:
    folder, report = converted
    assert (report.read, report.written, sum(report.quarantined.values())) == counts_stated()["all"]
    written = Counter(file_of(row["source"]) for row in conversations(folder))
    refused = Counter(file_of(line["source"]) for line in quarantined(folder))
    for name, (records, count_written, count_refused) in counts_stated().items():
        if name != "all":
            assert (written[name] + refused[name], written[name], refused[name]) == (
                records,
                count_written,
                count_refused,
            ), name


def test_refusals(converted: tuple[Path, ConvertReport]) -> None:
    found = {(file_of(line["source"]), line["reason"]): line["source"] for line in quarantined(converted[0])}
    assert found.keys() == {(name, reason) for name, _, reason in refusals_stated()}
    for name, place, reason in refusals_stated():
        assert re.search(rf":(record )?{place}$", found[name, reason]), found[name, reason]


def test_nothing_is_lost_on_the_way(converted: tuple[Path, ConvertReport]) -> None:
    """Every text of the plainest file arrives, in its order, spoken by the one who alternates."""
    rows = [row for row in conversations(converted[0]) if file_of(row["source"]) == "lists.json"]
    raw = json.loads((SAMPLE / "lists.json").read_text(encoding="utf-8"))
    assert [[message["content"] for message in row["messages"]] for row in rows] == raw
    for row in rows:
        roles = [message["role"] for message in row["messages"]]
        assert roles == [("user", "assistant")[turn % 2] for turn in range(len(roles))]


def test_what_the_readme_says_is_shown(converted: tuple[Path, ConvertReport]) -> None:
    rows = conversations(converted[0])
    messages = [message for row in rows for message in row["messages"]]
    assert any(message["train"] is False for message in messages)
    assert {message["weight"] for message in messages} >= {0.5}
    assert sum(row["tools"] is not None for row in rows) == 2
    assert any(message["tool_calls"] and message["content"] is None for message in messages)
    assert any(row["messages"][0]["role"] == "assistant" and row["messages"][-1]["role"] == "user" for row in rows)
    assert any("你好" in message["content"] for message in messages if message["content"])
    assert {message["role"] for message in messages} == {"system", "user", "assistant", "tool"}


def test_verifies(converted: tuple[Path, ConvertReport]) -> None:
    assert verify(converted[0]).ok
