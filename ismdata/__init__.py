"""ismdata: multi-turn conversations to packed Arrow shards, and models trained with the Intermittent Semi-working Mask.

The names below load on first use, so that importing the package (and `ismdata --help`) imports no torch.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ismdata.attention.attachment import attach
    from ismdata.data.collate import Collator
    from ismdata.data.dataset import PackedDataset
    from ismdata.generate.session import Session

__all__ = ["Collator", "PackedDataset", "Session", "__version__", "attach"]

_HOME = {
    "PackedDataset": "ismdata.data.dataset",
    "Collator": "ismdata.data.collate",
    "attach": "ismdata.attention",
    "Session": "ismdata.generate.session",
}

try:
    __version__ = version("ismdata")
except PackageNotFoundError:  # a source tree on the path that was never installed
    __version__ = "0+uninstalled"


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'ismdata' has no attribute {name!r}; it has {', '.join(__all__)}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted(globals() | dict.fromkeys(__all__))
