"""Pictures of what was measured: one of all cases, one a sweep, one of the training steps, one of their growth."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

from benchmarks import measure
from benchmarks import scaling as growth
from benchmarks.registry import TRAINING

COLOURS = {
    "fused": "#0b6fb8", "eager": "#d1602a", "compile": "#7a5aa6", "torchdistill": "#4c9a5b",
    "liger": "#b8860b", "fla": "#a2306f", "floor": "#777777", "reference": "#d1602a",
}  # fmt: skip
MARKERS = {
    "fused": "o", "eager": "s", "compile": "^", "torchdistill": "D", "liger": "v", "fla": "P", "reference": "x",
    "floor": "",
}  # fmt: skip
AS_RUN = "#4c9a5b"
NONE = {"p50": float("nan")}
NAMES = {"eager": "eager PyTorch", "compile": "torch.compile", "floor": "floor: a copy of the bytes that must move"}
STYLE = {
    "font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False,
    "axes.spines.right": False, "axes.grid": True, "grid.color": "#e4e4e4", "axes.axisbelow": True,
    "legend.frameon": False, "figure.dpi": 110, "savefig.dpi": 130,
}  # fmt: skip


def _plain(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:g}"


def _save(figure, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)
    return path


def _footer(result: dict) -> str:
    device, versions = result["device"], result["versions"]
    return (
        f"{device['name']}, {device['cores']} cores, {device['threads']} threads, {device['level']}, "
        f"torch {versions['torch']}, fastkd {result['commit']}, {result['date'][:10]}"
    )


def _head(figure, handles: list, labels: list[str], title: str) -> None:
    """The title over the legend, in a line of its own: apart, each takes the other's place."""
    bold = {"weight": "bold", "size": 12}
    figure.legend(
        handles, labels, loc="outside upper left", ncols=len(labels), title=title, title_fontproperties=bold,
        alignment="left",
    )  # fmt: skip


def _log_axis(axis, ticks: list[float] | None = None) -> None:
    axis.set_major_formatter(FuncFormatter(lambda value, _: _plain(value)))
    if ticks is not None:
        axis.set_ticks(ticks)
        axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def sweep(result: dict, series: dict, path: Path) -> Path:
    """Time, peak memory and the ratio to the floor against one size. `series`: of `result["sweeps"]`."""
    points = series["points"]
    sizes = [point["shape"][series["size"]] for point in points]
    with plt.rc_context(STYLE):
        figure, (time, memory, ratio) = plt.subplots(1, 3, figsize=(12, 4.2), layout="constrained")
        names = list(dict.fromkeys(name for point in points for name in point["microseconds"]))
        for name in names:
            line = {"color": COLOURS[name], "marker": MARKERS[name], "markersize": 4, "label": NAMES.get(name, name)}
            line |= {"linestyle": "--", "linewidth": 1} if name == measure.FLOOR else {"linewidth": 1.6}
            own = [(size, point) for size, point in zip(sizes, points, strict=True) if name in point["microseconds"]]
            at = [size for size, _ in own]
            times = {q: [point["microseconds"][name][q] / 1e3 for _, point in own] for q in ("p20", "p50", "p80")}
            time.plot(at, times["p50"], **line)
            time.fill_between(at, times["p20"], times["p80"], color=COLOURS[name], alpha=0.15, linewidth=0)
            over = [point["microseconds"][name]["p50"] / point["microseconds"]["floor"]["p50"] for _, point in own]
            ratio.plot(at, over, **line)
            if name != measure.FLOOR:
                memory.plot(at, [max(point["extra_bytes"][name], 1) / 1e6 for _, point in own], **line)
        titles = {time: "Time, ms", memory: "Peak of extra memory, MB", ratio: "Time over the floor's"}
        for axes, title in titles.items():
            axes.set(xscale="log", yscale="log", title=title, xlabel=series["label"])
            _log_axis(axes.xaxis, sizes)
            _log_axis(axes.yaxis)
        handles, labels = time.get_legend_handles_labels()
        _head(figure, handles, labels, f"{series['operation']}: {series['title']}")
        figure.supxlabel(
            f"{series['passes']}, {points[0]['dtype']}, {points[0]['caches']} caches, medians, band p20-p80. "
            + _footer(result),
            fontsize=7.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, path)


