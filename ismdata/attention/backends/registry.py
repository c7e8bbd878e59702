"""The backends by name, and the choice that `auto` makes.

`base.py` defines Intervals and Backend; `sdpa.py`, `flex.py` and `varlen.py` define one Backend each. All of them
compute a prefill or a decoded token (`not Intervals.one_pass`) densely.
"""

from __future__ import annotations

import torch

from ismdata.attention.backends.base import Backend, Intervals
from ismdata.attention.backends.flex import FLEX
from ismdata.attention.backends.sdpa import SDPA
from ismdata.attention.backends.varlen import VARLEN
from ismdata.display import LOGGED, Reporter
from ismdata.distributed import is_first_process
from ismdata.errors import UsageError

__all__ = ["BACKENDS", "Backend", "Intervals", "choose"]

BACKENDS: dict[str, Backend] = {
    "sdpa": SDPA,
    "flex": FLEX,
    "varlen": VARLEN,
}

#: What `auto` tries on a GPU, the fastest first. The last one runs anywhere.
_PREFERENCE = ("varlen", "flex", "sdpa")


def choose(
    backend: str,
    device: torch.device,
    *,
    dtype: torch.dtype = torch.bfloat16,
    soft_caps: bool = False,
    reporter: Reporter = LOGGED,
) -> str:
    """Choose the backend for a device.

    Args:
        backend: `auto`, or a name in BACKENDS.
        device: Where attention is computed.
        dtype: In which dtype, with or without autocast. `auto` skips backends that do not support it.
        soft_caps: Whether the model soft-caps its scores. `auto` skips backends that cannot.
        reporter: Receives a line that names the backend `auto` chose.

    Returns:
        A name in BACKENDS.

    Raises:
        UsageError: for an unknown backend, and for one that cannot run on the device; the message says what is missing.
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
    if is_first_process():
        reporter.note(f"attention backend: {chosen} on {device.type}")
    return chosen
