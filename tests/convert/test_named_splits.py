"""Splits that the sources name: kept apart, merged on request, never mixed without a word."""

from __future__ import annotations

import gzip
import io
import json
import sys
import tarfile
import zipfile
from types import SimpleNamespace

import jsonschema
import pytest

from ismdata.convert.options import Cleaning, Selection
from ismdata.convert.pipeline import convert, explain_sources
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from tests.convert.test_selection import check_counts, rows_of
from tests.support.paths import SCHEMAS


def talk(text):
    return {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": f"re {text}"}]}


def lines(*texts):
    return "".join(json.dumps(talk(text)) + "\n" for text in texts)


def texts(folder):
    return [row["messages"][0]["content"] for row in rows_of(folder)]


def check_parts(report, **expected):
    """The output has exactly these parts with these texts, sound and as the schemas say."""
    folders = [report.output / name for name in expected]
    check_counts(report, folders)
    for name, found in expected.items():
        assert texts(report.output / name) == found, name
    index = json.loads((report.output / "index.json").read_text())
    assert index["parts"] == report.parts == {name: len(found) for name, found in expected.items()}
    jsonschema.validate(index, json.loads((SCHEMAS / "split_index.schema.json").read_text()))
    schema = json.loads((SCHEMAS / "conversations_index.schema.json").read_text())
    for folder in folders:
        part = json.loads((folder / "index.json").read_text())
        jsonschema.validate(part, schema)
        assert sum(source["records"] for source in part["sources"]) == part["counts"]["read"]
        assert part["options"]["part"] == folder.name


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data").mkdir()
    for name, content in (("train", lines("a", "b")), ("dev", lines("c")), ("test", lines("d", "e"))):
        (tmp_path / "data" / f"{name}.jsonl").write_text(content)
    return tmp_path / "data"


APART = {"train": ["a", "b"], "validation": ["c"], "test": ["d", "e"]}


def test_a_folder_of_splits_is_kept_apart(data, tmp_path):
    report = convert([str(data)], tmp_path / "out")
    check_parts(report, **APART)
    assert report.splits == {
        "train": (f"{data}/train.jsonl",),
        "validation": (f"{data}/dev.jsonl",),
        "test": (f"{data}/test.jsonl",),
    }
    for workers in (1, 3):
        convert([str(data)], tmp_path / f"again{workers}", workers=workers)
        for path in (tmp_path / "out").rglob("*.arrow"):
            assert (tmp_path / f"again{workers}" / path.relative_to(tmp_path / "out")).read_bytes() == path.read_bytes()


def test_files_and_globs_are_as_their_folder(data, tmp_path):
    files = [str(data / f"{name}.jsonl") for name in ("test", "train", "dev")]
    check_parts(convert(files, tmp_path / "files"), **APART)
    check_parts(convert([f"{data}/*.jsonl"], tmp_path / "glob"), **APART)
    check_parts(convert([f"{data}/*"], tmp_path / "star"), **APART)


def test_folders_named_like_splits(tmp_path):
    for name, text in (("train", "a"), ("test", "b")):
        (tmp_path / "data" / name).mkdir(parents=True)
        (tmp_path / "data" / name / "part1.jsonl").write_text(lines(text))
    expected = {"train": ["a"], "test": ["b"]}
    check_parts(convert([str(tmp_path / "data")], tmp_path / "one"), **expected)
    both = [str(tmp_path / "data" / name) for name in expected]
    check_parts(convert(both, tmp_path / "two"), **expected)
    report = convert([str(tmp_path / "data" / "test")], tmp_path / "alone")
    assert (report.parts, texts(tmp_path / "alone")) == ({}, ["b"])


@pytest.mark.parametrize("kind", ["json", "json.gz", "stdin", "zip", "tar.gz", "saved", "memory"])
def test_splits_inside_one_source(kind, tmp_path, monkeypatch):
    inside = {"train": ["a", "b"], "valid": ["c"], "test": ["d", "e"]}
    records = {name: [talk(text) for text in found] for name, found in inside.items()}
    path = tmp_path / f"corpus.{kind}"
    source = str(path)
    if kind == "json":
        path.write_text(json.dumps(records))
    elif kind == "json.gz":
        path.write_bytes(gzip.compress(json.dumps(records).encode()))
    elif kind == "stdin":
        monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(json.dumps(records).encode())))
        source = "-"
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, found in inside.items():
                archive.writestr(f"corpus/{name}.jsonl", lines(*found))
    elif kind == "tar.gz":
        with tarfile.open(path, "w:gz") as archive:
            for name, found in inside.items():
                content = lines(*found).encode()
                info = tarfile.TarInfo(f"corpus/{name}.jsonl")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    else:
        datasets = pytest.importorskip("datasets")
        source = datasets.DatasetDict({name: datasets.Dataset.from_list(found) for name, found in records.items()})
        if kind == "saved":
            source.save_to_disk(str(path))
            source = str(path)
    check_parts(convert([source], tmp_path / "out"), **APART)
    if kind in ("stdin", "memory"):
        return
    for split, name in (("dev", "validation"), ("validation", "validation"), ("test", "test")):
        report = convert([f"{source}:{split}"], tmp_path / split)
        assert (report.parts, texts(tmp_path / split)) == ({}, APART[name])
        check_counts(report, [tmp_path / split])
    with pytest.raises(DataError, match=r"has the splits .*train.*; expected holdout"):
        convert([f"{source}:holdout"], tmp_path / "none")
    report = convert([source], tmp_path / "merged", selection=Selection(splits="merge"))
    assert sorted(texts(tmp_path / "merged")) == ["a", "b", "c", "d", "e"]
    assert any(note.startswith("merged the splits train (") for note in report.notes)
    report = convert([source], tmp_path / "two", selection=Selection(splits="train,test"))
    check_parts(report, train=["a", "b"], test=["d", "e"])
    assert any(note.startswith("left out validation") for note in report.notes)


