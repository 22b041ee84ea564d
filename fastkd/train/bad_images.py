"""The image files of a run that could not be read: named on the terminal, and all of them in bad_images.txt."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from fastkd._core.files import write_atomic
from fastkd._core.messages import note
from fastkd.data.batches import Loader
from fastkd.train.distributed import ALONE, World
from fastkd.train.metrics import Row

NAMED = 5  # new ones in a note; the file holds the rest
FILE = "bad_images.txt"


class BadImages:
    """What the loaders of a stage, by name, left out; with a folder also kept there, over all starts of the run."""

    def __init__(self, folder: Path | None, loaders: Mapping[str, Loader], world: World = ALONE):
        self.folder, self.loaders, self.world = folder, loaders, world
        self.told: set[str] = set()

    def lost(self, name: str) -> int:
        """How many the present or last pass of one loader left out, in all processes."""
        return int(self.world.sum(torch.tensor(self.loaders[name].lost)))

    def row(self, measured: Callable[[str], bool]) -> Row:
        """Columns of the metrics; NaN for loaders that had no pass in this epoch."""
        return {f"{name}_bad_images": self.lost(name) if measured(name) else math.nan for name in self.loaders}

    def tell(self) -> None:
        """Name those that are new since the last call, of all processes."""
        own = {path: reason for batches in self.loaders.values() for path, reason in batches.unreadable.items()}
        found = {path: reason for part in self.world.gather(own) for path, reason in part.items()}
        new = [path for path in found if path not in self.told]
        if not new:
            return
        self.told.update(new)
        named = ", ".join(f"{path} ({found[path]})" for path in new[:NAMED])
        rest = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
        where = ""
        if self.folder is not None:
            where = f"; all are listed in {self.folder / FILE}"
            _keep(self.folder / FILE, {f"{path}: {reason}" for path, reason in found.items()})
        note(f"{len(new)} image{'s' * (len(new) > 1)} cannot be read and left out: {named}{rest}{where}")


def _keep(path: Path, lines: set[str]) -> None:
    if path.exists():
        lines |= set(path.read_text().splitlines())
    write_atomic(path, "".join(f"{line}\n" for line in sorted(lines)).encode())
