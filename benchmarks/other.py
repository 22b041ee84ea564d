"""The sweep and the training steps: guard, measurements, table, file, charts."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from benchmarks import charts, guard, report, steps, sweep
from benchmarks.registry import OPERATIONS


def run(kind: str, options: argparse.Namespace) -> int:
    """0, or 2 where nothing has the keyword in its name. Raises guard.Refused where tests fail."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(options.results or report.FOLDER)
    less = options.quick or options.brief
    names = sweep.chosen(options.keyword) if kind == "sweep" else steps.chosen(options.keyword, device, options.large)
    if not names:
        print(f"-k {options.keyword}: no {kind} has this in its name")
        return 2
    said = guard.require_all_passing(_tests(kind, names), torch.device(device).type if less else "")
    kinds = {"sweep": _sweep, "steps": _steps}
    result = kinds[kind](names, device, options) | report.header(device, said)
    layout, module = (sweep.LAYOUT, sweep) if kind == "sweep" else (steps.LAYOUT, steps)
    report.validate(result, layout)
    print(module.table(result, folder))
    if options.quick or options.keyword:
        print("part of the cases or rounds: nothing was written")
        return 0
    for path in _write(kind, result, layout, folder / kind):
        print(f"written: {path}")
    return 0


def _tests(kind: str, names: list) -> dict[str, str]:
    """The tests of every operation that is measured; of the steps, those of the methods too."""
    if kind == "sweep":
        return sweep.tests(names)
    methods = {method: steps.TESTS[method] for _, method in names}
    return methods | {name: operation.tests for name, operation in OPERATIONS.items()}


def _sweep(names: list[sweep.Sweep], device: str, options: argparse.Namespace) -> dict:
    from benchmarks import peers

    found = {}
    for one in names:
        print(f"sweep: {one.name}", flush=True)
        found[one.name] = sweep.measured(one, device, 0.15 if options.quick or options.brief else 0.6)
    return {"peers": peers.report(device), "sweeps": found}


def _steps(names: list[tuple[str, str]], device: str, options: argparse.Namespace) -> dict:
    rounds = {"seconds": 0.5, "least": 3} if options.quick or options.brief else {"seconds": 6.0, "least": 5}
    if options.quick:
        names = [(group, method) for group, method in names if group == names[0][0]]
    found = []
    for group, method in names:
        print(f"steps: {steps.GROUPS[group]}, {method}", flush=True)
        found.append(steps.measured(group, method, device, **rounds))
    return {"steps": found}


def _write(kind: str, result: dict, layout: dict, folder: Path) -> list[Path]:
    path = report.write(result, folder, layout)
    if kind == "steps":
        return [path, charts.steps(result, path.with_suffix(".png"))]
    charted = [
        charts.sweep(result, series, path.with_name(f"{path.stem}-{name}.png"))
        for name, series in result["sweeps"].items()
    ]
    return [path, *charted]
