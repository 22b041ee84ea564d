"""ORC's feedback: the samples that the student group gets most wrong, and a batch mixed with them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd._core.labels import IGNORE_INDEX, is_soft
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.functional import GroupStats
from fastkd.methods._batch import Batch, map_tree
from fastkd.methods._pool import Pool


def hardest(stats: GroupStats, errors_only: bool, group: Any) -> Tensor:
    """int64 [B]: the samples that the student group gets most wrong, in the proportions r of its networks."""
    scores = functional.network_scores(stats, "ce", group)  # [K], mean CE
    if errors_only:
        wrong = stats.errors() & ~stats.ce.isnan()  # [K, B]
        some = wrong.any()
        scores = scores.masked_fill(~wrong.any(1) & some, -torch.inf)
        stats = stats._replace(ce=stats.ce.masked_fill(~wrong & some, torch.nan))  # NaN is left out
    # A network that gave NaN has no share. Where all did, or no row has a label, the shares are equal.
    lowest = torch.finfo(scores.dtype).min
    r = scores.nan_to_num(nan=lowest, neginf=lowest).softmax(0)
    return functional.hard_samples(stats, r, stats.ce.shape[1])


def mixed(name: str, batch: Batch, feedback: Tensor, share: float, pool: Pool | None) -> Batch:
    """x~ = l * x_t + (1 - l) * x_F with both targets (y_t, y_F), to be cut as the batch is."""
    target = batch.target if is_soft(batch.target) else batch.target.long()
    tensors = []
    others, labels = (batch.inputs, target) if pool is None else (pool.inputs, pool.target)

    def mix(x: Any, other: Any) -> Any:
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return x
        if x.dim() == 0 or len(x) != len(target):
            expected = f"tensors of {len(target)} rows as target"
            raise wrong_value(name, "inputs", expected, f"shape {list(x.shape)}")
        tensors.append(x)
        return torch.lerp(other.index_select(0, feedback), x, share)

    inputs = map_tree(mix, batch.inputs, others)
    if not tensors:
        expected = "a floating-point tensor [B, ...] to mix, or a tuple, list or dict with one"
        got = f"dtype {batch.inputs.dtype}" if isinstance(batch.inputs, Tensor) else type(batch.inputs).__name__
        raise wrong_type(name, "inputs", expected, got)
    other = labels.index_select(0, feedback)
    if not is_soft(target):
        other = other.masked_fill(target == IGNORE_INDEX, IGNORE_INDEX)
    return Batch(inputs, (target, other), batch.chunks, name=name)
