"""Names files that are no corpus by their first bytes, and places that are no local files, and says what to do."""

from __future__ import annotations

import re

from ismdata.errors import DataError

_CONVERT = "Convert the file to UTF-8"
_UNPACK = "Unpack it first"
_SAVE = "Save its rows as JSON Lines, CSV or Parquet"
#: First bytes of files that are no text, and what the user can do.
_BINARY = {
    b"\xff\xfe\x00\x00": ("UTF-32", _CONVERT),
    b"\x00\x00\xfe\xff": ("UTF-32", _CONVERT),
    b"\xff\xfe": ("UTF-16", _CONVERT),
    b"\xfe\xff": ("UTF-16", _CONVERT),
    b"7z\xbc\xaf": ("a 7z archive", _UNPACK),
    b"Rar!\x1a": ("a RAR archive", _UNPACK),
    b"\x04\x22\x4d\x18": ("LZ4 data", _UNPACK),
    b"ARROW1": ("an Arrow file", "Save it as Parquet, or name the folder that `save_to_disk` wrote"),
    b"\xff\xff\xff\xff": ("an Arrow stream", "Save it as Parquet, or name the folder that `save_to_disk` wrote"),
    b"SQLite format 3\x00": ("an SQLite database", _SAVE),
    b"\x93NUMPY": ("a NumPy array", _SAVE),
    b"\x89HDF": ("an HDF5 file", _SAVE),
    b"Obj\x01": ("an Avro file", _SAVE),
    b"GGUF\x02": ("the weights of a model", "Name a corpus"),
    b"GGUF\x03": ("the weights of a model", "Name a corpus"),
    b"\xd0\xcf\x11\xe0": ("an Office document", _SAVE),
    b"%PDF-": ("a PDF document", "Extract its text"),
    b"\x89PNG": ("a picture", "Name a corpus"),
    b"\xff\xd8\xff": ("a picture", "Name a corpus"),
}
#: A pickled object begins with its protocol, 2 to 5, and a frame or another opcode.
_PICKLE = re.compile(rb"\x80[\x02-\x05][\x95\x7d\x5d\x63\x28\x58\x8c]")
#: JSON in UTF-16 or UTF-32 without a byte order mark: a bracket beside zero bytes.
_WIDE_JSON = re.compile(rb"\x00{1,3}[\[{]|[\[{]\x00{1,3}")
_LFS = re.compile(rb"version https://(git-lfs\.github\.com|hawser\.github\.com)/spec/")
_ANNEX = re.compile(rb"(\.\./)*(\.git)?/annex/objects/")
_PAGE = re.compile(rb"(?i)\s*(<!--.{0,400}?-->\s*)?<(!doctype html|html)\b", re.DOTALL)
_XML = re.compile(rb"\s*<\?xml\b")

_URL = re.compile(r"(?i)([a-z][a-z0-9+.-]+)://")
_HUB = re.compile(r"(?i)(?:hf://datasets/|https?://huggingface\.co/datasets/)([\w.-]+/[\w.-]+)")
#: How to get what a URL names, by its scheme.
_DOWNLOADS = {
    "s3": "aws s3 cp --recursive",
    "gs": "gcloud storage cp --recursive",
    "http": "curl -LO",
    "https": "curl -LO",
}


def refuse_foreign(head: bytes, name: str) -> None:
    """Raise DataError for a file that is no corpus: a pointer, a page, a known binary format, another encoding.

    Args:
        head: The first bytes of the file.
        name: Its name in the error.
    """
    if _LFS.match(head):
        raise DataError(
            f"{name}: found a pointer of Git LFS, not the file itself; expected the data. Run `git lfs pull` in its "
            "repository, or download the file from the site that holds it"
        )
    if _ANNEX.match(head):
        raise DataError(
            f"{name}: found a pointer of git-annex, not the file itself; expected the data. Run `git annex get` in "
            "its repository"
        )
    for mark, (what, todo) in _BINARY.items():
        if head.startswith(mark):
            raise DataError(f"{name}: found {what}; expected UTF-8 text or Parquet. {todo}")
    if _PICKLE.match(head):
        raise DataError(f"{name}: found a pickled Python object; expected UTF-8 text or Parquet. {_SAVE}")
    if _WIDE_JSON.match(head):
        raise DataError(f"{name}: found UTF-16 or UTF-32; expected UTF-8 text. {_CONVERT}")
    if _PAGE.match(head):
        raise DataError(
            f"{name}: found a web page; expected a corpus. A download may have ended at a login or error page: open "
            "the file in a browser to see it. Services that export chats as a page often offer JSON too"
        )
    if _XML.match(head):
        raise DataError(f"{name}: found XML; expected JSON, CSV, YAML, Parquet or text. {_SAVE}")


def refuse_url(argument: str) -> None:
    """Raise DataError for a SOURCE that is a URL."""
    scheme = _URL.match(argument)
    if scheme is None:
        return
    hub = _HUB.match(argument)
    if hub is not None:
        todo = f"Give the name of the dataset on the Hugging Face hub: {hub.group(1)}"
    else:
        command = _DOWNLOADS.get(scheme.group(1).lower())
        todo = "Download it first" + (f", for instance with `{command}`" if command else "") + ", and name the copy"
    raise DataError(f"{argument}: found a URL; expected a local file or folder, or a name on the hub. {todo}")
