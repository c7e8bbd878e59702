"""Sources: what an argument stands for, what is read of it and what is left aside, and archives that are broken."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import json
import lzma
import os
import tarfile
import threading
import zipfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.convert.parts import ResultIterator
from ismdata.convert.sources import archives
from ismdata.convert.sources.archives import refuse_bomb
from ismdata.convert.sources.arguments import expand
from ismdata.convert.sources.file_names import select_files, skipped_files, stem_of
from ismdata.convert.sources.source_types import StreamSource
from ismdata.errors import DataError

TALK = b'["q", "a"]\n'


def zstd(data):
    return pa.compress(data, codec="zstd", asbytes=True)


PACKERS = {
    ".gz": lambda data: gzip.compress(data, mtime=0),
    ".zst": zstd,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def tar(members, *, format=tarfile.PAX_FORMAT):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w", format=format) as archive:
        for name, data in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return packed.getvalue()


def zipped(members):
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in members.items():
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return packed.getvalue()


def contents(source):
    return [(part.name, part.stem, part.stream.read()) for part in source.parts()]


def skipped_in(sources):
    """What is not read of sources, before and while they are read."""
    found = []
    for source in sources:
        parts = ResultIterator(source.parts())
        for part in parts:
            part.stream.read()
        found += [*source.skipped, *parts.result]
    return found


def read_all(argument):
    return [content for source in expand(str(argument)) for content in contents(source)]


def short(names, tmp_path):
    return [name.removeprefix(f"{tmp_path}/") for name in names]


def streamed(data, name="x"):
    """All parts of bytes that are read forwards only, as a pipe is."""
    return contents(StreamSource(name=name, stem="x", stream=io.BytesIO(data)))


# ---- compression ----


@pytest.mark.parametrize("ending", PACKERS)
def test_compressed_files_hold_what_was_packed_in_several_streams_or_one(tmp_path, ending):
    pack = PACKERS[ending]
    data = os.urandom(5000) + TALK * 50_000
    path = tmp_path / "named-anything"
    for packed in (pack(data), pack(data[:300]) + pack(data[300:]), pack(pack(data)), pack(b"")):
        path.write_bytes(packed)
        ((name, _, found),) = read_all(path)
        assert found == (data if packed != pack(b"") else b"")
        assert name == str(path)


@pytest.mark.parametrize("ending", PACKERS)
def test_no_cut_of_compressed_data_passes_for_the_whole(ending):
    packed = PACKERS[ending](TALK * 9)
    for cut in range(10, len(packed)):
        with pytest.raises(DataError, match=r"x: found broken or truncated data.*get the file again"):
            streamed(packed[:cut])


@pytest.mark.parametrize("ending", PACKERS)
def test_what_follows_compressed_data_is_not_dropped_without_a_word(ending):
    with pytest.raises(DataError, match="found broken or truncated data"):
        streamed(PACKERS[ending](TALK) + b"more data that is not packed")


@pytest.mark.parametrize("ending", PACKERS)
@settings(deadline=None, max_examples=60)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_is_refused_or_harmless(ending, at, bit):
    packed = bytearray(PACKERS[ending](tar({"a.json": TALK * 9})))
    packed[at % len(packed)] ^= 1 << bit
    try:
        found = streamed(bytes(packed))
    except DataError:
        return
    # zstd data has no checksum of its own as packed here; the tar archive around the text has one for its header only.
    if ending != ".zst":
        assert found in ([("x!a.json", "a", TALK * 9)], [("x", "x", bytes(packed))])


def test_data_compressed_over_and_over_is_refused():
    data = TALK
    for _ in range(archives.MAX_LAYERS):
        data = gzip.compress(data, mtime=0)
    assert streamed(data) == [("x", "x", TALK)]
    with pytest.raises(DataError, match="more than 4 nested compressions"):
        streamed(gzip.compress(data, mtime=0))


# ---- limits ----


def test_the_limit_takes_both_a_size_and_a_ratio(monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 1000)
    monkeypatch.setattr(archives, "MAX_RATIO", 10)
    refuse_bomb("x", 1000, 1)
    refuse_bomb("x", 5000, 500)
    with pytest.raises(DataError, match=r"^x: 499 bytes unpack to 5,000 or more, as in a zip bomb"):
        refuse_bomb("x", 5000, 499)


@pytest.mark.parametrize("ending", [*PACKERS, ".zip", ".tar"])
def test_bombs_are_refused_wherever_they_lie(tmp_path, monkeypatch, ending):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 100_000)
    bomb = b" " * 10_000_000
    packed = {
        ".zip": lambda data: zipped({"a.json": data}),
        ".tar": lambda data: gzip.compress(tar({"a.json": data}), mtime=0),
        **PACKERS,
    }[ending](bomb)
    (tmp_path / "corpus").write_bytes(packed)
    (tmp_path / "nested.zip").write_bytes(zipped({"a.json.gz": gzip.compress(bomb, mtime=0)}))
    for read in (lambda: read_all(tmp_path / "corpus"), lambda: streamed(packed)):
        with pytest.raises(DataError, match="as in a zip bomb"):
            read()
    with pytest.raises(DataError, match=r"nested\.zip!a\.json\.gz: .*as in a zip bomb"):
        read_all(tmp_path / "nested.zip")


def test_many_zip_members_count_together(tmp_path, monkeypatch):
    monkeypatch.setattr(archives, "MAX_UNPACKED_BYTES", 100_000)
    (tmp_path / "many.zip").write_bytes(zipped({f"{n}.json": b" " * 90_000 for n in range(9)}))
    with pytest.raises(DataError, match="as in a zip bomb"):
        expand(str(tmp_path / "many.zip"))


# ---- arguments ----


@pytest.fixture
def tree(tmp_path):
    for name, data in {
        "one.jsonl": TALK,
        "deep/two.csv.gz": gzip.compress(b"q,a\n", mtime=0),
        "deep/three.tar.gz": gzip.compress(tar({"in.json": TALK, "notes.md": b""}), mtime=0),
        "deep/four.zip": zipped({"in.json": TALK, "notes.md": b""}),
        "deep/pictures.tar": tar({"a.png": b"1", "b.png": b"2"}),
        "deep/pictures.zip": zipped({"a.png": b"1", "b.png": b"2"}),
        "deep/notes.txt": b"notes",
        "README.md": b"read me",
        ".git/config.json": b"[]",
        ".cache.json": b"[]",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    (tmp_path / "linked").symlink_to(tmp_path / "deep")
    (tmp_path / "broken.json").symlink_to(tmp_path / "nothing")
    return tmp_path


def test_folders_are_read_to_the_bottom_and_nothing_is_left_out_unnamed(tree):
    sources = expand(str(tree))
    found = [content[0] for source in sources for content in contents(source)]
    left = skipped_in(sources)
    assert short(found, tree) == [
        "deep/four.zip!in.json",
        "deep/three.tar.gz!in.json",
        "deep/two.csv.gz",
        "one.jsonl",
    ]
    assert sorted(short(left, tree)) == [
        ".cache.json",
        "README.md",
        "broken.json (no file)",
        "deep/four.zip!notes.md",
        "deep/notes.txt",
        "deep/pictures.tar",
        "deep/pictures.zip",
        "linked (a link to a folder)",
        "notes.md",
    ]


def test_a_folder_without_a_corpus_is_refused(tmp_path):
    (tmp_path / "notes.md").write_bytes(b"notes")
    (tmp_path / "README.txt").write_bytes(b"read me")
    with pytest.raises(DataError, match=r"the folder holds README\.txt, notes\.md; expected files ending in \.json"):
        expand(str(tmp_path))
    (tmp_path / "talk.txt").write_bytes(TALK)
    (source,) = expand(str(tmp_path))
    assert (source.path.name, short(skipped_in([source]), tmp_path)) == ("talk.txt", ["README.txt", "notes.md"])


def test_globs(tree):
    def names(pattern):
        return short([content[0] for content in read_all(f"{tree}/{pattern}")], tree)

    assert names("*.jsonl") == ["one.jsonl"]
    assert names("deep/*.txt") == ["deep/notes.txt"]
    assert names("**/*.gz") == ["deep/three.tar.gz!in.json", "deep/two.csv.gz"]
    assert names("d*") == names("deep")
    assert names("[do]*") == ["one.jsonl", *names("deep")]
    (tree / "one[1].jsonl").write_bytes(b"brackets")
    assert read_all(tree / "one[1].jsonl")[0][2] == b"brackets"
    with pytest.raises(DataError, match=r"x\*\.json: no file or folder matches"):
        expand(f"{tree}/x*.json")


def test_a_star_takes_what_a_folder_would_give(tree):
    sources = expand(f"{tree}/deep/*")
    assert "notes.txt" in " ".join(skipped_in(sources))
    assert all(not source.name.endswith("notes.txt") for source in sources)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (TALK, [("<stdin>", "stdin", TALK)]),
        (gzip.compress(TALK, mtime=0), [("<stdin>", "stdin", TALK)]),
        (tar({"a.json": TALK}), [("<stdin>!a.json", "a", TALK)]),
        (zipped({"a.json": TALK}), [("<stdin>!a.json", "a", TALK)]),
    ],
    ids=["plain", "gzip", "tar", "zip"],
)
def test_standard_input_is_read_once_and_hashed_on_the_way(monkeypatch, data, expected):
    read, write = os.pipe()
    with os.fdopen(read, "rb") as stdin, os.fdopen(write, "wb") as pipe:
        monkeypatch.setattr("sys.stdin", io.TextIOWrapper(stdin))
        pipe.write(data)
        pipe.close()
        (source,) = expand("-")
        with pytest.raises(RuntimeError):
            source.sha256()
        assert contents(source) == expected
        assert (source.bytes, source.sha256()) == (len(data), hashlib.sha256(data).hexdigest())
        assert source.identity() == {"name": "<stdin>", "bytes": None, "mtime_ns": None}
        monkeypatch.undo()


def test_named_pipes_are_read_as_standard_input_is(tmp_path):
    os.mkfifo(tmp_path / "pipe.jsonl")
    writer = threading.Thread(target=(tmp_path / "pipe.jsonl").write_bytes, args=(TALK,))
    writer.start()
    (source,) = expand(str(tmp_path / "pipe.jsonl"))
    assert source.once
    assert [data for *_, data in contents(source)] == [TALK]
    writer.join()


def test_parquet_is_read_wherever_it_lies(tmp_path):
    rows = [{"dialog": ["q", "a"]}, {"dialog": ["q", "b"]}]
    packed = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), packed)
    data = packed.getvalue()
    for name, held in {"a.parquet": data, "b": gzip.compress(data, mtime=0), "c": tar({"a.parquet": data}),
                       "d": zipped({"a.parquet": data}), "e": zstd(tar({"a.parquet": data}))}.items():  # fmt: skip
        (tmp_path / name).write_bytes(held)
        for source in (*expand(str(tmp_path / name)), StreamSource(name="x", stem="x", stream=io.BytesIO(held))):
            (tables,) = [[*part.tables()] for part in source.parts() if part.is_parquet]
            assert pa.concat_tables(tables).to_pylist() == rows


def test_sources_know_when_they_changed(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(TALK)
    (source,) = expand(str(path))
    before, digest = source.identity(), source.sha256()
    assert before == {"name": str(path), "bytes": len(TALK), "mtime_ns": path.stat().st_mtime_ns}
    os.utime(path, ns=(1, 1))
    assert source.identity() != before
    path.write_bytes(TALK * 2)
    os.utime(path, ns=(2, 2))
    assert source.sha256() == hashlib.sha256(TALK * 2).hexdigest() != digest
    path.unlink()
    with pytest.raises(DataError, match=r"a\.jsonl: cannot be read \(No such file"):
        source.identity()


def test_unreadable_arguments_are_data_errors(tmp_path):
    for name in ("missing", "x" * 5000, "nul\0byte", str(tmp_path / "a" / "b.json")):
        with pytest.raises(DataError, match=r"no such file|cannot be read"):
            expand(name)


def test_position_never_runs_ahead_of_the_file(tree):
    for source in expand(str(tree)):
        for part in source.parts():
            part.stream.read()
            assert 0 < part.position() <= source.bytes


# ---- names ----

names = st.lists(
    st.sampled_from(
        ["a.json", "b.CSV.gz", "c.txt", "README.txt", "dialogues_text.txt", "dialogues_test.txt", "dialogues_act.txt",
         ".x.json", "__MACOSX/._a.json", "d.py", "e/dialogues_train.txt", "f.parquet.zst"]
    ),
    unique=True,
)  # fmt: skip


@given(names)
def test_every_name_is_read_or_skipped_or_hidden(names):
    read = select_files(names)
    left = skipped_files(names, read)
    assert not set(read) & set(left)
    assert set(names) - set(read) - set(left) <= {"__MACOSX/._a.json"}
    assert {"a.json", "b.CSV.gz", "f.parquet.zst"} & set(names) <= set(read)
    if set(read) & {"a.json", "b.CSV.gz", "f.parquet.zst"}:
        assert not {"c.txt", "README.txt", "dialogues_act.txt", "d.py"} & set(read)


@pytest.mark.parametrize(
    ("name", "stem"),
    [("a/train.jsonl.gz", "train"), ("x.tar.zst", "x"), (".json", ".json"), ("v1.5.csv", "v1.5"), ("plain", "plain")],
)
def test_stems(name, stem):
    assert stem_of(name) == stem


def test_saved_datasets_tell_their_files(tmp_path):
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_list([{"dialog": ["q", "a"]}]).save_to_disk(str(tmp_path / "saved"))
    (source,) = expand(str(tmp_path / "saved"))
    identity = source.identity()
    assert json.loads(json.dumps(identity)) == identity
    assert [entry["bytes"] > 0 for entry in identity["files"]] == [True]
