"""Archives: what is read of them, in which order, and what is refused."""

from __future__ import annotations

import gzip
import hashlib
import io
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ismdata.convert.sources.arguments import expand
from ismdata.convert.sources.file_names import printable
from ismdata.errors import DataError
from tests.convert.sources.test_sources import PACKERS as PACKERS
from tests.convert.sources.test_sources import TALK as TALK
from tests.convert.sources.test_sources import contents as contents
from tests.convert.sources.test_sources import read_all as read_all
from tests.convert.sources.test_sources import skipped_in as skipped_in
from tests.convert.sources.test_sources import streamed as streamed
from tests.convert.sources.test_sources import tar as tar
from tests.convert.sources.test_sources import zipped as zipped

# ---- archives ----

MEMBERS = {
    "data/b.jsonl": TALK,
    "data/a.json.gz": gzip.compress(TALK, mtime=0),
    "readme.txt": b"read me",
    "code.py": b"pass",
    "../up.csv": b"q,a\n",
    "/etc/abs.yml": b"- - q\n",
    ".hidden.json": b"[]",
    "__MACOSX/data/._b.jsonl": b"fork",
}


@pytest.mark.parametrize("ending", [".tar", ".zip", *(".tar" + each for each in PACKERS)])
def test_members_are_read_in_order_and_the_rest_is_named(tmp_path, ending):
    packed = zipped(MEMBERS) if ending == ".zip" else tar(MEMBERS)
    packed = PACKERS.get(ending.removeprefix(".tar"), lambda data: data)(packed)
    path = tmp_path / f"corpus{ending}"
    path.write_bytes(packed)
    expected = [
        ("data/b.jsonl", "b", TALK),
        ("data/a.json.gz", "a", TALK),
        ("../up.csv", "up", b"q,a\n"),
        ("/etc/abs.yml", "abs", b"- - q\n"),
    ]
    sources = expand(str(path))
    assert len(sources) == (4 if ending == ".zip" else 1)
    found = [content for source in sources for content in contents(source)]
    assert found == [(f"{path}!{name}", stem, data) for name, stem, data in expected]
    left = [name.removeprefix(f"{path}!") for name in skipped_in(sources)]
    assert left == ["readme.txt", "code.py", ".hidden.json"]
    assert not (tmp_path / "up.csv").exists() and not (tmp_path.parent / "up.csv").exists()
    assert streamed(packed) == [(f"x!{name}", stem, data) for name, stem, data in expected]
    assert {source.sha256() for source in sources} == {hashlib.sha256(packed).hexdigest()}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_no_cut_of_a_tar_archive_passes_for_the_whole(format):
    members = {"a.json": TALK, "b" * 90 + ".json": TALK, "c.json": b""}
    whole = tar(members, format=format)
    data_ends = len(whole) - len(whole.rstrip(b"\0"))
    end = (len(whole) - data_ends + 511) // 512 * 512 + 512  # the end of the first block of zeros
    for cut in [*range(512, end, 7), end - 1]:
        with pytest.raises(DataError, match=r"broken or truncated|data after the end mark"):
            streamed(whole[:cut])
    assert [data for *_, data in streamed(whole[:end])] == [*members.values()]


def test_a_damaged_header_in_a_tar_archive_does_not_end_it_in_silence():
    whole = bytearray(tar({"a.json": TALK, "b.json": TALK}))
    whole[1024] ^= 1
    with pytest.raises(DataError, match="bad checksum"):
        streamed(bytes(whole))
    with pytest.raises(DataError, match="data after the end mark of the archive"):
        streamed(tar({"a.json": TALK}) * 2)


def test_links_and_devices_in_a_tar_archive_are_named_and_never_followed(tmp_path):
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for name, kind in (("link.json", tarfile.SYMTYPE), ("hard.json", tarfile.LNKTYPE), ("d.json", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = kind, "/etc/passwd"
            archive.addfile(entry)
        entry = tarfile.TarInfo("a.json")
        entry.size = len(TALK)
        archive.addfile(entry, io.BytesIO(TALK))
    (tmp_path / "a.tar").write_bytes(packed.getvalue())
    (source,) = expand(str(tmp_path / "a.tar"))
    assert [data for *_, data in contents(source)] == [TALK]
    assert skipped_in([source]) == ["link.json (no file)", "hard.json (no file)", "d.json (no file)"]


@pytest.mark.parametrize("pack", [tar, zipped], ids=["tar", "zip"])
def test_texts_are_read_where_they_are_alone(tmp_path, pack):
    path = tmp_path / "archive"
    path.write_bytes(pack({"readme.md": b"", "one.txt": b"1", "two.txt": b"2"}))
    assert [data for *_, data in read_all(path)] == [b"1", b"2"]
    path.write_bytes(pack({"no-ending": b"1"}))
    assert [data for *_, data in read_all(path)] == [b"1"]
    path.write_bytes(pack({"a.py": b"1", "b.png": b"2"}))
    with pytest.raises(DataError, match=r"archive: the archive holds a\.py, b\.png; expected files ending in \.json"):
        read_all(path)


def test_names_that_no_terminal_should_see_are_escaped():
    assert printable("a\x1b[2J\ud8ff\n\u2028é　b") == "a\\x1b[2J\\ud8ff\\n\\u2028é　b"
    ((name, stem, _),) = streamed(tar({"a\x1b[2J.json": TALK}))
    assert (name, stem) == ("x!a\\x1b[2J.json", "a\\x1b[2J")
    raw = tar({"\udcff.json": TALK}, format=tarfile.GNU_FORMAT)
    name.encode()
    assert streamed(raw)[0][0] == "x!\\udcff.json"


def test_encrypted_and_rare_zip_members_are_refused(tmp_path):
    packed = bytearray(zipped({"a.json": TALK}))
    directory = packed.index(b"PK\x01\x02")
    packed[6] |= 1
    packed[directory + 8] |= 1
    (tmp_path / "secret.zip").write_bytes(packed)
    with pytest.raises(DataError, match=r"secret\.zip!a\.json: found an encrypted member"):
        expand(str(tmp_path / "secret.zip"))
    packed = bytearray(zipped({"a.json": TALK}))
    packed[8] = packed[directory + 10] = 6  # "imploded"
    (tmp_path / "rare.zip").write_bytes(packed)
    with pytest.raises(DataError, match=r"rare\.zip!a\.json: cannot be unpacked"):
        read_all(tmp_path / "rare.zip")


@settings(deadline=None, max_examples=150)
@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_damaged_zip_archive_is_refused_or_reads_as_before(tmp_path_factory, at, bit):
    path = tmp_path_factory.mktemp("zip") / "x.zip"
    packed = bytearray(zipped({"a.json": TALK * 9, "b.json": TALK}))
    packed[at % len(packed)] ^= 1 << bit
    path.write_bytes(packed)
    try:
        found = [data for *_, data in read_all(path)]
    except DataError:
        return
    # What remains is a file that is no archive any more, or a member whose name or ending is another now.
    assert set(found) <= {TALK * 9, TALK, bytes(packed)}