def test_purposes_are_splits_of_their_own(tmp_path):
    datasets = pytest.importorskip("datasets")
    names = ("train_sft", "test_sft", "train_gen")
    source = datasets.DatasetDict({name: datasets.Dataset.from_list([talk(name)]) for name in names})
    check_parts(
        convert([source], tmp_path / "out"), train_sft=["train_sft"], train_gen=["train_gen"], test_sft=["test_sft"]
    )


def test_what_names_no_split_is_train_and_said(data, tmp_path):
    (data / "extra.jsonl").write_text(lines("x"))
    report = convert([str(data)], tmp_path / "out")
    check_parts(report, **{**APART, "train": ["x", "a", "b"]})
    assert f"{data}/extra.jsonl: of no split; written to train" in report.notes


def test_names_that_only_look_so_are_merged_and_said(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("training_notes", "test_case_chat"):
        (tmp_path / "data" / f"{name}.jsonl").write_text(lines(name))
    report = convert([str(tmp_path / "data")], tmp_path / "out")
    assert (report.parts, texts(tmp_path / "out")) == ({}, ["test_case_chat", "training_notes"])
    assert "data/test_case_chat.jsonl: the name may mean the split test, and was not taken for it" in report.notes[0]


def test_one_split_is_one_folder(tmp_path):
    (tmp_path / "train.jsonl").write_text(lines("a"))
    report = convert([str(tmp_path / "train.jsonl")], tmp_path / "out")
    assert (report.parts, report.notes) == ({}, ())
    assert texts(tmp_path / "out") == ["a"]


def test_shares_never_mix_splits_without_a_word(data, tmp_path):
    draw = {"split": "0.5/0.5"}
    with pytest.raises(UsageError, match=r"--split 0.5/0.5: .*train .*--splits train, or pass --splits merge"):
        convert([str(data)], tmp_path / "out", selection=Selection(**draw))
    records = {"train": [talk("a")], "test": [talk("b")]}
    (tmp_path / "splits.json").write_text(json.dumps(records))
    with pytest.raises(UsageError, match="--splits merge"):
        convert([str(tmp_path / "splits.json")], tmp_path / "out", selection=Selection(**draw))
    assert not (tmp_path / "out").exists()
    (data / "train.jsonl").write_text(lines(*map(str, range(40))))
    report = convert([str(data)], tmp_path / "train", selection=Selection(**draw, splits="train"))
    assert sum(report.parts.values()) == 40
    report = convert([str(data)], tmp_path / "all", selection=Selection(**draw, splits="merge"))
    assert sum(report.parts.values()) == 43
    assert any(note.startswith("merged the splits") for note in report.notes)


@pytest.mark.parametrize("form", ["files", "json"])
@pytest.mark.parametrize("dedup", ["exact", "near"])
def test_a_repeat_stays_in_the_split_that_measures(form, dedup, tmp_path):
    if dedup == "near":
        pytest.importorskip("datasketch")
    inside = {"train": ["a", "b", "a"], "test": ["b", "c"]}
    if form == "json":
        (tmp_path / "in.json").write_text(json.dumps({name: [*map(talk, found)] for name, found in inside.items()}))
    else:
        for name, found in inside.items():
            (tmp_path / "in.json").mkdir(exist_ok=True)
            (tmp_path / "in.json" / f"{name}.jsonl").write_text(lines(*found))
    selection = Selection(cleaning=Cleaning(dedup=dedup))
    report = convert([str(tmp_path / "in.json")], tmp_path / "out", selection=selection)
    check_parts(report, train=["a"], test=["b", "c"])
    assert report.quarantined == {"duplicate": 2}
    assert [json.loads(line)["reason"] for line in (tmp_path / "out/train/quarantine.jsonl").open()] == [
        "duplicate"
    ] * 2


def test_a_sample_is_of_all_splits(data, tmp_path):
    (data / "train.jsonl").write_text(lines(*(f"t{n}" for n in range(60))))
    report = convert([str(data)], tmp_path / "out", selection=Selection(sample=40, seed=1))
    assert report.written == 40 and report.quarantined == {"not_sampled": 23}
    check_counts(report, [tmp_path / "out" / name for name in report.parts])


def test_a_split_of_which_nothing_is_left_is_said(data, tmp_path):
    (data / "dev.jsonl").write_text('{"messages": [{"role": "narrator", "content": "x"}]}\n' * 3)
    report = convert([str(data)], tmp_path / "out")
    check_parts(report, train=["a", "b"], test=["d", "e"])
    assert "validation: none of its 3 records can be used; train/quarantine.jsonl lists them" in report.notes


def test_a_source_named_twice_is_refused(data, tmp_path):
    for twice in ([str(data), str(data / "dev.jsonl")], [str(data)] * 2):
        with pytest.raises(UsageError, match="named twice"):
            convert(twice, tmp_path / "out")


@pytest.mark.parametrize("splits", ["", "train,", " ,test"])
def test_splits_without_a_name_are_refused(splits):
    with pytest.raises(UsageError, match="expected keep, merge, or names"):
        Selection(splits=splits)


def test_what_has_no_splits_is_not_one(tmp_path):
    (tmp_path / "corpus.jsonl").write_text(lines("a"))
    source = str(tmp_path / "corpus.jsonl")
    with pytest.raises(DataError, match="names no splits; expected train"):
        convert([f"{source}:train"], tmp_path / "out")
    with pytest.raises(UsageError, match="names no split after the colon"):
        convert([f"{source}:"], tmp_path / "out")
    odd = tmp_path / "a:train"
    odd.write_text(lines("b"))
    convert([str(odd)], tmp_path / "odd")
    assert texts(tmp_path / "odd") == ["b"]


def test_hub_names_take_a_split_and_a_configuration(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")

    def load_dataset(name, config=None):
        if config is None:
            raise ValueError("Config name is missing.\nPlease pick one among the available configs: ['en', 'de']\n")
        found = {split: datasets.Dataset.from_list([talk(f"{config} {split}")]) for split in ("train", "validation")}
        return datasets.DatasetDict(found)

    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *args, **options: None)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    monkeypatch.setattr(datasets, "get_dataset_config_names", lambda name: ["en", "de"])
    check_parts(convert(["owner/talks:de"], tmp_path / "de"), train=["de train"], validation=["de validation"])
    convert(["owner/talks:en:dev"], tmp_path / "dev")
    assert texts(tmp_path / "dev") == ["en validation"]
    with pytest.raises(DataError, match=r"has the configurations en, de; expected one of them. Name owner/talks:en"):
        convert(["owner/talks"], tmp_path / "none")
    with pytest.raises(DataError, match=r"has the splits train, validation; expected test"):
        convert(["owner/talks:en:test"], tmp_path / "none")


def test_a_broken_part_is_found(data, tmp_path):
    convert([str(data)], tmp_path / "out")
    (tmp_path / "out" / "test" / "quarantine.jsonl").write_text("x")
    assert verify(tmp_path / "out").problems


def test_each_source_is_explained(data):
    assert [found.source for found in explain_sources([f"{data}:dev"])] == [f"{data}/dev.jsonl"]
