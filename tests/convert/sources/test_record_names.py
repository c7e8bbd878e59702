"""What records without an id are named after, where files in several folders have one name."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pytest

from ismdata.convert.pipeline import convert
from ismdata.convert.sources.arguments import with_unique_stems
from ismdata.convert.sources.source_types import FileSource


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        pytest.param(["a/dev.json", "b/test.json"], [None, None], id="other names"),
        pytest.param(["k/film/dev.json", "k/music/dev.json"], ["film/dev", "music/dev"], id="folders"),
        pytest.param(["x/1/dev.json", "y/1/dev.json", "y/2/dev.json"], ["x/1/dev", "y/1/dev", "y/2/dev"], id="deeper"),
        pytest.param(["dev.json", "b/dev.json", "c/test.json"], ["dev", "b/dev", None], id="no folder"),
        pytest.param(["a/dev.json", "a/dev.csv"], ["dev.json", "dev.csv"], id="endings"),
        pytest.param(["a/dev.json", "a/dev.csv", "b/dev.csv"], ["a/dev.json", "a/dev.csv", "b/dev.csv"], id="both"),
        pytest.param(["a/dev.json", "a/dev.json"], [None, None], id="one file twice"),
        pytest.param(["p.zip!film/dev.json", "p.zip!music/dev.json"], ["film/dev", "music/dev"], id="archive"),
    ],
)
def test_files_of_one_name_get_different_stems(names, expected):
    sources = [FileSource(name=name, path=Path(name)) for name in names]
    assert [source.unique_stem for source in with_unique_stems(sources)] == expected


def test_ids_of_files_of_one_name_differ(tmp_path):
    for folder in ("film", "music"):
        (tmp_path / folder).mkdir()
        talk = {"messages": [{"role": "user", "content": folder}, {"role": "assistant", "content": "Yes."}]}
        (tmp_path / folder / "dev.jsonl").write_text(json.dumps(talk) + "\n")
    convert([str(tmp_path / "film" / "dev.jsonl"), str(tmp_path / "music")], tmp_path / "one by one")
    convert([str(tmp_path / "*" / "dev.jsonl")], tmp_path / "pattern")
    for name in ("one by one", "pattern"):
        with pa.ipc.open_stream(tmp_path / name / "conversations-00000.arrow") as stream:
            assert stream.read_all()["id"].to_pylist() == ["film/dev-1", "music/dev-1"]
