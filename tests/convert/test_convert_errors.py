"""What convert refuses, with place, found, expected and what to do."""

from __future__ import annotations

import gzip

import pytest

from ismdata.convert.pipeline import convert
from ismdata.errors import DataError, UsageError
from tests.convert.test_convert import TALK as TALK
from tests.convert.test_convert import lines as lines
from tests.convert.test_convert import pairs as pairs
from tests.convert.test_convert import rows_of as rows_of
from tests.convert.test_convert import run as run

# ---- errors ----

SOUND = b'[{"messages": [{"role": "user", "content": "q"}]}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "corpus.jsonl: found no record"),
        (b" \n\n", "corpus.jsonl: found no record"),
        (b"[]", "corpus.jsonl: found no record"),
        (SOUND + b', {"mess', "end of the file at byte 57, inside record 2.*download"),
        (SOUND + b', {"messages" 1}]', "record 2: .*expected a JSON array"),
        (SOUND, "end of the file at byte 49.*download may be incomplete"),
        (b'{"messages": [{"role": "x", "content": "q"}]}', r"corpus.jsonl:1: message 1 has role 'x'.*none of which"),
        (b'{"better": [], "worse": []}', "has the fields 'better', 'worse'; expected a known format"),
        (b"just\nprose\n", "first record is 'just'. This looks like lines of text"),
        ('{"messages": []}'.encode("utf-16"), "found UTF-16; expected UTF-8"),
        (b"\x28\xb5\x2f\xfd1234", "found broken or truncated data"),
        (b"\xff\x00\xff\x00", "corpus.jsonl:1: byte 1 of the record is 0xff; expected UTF-8"),
        (gzip.compress(b'["a", "b"]\n' * 1000, mtime=0)[:-20], "broken or truncated data.*get the file again"),
        (b"PK\x03\x04broken", "not a readable zip archive"),
        (b"PAR1broken", "not a readable Parquet file"),
    ],
)  # fmt: skip
def test_unusable_files_leave_nothing(tmp_path, data, message):
    path = tmp_path / "corpus.jsonl"
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        convert([str(path)], tmp_path / "out")
    assert [entry.name for entry in tmp_path.iterdir()] == ["corpus.jsonl"]


def test_sources_that_cannot_be_read_are_refused(tmp_path):
    out = tmp_path / "out"
    with pytest.raises(DataError, match=r"missing\.jsonl: no such file or folder"):
        convert([str(tmp_path / "missing.jsonl")], out)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes.md").write_text("notes")
    with pytest.raises(DataError, match=r"folder: the folder holds notes\.md; expected files ending in \.json"):
        convert([str(tmp_path / "folder")], out)
    with pytest.raises(UsageError, match="no source given"):
        convert([], out)
    with pytest.raises(UsageError, match="unknown format; expected auto, "):
        convert([str(tmp_path)], out, format="csv")
    (tmp_path / "corpus.jsonl").write_bytes(lines({"instruction": "q", "output": "a"}))
    with pytest.raises(DataError, match=r"found JSON Lines; expected lines of text.*Leave out --format dailydialog"):
        convert([str(tmp_path / "corpus.jsonl")], out, format="dailydialog")
    with pytest.raises(DataError, match=r"corpus\.jsonl:1: the record has the fields .*; expected 'messages'"):
        convert([str(tmp_path / "corpus.jsonl")], out, format="messages")
    assert not out.exists()


def test_hub_names(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    asked = []

    def load_dataset(name):
        asked.append(name)
        if name != "owner/talks":
            raise ConnectionError("no network\nat all")
        return datasets.DatasetDict({"train": datasets.Dataset.from_list([{"dialog": ["q", "a"]}])})

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    report = convert(["owner/talks"], tmp_path / "out")
    (row,) = rows_of(tmp_path / "out")
    assert (row["id"], row["source"], pairs(row)) == ("talks-train-1", "owner/talks!train:row 1", TALK)
    assert report.sources[0].sha256 is None
    with pytest.raises(
        DataError, match=r"owner/other: no such file, and it cannot be loaded as a hub dataset \(no network\)"
    ):
        convert(["owner/other"], tmp_path / "other")
    monkeypatch.chdir(tmp_path)
    for name in ("missing", "out/missing", "owner/talks.jsonl", str(tmp_path / "missing")):
        with pytest.raises(DataError, match="no such file or folder"):
            convert([name], tmp_path / "other")
    assert asked == ["owner/talks", "owner/other"]


def test_an_output_in_use_is_refused(run, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    (tmp_path / "corpus.jsonl").write_bytes(lines(["q", "a"]))
    with pytest.raises(UsageError, match="in use"):
        convert([str(tmp_path / "corpus.jsonl")], tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").read_text() == "mine"
