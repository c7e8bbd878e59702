"""Every backend by the name that a user gives, and which one `auto` is on a device.

`intervals.py` has Intervals and Backend; each backend is a file of its own that ends in one Backend: `dense.py` (sdpa),
`flex.py`, `varlen.py`. A prefill or a decoded token (`not Intervals.one_pass`) goes through the dense path in each.
"""

from __future__ import annotations

import os

import torch

from ismdata.dense import SDPA
from ismdata.errors import UsageError
from ismdata.flex import FLEX
from ismdata.intervals import Backend, Intervals
from ismdata.terminal import note
from ismdata.varlen import VARLEN

__all__ = ["BACKENDS", "Backend", "Intervals", "choose"]

BACKENDS: dict[str, Backend] = {
    "sdpa": SDPA,
    "flex": FLEX,
    "varlen": VARLEN,
}

#: What `auto` tries on a GPU, the fastest first; the last runs anywhere.
_PREFERENCE = ("varlen", "flex", "sdpa")

#: What `auto` has said in this process.
_SAID: set[str] = set()


def choose(backend: str, device: torch.device) -> str:
    """The name of the backend to use on `device`. `auto` says once which one it is.

    Raises UsageError for an unknown backend, and for one that cannot run there, naming what is missing.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    if backend != "auto":
        reason = BACKENDS[backend].missing(device)
        if reason is not None:
            raise UsageError(f"the backend {backend} cannot run on {device}: {reason}. Use auto, or another backend")
        return backend
    chosen = "sdpa"
    if device.type == "cuda":
        chosen = next(name for name in _PREFERENCE if BACKENDS[name].missing(device) is None)
    line = f"attention backend: {chosen} on {device.type}"
    if line not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(line)
        note(line)
    return chosen
