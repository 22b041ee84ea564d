"""The picture of a comparison: paired gains with their intervals, or accuracies where there is nothing to pair."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastkd.runs.figures import pyplot, save_figure

if TYPE_CHECKING:
    from fastkd.runs.compare import Comparison

TELLS, CANNOT_TELL = "C0", "0.55"


def draw(comparison: Comparison, path: Path) -> None:
    """Gains over ce where two seeds or more have it beside another method; else bars."""
    paired = "ce" in comparison.results and len(comparison.results) > 1 and len(comparison.config.seeds) > 1
    (draw_gains if paired else draw_bars)(comparison, path)


def draw_gains(comparison: Comparison, path: Path) -> None:
    """A row for each method, by its mean gain over ce: the mean, its 95 % interval, and a point for each seed."""
    plt = pyplot()
    gains = {method: gain for method in comparison.results if (gain := comparison.gains(method)) is not None}
    order = sorted(gains, key=lambda method: gains[method].mean)
    figure, axis = plt.subplots(figsize=(7.2, 1.6 + 0.42 * len(order)), layout="constrained")
    axis.axvline(0, color="0.3", linewidth=1, zorder=1)
    baseline = comparison.accuracies("ce")
    for height, method in enumerate(order):
        gain, points = gains[method], zip(comparison.accuracies(method), baseline, strict=True)
        color = TELLS if gain.half < abs(gain.mean) else CANNOT_TELL
        seeds = [100 * (value - other) for value, other in points]
        axis.scatter(seeds, [height] * len(seeds), s=16, color=color, alpha=0.35, linewidth=0, zorder=2)
        bar = dict(fmt="o", color=color, markersize=7, capsize=4, linewidth=2.2, zorder=3)
        axis.errorbar([100 * gain.mean], [height], xerr=[100 * gain.half], **bar)
    labels = [f"{method}  {100 * gains[method].mean:+.1f}" for method in order]
    axis.set_yticks(range(len(order)), labels)
    axis.set_ylim(-0.6, len(order) - 0.4)
    axis.set_xlabel("gain over ce with the same seed, in points of test accuracy")
    config = comparison.config
    about = f"{config.student} on {config.data}, last epoch, {len(config.seeds)} seeds"
    axis.set_title(f"{about}; ce {100 * statistics.fmean(baseline):.1f} %", fontsize="medium")
    axis.grid(axis="x", alpha=0.3, zorder=0)
    figure.legend(handles=_key(plt), fontsize="small", loc="outside lower center", ncols=3)
    save_figure(figure, path)
    plt.close(figure)


def _key(plt: Any) -> list[Any]:
    line = dict(marker="o", linewidth=2.2)
    return [
        plt.Line2D([], [], color=TELLS, label="mean, 95 % interval", **line),
        plt.Line2D([], [], color=CANNOT_TELL, label="interval holds 0: cannot tell", **line),
        plt.Line2D([], [], color=TELLS, alpha=0.35, marker="o", markersize=4, linestyle="", label="one seed"),
    ]


def draw_bars(comparison: Comparison, path: Path) -> None:
    """A bar with its standard deviation for each method, and a point for each seed."""
    plt = pyplot()
    methods = list(comparison.results)
    values = [[100 * v for v in comparison.accuracies(method)] for method in methods]
    many = len(methods) > 8
    figure, axis = plt.subplots(figsize=(1.5 + (0.7 if many else 1.1) * len(methods), 4.2), layout="constrained")
    axis.tick_params(axis="x", rotation=30 if many else 0)
    means = [statistics.fmean(v) for v in values]
    deviations = [statistics.stdev(v) if len(v) > 1 else 0.0 for v in values]
    axis.bar(methods, means, width=0.6, color="C0", alpha=0.55, zorder=2)
    if len(values[0]) > 1:
        error = dict(fmt="none", ecolor="0.2", capsize=5, zorder=3, label="mean +- standard deviation")
        axis.errorbar(methods, means, yerr=deviations, **error)
    for index, points in enumerate(values):
        offsets = [index + 0.18 * (i - (len(points) - 1) / 2) / max(1, len(points) - 1) for i in range(len(points))]
        label = "one seed" if index == 0 else None
        axis.scatter(offsets, points, s=22, color="C3", edgecolor="white", linewidth=0.6, zorder=4, label=label)
    low = min(min(points) for points in values + [[m - d] for m, d in zip(means, deviations, strict=True)])
    high = max(max(points) for points in values + [[m + d] for m, d in zip(means, deviations, strict=True)])
    floor = max(0.0, low - 0.25 * (high - low) - 1) if low > 5 else 0.0
    axis.set_ylim(floor, min(100.0, high + 0.1 * (high - low) + 1))
    axis.set_ylabel("test accuracy of the student [%]" + ("\n(the axis does not start at 0)" if floor else ""))
    count = f"{len(values[0])} seed{'s' * (len(values[0]) > 1)}"
    what = f"ablation of {comparison.config.ablate}: " if comparison.config.ablate else ""
    axis.set_title(f"{what}{comparison.config.student} on {comparison.config.data}, last epoch, {count}")
    axis.grid(axis="y", alpha=0.3, zorder=0)
    figure.legend(fontsize="small", loc="outside lower center", ncols=2)
    save_figure(figure, path)
    plt.close(figure)
