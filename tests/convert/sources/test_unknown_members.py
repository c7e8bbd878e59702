"""Members of archives that are of no known format: skipped and reported, as in folders."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile

import pytest

from ismdata.convert.pipeline import explain_sources
from ismdata.errors import DataError
from tests.support.converted import convert_files
from tests.support.shapes import QA, chat

TALKS = json.dumps([{"messages": chat(*QA)}]).encode()
ONTOLOGY = b'{"domains": {"a": 1}, "intents": []}'


def zipped(members):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return out.getvalue()


def tarred(members):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, data in members.items():
            header = tarfile.TarInfo(name)
            header.size = len(data)
            archive.addfile(header, io.BytesIO(data))
    return out.getvalue()


PACK = {"a.zip": zipped, "a.tar.gz": tarred}


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("order", [1, -1])
def test_a_member_of_no_known_format_is_skipped(tmp_path, name, order):
    members = dict([("ontology.json", ONTOLOGY), ("talks.json", TALKS), ("empty.json", b"[]")][::order])
    found = convert_files(tmp_path, {name: PACK[name](members)})
    assert found.talks == [QA]
    place = f"{tmp_path / name}!ontology.json"
    assert found.report.notes == (
        f"skipped {place}: the first record has the fields 'domains', 'intents'; this is no known format",
    )
    assert [one for source in found.report.sources for one in source.left_aside] == [place]


@pytest.mark.parametrize("name", PACK)
@pytest.mark.parametrize("count", [1, 2])
def test_an_archive_without_a_known_member_is_refused(tmp_path, name, count):
    files = {name: PACK[name]({f"ontology{at}.json": ONTOLOGY for at in range(count)}), "talks.json": TALKS}
    with pytest.raises(DataError, match="expected a known format"):
        convert_files(tmp_path, files)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("name", PACK)
def test_a_broken_member_still_refuses_the_archive(tmp_path, name):
    with pytest.raises(DataError, match=r"!talks\.json: found the end of the file"):
        convert_files(tmp_path, {name: PACK[name]({"ontology.json": ONTOLOGY, "talks.json": TALKS[:-1]})})


def test_the_archive_is_explained_by_its_known_members(tmp_path):
    (tmp_path / "a.tar.gz").write_bytes(tarred({"ontology.json": ONTOLOGY, "talks.json": TALKS}))
    (found,) = explain_sources([str(tmp_path / "a.tar.gz")])
    assert (found.source, found.format) == (f"{tmp_path / 'a.tar.gz'}!talks.json", "messages")


def test_many_fields_are_not_all_listed(tmp_path):
    record = json.dumps({f"field{at}" + "x" * 100: at for at in range(30_000)})
    with pytest.raises(DataError, match=r"'field7x+…' and 29,992 more; expected a known format") as caught:
        convert_files(tmp_path, {"a.json": record})
    assert len(str(caught.value)) < 1000
