"""Every backend by the name that a user gives, and which one `auto` is on a device.

`base.py` has Intervals and Backend; each backend is a file of its own that ends in one Backend: `sdpa.py` (sdpa),
`flex.py`, `varlen.py`. A prefill or a decoded token (`not Intervals.one_pass`) goes through the dense path in each.
"""

from __future__ import annotations

import os

import torch

from ismdata.attention.backends.base import Backend, Intervals
from ismdata.attention.backends.flex import FLEX
from ismdata.attention.backends.sdpa import SDPA
from ismdata.attention.backends.varlen import VARLEN
from ismdata.display import note
from ismdata.errors import UsageError

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


def choose(backend: str, device: torch.device, *, dtype: torch.dtype = torch.bfloat16, soft_caps: bool = False) -> str:
    """The name of the backend to use on `device`. `auto` says once which one it is.

    dtype: what attention is to be computed in, under autocast or by itself. soft_caps: whether the model caps its
    scores; `auto` leaves out what cannot do either. Raises UsageError for an unknown backend, and for one that cannot
    run there, naming what is missing.
    """
    if backend != "auto" and backend not in BACKENDS:
        raise UsageError(f"backend is {backend!r}; expected auto or one of {', '.join(BACKENDS)}")
    if backend != "auto":
        reason = BACKENDS[backend].missing(device)
        if reason is not None:
            raise UsageError(f"the backend {backend} cannot run on {device}: {reason}. Use auto, or another backend")
        return backend
    chosen = _PREFERENCE[-1]
    if device.type == "cuda":
        able = [
            name
            for name in _PREFERENCE
            if BACKENDS[name].missing(device) is None
            and (dtype in (torch.bfloat16, torch.float16) or not BACKENDS[name].half_only)
            and (BACKENDS[name].soft_caps or not soft_caps)
        ]
        chosen = (able or [chosen])[0]
    line = f"attention backend: {chosen} on {device.type}"
    if line not in _SAID and os.environ.get("RANK", "0") == "0":
        _SAID.add(line)
        note(line)
    return chosen
