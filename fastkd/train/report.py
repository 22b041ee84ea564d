"""What a finished run leaves for a reader: curves.png and report.md."""

from __future__ import annotations

import math
import re
from pathlib import Path

from fastkd import models
from fastkd._extras import require
from fastkd.data import loader
from fastkd.train import checkpoint, environment
from fastkd.train.config import Settings, TrainConfig
from fastkd.train.devices import pick_device
from fastkd.train.loop import evaluate
from fastkd.train.metrics import Row
from fastkd.train.plans import arguments, in_force, recipe
from fastkd.train.runner import Result

LAST_EPOCH = (
    "Accuracies are those after the last epoch. No epoch, network or setting was chosen by the test images within this "
    "run."
)


def pyplot():
    """matplotlib.pyplot that draws into files, whether there is a display or not."""
    matplotlib = require("matplotlib", "Drawing curves")
    matplotlib.use("Agg")
    return require("matplotlib.pyplot", "Drawing curves")


def save_figure(figure, path: Path) -> None:
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
        style = ("--", ":", "-.")[number % 3]
        right.axhline(100 * accuracy, color="0.45", linewidth=1, linestyle=style, label=f"{label}, test, last epoch")
    left.set_ylabel("loss per image")
    _log_scale(left)
    right.set_ylabel("accuracy [%]")
    for axis in third:
        for number, (name, values) in enumerate(found.items()):
            style = dict(color=f"C{number % 10}", label=name, marker=marker, markersize=4)
            axis.plot([row["epoch"] for row in rows], values, linestyle=("-", "--")[number // 10 % 2], **style)
        axis.set_ylabel("terms of the method's loss, per image")
        _log_scale(axis)
    for axis in (left, right, *third):
        axis.set_xlabel("epoch")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    save_figure(figure, path)
    plt.close(figure)


def _log_scale(axis) -> None:
    """The method's loss, its terms and the cross-entropy may be far apart."""
    axis.set_yscale("log")
    axis.yaxis.set_major_locator(require("matplotlib.ticker", "Drawing curves").LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter("{x:g}")
    axis.yaxis.set_minor_formatter("")


def _label(name: str, kind: str) -> str:
    if kind == "loss":
        return "training (the method's loss)" if name == "train" else f"{name} (cross-entropy)"
    return "training (augmented, before each step)" if name == "train" else name


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose source is aligned too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * max(2, widths[0] - 1), *("-" * max(2, w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])


def percent(value: float) -> str:
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def final(result: Result, name: str = "test_accuracy") -> float:
    return result.rows[-1].get(name, math.nan) if result.rows else math.nan


def networks_table(config: TrainConfig, results: dict[str, Result], data) -> str:
    rows = []
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
            batches = loader(data.test, 256, shuffle=False)
            rows[-1].append(percent(evaluate(network, batches, pick_device(config.device))[1]))
    header = ["network", "architecture", "parameters", "trained by", "guided by", "epochs", "test accuracy [%]"]
    return table(header, rows)


def terms(rows: list[Row]) -> dict[str, list[float]]:
    """The terms of the loss, epoch by epoch, where there are several; those of peers are added up.

    {"ce": [...], "kd": [...]} from columns such as train_ce, train_kd, train_peers.0.ce.
    """
    found: dict[str, list[float]] = {}
    columns = [name for row in rows for name in row if name.startswith("train_")]
    for column in dict.fromkeys(columns):
        name = re.sub(r"\bpeers\.\d+\.", "", column.removeprefix("train_"))
        if name not in ("loss", "accuracy"):
            values = [row.get(column, math.nan) for row in rows]
            found[name] = [a + b for a, b in zip(found.get(name, [0.0] * len(rows)), values, strict=True)]
    return found if len(found) > 1 else {}


def _terms_text(rows: list[Row]) -> list[str]:
    found = terms(rows)
    cells = [[name, f"{values[0]:.4g}", f"{values[-1]:.4g}"] for name, values in found.items()]
    lines = ["## Terms of the loss", "", table(["term", "first epoch", "last epoch"], cells), ""] if found else []
    counts = {k.removeprefix("promotions_"): v for k, v in rows[-1].items() if k.startswith("promotions_")}
    if counts:
        shown = ", ".join(f"{name} {int(count)}" for name, count in counts.items())
        lines += [f"Steps in which a network was a temporary teacher: {shown}.", ""]
    return lines


def data_text(config: Settings, data) -> str:
    parts = [f"{len(data.train)} training images"]
    if data.validation is not None:
        parts.append(f"{len(data.validation)} validation images")
    parts.append(f"{len(data.test)} test images")
    augmented = "augmented" if config.augment else "not augmented"
    if config.augment and config.variants:
        augmented += f" in {config.variants} variants"
    size = f"{data.channels}x{data.image_size}x{data.image_size}"
    return f"{config.data}: {', '.join(parts)}, {data.num_classes} classes, {size} pixels, training images {augmented}."


def optimization_text(config: Settings) -> str:
    momentum = f", momentum {config.momentum}{' (Nesterov)' if config.nesterov else ''}"
    schedule = config.schedule
    if schedule == "multistep":
        schedule += f" (times {config.gamma} at {', '.join(f'{m:g}' for m in config.milestones)})"
    warmup = f", {config.warmup_epochs} epochs of linear warm-up" if config.warmup_epochs else ""
    name = config.optimizer + (momentum if config.optimizer == "sgd" else "")
    return (
        f"{name}, learning rate {config.lr:g}, weight decay {config.weight_decay:g}, batches of {config.batch_size}, "
        f"schedule {schedule}{warmup}. The same for every network, but for ORC's pivot (options.pivot_lr)."
    )


def method_text(name: str, data: str, options: dict) -> str:
    """Which networks there are, and the method's arguments in force."""
    values = arguments(name) | in_force(name, data, options)
    shown = ", ".join(f"{key}={value!r}" for key, value in values.items()) or "none"
    return f"{recipe(name).about} Arguments: {shown}."


def train_report(config: TrainConfig, results: dict[str, Result], data, command: str) -> str:
    student = results["student"]
    last = student.rows[-1]
    lines = [f"# {config.method} on {config.data}", ""]
    lines += [f"Test accuracy of the student after epoch {int(last['epoch'])}: **{percent(last['test_accuracy'])} %**"]
    if data.validation is not None:
        lines[-1] += f" (validation: {percent(last['validation_accuracy'])} %)"
    lines[-1] += "."
    lines += ["", "![loss and accuracy over the epochs](curves.png)", ""]
    lines += ["## Networks", "", networks_table(config, results, data), ""]
    lines += ["## Method", "", method_text(config.method, config.data, config.options), ""]
    lines += _terms_text(student.rows)
    lines += ["## Data", "", data_text(config, data), ""]
    lines += ["## Optimisation", "", optimization_text(config), ""]
    lines += _how_to_repeat(command, config)
    lines += ["## How to read this", "", LAST_EPOCH, ""]
    lines += ["One seed is one sample: `fastkd compare` repeats a run with several seeds and gives the spread.", ""]
    return "\n".join(lines)


def _how_to_repeat(command: str, config: Settings) -> list[str]:
    where = environment.describe(pick_device(config.device))
    lines = ["## How to repeat it", "", "```", command, "```", "", where + ".", ""]
    return [*lines, "All options, the defaults too, are in config.yaml: `--config config.yaml` takes them.", ""]


def write_train_report(config: TrainConfig, results: dict[str, Result], data, command: str) -> Path:
    """Write OUT/curves.png and OUT/report.md; returns the report's path."""
    out = Path(config.out)
    labels = {f"{r.stage.name} {r.stage.network}": final(r) for r in results.values() if r.stage.name != "student"}
    guides = {label: accuracy for label, accuracy in labels.items() if not math.isnan(accuracy)}
    title = f"{config.method}: {config.student} on {config.data}, seed {config.seed}"
    draw_curves(results["student"].rows, out / "curves.png", title, guides)
    path = out / "report.md"
    checkpoint.write_atomic(path, train_report(config, results, data, command).encode())
    return path
