"""One process a folder."""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.train.config import UserError

_held: set[io.TextIOWrapper] = set()


def _forget() -> None:
    """In a child. A lock lasts as long as any process has its file open; a loader's worker outlives a killed run."""
    for file in _held:
        file.close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)


@contextmanager
def lock(folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
    """Holds `folder` for this process until the end of the block or of the process.

    While another process holds it: calls `wait()` once and waits, or without `wait` raises UserError.
    """
    try:
        import fcntl
    except ImportError:  # not a POSIX system: do without
        yield
        return
    with open(folder / ".lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if wait is None:
                raise UserError(f"another process is running in {folder}: wait for it, or use another --out") from error
            wait()
            fcntl.flock(file, fcntl.LOCK_EX)
        _held.add(file)
        try:
            yield
        finally:
            _held.discard(file)
