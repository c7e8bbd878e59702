"""One run at a time for one output folder: a lock on `.NAME.lock` beside it, which ends with its process."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ismdata.display import note
from ismdata.errors import DataError, UsageError

#: What flock says on a file system that has no locks.
_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL}


@contextmanager
def locked(final: Path) -> Iterator[None]:
    """Hold the lock of the output folder `final`, whose parent folders are made where they are absent.

    Raises UsageError where another run holds it, DataError where nothing can be written there.
    """
    path = final.parent / f".{final.name}.lock"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = _acquire(path, final)
    except OSError as error:
        raise DataError(f"{final}: cannot be written ({error.strerror}). Name another output folder") from error
    try:
        yield
    finally:
        try:
            # Removed while it is held, so that nobody can lock a file that is about to go.
            path.unlink(missing_ok=True)
        finally:
            os.close(handle)


def _acquire(path: Path, final: Path) -> int:
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            pid = os.read(handle, 32).decode(errors="replace").strip()
            os.close(handle)
            by = f"process {pid}" if pid else "another process"
            raise UsageError(
                f"{final}: {by} is writing it; expected one run at a time. Wait for it, or name another output"
            ) from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                os.close(handle)
                raise
            note(f"{final}: this file system has no locks ({error.strerror}); see to it that no other run writes there")
            return handle
        if _is_still(handle, path):
            os.truncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
            return handle
        os.close(handle)  # its holder took the file away in between


def _is_still(handle: int, path: Path) -> bool:
    """Whether the open file is the one at `path`."""
    try:
        return os.path.samestat(os.fstat(handle), path.stat())
    except FileNotFoundError:
        return False
