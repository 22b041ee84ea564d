"""Files that are whole or not there."""

from __future__ import annotations

import contextlib
import errno
import os
from pathlib import Path

from fastkd._core.messages import UserError

FULL = {errno.ENOSPC: "the disk is full", errno.EDQUOT: "the quota is used up", errno.EFBIG: "the file is too large"}


class StorageError(UserError):
    """No room for a file."""

    def __init__(self, message: str):
        super().__init__(message, status=1)


def write_atomic(path: str | Path, content: bytes | memoryview) -> None:
    """Write a file, and its folder, so that at any moment its name holds the old content or the new one.

    StorageError where there is no room; the old content stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        _make_folder(path.parent)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync(path.parent)  # the rename itself
    except OSError as error:
        if error.errno in FULL:
            raise StorageError(
                f"{path} cannot be written, {FULL[error.errno]}: make room and repeat the command with --resume; "
                "what was saved before is whole"
            ) from error
        error.filename = error.filename or str(path)  # a failed write does not say where
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()


def _make_folder(folder: Path) -> None:
    missing = [each for each in (folder, *folder.parents) if not each.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for each in missing:
        _sync(each.parent)


def _sync(folder: Path) -> None:
    """The names in a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sweep(folder: str | Path) -> None:
    """Delete what `write_atomic` left half-written when its process was killed. Only for who has locked the folder."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink()
