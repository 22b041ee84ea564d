"""report.md and pictures of a study: gains with their intervals, and accuracy against what training costs."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd._core.files import write_atomic
from fastkd.runs import environment
from fastkd.runs.config import to_yaml
from fastkd.runs.figures import log_scale, pyplot, save_figure
from fastkd.runs.job import Job
from fastkd.runs.study import DEFAULT, Run, Study, arguments_text
from fastkd.runs.study_stats import TEST, Difference, Rows, by_seed, half_width, holm, mean_of, paired
from fastkd.runs.tables import table

ALL = ("", "_before")  # of the student's stage, and of what was trained for it


@dataclass(frozen=True)
class Facts:
    """planned: setting > the method of each of its runs, {} where it is not known; the others as in `Study`."""

    name: str
    planned: dict[str, list[str]]
    baselines: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]


def tables(rows: Rows, facts: Facts) -> str:
    """For each setting: accuracy and cost of each method, its gains over the baselines, the pairs."""
    parts = []
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        planned = facts.planned.get(setting)
        of = f" of {len(planned)}" if planned else ""
        there = f"{len(own)}{of} run{'s' * (bool(of) or len(own) > 1)}"
        parts += [f"## {setting}: {there}", "", accuracies(own), ""]
        for baseline in facts.baselines:
            parts += [gains(own, baseline), ""] if differences(own, baseline) else []
        within = [pair for pair in facts.pairs if not _across(pair) and {*pair} <= {*(planned or _methods(own))}]
        parts += [orderings(rows, within, setting), ""] if within else []
    across = [pair for pair in facts.pairs if _across(pair)]
    parts += ["## Between settings", "", orderings(rows, across)] if across else []
    return "\n".join(parts).rstrip()


def accuracies(rows: Rows) -> str:
    """A table, one row a method: accuracy, its interval, costs."""
    part = rows[0].get("judged_on", "test")
    header = ["method", "seeds", f"{part} accuracy [%]", "95 % interval", "teacher [%]", "training images right [%]"]
    header += ["CPU min", "with guides", "TFLOP", "with guides"]
    cells = []
    for method in _methods(rows):
        values = [100 * v for v in by_seed(rows, method).values()]
        mean, half = statistics.fmean(values), half_width(values)
        interval = "-" if math.isnan(half) else f"{mean - half:.2f} to {mean + half:.2f}"
        others = [_number(100 * mean_of(rows, method, name)) for name in ("teacher_accuracy", "train_accuracy")]
        costs = [mean_of(rows, method, "cpu_seconds") / 60, _total(rows, method, "cpu_seconds") / 60]
        costs += [mean_of(rows, method, "flops") / 1e12, _total(rows, method, "flops") / 1e12]
        cells.append([method, str(len(values)), f"{mean:.2f}", interval, *others, *(_number(c, 1) for c in costs)])
    return table(header, cells)


def gains(rows: Rows, baseline: str) -> str:
    """Paired differences to the baseline, the largest first."""
    found = differences(rows, baseline)
    adjusted = holm([each.p for each in found.values()])
    header = [f"method - {baseline}", "points", "95 % interval", "p", "p (Holm)", "seeds better"]
    cells = [[name, *_difference(each, p)] for (name, each), p in zip(found.items(), adjusted, strict=True)]
    return table(header, cells)


def differences(rows: Rows, baseline: str) -> dict[str, Difference]:
    """By method its paired difference to `baseline`, the largest first."""
    others = [name for name in _methods(rows) if name != baseline]
    found = {name: paired(by_seed(rows, name), by_seed(rows, baseline)) for name in others}
    return dict(sorted(((n, d) for n, d in found.items() if d is not None), key=lambda item: -item[1].mean))


def _across(pair: tuple[str, str]) -> bool:
    return any(":" in name for name in pair)


def orderings(rows: Rows, pairs: Iterable[tuple[str, str]], setting: str = DEFAULT) -> str:
    """A table, one row a pair (better, than), with its verdict; a plain name is a method in `setting`."""
    cells = []
    for better, than in pairs:
        found = paired(*(_named(rows, name, setting) for name in (better, than)))
        empty = ["-"] * 4
        cells.append([f"{better} > {than}", *(_difference(found, None) if found else empty)])
        cells[-1].append(found.verdict if found else "no runs yet")
    return table(["ordering", "points", "95 % interval", "p", "seeds better", "verdict"], cells)


def _named(rows: Rows, name: str, setting: str) -> dict[int, float]:
    """seed > accuracy of "SETTING:METHOD", or of a method in `setting`."""
    named, _, method = name.rpartition(":")
    return by_seed([row for row in rows if row["setting"] == (named or setting)], method)


def _difference(each: Difference, adjusted: float | None) -> list[str]:
    ps = [_number(p, 4) for p in ([each.p] if adjusted is None else [each.p, adjusted])]
    return [f"{100 * each.mean:+.2f}", each.interval, *ps, f"{each.better} of {each.seeds}"]


def _methods(rows: Rows) -> list[str]:
    return list(dict.fromkeys(row["method"] for row in rows))


def _total(rows: Rows, method: str, column: str) -> float:
    return mean_of(rows, method, *(column + part for part in ALL))


def _number(value: float, digits: int = 2) -> str:
    return "-" if math.isnan(value) else f"{value:.{digits}f}"


def draw_gains(rows: Rows, baselines: tuple[str, ...], path: Path) -> None:
    """Paired gains over each baseline with their intervals, ordered, and a point for each seed."""
    plt = pyplot()
    shown = [name for name in baselines if differences(rows, name)]
    height = 1.5 + 0.32 * len(_methods(rows))
    figure, axes = plt.subplots(1, len(shown), figsize=(6 * len(shown), height), layout="constrained", squeeze=False)
    for axis, baseline in zip(axes[0], shown, strict=True):
        found = dict(reversed(differences(rows, baseline).items()))
        for place, (name, each) in enumerate(found.items()):
            ours, theirs = by_seed(rows, name), by_seed(rows, baseline)
            points = [100 * (ours[seed] - theirs[seed]) for seed in ours if seed in theirs]
            axis.scatter(points, [place] * len(points), s=14, color="0.6", zorder=2)
            half = 0.0 if math.isnan(each.half) else 100 * each.half
            axis.errorbar(100 * each.mean, place, xerr=half, fmt="o", color="C0", capsize=4, zorder=3)
        axis.set_yticks(range(len(found)), list(found))
        axis.axvline(0, color="0.3", linewidth=1)
        axis.set_xlabel(f"points over {baseline}, same seed: mean, 95 % interval")
        axis.grid(axis="x", alpha=0.3)
    save_figure(figure, path)
    plt.close(figure)


def draw_costs(rows: Rows, path: Path) -> None:
    """Accuracy against training cost: of the student's stage (hollow) and with all that was trained for it (full)."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 2, figsize=(13, 5.5), layout="constrained")
    for axis, column, unit, label in ((axes[0], "flops", 1e12, "TFLOP"), (axes[1], "cpu_seconds", 60, "CPU minutes")):
        labels: list[tuple[str, float, float, str]] = []
        for number, method in enumerate(_methods(rows)):
            values = [100 * v for v in by_seed(rows, method).values()]
            mean, half, style = statistics.fmean(values), half_width(values), dict(color=f"C{number % 10}")
            total, own = _total(rows, method, column) / unit, mean_of(rows, method, column) / unit
            if not total > 0:  # not counted
                continue
            axis.errorbar(total, mean, yerr=0 if math.isnan(half) else half, fmt="o", capsize=3, **style)
            axis.plot([own, total], [mean, mean], linewidth=0.8, alpha=0.6, **style)
            axis.scatter(own, mean, s=30, facecolor="white", zorder=3, edgecolor=style["color"])
            labels.append((method, total, mean, style["color"]))
        if labels:
            log_scale(axis, "x")
        axis.set_xlabel(f"training [{label}]: hollow the student's stage, full with all before it")
        axis.set_ylabel(f"{rows[0].get('judged_on', 'test')} accuracy, last epoch [%]")
        axis.grid(alpha=0.3, which="both")
        axis.margins(x=0.12)
        figure.draw_without_rendering()  # so that places on the paper are known
        _write_apart(axis, labels)
    save_figure(figure, path)
    plt.close(figure)


