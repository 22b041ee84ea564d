"""The samples of all processes of a group, from which ORC's feedback may be taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastkd.functional import GroupStats
from fastkd.methods._batch import Batch, map_tree
from fastkd.methods._relations import rows_that_count, select
from fastkd.ops.shared import all_gather_integers, gather_rows


@dataclass(frozen=True)
class Pool:
    """The N samples with a label of all processes, in the order of the ranks.

    Attributes:
        inputs: as the batch's, floating-point tensors [N, ...]; others are left as they were.
        target: int64 [N].
        stats: of K networks, [K, N].
    """

    inputs: Any
    target: Tensor
    stats: GroupStats
    start: int  # this process's samples in the pool
    rows: Tensor  # int64 [n], which rows of its batch they are
    size: int  # B, rows of its batch

    def mine(self, feedback: Tensor) -> Tensor:
        """The feedback of this process's batch [B], from that of every sample of the pool, int64 [N]."""
        own = feedback.new_zeros(self.size)  # a row without a label takes anything
        own[self.rows] = feedback[self.start : self.start + len(self.rows)]
        return own


def gather_pool(batch: Batch, stats: GroupStats, group: Any) -> Pool | None:
    """The pool of this batch [B] and its statistics [K, B]; None where no process has a label.

    Waits for the device: the host must know how many rows each process has.
    """
    target = batch.target.long()
    kept = rows_that_count(target)
    rows = torch.arange(len(target), device=target.device) if kept is None else kept
    counts = [count for (count,) in all_gather_integers([len(rows)], target.device, group)]
    if sum(counts) == 0:
        return None

    def gather(x: Any) -> Any:
        floating = isinstance(x, Tensor) and x.is_floating_point() and x.dim() > 0 and len(x) == len(target)
        return _gather(select(x, kept), counts, group) if floating else x

    columns = [_gather(select(column.T, kept), counts, group).T for column in stats]
    start = sum(counts[: torch.distributed.get_rank(group)])
    inputs = map_tree(gather, batch.inputs)
    return Pool(inputs, _gather(select(target, kept), counts, group), GroupStats(*columns), start, rows, len(target))


def _gather(x: Tensor, counts: list[int], group: Any) -> Tensor:
    """[n, ...] of each process -> [N, ...], without a gradient; bool travels as uint8."""
    sent = x.to(torch.uint8) if x.dtype == torch.bool else x.detach()
    return gather_rows(sent, counts, group).to(x.dtype)
