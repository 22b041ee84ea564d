"""The image files of a run that could not be read: named on the terminal, and all of them in bad_images.txt."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from fastkd._core.files import write_atomic
from fastkd._core.messages import note
from fastkd.data.batches import Loader
from fastkd.train.distributed import ALONE, World

NAMED = 5  # new ones in a note; the file holds the rest
FILE = "bad_images.txt"


class BadImages:
    """What the loaders of a stage left out; with a folder also kept there, over all starts of the run."""

    def __init__(self, folder: Path | None, loaders: Sequence[Loader], world: World = ALONE):
        self.folder, self.loaders, self.world = folder, loaders, world
        self.told: set[str] = set()

    def tell(self) -> None:
        """Name those that are new since the last call, of all processes."""
        own = {path: reason for batches in self.loaders for path, reason in batches.unreadable.items()}
        found = {path: reason for part in self.world.collect(own) for path, reason in part.items()}
        new = [path for path in found if path not in self.told]
        if not new:
            return
        self.told.update(new)
        named = ", ".join(f"{path} ({found[path]})" for path in new[:NAMED])
        rest = f" and {len(new) - NAMED} more" if len(new) > NAMED else ""
        where = ""
        if self.folder is not None:
            where = f"; all are listed in {self.folder / FILE}"
            self._keep({f"{path}: {reason}" for path, reason in found.items()})
        note(f"{len(new)} image{'s' * (len(new) > 1)} cannot be read and left out: {named}{rest}{where}")

    def _keep(self, lines: set[str]) -> None:
        path = self.folder / FILE
        if path.exists():
            lines |= set(path.read_text().splitlines())
        write_atomic(path, "".join(f"{line}\n" for line in sorted(lines)).encode())