def overview(result: dict, path: Path) -> Path:
    """How much faster than each baseline, how much memory and how far from the floor, every case a row."""
    cases = {}
    for c in result["comparisons"]:  # warm where there is one: it comes last
        shape = " ".join(f"{key} {size}" for key, size in c["shape"].items())
        passes = "" if c["passes"] == TRAINING else f", {c['passes']} only"
        cases[f"{c['operation']}{passes}, {c['dtype']}\n{shape}"] = c
    baselines = [
        name for name in COLOURS if name != "floor" and any(name in c["ratios"] for c in cases.values())
    ]  # fmt: skip
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        size = (12, 1.6 + 0.52 * len(cases))
        figure, (speed, memory, floor) = plt.subplots(
            1, 3, figsize=size, sharey=True, layout="constrained", width_ratios=[2, 1.4, 1.2]
        )
        rows = range(len(cases))
        height = 0.8 / max(1, len(baselines))
        for i, name in enumerate(baselines):
            places = [row - 0.4 + height * (i + 0.5) for row in rows]
            bars = {"height": height * 0.9, "color": COLOURS[name], "label": NAMES.get(name, name)}
            _bars(speed, places, [c["ratios"].get(name, NONE)["p50"] for c in cases.values()], **bars)
            _bars(memory, places, [_memory_ratio(c, name) for c in cases.values()], **bars)
        over = [c["ratios"]["floor"]["p50"] for c in cases.values()]
        _bars(floor, list(rows), over, height=0.45, color=COLOURS["fused"])
        speed.set_yticks(list(rows), list(cases), fontsize=7.5)
        speed.invert_yaxis()
        speed.set_title("Times faster than")
        memory.set_title("Times less extra memory than")
        floor.set_title("Fused, over the floor's time")
        for axes in (speed, memory, floor):
            axes.set_xscale("log")
            axes.axvline(1, color="#333333", linewidth=1)
            axes.margins(x=0.18, y=0.01)
            axes.tick_params(axis="y", length=0)
            _log_axis(axes.xaxis)
        _head(figure, *speed.get_legend_handles_labels(), "fastkd: fused operations")
        figure.supxlabel(
            "Medians of paired ratios, caches warm where measured. No bar: does not run or needs none. "
            + _footer(result),
            fontsize=7.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, path)


def _bars(axes, places: list[float], values: list[float], **style) -> None:
    """Bars that begin at 1, so that what is worse than the other points to the left."""
    axes.barh(places, [value - 1 for value in values], left=1, **style)
    for place, value in zip(places, values, strict=True):
        if value == value:  # not a number: no bar
            axes.annotate(
                f"{value:.1f}", (max(value, 1), place), (3, 0), textcoords="offset points", va="center", fontsize=7.5
            )


def _memory_ratio(comparison: dict, name: str) -> float:
    """Not a number where the fused operation allocates next to nothing: a ratio to that says nothing."""
    own, fused = comparison["extra_bytes"].get(name), comparison["extra_bytes"][measure.FUSED]
    return float("nan") if own is None or fused < 4096 else own / fused


