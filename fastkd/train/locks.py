"""One process a folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fastkd.train.config import UserError


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
        yield
