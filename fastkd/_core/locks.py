"""A lock: one process at a time in a folder."""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd._core.messages import UserError

UNWRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)  # the last: a file has the name


class Busy(UserError):
    """Another process holds the folder."""


class NotWritable(UserError):
    """A folder that cannot be made, or that this process may not write in."""

    def __init__(self, folder: Path, reason: str, advice: str = "give the right to write, or name another folder"):
        super().__init__(f"the folder {folder} cannot be written ({reason}): {advice}")
        self.folder, self.reason = folder, reason


_held: set[io.TextIOWrapper] = set()


def _forget() -> None:
    """In a child. A lock lasts as long as any process has its file open; a loader's worker outlives a killed run."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


def _open(folder: Path) -> io.TextIOWrapper:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return open(folder / ".lock", "w")
    except OSError as error:
        if error.errno not in UNWRITABLE:
            raise
        raise NotWritable(folder, error.strerror or str(error)) from error


def why_not_writable(folder: Path) -> str:
    """Why this process may not write in `folder`, which is made where it is not there; "" where it may."""
    try:
        _open(folder).close()
    except NotWritable as error:
        return error.reason
    return ""


@contextmanager
def lock(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds `folder`, made where it is not there, for this process until the end of the block or of the process.

    While another process holds it: calls `wait()` once and waits, or without `wait` raises Busy. NotWritable where this
    process may not write there.
    """
    file = _open(folder)
    try:
        import fcntl
    except ImportError:  # not a POSIX system: do without
        file.close()
        yield
        return
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if wait is None:
                raise Busy(f"another process is running in {folder}: wait for it, or use another --out") from error
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
