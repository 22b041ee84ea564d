"""`python -m benchmarks --scaling`: how a training step's cost grows with its networks, its batch and the classes.

Small networks of one architecture, so that losses are a visible part of a step. Each step is split into the time of the
losses (the calls of fastkd.functional that it makes, made again by themselves) and that of the networks, the rest.

`python -m benchmarks.scaling FILE` prints the tables of a file that was written before.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from benchmarks import measure, report, steps

NETWORK = "resnet8"
IMAGE_SIZE = 32


class Point(NamedTuple):
    """networks: how many guides, students, peers, branches or teachers; see GROWS."""

    networks: int
    batch: int
    classes: int

    def __str__(self) -> str:
        return f"networks={self.networks} batch={self.batch} classes={self.classes}"


BASE = Point(networks=4, batch=64, classes=100)  # what stays while one of them grows
AXES = {"networks": (2, 3, 4, 6, 8), "batch": (32, 64, 128, 256), "classes": (10, 100, 1000, 10000)}
GROWS = {
    "DGKD": "K frozen guides of a student",
    "ORC": "K students beside the pivot, all learn",
    "CTSL-MKT": "M peers, their M frozen selves",
    "DKEL": "m branches on one stem, their m mean teachers",
    "FEED": "K frozen teachers of a student",
}

NETWORKS = "networks"  # of "milliseconds": the fused step without its losses, round by round
STEP = {
    "method": str,
    **{name: int for name in Point._fields},
    "losses": int,
    "rounds": int,
    "milliseconds": steps.TIMES,
    "extra_bytes": {str: int},
    "others_cores": (float, type(None)),
}
LAYOUT = report.HEADER | {"network": str, "image_size": int, "base": {str: int}, "steps": [STEP]}


def points(axis: str, quick: bool = False) -> list[Point]:
    """Of rising sizes. quick: the two smallest."""
    return [BASE._replace(**{axis: size}) for size in AXES[axis][: 2 if quick else None]]


def chosen(keyword: str, quick: bool = False) -> list[tuple[str, Point]]:
    """(method, point), each once, of those whose "method networks=4 batch=64 classes=100" contains the keyword."""
    wanted = dict.fromkeys((m, p) for axis in AXES for p in points(axis, quick) for m in GROWS)
    return [(m, p) for m, p in wanted if keyword.lower() in f"{m} {p}".lower()]


def measured(method: str, point: Point, device: str, seconds: float, least: int = 3) -> dict:
    """One entry of a file's "steps": both backends' steps and their losses alone, in turns; peak memory of each."""
    group = steps.Group(NETWORK, point.batch, point.classes, IMAGE_SIZE)
    whole, alone, calls = steps.both(steps.TrainingStep(method, group, device, number=point.networks))
    others = measure.Others()
    times = measure.interleave(whole | alone, device=device, seconds=seconds, least=least)
    others_cores = others.cores()
    # Not of the reference: in its step the graphs of all losses wait for the backward pass, alone one after another.
    times[NETWORKS] = [max(0.0, a - b) for a, b in zip(times["fused"], times["fused loss"], strict=True)]
    return {
        "method": method,
        **point._asdict(),
        "losses": calls,
        "rounds": len(times["fused"]),
        "milliseconds": {name: report.rounded([t * 1e3 for t in ts]) for name, ts in times.items()},
        "extra_bytes": {name: measure.extra_bytes(call, device) for name, call in (whole | alone).items()},
        "others_cores": None if others_cores is None else round(others_cores, 2),
    }


def result(found: list[dict]) -> dict:
    return {"network": NETWORK, "image_size": IMAGE_SIZE, "base": BASE._asdict(), "steps": found}


def series(result: dict, axis: str) -> Iterator[tuple[str, dict[int, dict]]]:
    """(method, size -> entry) of each method, over one of the sizes while the others are those of the base."""
    fixed = {name: size for name, size in result["base"].items() if name != axis}
    for method in dict.fromkeys(entry["method"] for entry in result["steps"]):
        own = [e for e in result["steps"] if e["method"] == method and all(e[n] == s for n, s in fixed.items())]
        if own:
            yield method, {e[axis]: e for e in sorted(own, key=lambda e: e[axis])}


def title(result: dict, axis: str) -> str:
    base = result["base"] | {axis: "N"}
    side = result["image_size"]
    said = f"{result['network']}, [{base['batch']}, 3, {side}, {side}], {base['classes']} classes"
    return said if axis == NETWORKS else f"{said}, {base[NETWORKS]} networks in a group"


def table(result: dict, folder: Path) -> str:
    """Markdown: a table an axis."""
    lines = ["", report.machine(result)]
    for axis in AXES:
        found = dict(series(result, axis))
        sizes = sorted({size for entries in found.values() for size in entries})
        if len(sizes) < 2:
            continue
        head = ["method", *[f"{axis} {size}" for size in sizes], "last / first", "MB"]
        body = [head, *[_row(method, entries, sizes) for method, entries in found.items()]]
        lines += ["", title(result, axis), "", *report.aligned(body)]
    lines += [
        "",
        "Milliseconds of a step: networks + fused losses (plain PyTorch's losses), medians of steps in turns. Losses "
        "by themselves: within a step the graphs of all of them are held at once, which costs plain PyTorch more.",
        "last / first: the networks' time and the fused losses', largest size over smallest.",
        "MB: peak of what PyTorch allocated during the fused step, activations included, smallest size > largest.",
        "networks: " + "; ".join(f"{method} {what}" for method, what in GROWS.items()) + ".",
    ]
    return "\n".join(
        [*lines, *report.disturbed(result["steps"], result["device"]["cores"]), report.gpu(result, folder)]
    )


def _row(method: str, entries: dict[int, dict], sizes: list[int]) -> list[str]:
    first, last = (entries[edge(entries)] for edge in (min, max))
    cells = [_cell(entries[size]) if size in entries else "-" for size in sizes]
    growth = [_median(last, name) / max(_median(first, name), 1e-6) for name in (NETWORKS, "fused loss")]
    memory = " > ".join(f"{entry['extra_bytes']['fused'] / 1e6:.0f}" for entry in (first, last))
    return [method, *cells, f"{growth[0]:.1f}, {growth[1]:.1f}", memory]


def _cell(entry: dict) -> str:
    networks, fused, reference = (_median(entry, name) for name in (NETWORKS, "fused loss", "reference loss"))
    return f"{networks:.0f} + {_short(fused)} ({_short(reference)})"


def _median(entry: dict, name: str) -> float:
    return entry["milliseconds"][name]["p50"]


def _short(milliseconds: float) -> str:
    return f"{milliseconds:.2g}" if milliseconds < 10 else f"{milliseconds:.0f}"


if __name__ == "__main__":
    path = Path(sys.argv[1])
    print(table(json.loads(path.read_text()), path.parent))
