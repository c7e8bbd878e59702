"""Damage to complete folders is reported: flipped bits, truncations, and swapped, missing or additional files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil

import pytest

from ismdata import conversation
from ismdata.data import shards
from ismdata.data.dataset import PackedDataset
from ismdata.data.index import INDEX_NAME, leaves_folder, load_index, read_index, with_own_hash, write_index
from ismdata.data.verification import verify
from ismdata.errors import DataError
from tests.support.handmade import ConvertedFolder, PackedFolder

pytestmark = pytest.mark.slow  # flips every bit of a folder

KINDS = {"converted": ConvertedFolder, "packed": PackedFolder}


def tiny(kind, parent):
    """The smallest folder with all kinds of files: one shard of one row."""
    if kind == "packed":
        made = PackedFolder(parent / kind, packed=[[[("a", [(2, 1, 0), (3, 2, 1)])]]], seq_len=128)
        made.index["totals"]["split"] = 0
    else:
        made = ConvertedFolder(parent / kind)
        (made.folder / "conversations-00001.arrow").unlink()
        made.rows = made.rows[:1]
        made.index["counts"] |= {"read": 2, "written": 1}
    made.write()
    assert verify(made.folder).ok
    return made.folder


def files_of(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


@pytest.mark.parametrize("kind", KINDS)
def test_every_single_flipped_bit_is_reported(tmp_path, kind):
    """Every bit of every file. The problem names the damaged file, and nothing is raised."""
    folder = tiny(kind, tmp_path)
    flipped = 0
    for path in files_of(folder):
        with path.open("r+b") as file:
            descriptor = file.fileno()
            for place, byte in enumerate(path.read_bytes()):
                for bit in range(8):
                    os.pwrite(descriptor, bytes([byte ^ 1 << bit]), place)
                    problems = verify(folder).problems
                    assert len(problems) == 1, (path.name, place, bit, problems)
                    assert problems[0].startswith(f"{path}: "), (path.name, place, bit, problems)
                    flipped += 1
                os.pwrite(descriptor, bytes([byte]), place)
    assert flipped == 8 * sum(path.stat().st_size for path in files_of(folder))
    assert verify(folder).ok


@pytest.mark.parametrize("kind", KINDS)
def test_every_truncation_and_every_extension_is_reported(tmp_path, kind):
    folder = tiny(kind, tmp_path)
    for path in files_of(folder):
        sound = path.read_bytes()
        sizes = range(len(sound)) if path.name == INDEX_NAME else range(0, len(sound), 97)
        for broken in [*(sound[:size] for size in sizes), sound[:-1], sound + b"\n", sound + sound]:
            if broken != sound:
                path.write_bytes(broken)
                problems = verify(folder).problems
                assert [problem.startswith(f"{path}: ") for problem in problems] == [True], (path, len(broken))
        path.write_bytes(sound)
    assert verify(folder).ok


@pytest.mark.parametrize("kind", KINDS)
def test_every_missing_file_is_reported(tmp_path, kind):
    folder = KINDS[kind](tmp_path / kind).folder
    for path in files_of(folder):
        path.rename(tmp_path / "kept")
        problems = verify(folder).problems
        assert [problem.startswith(f"{path}: ") for problem in problems] == [True], problems
        (tmp_path / "kept").rename(path)
    assert verify(folder).ok


ADDITIONAL = ["shard-00002.arrow", "conversations-00002.arrow", "shard-00000.arrow.tmp", ".hidden", "deeper/x.arrow"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ADDITIONAL)
def test_every_additional_file_is_reported(tmp_path, kind, name):
    folder = KINDS[kind](tmp_path / kind).folder
    (folder / name).parent.mkdir(exist_ok=True)
    shutil.copy(next(folder.glob("*.arrow")), folder / name)
    [problem] = verify(folder).problems
    assert problem.startswith(f"{folder / name}: index.json does not list it")


@pytest.mark.parametrize("kind", KINDS)
def test_a_shard_of_another_folder_is_reported(tmp_path, kind):
    """A valid file, but of another folder with another index."""
    one, other = KINDS[kind](tmp_path / "one"), KINDS[kind](tmp_path / "other")
    row = other.rows[0][0]
    row["conversation_ids" if kind == "packed" else "id"] = (
        [f"x{name[1:]}" for name in row["conversation_ids"]] if kind == "packed" else "x"
    )
    other.write()
    name = sorted(path.name for path in one.folder.glob("*.arrow"))[0]
    assert (one.folder / name).stat().st_size == (other.folder / name).stat().st_size
    assert verify(other.folder).ok
    shutil.copy(other.folder / name, one.folder / name)
    [problem] = verify(one.folder).problems
    assert problem.startswith(f"{one.folder / name}: SHA-256 is ")
    shutil.copy(other.folder / INDEX_NAME, one.folder / INDEX_NAME)
    assert verify(one.folder).ok


def test_a_file_replaced_by_a_folder_or_a_link_is_reported(tmp_path):
    folder = PackedFolder(tmp_path / "packed").folder
    shard = folder / "shard-00000.arrow"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    assert verify(folder).ok  # a link to a file with the listed content is valid
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    assert verify(folder).problems == [f"{shard}: missing; index.json lists it. Restore it or make the folder again"]
    shard.unlink()
    shard.mkdir()
    assert [problem.startswith(f"{shard}: missing") for problem in verify(folder).problems] == [True]
    shard.rmdir()
    (tmp_path / "elsewhere").rename(shard)
    (folder / "tokenizer").rename(tmp_path / "tokenizer")
    (folder / "tokenizer").symlink_to(tmp_path / "tokenizer")
    [problem] = verify(folder).problems
    assert problem.startswith(f"{folder / 'tokenizer'}: is a link to a folder; expected a folder")


# ---- the index ----

WRONG_INDEX = {
    "nothing": b"",
    "not UTF-8": b'{"format": "\xff"}',
    "UTF-16": '{"format": "ismdata.packed/1"}'.encode("utf-16"),
    "a byte order mark": b'\xef\xbb\xbf{"format": "ismdata.packed/1"}',
    "a list": b"[]",
    "a number": b"5",
    "an empty object": b"{}",
    "deep": b"[" * 100_000,
    "deep and closed": b'{"a":' * 50_000 + b"1" + b"}" * 50_000,
    "a huge number": b'{"shards": ' + b"9" * 10_000 + b"}",
    "no hash": b'{"format": "ismdata.packed/1", "shards": 5}',
    "a hash of another type": b'{"format": "ismdata.packed/1", "sha256": 5}',
    "a hash that is not last": b'{"sha256": "' + b"0" * 64 + b'"\n, "shards": []}\n',
}


@pytest.mark.parametrize("content", WRONG_INDEX.values(), ids=WRONG_INDEX)
def test_an_index_that_ismdata_did_not_write_is_a_problem(tmp_path, content):
    folder = PackedFolder(tmp_path / "packed").folder
    (folder / INDEX_NAME).write_bytes(content)
    [problem] = verify(folder).problems
    assert problem.startswith(f"{folder / INDEX_NAME}: ")
    assert "expected" in problem or "Make the folder again" in problem
    for reader in (PackedDataset, load_index):
        with pytest.raises(DataError, match=r"index\.json: "):
            reader(folder)


@pytest.mark.parametrize("upper", [False, True])
def test_the_hash_of_an_index_is_that_of_the_file_with_zeros_in_its_place(tmp_path, upper):
    write_index(tmp_path, {"format": "x", "name": "é\udcff"})
    data = (tmp_path / INDEX_NAME).read_bytes()
    own_hash = json.loads(data)["sha256"]
    assert list(json.loads(data)) == ["format", "name", "sha256"]
    assert json.loads(data)["name"] == "é\udcff"
    assert data.endswith(b'"sha256": "' + own_hash.encode() + b'"\n}\n')
    assert hashlib.sha256(data.replace(own_hash.encode(), b"0" * 64)).hexdigest() == own_hash
    assert with_own_hash(data) == data
    if upper:
        (tmp_path / INDEX_NAME).write_bytes(data.replace(own_hash.encode(), own_hash.upper().encode()))
        with pytest.raises(DataError, match="its own SHA-256 does not match"):
            load_index(tmp_path)


def test_an_index_of_an_older_version_is_refused(tmp_path):
    folder = PackedFolder(tmp_path / "packed").folder
    index = load_index(folder)
    del index["sha256"]
    (folder / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as refusal:
        PackedDataset(folder)
    [problem] = verify(folder).problems
    assert problem == str(refusal.value)
    assert problem == (
        f"{folder}/index.json: has no SHA-256 of its own; expected one as its last key. "
        "An older version of ismdata wrote it, or it has changed; make the folder again"
    )


def test_a_changed_index_is_refused_by_every_reader(tmp_path):
    for kind, format_ in (("converted", conversation.FORMAT), ("packed", shards.FORMAT)):
        folder = KINDS[kind](tmp_path / kind).folder
        path = folder / INDEX_NAME
        path.write_bytes(path.read_bytes().replace(b'"version": "0.0.0"', b'"version": "0.0.1"'))
        with pytest.raises(DataError, match="its own SHA-256 does not match its content"):
            read_index(folder, format_)


LEAVING = ["../shard-00000.arrow", "a/../../b", "/etc/passwd", "", ".", "a\0b"]


@pytest.mark.parametrize("name", LEAVING)
def test_names_that_leave_the_folder_are_refused(tmp_path, name):
    """Even if the hash of the index matches, as a hostile one would."""
    assert leaves_folder(name)
    packed = PackedFolder(tmp_path / "packed")
    packed.index["shards"][0]["name"] = name
    write_index(packed.folder, packed.index)
    assert any(f"lists {name!r}; expected each file once" in problem for problem in verify(packed.folder).problems)
    with pytest.raises(DataError, match="expected a name inside the folder"):
        PackedDataset(packed.folder)


WRONG_SHARDS = {
    "a number": 5,
    "numbers": [5],
    "no name": [{"rows": 1, "bytes": 1, "sha256": ""}],
    "rows as text": [{"name": "a", "rows": "1", "bytes": 1, "sha256": ""}],
    "rows as a truth value": [{"name": "a", "rows": True, "bytes": 1, "sha256": ""}],
    "fewer than no rows": [{"name": "a", "rows": -1, "bytes": 1, "sha256": ""}],
    "one key more": [{"name": "a", "rows": 1, "bytes": 1, "sha256": "", "more": 1}],
}


@pytest.mark.parametrize("listed", WRONG_SHARDS.values(), ids=WRONG_SHARDS)
def test_wrong_shards_in_an_index_are_named(tmp_path, listed):
    packed = PackedFolder(tmp_path / "packed")
    write_index(packed.folder, packed.index | {"shards": listed})
    assert not verify(packed.folder).ok
    with pytest.raises(
        DataError, match=r"shards(\[0\] is .*; expected name, rows, bytes and sha256| is 5; expected a list)"
    ):
        PackedDataset(packed.folder)


def test_a_shard_with_other_rows_than_listed_is_refused_when_read(tmp_path):
    packed = PackedFolder(tmp_path / "packed")
    packed.index["shards"][0]["rows"] += 1
    write_index(packed.folder, packed.index)
    with pytest.raises(DataError, match=r"shard-00000\.arrow: 2 rows; expected 3"):
        PackedDataset(packed.folder)[0]


@pytest.mark.parametrize(
    "record", [b"[" * 100_000, b'{"a": ' * 3000, b"9" * 5000, b'"\\ud800"', b"1e999"], ids=range(5)
)
def test_hostile_quarantine_lines_are_read_or_named(tmp_path, record):
    converted = ConvertedFolder(tmp_path / "converted")
    line = b'{"source": "a", "reason": "unknown_role", "detail": "so", "record": ' + record + b"}\n"
    (converted.folder / "quarantine.jsonl").write_bytes(line)
    converted.sign()
    sound = not record.endswith((b"[", b" "))
    assert verify(converted.folder).ok is sound


def test_a_reason_that_is_no_text_is_a_problem(tmp_path):
    converted = ConvertedFolder(tmp_path / "converted")
    (converted.folder / "quarantine.jsonl").write_text(
        json.dumps({"source": "a", "reason": [], "detail": "so", "record": 1}) + "\n"
    )
    converted.sign()
    assert any(
        "line 1 has the reason []; expected one that ismdata knows" in problem
        for problem in verify(converted.folder).problems
    )
