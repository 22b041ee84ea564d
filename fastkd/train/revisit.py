"""`fastkd report RUN ...`: what runs have come to, finished or not, from the files that they keep."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd.train import checkpoint
from fastkd.train.config import UserError, read_yaml
from fastkd.train.metrics import Row, read_csv
from fastkd.train.report import LAST_EPOCH, draw_curves, percent, pyplot, save_figure, table

UNFINISHED = "This run is not finished."
DEFAULT_OUT = "report"


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
    """The run in a folder, or all runs of a comparison; UserError where there is none with a finished epoch."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}: give the folder (--out) of a run")
    if not (folder / "config.yaml").is_file():
        raise UserError(f"{folder} holds no run: it has no config.yaml")
    options = read_yaml(folder / "config.yaml")
    if "methods" in options:
        return _compared(folder, options)
    rows = read_csv(folder / "metrics.csv")
    if not rows:
        raise UserError(f"the run in {folder} has finished no epoch yet: there is nothing to report")
    return [Run(folder, options, rows)]


def _compared(folder: Path, options: dict[str, Any]) -> list[Run]:
    """The runs of a comparison that have finished an epoch, in its order; they have its options."""
    runs = []
    for seed in options["seeds"]:
        for method in options["methods"]:
            each = folder / "runs" / f"{method}-seed{seed}"
            rows = read_csv(each / "metrics.csv")
            runs += [Run(each, options | {"method": method, "seed": seed}, rows)] if rows else []
    return runs


def summary(runs: Sequence[Run]) -> str:
    """A Markdown table with a line a run."""
    cells = []
    for run in runs:
        done, planned = run.epochs
        accuracy = f"{percent(run.last(f'{run.part}_accuracy'))} ({run.part})"
        who = [str(run.options.get(name, "-")) for name in ("method", "data", "student", "seed")]
        seconds = f"{sum(row.get('seconds', 0.0) for row in run.rows):.0f}"
        loss = f"{run.last('train_loss'):.4g}"
        cells.append([str(run.folder), *who, f"{done} of {planned}", loss, accuracy, seconds])
    header = ["run", "method", "data", "student", "seed", "epochs", "training loss", "accuracy [%]", "seconds"]
    return table(header, cells)


def report(folders: Sequence[str], out: str | None, command: str, say=print) -> Path:
    """Report on one run in its own folder, on several in `out`; returns the path of report.md.

    The report that a finished run wrote by itself is kept: it says more.
    """
    runs = [run for folder in folders for run in read(folder)]
    if not runs:
        raise UserError(f"{', '.join(folders)}: no run there has finished an epoch: there is nothing to report")
    say(summary(runs))
    if len(runs) == 1 and out is None:
        return _report_one(runs[0], command, say)
    target = Path(out or DEFAULT_OUT)
    if (target / "config.yaml").exists():
        raise UserError(f"--out {target} holds a run: name another folder for the report")
    target.mkdir(parents=True, exist_ok=True)
    draw_runs(runs, target / "runs.png")
    lines = [f"# {len(runs)} runs", "", summary(runs), "", "![accuracy and loss of each run](runs.png)", ""]
    return _write(target / "report.md", [*lines, LAST_EPOCH, "", f"`{command}`"], say, target / "runs.png")


def _report_one(run: Run, command: str, say) -> Path:
    path, picture = run.folder / "report.md", run.folder / "curves.png"
    title = f"{run.options.get('method')}, {run.options.get('student')} on {run.options.get('data')}"
    draw_curves(run.rows, picture, title)
    if run.finished and path.exists() and UNFINISHED not in path.read_text():
        say(f"report: {path} (the run's own, kept), curves: {picture}")
        return path
    lines = [f"# {title}", ""]
    if not run.finished:
        done, planned = run.epochs
        lines += [f"{UNFINISHED} It has done {done} of {planned} epochs; `fastkd train --resume` goes on with it.", ""]
    lines += [summary([run]), "", "![loss and accuracy over the epochs](curves.png)", "", "## Options", ""]
    values = [[str(name), str(value)] for name, value in run.options.items()]
    return _write(path, [*lines, table(["option", "value"], values), "", f"`{command}`"], say, picture)


def _write(path: Path, lines: list[str], say, picture: Path) -> Path:
    checkpoint.write_atomic(path, ("\n".join(lines) + "\n").encode())
    say(f"report: {path}, picture: {picture}")
    return path


def draw_runs(runs: Sequence[Run], path: Path) -> None:
    """Accuracy and training loss of several runs over their epochs."""
    plt = pyplot()
    rows = (len(runs) + 3) // 4  # of the legend
    figure, (left, right) = plt.subplots(1, 2, figsize=(12, 4.5 + 0.2 * rows), layout="constrained")
    kinds = list(dict.fromkeys(_kind(run) for run in runs))
    seen = dict.fromkeys(kinds, 0)  # a colour a kind, a dash pattern for each of its runs
    for run, name in zip(runs, _short_names(runs), strict=True):
        kind = _kind(run)
        style = dict(color=f"C{kinds.index(kind) % 10}", linestyle=("-", "--", ":", "-.")[seen[kind] % 4])
        seen[kind] += 1
        for axis, column, scale in ((left, "train_loss", 1), (right, f"{run.part}_accuracy", 100)):
            points = [(row["epoch"], scale * row.get(column, math.nan)) for row in run.rows]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if points:
                marker = "o" if len(points) < 3 else None  # one epoch is no line
                axis.plot(*zip(*points, strict=True), label=name, marker=marker, markersize=4, **style)
    left.set_ylabel("training loss, each method's own")
    right.set_ylabel("accuracy [%]")
    for axis in (left, right):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
    figure.legend(*right.get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize="small")
    save_figure(figure, path)
    plt.close(figure)


def _kind(run: Run) -> tuple[str, str]:
    return str(run.options.get("method")), str(run.options.get("student"))


def _short_names(runs: Sequence[Run]) -> list[str]:
    """The folders' own names, with their parents' where two are alike."""
    names = [run.folder.name for run in runs]
    return [name if names.count(name) == 1 else str(run.folder) for name, run in zip(names, runs, strict=True)]


def main(argv: list[str], command: str) -> int:
    usage = "fastkd report RUN [RUN ...] [--out DIR]"
    parser = argparse.ArgumentParser(
        prog="fastkd report",
        usage=usage,
        description="report.md and pictures of a run, finished or not, or of several side by side",
        exit_on_error=False,
        allow_abbrev=False,
    )
    parser.add_argument("run", nargs="*", metavar="RUN", help="folder (--out) of a run or of a comparison")
    parser.add_argument("--out", metavar="DIR", help=f"folder for the report of several runs (default: {DEFAULT_OUT})")
    if "-h" in argv or "--help" in argv:
        parser.print_help()
        return 0
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        raise UserError(f"fastkd report has no option {unknown[0]}: use {usage}")
    if not options.run:
        raise UserError(f"fastkd report needs the folder of a run: {usage}")
    report(options.run, options.out, command)
    return 0
