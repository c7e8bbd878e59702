"""Folders of splits are packed whole: each split as if it were packed alone."""

from __future__ import annotations

import json

import jsonschema
import pytest
from typer.testing import CliRunner

from ismdata import PackedDataset
from ismdata.cli.main import app
from ismdata.convert.pipeline import convert
from ismdata.data.verification import verify
from ismdata.errors import DataError, UsageError
from ismdata.pack import pack, verify_conversations
from tests.hostile.test_crash import Death, DeathAfter
from tests.pack.test_pack import bytes_tokenizer as bytes_tokenizer
from tests.pack.test_pack import talk
from tests.support.paths import SCHEMAS


@pytest.fixture
def splits(tmp_path):
    records = {name: [{"messages": talk(n + 1, name=name[0])} for n in range(4)] for name in ("train", "valid")}
    (tmp_path / "in.json").write_text(json.dumps(records))
    convert([str(tmp_path / "in.json")], tmp_path / "c")
    return tmp_path / "c"


@pytest.fixture
def options(bytes_tokenizer):
    return {"tokenizer": str(bytes_tokenizer), "seq_len": 256}


def files(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_each_split_is_packed_as_if_alone(splits, tmp_path, options):
    report = pack([splits], tmp_path / "p", **options)
    for name in ("train", "validation"):
        alone = pack([splits / name], tmp_path / name, **options)
        assert files(tmp_path / "p" / name) == files(tmp_path / name)
        assert (report.parts[name].counts, report.parts[name].totals) == (alone.counts, alone.totals)
    assert report.counts == {"read": 8, "packed": 8, "quarantined": {}}
    index = json.loads((tmp_path / "p" / "index.json").read_text())
    jsonschema.validate(index, json.loads((SCHEMAS / "packed_split_index.schema.json").read_text()))
    assert index["parts"] == {name: len(PackedDataset(tmp_path / "p" / name)) for name in ("train", "validation")}
    found = verify(tmp_path / "p")
    assert found.problems == [] and found.counts["conversations"] == 8
    assert verify_conversations(found, [splits]).counts["answers found"] == 20
    with pytest.raises(DataError, match=r"holds splits; .*Name .*p/train or .*`ismdata train .*/train --eval .*/valid"):
        PackedDataset(tmp_path / "p")


def test_damage_in_a_split_is_found(splits, tmp_path, options):
    pack([splits], tmp_path / "p", **options)
    shard = tmp_path / "p" / "validation" / "shard-00000.arrow"
    shard.write_bytes(shard.read_bytes()[:-1])
    assert any(str(shard) in problem for problem in verify(tmp_path / "p").problems)


def test_folders_of_one_kind(splits, tmp_path, options):
    with pytest.raises(UsageError, match=r"train: one folder of conversations beside .*c, which holds splits"):
        pack([splits, splits / "train"], tmp_path / "p", **options)
    with pytest.raises(UsageError, match="named twice"):
        pack([splits, splits], tmp_path / "p", **options)
    assert not (tmp_path / "p").exists()


@pytest.mark.slow
def test_a_death_at_any_sync_is_resumed_to_the_same_bytes(splits, tmp_path, options, monkeypatch):
    pack([splits], tmp_path / "direct", **options)
    n, died = 0, True
    while died:
        died = False
        with monkeypatch.context() as patch:
            patch.setattr("os.fsync", DeathAfter(n))
            try:
                pack([splits], tmp_path / "p", **options)
            except Death:
                died = True
                assert not (tmp_path / "p").exists() or files(tmp_path / "p") == files(tmp_path / "direct")
        if not (tmp_path / "p").exists():
            pack([splits], tmp_path / "p", **options)
        assert files(tmp_path / "p") == files(tmp_path / "direct")
        pack([splits], tmp_path / "p", overwrite=True, **options)
        for path in sorted((tmp_path / "p").rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        (tmp_path / "p").rmdir()
        n += 5
    assert n > 20


def test_the_command_to_train_is_said(splits, tmp_path, options):
    words = ["pack", splits, "-o", tmp_path / "p", "--tokenizer", options["tokenizer"], "--seq-len", 256]
    shown = CliRunner().invoke(app, [*map(str, words)], env={"COLUMNS": "400"})
    assert shown.exit_code == 0, shown.stderr
    assert (
        f"ismdata train {tmp_path / 'p' / 'train'} --eval {tmp_path / 'p' / 'validation'} --model MODEL" in shown.stdout
    )


def test_inspect_shows_all_splits(splits, tmp_path, options):
    pack([splits], tmp_path / "p", **options)
    for folder, column in ((splits, "conversations"), (tmp_path / "p", "sequences")):
        shown = CliRunner().invoke(app, ["inspect", str(folder)])
        assert shown.exit_code == 0, shown.stderr
        assert column in shown.stdout and "train" in shown.stdout and "validation" in shown.stdout
        facts = json.loads(CliRunner().invoke(app, ["inspect", str(folder), "--json"]).stdout)
        assert list(facts["parts"]) == ["train", "validation"]
        assert facts["parts"]["train"]["conversations"] == 4