def _write_apart(axis: Any, labels: list[tuple[str, float, float, str]]) -> None:
    """Each (text, x, y, color) right of its point, as far above or below as no other text is."""
    points = 72 / axis.figure.dpi
    width, height = 4.8, 10.0  # of a letter of 8 points
    taken: list[tuple[float, float, float]] = []  # left, right, bottom
    for text, x, y, color in sorted(labels, key=lambda label: -label[2]):
        left, bottom = (points * value for value in axis.transData.transform((x, y)))
        for step in sorted(range(-12, 13), key=abs):
            low = bottom + 3 + 5 * step
            right = left + width * len(text)
            if not any(abs(low - b) < height and left < end and start < right for start, end, b in taken):
                break
        taken.append((left, right, low))
        place = {"xytext": (5, low - bottom), "textcoords": "offset points"}
        axis.annotate(text, (x, y), fontsize=8, color=color, **place)


READING = f"""Accuracies are those after the last epoch; within the study nothing was chosen by the images they are of.
Intervals are Student's of the mean over seeds. Differences are those of the same seed, that is of the same initial
weights, images and order; p is that of the {TEST}, "p (Holm)" that corrected for the number of methods in the table.
"holds" and "does not" say that the interval lies above or below 0, "cannot tell" that it does not exclude it.
Cost is that of a run that trains all by itself: teachers that several methods share count in each. TFLOP are those of
the networks' convolutions and products over all training steps, from {{steps}} counted steps of each stage; CPU minutes
are the processor time of the epochs, evaluation among them."""


def write(out: Path, rows: Rows, facts: Facts, command: str, study: Study | None = None) -> Path:
    """OUT/report.md and a picture of gains and one of costs for each setting."""
    from fastkd.runs.study_cost import STEPS

    lines = [f"# {facts.name}", "", tables(rows, facts), ""]
    for setting in dict.fromkeys(row["setting"] for row in rows):
        own = [row for row in rows if row["setting"] == setting]
        draw_costs(own, out / f"costs-{setting}.png")
        lines += [f"![costs, {setting}](costs-{setting}.png)", ""]
        if any(differences(own, baseline) for baseline in facts.baselines):
            draw_gains(own, facts.baselines, out / f"gains-{setting}.png")
            lines += [f"![gains, {setting}](gains-{setting}.png)", ""]
    lines += ["## How to read this", "", READING.format(steps=STEPS), "", "## How to repeat it", "", f"`{command}`", ""]
    lines += _protocol(study) if study else []
    write_atomic(out / "report.md", "\n".join(lines).encode())
    return out / "report.md"


def _protocol(study: Study) -> list[str]:
    """The options of the first run, and the arguments of each method."""
    job = Job.of(study.runs[0].config(Path("OUT")))
    seen: dict[str, Run] = {}
    lines = [environment.describe(job.device) + ".", "", "## Methods", ""]
    for run in study.runs:
        seen.setdefault(f"{run.method} ({run.setting})", run)
    lines += [f"- {name}: {run.options['method']}, {arguments_text(run)}" for name, run in seen.items()]
    options = to_yaml(job.config).rstrip()
    return [*lines, "", "## Options of the first run", "", "```yaml", options, "```", ""]
