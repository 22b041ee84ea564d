"""ORC's roles over a run: who was promoted, and what intensive teaching does to the samples that the group gets wrong.

Promotions are read in the run's log. The pivot learns by intensive teaching alone, so that what it has gained since it
came (the trained teacher) is the effect of that teaching. It is measured here on hard samples, those that at least one
network of the student group gets wrong after the epoch, and on all others, training images without augmentation and
test images apart. How the paper measures it is not known to us: this protocol is ours (C).
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._core.modes import eval_mode
from fastkd.functional import group_stats
from fastkd.methods import ORC
from fastkd.models import call_network, logits_of
from fastkd.runs.figures import pyplot, save_figure
from fastkd.runs.folder import Run
from fastkd.runs.revisit import Revisited, revisited
from fastkd.runs.tables import write_csv
from fastkd.train.devices import batch_on
from fastkd.train.loaders import held_out_batches, plain_batches
from fastkd.train.progress import each

PREFIX = "promotions_"
SAMPLES = ("hard", "others")


class Effect(NamedTuple):
    """The pivot as it came and after an epoch, on the hard samples of this epoch or on all others; NaN of none."""

    run: str
    epoch: int
    images: str  # "train", "test"
    samples: str  # "hard", "others"
    number: int  # of samples
    loss_before: float
    loss: float
    accuracy_before: float
    accuracy: float


def promotions(run: Run) -> dict[str, list[float]]:
    """Network -> its promotions in each epoch, as the log has them (there since the start)."""
    names = [name for name in run.rows[-1] if name.startswith(PREFIX)]
    since = {name.removeprefix(PREFIX): [0.0, *(row[name] for row in run.rows)] for name in names}
    return {name: [b - a for a, b in itertools.pairwise(counts)] for name, counts in since.items()}


def roles(runs: list[Run], out: Path) -> list[Path]:
    """The first run's promotions, epoch by epoch; of all runs the effect of intensive teaching, as (C) above has it."""
    counts = promotions(runs[0])
    epochs = [int(row["epoch"]) for row in runs[0].rows]
    rows = [[epoch, *(int(each[i]) for each in counts.values())] for i, epoch in enumerate(epochs)]
    table = write_csv(out / "roles.csv", ["epoch", *counts], rows)
    found = [effect for run in each(runs, "roles") for effect in effects(run)]
    hard = write_csv(out / "roles-hard.csv", Effect._fields, found)
    return [table, hard, _draw(runs[0], epochs, counts, found, out / "roles.png")]


def effects(run: Run) -> Iterator[Effect]:
    """After each epoch whose checkpoint was kept, the last at least."""
    with revisited(run) as again:
        batches = {"train": plain_batches(again.runner.data, again.runner.config)}
        batches["test"] = held_out_batches(again.runner.data, again.runner.config)["test"]
        for epoch in again.epochs:
            for images, part in batches.items():
                yield from _of_images(again, epoch, images, part)


def _of_images(again: Revisited, epoch: int, images: str, batches: Iterable[Any]) -> Iterator[Effect]:
    fit = again.fit(epoch)
    method = fit.method
    assert isinstance(method, ORC)
    pivots = [again.earlier["teacher"].network.to(fit.device), method.pivot]
    losses, errors = _judged([*pivots, *method.students], batches, fit.device)  # each [2 + K, N]
    hard = errors[2:].any(0)
    for samples, mask in zip(SAMPLES, (hard, ~hard), strict=True):
        loss = losses[:2, mask].mean(1).tolist()
        accuracy = (~errors[:2, mask]).double().mean(1).tolist()
        yield Effect(again.run.folder.name, epoch, images, samples, int(mask.sum()), *loss, *accuracy)


@torch.no_grad()
def _judged(networks: Sequence[nn.Module], batches: Iterable[Any], device: torch.device) -> tuple[Tensor, Tensor]:
    """(cross-entropies, float64; errors) [M, N] of the images that have a label, in eval mode, on the CPU."""
    losses, errors = [], []
    with eval_mode(*networks):
        for batch in batches:
            inputs, target = batch_on(batch, device)
            logits = torch.stack([logits_of(call_network(network, inputs)).float() for network in networks])
            stats = group_stats(logits, target)
            counted = stats.labelled()[0]
            losses.append(stats.ce[:, counted].double().cpu())
            errors.append(stats.errors()[:, counted].cpu())
    return torch.cat(losses, 1), torch.cat(errors, 1)


def _draw(run: Run, epochs: list[int], counts: dict[str, list[float]], found: list[Effect], path: Path) -> Path:
    plt = pyplot()
    figure, (left, middle, *right) = plt.subplots(1, 4, figsize=(20, 4), layout="constrained")
    totals = [max(1.0, sum(each[i] for each in counts.values())) for i in range(len(epochs))]
    below = [0.0] * len(epochs)
    for name, promoted in counts.items():
        share = [100 * value / total for value, total in zip(promoted, totals, strict=True)]
        left.bar(epochs, share, bottom=below, label=name, width=1.0)
        below = [a + b for a, b in zip(below, share, strict=True)]
    left.set(xlabel="epoch", ylabel="temporary teachers [%]", title=f"who was promoted, {run.folder.name}")
    left.legend(fontsize="small", loc="lower right")
    for name in ("train_intensive", "train_private_kd", "train_group_kd", "train_group_ce"):
        values = [row.get(name, float("nan")) for row in run.rows]
        middle.plot(epochs, values, label=name.removeprefix("train_"))
    middle.set(xlabel="epoch", ylabel="terms of the loss", title="what the teachings leave to learn")
    middle.legend(fontsize="small")
    for panel, images in zip(right, ("train", "test"), strict=True):
        _draw_effect(panel, [effect for effect in found if effect.images == images], images)
    save_figure(figure, path)
    plt.close(figure)
    return path


def _draw_effect(panel: Any, found: list[Effect], images: str) -> None:
    """The pivot's loss less what it was when it came, over the epochs: each run, and the mean of the runs."""
    for color, samples in zip(("C3", "C0"), SAMPLES, strict=True):
        of_epoch: dict[int, list[float]] = {}
        for effect in found:
            if effect.samples == samples and math.isfinite(effect.loss):
                of_epoch.setdefault(effect.epoch, []).append(effect.loss - effect.loss_before)
        of_epoch = dict(sorted(of_epoch.items()))  # runs may have kept different ones
        means = [statistics.fmean(values) for values in of_epoch.values()]
        style = dict(color=color, marker="o" if len(of_epoch) < 3 else None, label=f"{samples}, mean of the runs")
        panel.plot([0, *of_epoch], [0.0, *means], **style)  # before the first step there is no change
        for epoch, values in of_epoch.items():
            panel.scatter([epoch] * len(values), values, s=10, color=color, alpha=0.4)
    panel.axhline(0, color="0.3", linewidth=0.8)
    panel.set(xlabel="epoch", ylabel="pivot's cross-entropy, now - as it came")
    panel.set_title(f"effect of intensive teaching, {images} images", fontsize="medium")
    panel.legend(fontsize="small")
