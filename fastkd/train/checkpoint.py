"""Checkpoints that are either whole or not there, and that load with `torch.load(weights_only=True)`.

A checkpoint is one file, and its checksum stands in it: as the comment of the zip archive that `torch.save` writes, its
last 71 bytes, the SHA-256 of all bytes before the digest. A file beside it would be a second write: killed between the
two, a sound checkpoint would lack its checksum or have another one's.
"""

from __future__ import annotations

import hashlib
import io
import os
import random
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from fastkd._core.files import write_atomic
from fastkd._core.messages import UserError

_NAME = re.compile(r"epoch-(\d{4,})\.pt")


PARTIAL = "partial.pt"  # the state in the middle of an epoch


_SEAL = b"sha256:"  # before the digest of 64 hex digits


_SEALED = len(_SEAL) + 64


class DamagedError(UserError):
    """A checkpoint that is not what was written."""


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`: tensors, numbers, strings, and lists, tuples and dicts of them. Equal states give equal files."""
    buffer = io.BytesIO()  # torch.save to a path would write that path's name into the file
    torch.save(_unshared(state, {}), buffer)
    _seal(buffer)
    write_atomic(path, buffer.getbuffer())


def _unshared(value: Any, strings: dict[str, str]) -> Any:
    """The same nested state with equal strings made one, and every container of its own.

    A pickle says where an object comes again, and an object that was loaded shares less than the one that was saved.
    """
    if isinstance(value, str):
        return strings.setdefault(value, value)
    if isinstance(value, dict):
        return {_unshared(key, strings): _unshared(item, strings) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        items = [_unshared(item, strings) for item in value]
        return tuple(items) if isinstance(value, tuple) else items
    return value


def _seal(buffer: io.BytesIO) -> None:
    """Put the checksum at the end of a zip archive, as its comment."""
    buffer.seek(-22, os.SEEK_END)  # the record that ends an archive without a comment
    end = buffer.read()
    if not (end.startswith(b"PK\x05\x06") and end.endswith(b"\x00\x00")):
        raise RuntimeError("torch.save did not end its file as a zip archive without a comment")
    buffer.seek(-2, os.SEEK_END)
    buffer.write(_SEALED.to_bytes(2, "little") + _SEAL)
    digest = hashlib.sha256(buffer.getbuffer()).hexdigest()
    buffer.write(digest.encode())


def load(path: str | Path, sealed: bool = True) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU.

    With sealed=False also what plain `torch.save` wrote, without our checksum. UserError for a file that is missing,
    DamagedError for one that is truncated, altered or no checkpoint.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: give an existing file")
    reason, seen = _damage(path, sealed)
    if not reason:
        try:
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
            return state
        except MemoryError:
            raise
        except Exception as error:  # a damaged pickle raises nearly anything
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            if seen:
                raise UserError(f"the checkpoint {path} is whole, but cannot be read ({reason})") from error
    raise DamagedError(f"the checkpoint {path} is damaged or no checkpoint ({reason})")


def _damage(path: Path, sealed: bool) -> tuple[str, bool]:
    """What is wrong with the file, "" for nothing; and whether it has our checksum."""
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(-min(size, _SEALED), os.SEEK_END)
            seal = file.read()
            if seal.startswith(_SEAL):
                file.seek(0)
                return "" if _digest(file, size - 64) == seal[len(_SEAL) :] else "its checksum is wrong", True
            if not size:
                return "it is empty", False
            if sealed:
                return "its checksum is missing", False
            file.seek(0)
            with zipfile.ZipFile(file) as archive:
                bad = archive.testzip()  # torch.load does not look at the checksums
            return f"the checksum of {bad} is wrong" if bad else "", False
    except MemoryError:
        raise
    except Exception as error:
        return " ".join(str(error).split())[:120] or type(error).__name__, False


def _digest(file: io.BufferedReader, size: int) -> bytes:
    """The SHA-256 of the next `size` bytes."""
    found = hashlib.sha256()
    while size and (block := file.read(min(size, 1 << 20))):
        found.update(block)
        size -= len(block)
    return found.hexdigest().encode()


def path_of(folder: str | Path, epoch: int) -> Path:
    """The checkpoint file of `epoch` in `folder`."""
    return Path(folder) / f"epoch-{epoch:04d}.pt"


def epochs(folder: str | Path) -> list[int]:
    """The epochs of which `folder` holds a checkpoint, in order."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(match[1]) for match in map(_NAME.fullmatch, names) if match)


def prune(folder: str | Path, keep: int) -> None:
    """Delete all but the last `keep` checkpoints; 0 keeps all."""
    for epoch in epochs(folder)[:-keep] if keep else []:
        path_of(folder, epoch).unlink()


def newest(folder: str | Path, note: Callable[[str], None]) -> dict[str, Any] | None:
    """The last state in `folder` that is whole, in the middle of an epoch or after one; None where there is none.

    Damaged files are named by `note` and set aside, as NAME.damaged, so that no later pruning counts them.
    DamagedError if every one is damaged.
    """
    folder = Path(folder)
    found, refused = None, []

    def read(path: Path) -> dict[str, Any] | None:
        try:
            return load(path)
        except DamagedError as error:
            refused.append((path, error))
            return None

    partial = read(folder / PARTIAL) if (folder / PARTIAL).exists() else None
    for epoch in reversed(epochs(folder)):
        if partial is not None and partial["epoch"] >= epoch:  # else an epoch was finished after it
            break
        found = read(path_of(folder, epoch))
        if found is not None:
            break
    if found is None:
        found = partial
    if refused and found is None:
        raise DamagedError(
            f"no checkpoint in {folder} can be used; {refused[0][1]}: delete this folder and repeat the command to "
            "start afresh"
        )
    if found is None:
        return None
    for path, error in refused:
        os.replace(path, path.with_name(f"{path.name}.damaged"))
        within = "within epoch" if found is partial else "after epoch"
        number = found["epoch"] + (found is partial)
        note(f"{error}: set aside as {path.name}.damaged, the run goes on from the state before it, {within} {number}")
    if partial is not None and found is not partial:
        (folder / PARTIAL).unlink()  # killed between writing the epoch's and this
    return found


def seed_all(seed: int) -> None:
    """Seed PyTorch's, Python's and NumPy's global generators: 0 <= seed < 2**32."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of PyTorch's, Python's and NumPy's global generators, in types that a weights-only load accepts."""
    kind, keys, *rest = cast("tuple[str, np.ndarray[Any, Any], int, int, float]", np.random.get_state())
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """The way back of `random_state`."""
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
