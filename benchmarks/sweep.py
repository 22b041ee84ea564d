"""`python -m benchmarks --sweep`: operations over one size: time, memory and distance to the floor, a chart each."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import torch

from benchmarks import measure, report
from benchmarks.inputs import Embeddings, Logits, Maps, Networks
from benchmarks.registry import OPERATIONS, Case

# Of a sweep's comparisons, what is the same for all stands once.
POINT = {
    name: kind for name, kind in (report.COMPARISON | report.COUNTS).items() if name not in ("operation", "passes")
}
SERIES = {"operation": str, "title": str, "size": str, "label": str, "passes": str, "points": [POINT]}
LAYOUT = report.HEADER | {"peers": {str: str}, "sweeps": {str: SERIES}}


@dataclass(frozen=True)
class Sweep:
    """One operation over one field of its shape. `alone_on_cpu`: sizes that no baseline runs at on a CPU."""

    name: str
    operation: str
    title: str
    size: str
    label: str
    shapes: tuple[NamedTuple, ...]
    gpu_shapes: tuple[NamedTuple, ...] = ()
    alone_on_cpu: tuple[NamedTuple, ...] = ()

    def cases(self, device: str) -> list[Case]:
        shapes = self.shapes + (self.gpu_shapes if torch.device(device).type == "cuda" else ())
        operation = replace(OPERATIONS[self.operation], shapes=shapes, alone_on_cpu=self.alone_on_cpu)
        return [Case(operation, shape, torch.float32, operation.passes[-1]) for shape in shapes]


def _logits(*classes: int, rows: int = 128) -> tuple[Logits, ...]:
    return tuple(Logits(rows, c, 4) for c in classes)


SWEEPS = {
    sweep.name: sweep
    for sweep in [
        Sweep(
            "multi_teacher", "multi_teacher", "128 rows, 4 teachers", "classes", "classes",
            _logits(100, 320, 1000, 3200, 10000, 32000), _logits(128256),
        ),
        Sweep(
            "mutual", "mutual", "128 rows of 100 classes", "networks", "networks",
            tuple(Networks(128, 100, m) for m in (2, 3, 4, 6, 8)),
        ),
        Sweep(
            "rkd_angle", "rkd_angle", "embeddings of 512 numbers", "rows", "embeddings",
            tuple(Embeddings(n, 512) for n in (32, 64, 128, 256, 512, 1024)),
            (Embeddings(2048, 512),),
            alone_on_cpu=(Embeddings(512, 512), Embeddings(1024, 512)),
        ),
        Sweep(
            "feature_ensemble", "feature_ensemble", "3 pairs of square maps, 64 of 64 channels", "height",
            "height and width", tuple(Maps(64, 64, s, s, 3) for s in (4, 8, 16, 32)), (Maps(64, 64, 56, 56, 3),),
        ),
    ]
}  # fmt: skip


def chosen(keyword: str) -> list[Sweep]:
    return [sweep for sweep in SWEEPS.values() if keyword in sweep.name]


def measured(sweep: Sweep, device: str, seconds: float, say: Callable[[str], object] = print) -> dict:
    """One entry of a file's "sweeps"."""
    cases = sweep.cases(device)
    points = []
    for case in cases:
        say(f"  {case}")
        steps = measure.candidates(case, device)
        (point,) = report.comparisons(case, steps, device, seconds, least=5, caches=[measure.COLD])
        points.append({name: value for name, value in point.items() if name in POINT})
    about = {name: getattr(sweep, name) for name in ("operation", "title", "size", "label")}
    return about | {"passes": cases[0].passes, "points": points}


def table(result: dict, folder: Path) -> str:
    lines = ["", report.machine(result)]
    for name, series in result["sweeps"].items():
        lines += ["", f"{name}: {series['title']}; {series['passes']}, float32, cold caches", ""]
        baselines = list(dict.fromkeys(b for p in series["points"] for b in p["ratios"] if b != measure.FLOOR))
        header = [series["label"], "fused us", *[f"faster than {b}" for b in baselines], "xFLOOR"]
        body = [[*header, *[f"MB {b}" for b in [measure.FUSED, *baselines]]]]
        for point in series["points"]:
            ratios = [report.ratio(point["ratios"].get(b)) for b in [*baselines, measure.FLOOR]]
            memory = [point["extra_bytes"].get(b) for b in [measure.FUSED, *baselines]]
            memory = ["-" if m is None else f"{m / 1e6:.2f}" for m in memory]
            fused = f"{point['microseconds'][measure.FUSED]['p50']:.0f}"
            body.append([str(point["shape"][series["size"]]), fused, *ratios, *memory])
        lines += report.aligned(body)
    points = [point for series in result["sweeps"].values() for point in series["points"]]
    lines += ["", *[f"{name}: {said}." for name, said in result["peers"].items() if said.startswith("not measured")]]
    return "\n".join([*lines, *report.disturbed(points, result["device"]["cores"]), report.gpu(result, folder)])


def tests(sweeps: Iterable[Sweep]) -> dict[str, str]:
    """name -> pattern of the operations' tests."""
    return {sweep.operation: OPERATIONS[sweep.operation].tests for sweep in sweeps}
