"""Several teachers as (hidden states, head) in plain PyTorch: with whole logits, and as TRL cuts them into chunks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Teachers = Sequence[tuple[Tensor, Tensor]]  # K x ([N, H_k], [V, H_k])


def linear_multi_teacher(hidden: Tensor, weight: Tensor, teachers: Teachers) -> Tensor:  # [N, H], [V, H]
    return _sum(hidden, weight, teachers) / hidden.shape[0]


def _sum(hidden: Tensor, weight: Tensor, teachers: Teachers) -> Tensor:
    log_q, loss = F.log_softmax(F.linear(hidden, weight), dim=1), 0
    for teacher, head in teachers:
        with torch.no_grad():
            p = F.softmax(F.linear(teacher, head), dim=1)
        loss = loss + F.kl_div(log_q, p, reduction="sum") / len(teachers)
    return loss


def masked(hidden: Tensor, weight: Tensor, teachers: Teachers, mask: Tensor) -> Tensor:
    """Of the rows in the mask [N], which are known after the logits."""
    log_q, loss = F.log_softmax(F.linear(hidden, weight), dim=1), 0
    for teacher, head in teachers:
        with torch.no_grad():
            p = F.softmax(F.linear(teacher, head), dim=1)
        loss = loss + F.kl_div(log_q, p, reduction="none").sum(1)[mask].sum() / len(teachers)
    return loss / mask.sum()


def checkpointed(hidden: Tensor, weight: Tensor, teachers: Teachers, rows: int = 256) -> Tensor:
    """A loop over chunks of rows, each made again in the backward: TRL's since 2026-09, typed again."""
    total = 0
    for start in range(0, hidden.shape[0], rows):
        part = slice(start, start + rows)
        cut = [(teacher[part], head) for teacher, head in teachers]
        total = total + checkpoint(_sum, hidden[part], weight, cut, use_reentrant=False)
    return total / hidden.shape[0]
