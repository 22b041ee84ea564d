"""What a run costs: floating-point operations of its networks, and processor time."""

from __future__ import annotations

import math
from typing import Any

from torch.utils.flop_counter import FlopCounterMode

from fastkd.runs.runner import Result, Runner
from fastkd.runs.stages import Stage
from fastkd.train.devices import batch_on

STEPS = 4  # of each stage are counted: the steps of ORC differ


def flops(runner: Runner, stage: Stage, results: dict[str, Result]) -> float:
    """Operations of all training steps of a stage, frozen networks' passes among them, from a few that are counted.

    Convolutions and matrix products of the networks, forward and backward, a multiplication and an addition being two;
    not the losses, nor what evaluation costs.
    """
    fit = runner.fit(stage, {name: results[name].network for name in stage.needs}, None)
    fit.initialise()
    fit.method.start_epoch(0, stage.epochs)
    fit.method.train()
    images, total = 0, 0
    for _, batch in zip(range(STEPS), fit.train_batches, strict=False):
        inputs, target = batch_on(batch, fit.device)
        with FlopCounterMode(display=False) as counter:
            for _ in fit.steps.take(inputs, target, None):
                pass
        images, total = images + len(target), total + counter.get_total_flops()
    everything: Any = fit.data.train
    return float(total / images * len(everything) * stage.epochs)


def costs(runner: Runner, results: dict[str, Result]) -> dict[str, float]:
    """Columns of a run's row: what the student's stage cost, and with `_before` all that was trained for it."""
    row: dict[str, float] = {}
    for column in ("seconds", "cpu_seconds"):
        each = {name: sum(r.get(column, math.nan) for r in result.rows) for name, result in results.items()}
        row |= {column: each.pop("student"), f"{column}_before": sum(each.values())}
    counted = {name: flops(runner, result.stage, results) for name, result in results.items() if result.rows}
    return row | {"flops": counted.pop("student"), "flops_before": sum(counted.values())}