def steps(result: dict, path: Path) -> Path:
    """A training step of each method, reference over fused: the share of the losses dark. Below, as runs do it."""
    entries = result["steps"]
    groups = list(dict.fromkeys(entry["group"] for entry in entries))
    with plt.rc_context(STYLE | {"axes.grid.axis": "x"}):
        most = max(sum(e["group"] == group for e in entries) for group in groups)
        figure, plots = plt.subplots(
            1, len(groups), figsize=(max(9, 6.2 * len(groups)), 1.9 + 0.95 * most), layout="constrained", squeeze=False
        )
        for axes, group in zip(plots[0], groups, strict=True):
            own = [entry for entry in entries if entry["group"] == group]
            longest = max(e["milliseconds"][b]["p50"] for e in own for b in ("reference", "fused"))
            for row, entry in enumerate(own):
                if (last := _as_run(entry)) is not None:
                    whole = entry["milliseconds"][last]["p50"]
                    axes.barh(row + 0.29, whole, height=0.26, color=AS_RUN)
                    axes.text(
                        whole + longest * 0.015, row + 0.29, f"{whole:,.0f} ms, {last}", va="center", fontsize=7.5
                    )
                for backend, place in (("reference", row - 0.29), ("fused", row)):
                    whole = entry["milliseconds"][backend]["p50"]
                    loss = min(whole, entry["milliseconds"][f"{backend} loss"]["p50"])
                    colour = COLOURS[backend]
                    axes.barh(place, loss, height=0.26, color=colour)
                    axes.barh(place, whole - loss, left=loss, height=0.26, color=colour, alpha=0.3)
                    share, speed = entry["loss_share"][backend], entry["images_per_second"][backend]
                    text = f"{whole:,.0f} ms, losses {100 * share:.1f} %, {speed:,.0f} images/s"
                    axes.text(whole + longest * 0.015, place, text, va="center", fontsize=7.5)
            labels = [f"{entry['method']}\n{_gains(entry)}" for entry in own]
            axes.set_yticks(range(len(own)), labels)
            axes.invert_yaxis()
            axes.tick_params(axis="y", length=0)
            axes.set_xlim(0, longest * 1.75)
            axes.set_xlabel("ms a step")
            axes.set_title(own[0]["networks"])
        legend = {
            "losses, plain PyTorch": (COLOURS["reference"], 1),
            "the rest of that step": (COLOURS["reference"], 0.3),
            "losses, fused": (COLOURS["fused"], 1),
            "the rest of the fused step": (COLOURS["fused"], 0.3),
            "as runs do it": (AS_RUN, 1),
        }
        handles = [plt.Rectangle((0, 0), 1, 1, color=colour, alpha=alpha) for colour, alpha in legend.values()]
        _head(figure, handles, list(legend), "A training step, networks included")
        figure.supxlabel(
            "Medians of steps in turns; under the method, how many times faster its step is, fused and as runs do it.\n"
            + _footer(result),
            fontsize=7.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, path)


def _as_run(entry: dict) -> str | None:
    """The last stage of the fused step that was measured, which is how runs make it."""
    return next((name for name in reversed(entry["milliseconds"]) if name.startswith("fused, ")), None)


def _gains(entry: dict) -> str:
    last = _as_run(entry)
    times = [entry["ratios"]["step"]["p50"]]
    if "all" in entry["ratios"]:
        times.append(entry["ratios"]["all"]["p50"])
    elif last is not None:  # CUDA graphs, whose ratio is to the fused step
        times.append(entry["milliseconds"]["reference"]["p50"] / entry["milliseconds"][last]["p50"])
    return ", ".join(f"{value:.2f}x" for value in times)


LINES = {"DGKD": "#0b6fb8", "ORC": "#d1602a", "CTSL-MKT": "#7a5aa6", "DKEL": "#4c9a5b", "FEED": "#b8860b"}


def scaling(result: dict, path: Path) -> Path:
    """A step against the number of networks; its losses, fused and plain PyTorch, against each of the sizes."""
    with plt.rc_context(STYLE):
        figure, plots = plt.subplots(1, 4, figsize=(14, 4.4), layout="constrained")
        panels = [("A step, ms", "networks", {"fused": "-", "reference": ":"})]
        losses = {"fused loss": "-", "reference loss": ":"}
        panels += [(f"Its losses by {axis}, ms", axis, losses) for axis in growth.AXES]
        for axes, (title, axis, lines) in zip(plots, panels, strict=True):
            sizes = set()
            for method, entries in growth.series(result, axis):
                sizes |= set(entries)
                for name, style in lines.items():
                    times = [entry["milliseconds"][name]["p50"] for entry in entries.values()]
                    line = {"color": LINES[method], "linestyle": style, "linewidth": 1.6, "marker": "o"}
                    axes.plot(list(entries), times, markersize=3.5, **line)
            axes.set(xscale="log", yscale="log", title=title, xlabel=axis)
            _log_axis(axes.xaxis, sorted(sizes))
            _log_axis(axes.yaxis)
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        methods = list(dict.fromkeys(entry["method"] for entry in result["steps"]))
        handles = [plt.Line2D([], [], color=LINES[method], marker="o", markersize=3.5) for method in methods]
        handles += [plt.Line2D([], [], color="#333333", linestyle=style) for style in ("-", ":")]
        _head(figure, handles, [*methods, "fused", "plain PyTorch"], "How a training step grows")
        figure.supxlabel(
            f"{growth.title(result, 'networks')}, where nothing else grows {result['base']['networks']} networks in a "
            "group; medians of steps in turns; logarithmic axes. " + _footer(result),
            fontsize=7.5, color="#555555", x=0.01, ha="left",
        )  # fmt: skip
        return _save(figure, path)
