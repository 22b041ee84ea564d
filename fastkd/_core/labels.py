"""Which rows of a batch count, by their labels."""

from __future__ import annotations

import torch
from torch import Tensor

IGNORE_INDEX = -100  # PyTorch's default: a target that counts nowhere


def is_soft(target: Tensor) -> bool:
    """Whether these labels are probabilities [..., C], not class indices [...]."""
    return target.is_floating_point()


def counted(target: Tensor) -> Tensor:
    """bool [...]: the rows whose label is not -100. With probabilities [..., C] every row counts."""
    if is_soft(target):
        return target.new_ones(target.shape[:-1], dtype=torch.bool)
    return target != IGNORE_INDEX


def mean_over_counted(rows: Tensor, target: Tensor) -> Tensor:
    """The mean of `rows` [B] over those that count, 0 where none does; what the others hold reaches no gradient."""
    counts = counted(target)
    return rows.masked_fill(~counts, 0).sum() / counts.sum().clamp(min=1)
