"""Raw corpora to conversations."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ismdata.convert.pipeline import ConvertReport, convert

__all__ = ["ConvertReport", "convert"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ismdata.convert.pipeline"), name)
