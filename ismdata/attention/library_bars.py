"""The progress bars of transformers, shown by our reporter instead.

transformers draws bars while it reads a GGUF file, loads weights and writes them. On a terminal they would run through
ours, elsewhere they fill the log. Downloads from the hub keep the bar of huggingface_hub on a terminal.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import transformers.modeling_gguf_pytorch_utils
from huggingface_hub import utils
from transformers.utils import logging

from ismdata.display import Reporter, on_terminal

#: What transformers calls its bars -> our stage. Others keep their name.
_STAGES = {
    "Converting and de-quantizing GGUF tensors": "read GGUF",
    "Loading weights": "load weights",
    "Writing model shards": "write weights",
}


_hub: Any = utils
_gguf: Any = transformers.modeling_gguf_pytorch_utils


class _ReportedBar:
    """What transformers uses of a tqdm bar: iteration, `update` and the context manager."""

    def __init__(
        self,
        reporter: Reporter,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: float | None = None,
        **options: Any,
    ) -> None:
        name = (desc or "load").rstrip(".: ")
        sized = total is None and hasattr(iterable, "__len__")
        self.reporter = reporter
        self.stage = _STAGES.get(name, name)
        self.iterable = iterable
        self.total = len(iterable) if sized else int(total or 0)  # type: ignore[arg-type]
        self.done = 0

    def __iter__(self) -> Iterator[Any]:
        for each in self.iterable or ():
            yield each
            self.update()

    def update(self, count: float = 1) -> None:
        self.done += int(count)
        self.reporter.progress(self.stage, self.done, self.total)

    def __enter__(self) -> _ReportedBar:
        return self

    def __exit__(self, *error: object) -> None:
        pass

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *args, **options: None  # set_description and the like only draw


@contextmanager
def library_bars(reporter: Reporter) -> Iterator[None]:
    """Within this context, transformers' progress bars go to `reporter`.

    Args:
        reporter: Receives the stages `read GGUF`, `load weights` and `write weights`.

    Returns:
        A context manager.
    """

    def bar(*args: Any, **options: Any) -> _ReportedBar:
        return _ReportedBar(reporter, *args, **options)

    downloads_drawn = not _hub.are_progress_bars_disabled()
    former_hook = logging.set_tqdm_hook(lambda factory, args, options: bar(*args, **options))
    former_bar = getattr(_gguf, "tqdm", None)  # its module takes the bar from tqdm itself
    _gguf.tqdm = bar
    if downloads_drawn and not on_terminal():
        _hub.disable_progress_bars()
    try:
        yield
    finally:
        _gguf.tqdm = former_bar
        logging.set_tqdm_hook(former_hook)
        if downloads_drawn and _hub.are_progress_bars_disabled():
            _hub.enable_progress_bars()
