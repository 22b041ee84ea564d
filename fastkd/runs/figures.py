"""Pictures of runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

from fastkd._core.extras import require
from fastkd.runs.folder import Run
from fastkd.runs.tables import terms
from fastkd.train.metrics import Row

LAST_EPOCH = (
    "Accuracies are those after the last epoch. No epoch, network or setting was chosen by the test images within this "
    "run."
)


def pyplot() -> Any:
    """matplotlib.pyplot that draws into files, whether there is a display or not."""
    matplotlib = require("matplotlib", "Drawing curves")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "Drawing curves")


def save_figure(figure: Any, path: Path) -> None:
    """Writes `figure` as a PNG to `path`, whole or not at all."""
    temporary = path.with_name(f".{path.stem}.tmp.png")
    figure.savefig(temporary, dpi=150, metadata={"Software": None})
    temporary.replace(path)


def draw_curves(rows: list[Row], path: Path, title: str, guides: dict[str, float] | None = None) -> None:
    """Loss, accuracy and the loss's terms over the epochs.

    guides: label -> final test accuracy in 0..1, drawn as horizontal lines.
    """
    plt = pyplot()
    found = terms(rows)
    panels = 3 if found else 2
    figure, (left, right, *third) = plt.subplots(1, panels, figsize=(5 * panels, 4), layout="constrained")
    figure.suptitle(title)
    marker = "o" if len(rows) < 3 else None  # one epoch is no line
    for name, color in (("train", "C0"), ("validation", "C2"), ("test", "C1")):
        for axis, kind, scale in ((left, "loss", 1), (right, "accuracy", 100)):
            points = [(row["epoch"], scale * row.get(f"{name}_{kind}", math.nan)) for row in rows]
            points = [(x, y) for x, y in points if math.isfinite(y)]
            if points:
                style = dict(color=color, label=_label(name, kind), marker=marker, markersize=4)
                axis.plot(*zip(*points, strict=True), **style)
    for number, (label, accuracy) in enumerate((guides or {}).items()):
        dashes = ("--", ":", "-.")[number % 3]
        right.axhline(100 * accuracy, color="0.45", linewidth=1, linestyle=dashes, label=f"{label}, test, last epoch")
    left.set_ylabel("loss per image")
    log_scale(left, "y")
    right.set_ylabel("accuracy [%]")
    for axis in third:
        for number, (name, values) in enumerate(found.items()):
            style = dict(color=f"C{number % 10}", label=name, marker=marker, markersize=4)
            axis.plot([row["epoch"] for row in rows], values, linestyle=("-", "--")[number // 10 % 2], **style)
        axis.set_ylabel("terms of the method's loss, per image")
        log_scale(axis, "y")
    for axis in (left, right, *third):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save_figure(figure, path)
    plt.close(figure)


def log_scale(panel: Any, which: Literal["x", "y"]) -> None:
    """For values that may be far apart, as a method's loss, its terms and the cross-entropy; ticks at 1, 2, 5."""
    panel.set(**{f"{which}scale": "log"})
    axis = getattr(panel, f"{which}axis")
    axis.set_major_locator(require("matplotlib.ticker", "Drawing curves").LogLocator(subs=(1, 2, 5)))
    axis.set_major_formatter("{x:g}")
    axis.set_minor_formatter("")


def _label(name: str, kind: str) -> str:
    if kind == "loss":
        return "training (the method's loss)" if name == "train" else f"{name} (cross-entropy)"
    return "training (augmented, before each step)" if name == "train" else name


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
