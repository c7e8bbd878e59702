"""The corpus formats. To add one: a file with an object that is a `base.Reader`, and a line in `READERS`."""

from __future__ import annotations

from typing import Any

from ismdata.readers.alpaca import ALPACA
from ismdata.readers.base import Reader
from ismdata.readers.dailydialog import DAILYDIALOG
from ismdata.readers.lists import LISTS
from ismdata.readers.messages import KDCONV, OPENAI, SHAREGPT

#: Format names, as `--format` takes them, in the order in which detection asks.
READERS: dict[str, Reader] = {
    "messages": OPENAI,
    "sharegpt": SHAREGPT,
    "alpaca": ALPACA,
    "dailydialog": DAILYDIALOG,
    "kdconv": KDCONV,
    "lists": LISTS,
}


def detect(record: Any) -> str | None:
    """The name of the first format that a record looks like, or None.

    >>> detect({"conversations": [{"from": "human", "value": "Hello!"}]})
    'sharegpt'
    """
    return next((name for name, reader in READERS.items() if reader.fits(record)), None)
