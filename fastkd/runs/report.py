"""What a finished run leaves for a reader: curves.png and report.md."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastkd import models
from fastkd._core.files import write_atomic
from fastkd.data import Data
from fastkd.runs import environment
from fastkd.runs.figures import LAST_EPOCH, draw_curves
from fastkd.runs.job import Job
from fastkd.runs.runner import Result
from fastkd.runs.tables import final, percent, table, terms
from fastkd.train.devices import keeps_channels_last, prepares_teachers
from fastkd.train.metrics import Row
from fastkd.train.settings import Settings


def networks_table(job: Job, results: dict[str, Result], others: dict[str, float]) -> str:
    """One row a network: parameters, method, guides, epochs, test accuracy.

    others: the test accuracies of the networks that learned together with the student, by their names.
    """
    config, rows = job.config, []
    for result in results.values():
        stage = result.stage
        given = stage.name in config.checkpoint
        how = f"taken from {config.checkpoint[stage.name]}" if given else stage.method
        epochs = "-" if given else str(stage.epochs)
        count = f"{models.parameters_count(result.network):,}"
        rows.append([stage.name, stage.network, count, how, ", ".join(stage.guides) or "-", epochs])
        rows[-1].append(percent(final(result)))
        for learner in stage.learners[1:]:
            network = result.others[learner.name]
            name = f"{learner.name}, going on" if learner.start else learner.name
            how = f"{stage.method}, with the {stage.name}"
            rows.append([name, learner.network, f"{models.parameters_count(network):,}", how, "-", epochs])
            rows[-1].append(percent(others[learner.name]))
    header = ["network", "architecture", "parameters", "trained by", "guided by", "epochs", "test accuracy [%]"]
    return table(header, rows)


def _terms_text(rows: list[Row], counted: Mapping[str, str]) -> list[str]:
    found = terms(rows)
    cells = [[name, f"{values[0]:.4g}", f"{values[-1]:.4g}"] for name, values in found.items()]
    lines = ["## Terms of the loss", "", table(["term", "first epoch", "last epoch"], cells), ""] if found else []
    for what, words in counted.items():
        counts = {k.removeprefix(f"{what}_"): v for k, v in rows[-1].items() if k.startswith(f"{what}_")}
        shown = ", ".join(f"{name} {int(count)}" for name, count in counts.items())
        lines += [f"{words}: {shown}.", ""]
    return lines


def data_text(config: Settings, data: Data) -> str:
    """One sentence: how many images, classes, pixels, and how they are augmented."""
    images: dict[str, Any] = {"training": data.train, "validation": data.validation, "test": data.test}
    parts = [f"{len(part)} {name} images" for name, part in images.items() if part is not None]
    augmented = "augmented" if config.augment else "not augmented"
    if config.augment and config.variants:
        augmented += f" in {config.variants} variants"
    if config.label_noise:
        augmented += f", each with probability {config.label_noise:g} under a wrong label"
    size = f"{data.channels}x{data.image_size}x{data.image_size}"
    return f"{config.data}: {', '.join(parts)}, {data.num_classes} classes, {size} pixels, training images {augmented}."


def optimization_text(config: Settings) -> str:
    """Two sentences: optimiser, learning rate, batch, schedule."""
    momentum = f", momentum {config.momentum}{' (Nesterov)' if config.nesterov else ''}"
    schedule: str = config.schedule
    if schedule == "multistep":
        schedule += f" (times {config.gamma} at {', '.join(f'{m:g}' for m in config.milestones)})"
    warmup = f", {config.warmup_epochs} epochs of linear warm-up" if config.warmup_epochs else ""
    name = config.optimizer + (momentum if config.optimizer == "sgd" else "")
    return (
        f"{name}, learning rate {config.lr:g}, weight decay {config.weight_decay:g}, batches of {config.batch_size}, "
        f"schedule {schedule}{warmup}. The same for every network, but for ORC's pivot (options.pivot_lr)."
    )


def speed_text(settings: Settings, device: torch.device) -> str:
    """How networks were run, where it changes the last digits."""
    last, prepared = keeps_channels_last(settings, device), prepares_teachers(settings, device)
    maps = "channels-last" if last else "contiguous"
    frozen = "copies made for inference (--prepare-teachers)" if prepared else "as they are"
    return f"Feature maps in {maps} order; frozen networks {frozen}."


def train_report(job: Job, results: dict[str, Result], others: dict[str, float], data: Data, command: str) -> str:
    """The report of one run in Markdown."""
    config, student = job.config, results["student"]
    last = student.rows[-1]
    lines = [f"# {config.method} on {config.data}", ""]
    lines += [f"Test accuracy of the student after epoch {int(last['epoch'])}: **{percent(last['test_accuracy'])} %**"]
    if data.validation is not None:
        lines[-1] += f" (validation: {percent(last['validation_accuracy'])} %)"
    lines[-1] += "."
    lines += ["", "![loss and accuracy over the epochs](curves.png)", ""]
    lines += ["## Networks", "", networks_table(job, results, others), ""]
    lines += ["## Method", "", job.recipe.described(config.data, config.options), ""]
    lines += _terms_text(student.rows, job.recipe.method.counted)
    lines += ["## Data", "", data_text(config, data), ""]
    lines += ["## Optimisation", "", f"{optimization_text(config)} {speed_text(config, job.device)}", ""]
    lines += _how_to_repeat(command, job.device)
    lines += ["## How to read this", "", LAST_EPOCH, ""]
    lines += ["One seed is one sample: `fastkd compare` repeats a run with several seeds and gives the spread.", ""]
    return "\n".join(lines)


def _how_to_repeat(command: str, device: torch.device) -> list[str]:
    where = environment.describe(device)
    lines = ["## How to repeat it", "", "```", command, "```", "", where + ".", ""]
    return [*lines, "All options, the defaults too, are in config.yaml: `--config config.yaml` takes them.", ""]


def write_train_report(
    job: Job, results: dict[str, Result], others: dict[str, float], data: Data, command: str
) -> Path:
    """Write OUT/curves.png and OUT/report.md; returns the report's path. others: as in `networks_table`."""
    config, out = job.config, job.folder
    labels = {f"{r.stage.name} {r.stage.network}": final(r) for r in results.values() if r.stage.name != "student"}
    guides = {label: accuracy for label, accuracy in labels.items() if not math.isnan(accuracy)}
    title = f"{config.method}: {config.student} on {config.data}, seed {config.seed}"
    draw_curves(results["student"].rows, out / "curves.png", title, guides)
    path = out / "report.md"
    write_atomic(path, train_report(job, results, others, data, command).encode())
    return path
