"""Files and places that are no corpus are named as what they are."""

from __future__ import annotations

import gzip
import pickle

import pytest

from ismdata.convert.sources.arguments import expand
from ismdata.errors import DataError
from tests.support.converted import convert_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
SCALAR = {"a": "b" * 5000}


@pytest.mark.parametrize(
    ("data", "found"),
    [
        (POINTER, "a pointer of Git LFS.*git lfs pull"),
        (gzip.compress(POINTER), "a pointer of Git LFS"),
        (b"/annex/objects/SHA256E-s1--aa.jsonl\n", "a pointer of git-annex.*git annex get"),
        (b"../../.git/annex/objects/x/y\n", "a pointer of git-annex"),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\n <!-- saved -->\n<HTML lang=en>", "a web page"),
        (b"<?xml version='1.0'?><talk/>", "XML"),
        (pickle.dumps(SCALAR), "a pickled Python object"),
        (pickle.dumps([SCALAR], protocol=2), "a pickled Python object"),
        (b"SQLite format 3\x00....", "an SQLite database"),
        (b"\x89HDF\r\n\x1a\n", "an HDF5 file"),
        (b"Obj\x01\x04", "an Avro file"),
        (b"%PDF-1.7\n", "a PDF document"),
        (b"GGUF\x03\x00\x00\x00", "the weights of a model"),
        (b"\xff\xff\xff\xff\x78\x00", "an Arrow stream"),
        (b"ARROW1\x00\x00", "an Arrow file"),
        (b"\xff\xfe{\x00", "UTF-16"),
        (b"{\x00}\x00", "UTF-16 or UTF-32"),
    ],
)
@pytest.mark.parametrize("name", ["corpus.jsonl", "corpus.jsonl.gz", "corpus.parquet", "corpus.txt"])
def test_files_that_are_no_corpus_are_named(tmp_path, data, found, name):
    with pytest.raises(DataError, match=f"{name}: found {found}"):
        convert_files(tmp_path, {name: data})


@pytest.mark.parametrize(
    "text", ["Obj: one__eou__GGUF two__eou__", "version 2 of it__eou__yes__eou__", "%PDF__eou__a__eou__"]
)
def test_text_that_begins_alike_is_read(tmp_path, text):
    assert len(convert_files(tmp_path, {"a.txt": text}).talks) == 1


@pytest.mark.parametrize(
    ("argument", "todo"),
    [
        ("s3://bucket/a.jsonl", "`aws s3 cp --recursive`"),
        ("gs://bucket/a.jsonl", "`gcloud storage cp"),
        ("https://example.org/a.jsonl?x=[1]", "`curl -LO`"),
        ("HTTP://example.org/a.jsonl", "`curl -LO`"),
        ("abfs://c/a.jsonl", "Download it first, and name the copy"),
        ("hf://datasets/owner/talks/train.jsonl", "hub: owner/talks"),
        ("https://huggingface.co/datasets/owner/talks", "hub: owner/talks"),
    ],
)
def test_urls_are_named(argument, todo):
    with pytest.raises(DataError, match=f"found a URL; expected a local file or folder.*({todo})"):
        expand(argument)
