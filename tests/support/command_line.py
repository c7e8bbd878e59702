"""The command line in this process, as a shell runs it: with the errors of `main`."""

from __future__ import annotations

import contextlib
import io
import signal
from dataclasses import dataclass

from ismdata.cli.main import main


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How a command ended."""

    code: int
    stdout: str
    stderr: str


def ismdata(*words: object) -> Ended:
    """Run `ismdata` with these words."""
    streams = [io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True) for _ in range(2)]
    before, code = signal.getsignal(signal.SIGTERM), 0
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            main([str(word) for word in words])
    except SystemExit as ended:
        code = int(ended.code or 0)
    finally:
        signal.signal(signal.SIGTERM, before)
    stdout, stderr = (stream.buffer.getvalue().decode() for stream in streams)  # type: ignore[attr-defined]
    return Ended(code=code, stdout=stdout, stderr=stderr)
