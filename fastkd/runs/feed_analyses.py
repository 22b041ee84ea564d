"""FEED's analyses: what an auto-encoder restores of the last feature maps, and what a chain gains from link to link.

FEED reports reconstruction errors of networks with and without its teaching; its protocol is not known to us, and the
one here is ours (C): `fastkd.methods.reconstruction.Reconstruction`, trained for the same steps on the training images
of each frozen network, and its error on the test images. The direction of an effect is not assumed.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fastkd.methods.reconstruction import Reconstruction
from fastkd.runs.figures import pyplot, save_figure
from fastkd.runs.folder import Run
from fastkd.runs.revisit import Revisited, revisited
from fastkd.runs.runner import Result
from fastkd.runs.tables import final, write_csv
from fastkd.train.devices import batch_on
from fastkd.train.loaders import held_out_batches, training_batches
from fastkd.train.progress import each

STEPS, LEARNING_RATE, MOMENTUM = 300, 0.1, 0.9  # of the auto-encoder, by SGD (C)


class Member(NamedTuple):
    """A trained network of a run: how it was trained, its name in the run, its result."""

    how: str
    name: str
    result: Result


def members(again: Revisited) -> Iterator[Member]:
    """The networks of a run of ce or FEED that have the student's architecture, the student last."""
    method = again.runner.config.method
    chain = method in ("feed-sequential", "ban")
    for number, (name, result) in enumerate(again.earlier.items(), 1):
        yield Member(f"sequential, generation {number}" if chain else "alone", name, result)
    count = len(again.earlier)
    how = {"ce": "alone", "feed-parallel": f"parallel, {count} teacher{'s' * (count > 1)}"}
    yield Member(how.get(method, f"sequential, generation {count + 1}"), "student", again.student())


def restored(network: nn.Module, again: Revisited) -> tuple[float, float]:
    """(absolute, relative) error on the test images of an auto-encoder of the network's last feature map."""
    runner, device = again.runner, again.runner.job.device
    batches = training_batches(runner.data, runner.config, runner.config.seed)
    first, _ = batch_on(next(iter(batches.go_on(0, 0))), device)
    method = Reconstruction(network.to(device), seed=runner.config.seed, example=first[:1]).to(device).train()
    optimizer = torch.optim.SGD(method.parameter_groups(LEARNING_RATE), momentum=MOMENTUM)
    epochs = -(-STEPS // len(batches))
    for epoch in range(epochs):
        for batch in batches.go_on(epoch, 0):
            method.step(optimizer, *batch_on(batch, device))
    errors = [method.error(batch_on(b, device)[0]) for b in held_out_batches(runner.data, runner.config)["test"]]
    absolute, relative = (torch.cat(rows).mean().item() for rows in zip(*errors, strict=True))
    return absolute, relative


def reconstruction(runs: list[Run], out: Path) -> list[Path]:
    """The errors of all networks alone, of parallel and of sequential FEED, in these runs."""
    rows: list[list[Any]] = []
    known: dict[Path, tuple[float, float]] = {}  # a first generation may be a teacher of parallel FEED, too
    for run in runs:
        with revisited(run) as again:
            for how, name, result in each(list(members(again)), f"reconstruction {run.folder}"):
                errors = known.get(result.folder or Path()) or restored(result.network, again)
                if result.folder is not None:  # that of a student is
                    known[result.folder] = errors
                rows.append([run.folder.name, run.options["seed"], how, name, *errors, final(result)])
    rows.sort(key=lambda row: (row[2], row[1]))
    header = ["run", "seed", "trained", "network", "absolute_error", "relative_error", "test_accuracy"]
    table = write_csv(out / "reconstruction.csv", header, rows)
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(row[2], []).append(row[5])
    return [table, _draw_groups(groups, out / "reconstruction.png")]


def _draw_groups(groups: dict[str, list[float]], path: Path) -> Path:
    plt = pyplot()
    figure, axis = plt.subplots(figsize=(2.5 + 1.7 * len(groups), 4.2), layout="constrained")
    axis.bar(list(groups), [statistics.fmean(values) for values in groups.values()], width=0.6, alpha=0.55, zorder=2)
    for index, values in enumerate(groups.values()):
        axis.scatter([index] * len(values), values, s=22, color="C3", edgecolor="white", zorder=3)
    axis.set_ylabel("relative reconstruction error (mean, each network)")
    axis.set_title(f"auto-encoder of the last feature map, {STEPS} steps, test images", fontsize="medium")
    axis.tick_params(axis="x", rotation=20 if len(groups) > 3 else 0)
    axis.grid(axis="y", alpha=0.3, zorder=0)
    save_figure(figure, path)
    plt.close(figure)
    return path


def generations(runs: list[Run], out: Path) -> list[Path]:
    """The test accuracy of each network of the chain after its last epoch, and its gain over the one before."""
    chains: dict[str, list[float]] = {}
    for run in each(runs, "generations"):
        with revisited(run) as again:
            chains[run.folder.name] = [final(member.result) for member in members(again)]
    rows: list[list[object]] = []
    for name, values in chains.items():
        for number, value in enumerate(values):
            before = values[max(0, number - 1)]
            rows.append([name, number + 1, value, value - before, value - values[0]])
    header = ["run", "generation", "test_accuracy", "gain_over_previous", "gain_over_first"]
    table = write_csv(out / "generations.csv", header, rows)
    return [table, _draw_chains(chains, out / "generations.png")]


def _draw_chains(chains: dict[str, list[float]], path: Path) -> Path:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for name, values in chains.items():
        left.plot(range(1, len(values) + 1), [100 * value for value in values], "o-", alpha=0.7, label=name)
    left.set(xlabel="generation (1: alone)", ylabel="test accuracy, last epoch [%]")
    left.legend(fontsize="small")
    gains = [[100 * (b - a) for a, b in pairwise(values)] for values in chains.values()]
    numbers = range(2, max(map(len, chains.values())) + 1)
    of_step = [[each_[n - 2] for each_ in gains if len(each_) > n - 2] for n in numbers]
    right.bar(list(numbers), [statistics.fmean(values) for values in of_step], width=0.5, alpha=0.55, zorder=2)
    for number, values in zip(numbers, of_step, strict=True):
        right.scatter([number] * len(values), values, s=22, color="C3", edgecolor="white", zorder=3)
    right.axhline(0, color="0.3", linewidth=0.8)
    right.set(xlabel="generation", ylabel="gain over the one before [points]")
    for panel in (left, right):
        panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)
    return path
