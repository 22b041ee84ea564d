"""`fastkd analyze diversity`: how alike the networks of a run are, over its epochs.

The measures are those of fastkd/train/diversity.py; DGKD's Fig. 4 has the common errors, DKEL's abstract the claim that
a student and a teacher too alike make training collapse. But for the common errors the protocol is ours (C).
"""

from __future__ import annotations

import math
from itertools import combinations
from pathlib import Path
from typing import Any

from fastkd._core.messages import UserError
from fastkd.runs.figures import pyplot, save_figure
from fastkd.runs.folder import Run
from fastkd.runs.revisit import job_of, revisited
from fastkd.runs.tables import write_csv
from fastkd.train.diversity import MEAN_TEACHER, PREFIX
from fastkd.train.metrics import Row
from fastkd.train.progress import each

KINDS = ("learners", "learner and teacher", "teachers", "learner and its own average")
NETWORKS = 12  # more names than these are not written beside a matrix


def diversity(runs: list[Run], out: Path) -> list[Path]:
    """Of each run with several networks all measures as CSV, and a row of panels."""
    several = [run for run in runs if run.options["seed"] == runs[0].options["seed"] and job_of(run).has_several()]
    if not several:
        raise UserError(f"{runs[0].folder} has one network alone: diversity is that of several")
    found = {run.folder.name: (run, measures(run)) for run in several}
    rows = [[name, *line] for name, (_, values) in found.items() for line in _lines(values)]
    table = write_csv(out / "diversity.csv", ["run", "epoch", "measure", "network", "other", "value"], rows)
    return [table, _draw(found, out / "diversity.png")]


def measures(run: Run) -> dict[int, Row]:
    """Epoch -> the columns of `--diversity`: from the log where it has them, else from the checkpoints kept."""
    logged = {int(row["epoch"]): {n: v for n, v in row.items() if n.startswith(PREFIX)} for row in run.rows}
    logged = {epoch: row for epoch, row in logged.items() if any(map(math.isfinite, row.values()))}
    if logged:
        return logged
    with revisited(run) as again:
        return {epoch: again.fit(epoch).diversity().row() for epoch in each(again.epochs, f"diversity {run.folder}")}


def _lines(values: dict[int, Row]) -> list[list[object]]:
    lines: list[list[object]] = []
    for epoch, row in values.items():
        for column, value in row.items():
            measure, network, *other = column.removeprefix(PREFIX).split(".")
            lines.append([epoch, measure, network, "".join(other), value])
    return lines


def _names(row: Row) -> list[str]:
    start = f"{PREFIX}collapse."
    return [column.removeprefix(start) for column in row if column.startswith(start)]


def _pairs(run: Run, row: Row) -> dict[str, list[str]]:
    """Kind -> the ends "A.B" of the columns of its pairs."""
    guides = job_of(run).stages["student"].guides
    found: dict[str, list[str]] = {kind: [] for kind in KINDS}
    for pair in combinations(_names(row), 2):
        kind = KINDS[sum(name in guides or name.startswith(MEAN_TEACHER) for name in pair)]
        own = pair[1] in (MEAN_TEACHER, f"{MEAN_TEACHER}{pair[0].removeprefix('peer')}")
        found[KINDS[-1] if own else kind].append(".".join(pair))
    return {kind: pairs for kind, pairs in found.items() if pairs}


def _draw(found: dict[str, tuple[Run, dict[int, Row]]], path: Path) -> Path:
    plt = pyplot()
    size = dict(figsize=(18, 3.9 * len(found)), squeeze=False, layout="constrained")
    figure, panels = plt.subplots(len(found), 4, **size)
    for (distance, common, homogeneity, collapse), (name, (run, values)) in zip(panels, found.items(), strict=True):
        last = max(values)
        kinds = _pairs(run, values[last])
        _draw_pairs(distance, kinds, values, "distance", "distance of the softmax outputs")
        _draw_pairs(homogeneity, kinds, values, "homogeneity", "homogeneity")
        _draw_common(figure, common, values[last])
        common.set_title(f"errors that the other makes, too [%], epoch {last}", fontsize="medium")
        for network in _names(values[last]):
            points = [row[f"{PREFIX}collapse.{network}"] for row in values.values()]
            collapse.plot(list(values), points, marker="o" if len(values) < 3 else None, label=network)
        collapse.set(ylabel="collapse (1: one output for all)", ylim=(-0.03, 1.03))
        distance.set_title(name, fontweight="bold")
        for panel in (distance, homogeneity, collapse):
            panel.set(xlabel="epoch", xlim=(0, last + 1) if len(values) < 3 else None)
            panel.xaxis.get_major_locator().set_params(integer=True)
            panel.grid(alpha=0.3)
            panel.legend(fontsize="x-small")
    save_figure(figure, path)
    plt.close(figure)
    return path


def _draw_pairs(panel: Any, kinds: dict[str, list[str]], values: dict[int, Row], measure: str, label: str) -> None:
    """The mean of each kind of pairs over the epochs, and from the least to the largest."""
    epochs = list(values)
    for kind, pairs in kinds.items():
        color = f"C{KINDS.index(kind)}"
        points = [[row[f"{PREFIX}{measure}.{pair}"] for pair in pairs] for row in values.values()]
        points = [[value for value in each_ if math.isfinite(value)] or [math.nan] for each_ in points]
        means = [sum(each_) / len(each_) for each_ in points]
        few = len(epochs) < 3
        text = f"{kind} ({len(pairs)} pair{'s' * (len(pairs) > 1)})"
        panel.plot(epochs, means, color=color, label=text, marker="o" if few else None)
        low, high = [min(each_) for each_ in points], [max(each_) for each_ in points]
        if few:
            panel.vlines(epochs, low, high, color=color, alpha=0.4)
        else:
            panel.fill_between(epochs, low, high, color=color, alpha=0.15)
    panel.set_ylabel(label)


def _draw_common(figure: Any, panel: Any, row: Row) -> None:
    """A matrix: of the errors of the network on the left, those that the one below makes."""
    names = _names(row)
    shares = [[100 * row.get(f"{PREFIX}common.{a}.{b}", math.nan) for b in names] for a in names]
    image = panel.imshow(shares, vmin=0, vmax=100, cmap="viridis")
    figure.colorbar(image, ax=panel, shrink=0.8)
    if len(names) > NETWORKS:
        return
    panel.set_xticks(range(len(names)), names, rotation=30, ha="right", fontsize="x-small")
    panel.set_yticks(range(len(names)), names, fontsize="x-small")
    for i, values in enumerate(shares):
        for j, value in enumerate(values):
            if math.isfinite(value):
                style = dict(ha="center", va="center", fontsize="x-small", color="white" if value < 60 else "black")
                panel.text(j, i, f"{value:.0f}", **style)
