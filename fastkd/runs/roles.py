"""ORC's roles over a run: who was promoted how often, epoch by epoch, from the run's log."""

from __future__ import annotations

import itertools
from pathlib import Path

from fastkd.runs.figures import pyplot, save_figure
from fastkd.runs.folder import Run
from fastkd.runs.tables import write_csv

PREFIX = "promotions_"


def promotions(run: Run) -> dict[str, list[float]]:
    """Network -> its promotions in each epoch, as the log has them (there since the start)."""
    names = [name for name in run.rows[-1] if name.startswith(PREFIX)]
    since = {name.removeprefix(PREFIX): [0.0, *(row[name] for row in run.rows)] for name in names}
    return {name: [b - a for a, b in itertools.pairwise(counts)] for name, counts in since.items()}


def roles(run: Run, out: Path) -> list[Path]:
    """Share of each network among the temporary teachers of each epoch, and the students' test accuracy beside it."""
    counts = promotions(run)
    epochs = [int(row["epoch"]) for row in run.rows]
    rows = [[epoch, *(int(each[i]) for each in counts.values())] for i, epoch in enumerate(epochs)]
    table = write_csv(out / "roles.csv", ["epoch", *counts], rows)
    return [table, _draw(run, epochs, counts, out / "roles.png")]


def _draw(run: Run, epochs: list[int], counts: dict[str, list[float]], path: Path) -> Path:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    totals = [max(1.0, sum(each[i] for each in counts.values())) for i in range(len(epochs))]
    below = [0.0] * len(epochs)
    for name, each in counts.items():
        share = [100 * value / total for value, total in zip(each, totals, strict=True)]
        left.bar(epochs, share, bottom=below, label=name, width=1.0)
        below = [a + b for a, b in zip(below, share, strict=True)]
    left.set(xlabel="epoch", ylabel="temporary teachers [%]", title="who was promoted")
    left.legend(fontsize="small", loc="lower right")
    for name in ("train_intensive", "train_private_kd", "train_group_kd", "train_group_ce"):
        values = [row.get(name, float("nan")) for row in run.rows]
        right.plot(epochs, values, label=name.removeprefix("train_"))
    right.set(xlabel="epoch", ylabel="terms of the loss", title="what the teachings leave to learn")
    right.legend(fontsize="small")
    save_figure(figure, path)
    plt.close(figure)
    return path
