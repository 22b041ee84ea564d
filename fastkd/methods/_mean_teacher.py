"""A teacher that is the moving average of a student: where its weights start, and how they follow."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._fresh import beside
from fastkd.methods.base import Method, Phase
from fastkd.models import Branched


def fresh_like(method: str, student: Branched) -> Branched:
    """Random weights in the student's shapes, on its device and in its dtype."""
    try:
        teacher = student.fresh()
    except ValueError:
        expected = "given where the student was not made by fastkd.models.branched, which could make another one"
        raise wrong_value(method, "teacher", expected, None) from None
    return beside(student, teacher)


def shapes(network: nn.Module) -> list[tuple[str, torch.Size]]:
    return [(name, parameter.shape) for name, parameter in network.named_parameters()]


def check_precision(method: str, teacher: nn.Module) -> None:
    dtype = next(teacher.parameters()).dtype
    if dtype.itemsize < 4:
        expected = "of float32 or float64 parameters, since lower ones round an average away (use torch.autocast)"
        raise wrong_type(method, "student", expected, dtype)


class Averaging(Method):
    """Methods whose `teacher` is the moving average of their `student`: its steps, also in the state dict."""

    student: nn.Module
    teacher: nn.Module
    one_loss = False  # the average follows the step
    momentum: float | None
    steps: int  # of the average

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The networks that are moving averages."""
        return ("teacher",)

    def momentum_at(self, step: int) -> float:
        """a, the teacher's share in itself after step 0, 1, ... that was taken: it warms up."""
        return min(1 - 1 / (step + 1), self.whole_momentum())

    def whole_momentum(self) -> float:
        """a without its warm-up: as given, or by the length of the run."""
        return momentum_of_run(self.run_steps) if self.momentum is None else self.momentum

    def follow(self, phase: Phase) -> None:
        """The average's step after the optimiser's, where the loop took one."""
        if not phase.skipped:
            average(self.teacher, self.student, self.momentum_at(self.steps))
            self.steps += 1

    def extra(self) -> dict[str, Any]:
        """With the steps of the average."""
        return super().extra() | {"steps": self.steps}

    def set_extra(self, extra: dict[str, Any]) -> None:
        """The way back of `extra`."""
        super().set_extra(extra)
        self.steps = extra["steps"]


def ramp_up(epoch: int, length: float) -> float:
    """exp(-5 (1 - epoch / length)^2) up to that epoch, then 1."""
    left = 0.0 if epoch >= length else 1 - epoch / length
    return math.exp(-5 * left * left)


def momentum_of_run(steps: int | None) -> float:
    """The a of an average over a run of this many steps: 1 - a = 117 / steps, between 0.001 and 0.5; 0.999 for None.

    117 = 0.001 * 300 epochs of 390 steps, the run in which the authors of DKEL and PCL take 0.999.
    """
    return 0.999 if steps is None else 1 - min(max(117 / steps, 0.001), 0.5)


def average(teacher: nn.Module, student: nn.Module, momentum: float) -> None:
    """teacher = momentum * teacher + (1 - momentum) * student, the parameters; buffers stay the teacher's own."""
    get_ema_multi_avg_fn(momentum)(list(teacher.parameters()), list(student.parameters()), None)


def average_gradients(network: nn.Module, rows: torch.Tensor) -> None:
    """Over the processes of a distributed run, where there is one; each counts by its `rows`, a 0-d tensor."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        total = rows.clone()
        torch.distributed.all_reduce(total)
        for parameter in network.parameters():
            gradient = parameter.grad
            assert gradient is not None
            gradient *= rows / total.clamp(min=1)
            torch.distributed.all_reduce(gradient)
