"""The sweep, the training steps and their growth: guard, measurements, table, file, charts."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from benchmarks import charts, guard, report, scaling, steps, sweep
from benchmarks.registry import OPERATIONS

MODULES = {"sweep": sweep, "steps": steps, "scaling": scaling}


def run(kind: str, options: argparse.Namespace) -> int:
    """0, or 2 where nothing has the keyword in its name. Raises guard.Refused where tests fail."""
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    folder = Path(options.results or report.FOLDER)
    less = options.quick or options.brief
    names = _chosen(kind, device, options)
    if not names:
        print(f"-k {options.keyword}: no {kind} has this in its name")
        return 2
    before = getattr(options, "untested", None)
    said = json.loads(Path(before).read_text()) if before else _tested(kind, names, device, less)
    kinds = {"sweep": _sweep, "steps": training_steps, "scaling": _scaling}
    result = kinds[kind](names, device, options) | report.header(device, said)
    layout = MODULES[kind].LAYOUT
    report.validate(result, layout)
    print(MODULES[kind].table(result, folder))
    if options.quick or options.keyword:
        print("part of the cases or rounds: nothing was written")
        return 0
    for path in _write(kind, result, layout, folder / kind):
        print(f"written: {path}")
    return 0


def _chosen(kind: str, device: str, options: argparse.Namespace) -> list:
    if kind == "steps":
        return steps.chosen(options.keyword, device, options.large)
    return sweep.chosen(options.keyword) if kind == "sweep" else scaling.chosen(options.keyword, options.quick)


def _tested(kind: str, names: list, device: str, less: bool) -> dict[str, str]:
    """The tests of every operation that is measured; of steps, those of the methods too.

    less: only the operations' tests that name the device. The methods' name none; before a step is timed, both
    backends must give the same losses anyway.
    """
    keyword = guard.keyword(device, less)
    if kind == "sweep":
        return guard.require_all_passing(sweep.tests(names), keyword)
    said = guard.require_all_passing({name: operation.tests for name, operation in OPERATIONS.items()}, keyword)
    methods = {} if less else {m: test for m, test in steps.TESTS.items() if any(m in name for name in names)}
    return said | guard.require_all_passing(methods)


def _in_time(names: list, options: argparse.Namespace) -> Iterator:
    """The names in turn, until the deadline has passed."""
    end = time.monotonic() + (options.deadline or float("inf"))
    for done, name in enumerate(names):
        if done and time.monotonic() > end:
            print(f"{len(names) - done} of {len(names)} left out: {options.deadline:.0f} seconds have passed")
            return
        yield name


def _sweep(names: list[sweep.Sweep], device: str, options: argparse.Namespace) -> dict:
    from benchmarks import peers

    found = {}
    for one in _in_time(names, options):
        print(f"sweep: {one.name}", flush=True)
        found[one.name] = sweep.measured(one, device, 0.15 if options.quick or options.brief else 0.6)
    return {"peers": peers.report(device), "sweeps": found}


def training_steps(names: list[tuple[str, str]], device: str, options: argparse.Namespace) -> dict:
    rounds = {"seconds": 0.5, "least": 3} if options.quick or options.brief else {"seconds": 6.0, "least": 5}
    if options.quick:
        names = [(group, method) for group, method in names if group == names[0][0]]
    found = []
    for group, method in _in_time(names, options):
        print(f"steps: {steps.GROUPS[group]}, {method}", flush=True)
        found.append(steps.measured(group, method, device, **rounds))
    return {"steps": found}


def _scaling(names: list[tuple[str, scaling.Point]], device: str, options: argparse.Namespace) -> dict:
    rounds = {"seconds": 0.2, "least": 2} if options.quick or options.brief else {"seconds": 0.5, "least": 3}
    found = []
    for method, point in _in_time(names, options):
        print(f"scaling: {method}, {point}", flush=True)
        found.append(scaling.measured(method, point, device, **rounds))
    return scaling.result(found)


def _write(kind: str, result: dict, layout: dict, folder: Path) -> list[Path]:
    path = report.write(result, folder, layout)
    if kind in ("steps", "scaling"):
        draw = charts.steps if kind == "steps" else charts.scaling
        return [path, draw(result, path.with_suffix(".png"))]
    charted = [
        charts.sweep(result, series, path.with_name(f"{path.stem}-{name}.png"))
        for name, series in result["sweeps"].items()
    ]
    return [path, *charted]
