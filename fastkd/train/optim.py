"""The optimiser and the learning rate of each epoch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch.optim.lr_scheduler import LambdaLR

from fastkd.methods import Method
from fastkd.train.settings import OptimizationOptions


def make_optimizer(method: Method, options: OptimizationOptions) -> torch.optim.Optimizer:
    """The optimiser that `options` name, over the method's parameter groups."""
    groups = method.parameter_groups(options.lr)
    if options.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=options.lr, weight_decay=options.weight_decay)
    return torch.optim.SGD(
        groups,
        lr=options.lr,
        momentum=options.momentum,
        nesterov=options.nesterov,
        weight_decay=options.weight_decay,
    )


def rate_factor(options: OptimizationOptions, epochs: int) -> Callable[[int], float]:
    """epoch 0, 1, ... -> what the base learning rate is multiplied by.

    A function of the epoch alone, not of the rate before: a resumed run meets the same rates to the last bit.
    """
    warmup = options.warmup_epochs
    milestones = [m * epochs if m < 1 else m for m in options.milestones]

    def factor(epoch: int) -> float:
        if epoch < warmup:
            return (epoch + 1) / (warmup + 1)
        if options.schedule == "multistep":
            return options.gamma ** sum(epoch >= m for m in milestones)
        if options.schedule == "cosine":
            return 0.5 * (1 + math.cos(math.pi * min(1.0, (epoch - warmup) / max(1, epochs - warmup))))
        return 1.0

    return factor


def make_schedule(optimizer: torch.optim.Optimizer, options: OptimizationOptions, epochs: int) -> LambdaLR:
    """To be stepped once after each epoch."""
    return LambdaLR(optimizer, rate_factor(options, epochs))


def set_rates(optimizer: torch.optim.Optimizer, schedule: LambdaLR, epoch: int) -> None:
    """The rates of this epoch under this schedule: for a run whose number of epochs was raised since its state."""
    rates = zip(optimizer.param_groups, schedule.base_lrs, schedule.lr_lambdas, strict=True)
    for group, base, factor in rates:
        group["lr"] = base * factor(epoch)
