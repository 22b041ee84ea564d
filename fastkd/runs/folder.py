"""A run's folder: what is in it, and reading it again."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd._core.messages import UserError
from fastkd.runs.config import read_yaml
from fastkd.train.metrics import Row, read_csv

CONFIG = "config.yaml"
UNFINISHED = "This run is not finished."


@dataclass(frozen=True)
class Run:
    """A run's folder: its options and its metrics, one row an epoch, at least one."""

    folder: Path
    options: dict[str, Any]
    rows: list[Row]

    @property
    def epochs(self) -> tuple[int, int]:
        """Finished ones, and planned ones."""
        return int(self.rows[-1]["epoch"]), int(self.options.get("epochs", self.rows[-1]["epoch"]))

    @property
    def finished(self) -> bool:
        """Whether all epochs that were planned are done."""
        done, planned = self.epochs
        return done >= planned

    @property
    def part(self) -> str:
        """The part of the data that tells: test, else validation."""
        return "test" if any(math.isfinite(row.get("test_accuracy", math.nan)) for row in self.rows) else "validation"

    def last(self, column: str) -> float:
        """The last value that was measured, or NaN."""
        values = [row[column] for row in self.rows if math.isfinite(row.get(column, math.nan))]
        return values[-1] if values else math.nan


def read(folder: str | Path) -> list[Run]:
    """The run in a folder, which may be one of a comparison's, or all runs of a comparison or a study.

    UserError where there is none with a finished epoch.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder (--out) of a run")
    if not (folder / CONFIG).is_file():
        if found := _of_comparison(folder):
            return [found]
        if runs := _of_study(folder):
            return runs
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    options = read_yaml(folder / CONFIG)
    if "methods" in options:
        return _compared(folder, options)
    rows = read_csv(folder / "metrics.csv")
    if not rows:
        raise UserError(f"the run in {folder} has finished no epoch yet: there is nothing to report")
    return [Run(folder, options, rows)]


def _of_comparison(folder: Path) -> Run | None:
    """The run in OUT/runs/METHOD-seedN, whose options are those of the comparison in OUT."""
    folder = folder.absolute()
    config = folder.parents[1] / CONFIG if len(folder.parents) > 1 else folder
    options = read_yaml(config) if folder.parent.name == "runs" and config.is_file() else {}
    runs = _compared(folder.parents[1], options) if "methods" in options else []
    return next((run for run in runs if run.folder == folder), None)


def _of_study(folder: Path) -> list[Run]:
    """The runs of a study that have finished an epoch here; each has options of its own."""
    folders = sorted(each.parent for each in (folder / "runs").glob(f"*/{CONFIG}"))
    runs = ((each, read_csv(each / "metrics.csv")) for each in folders)
    return [Run(each, read_yaml(each / CONFIG), rows) for each, rows in runs if rows]


def _compared(folder: Path, options: dict[str, Any]) -> list[Run]:
    """The runs of a comparison that have finished an epoch, in its order; they have its options."""
    runs = []
    for seed in options["seeds"]:
        for method in options["methods"]:
            each = folder / "runs" / f"{method}-seed{seed}"
            rows = read_csv(each / "metrics.csv")
            runs += [Run(each, options | {"method": method, "seed": seed}, rows)] if rows else []
    return runs


def holds_run(folder: Path) -> bool:
    """Whether `folder` holds the files of a run."""
    return any((folder / name).exists() for name in (CONFIG, "metrics.csv", "checkpoints"))
