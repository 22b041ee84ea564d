"""Checkpoints that are either whole or not there, and that load with `torch.load(weights_only=True)`."""

from __future__ import annotations

import io
import os
import random
import re
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastkd.train.config import UserError

_NAME = re.compile(r"epoch-(\d{4,})\.pt")
PARTIAL = "interrupted.pt"  # the state in the middle of an epoch


def write_atomic(path: str | Path, content: bytes) -> None:
    """Write a file, and its folder, so that at any moment its name holds the old content or the new one."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def save(path: str | Path, state: dict[str, Any]) -> None:
    """Write `state`: tensors, numbers, strings, and lists, tuples and dicts of them. Equal states give equal files."""
    buffer = io.BytesIO()  # torch.save to a path would write that path's name into the file
    torch.save(state, buffer)
    write_atomic(path, buffer.getvalue())


def load(path: str | Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU. UserError for a file that is missing, truncated or altered."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"there is no checkpoint {path}: give an existing file")
    try:
        with zipfile.ZipFile(path) as archive:
            bad = archive.testzip()  # torch.load does not look at the checksums
        if bad is None:
            return torch.load(path, map_location="cpu", weights_only=True)
        reason = f"the checksum of {bad} is wrong"
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = " ".join(str(error).split())[:120] or type(error).__name__
    raise UserError(f"the checkpoint {path} is damaged or no checkpoint ({reason}): delete it{_fallback(path)}")


def _fallback(path: Path) -> str:
    """How to go on without this file."""
    match = _NAME.fullmatch(path.name)
    before = [e for e in epochs(path.parent) if match and e < int(match[1])]
    if before:
        return f" and repeat the command with --resume to go on from epoch {before[-1]}"
    return " and repeat the command" if match or path.name == PARTIAL else " or name another one"


def path_of(folder: str | Path, epoch: int) -> Path:
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


def seed_all(seed: int) -> None:
    """Seed PyTorch's, Python's and NumPy's global generators: 0 <= seed < 2**32."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed)


def random_state() -> dict[str, Any]:
    """The state of PyTorch's, Python's and NumPy's global generators, in types that a weights-only load accepts."""
    kind, keys, *rest = np.random.get_state()
    state = {"torch": torch.get_rng_state(), "python": random.getstate()}
    state["numpy"] = [kind, torch.from_numpy(keys.astype(np.int64)), *rest]
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), *rest))
    if "cuda" in state and torch.cuda.is_available() and len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
