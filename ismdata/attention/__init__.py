"""The mask inside decoders of Hugging Face."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ismdata.attention.attachment import attach, attached_backend, detach
    from ismdata.attention.model_folder import load

__all__ = ["attach", "attached_backend", "detach", "load"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("ismdata.attention.attachment"), name)
