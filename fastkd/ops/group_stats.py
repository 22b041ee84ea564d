"""Per-sample statistics of a group of networks: how right, how sure and how far from right each is on each sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops import _common as common


class GroupStats(NamedTuple):
    """Statistics of M networks on R samples, each [M, R], detached.

    ce: cross-entropy with the label (NaN without one). correct: bool, argmax equals the label. label_rank: int64, the
    number of classes with a strictly larger logit than the label's (0 = right, -1 without a label). confidence: the
    largest probability. entropy: of softmax(logits), in nats. margin: largest minus second largest probability.
    """

    ce: Tensor
    correct: Tensor
    label_rank: Tensor
    confidence: Tensor
    entropy: Tensor
    margin: Tensor


def reference_stats(networks: Sequence[Tensor], target: Tensor | None, ignore_index: int = -100) -> GroupStats:
    """GroupStats of logits M x [R, C] and labels [R] (or None), in plain PyTorch."""
    columns = [_network_stats(z.detach(), target, ignore_index) for z in networks]
    return GroupStats(*(torch.stack(column) for column in zip(*columns, strict=True)))


def _network_stats(logits: Tensor, target: Tensor | None, ignore_index: int) -> tuple[Tensor, ...]:
    logits = logits.to(common.accumulate_dtype(logits.dtype))
    log_p = torch.log_softmax(logits, -1)  # [R, C]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    top = p.topk(min(2, p.shape[-1]), -1).values  # [R, 2]
    margin = top[:, 0] - top[:, 1] if top.shape[1] == 2 else top[:, 0]
    if target is None:
        nothing = torch.full_like(entropy, math.nan)
        return nothing, nothing == 0, torch.full_like(nothing, -1, dtype=torch.int64), top[:, 0], entropy, margin
    labelled = (target != ignore_index) & (target >= 0) & (target < logits.shape[-1])
    index = target.where(labelled, 0)[:, None]
    ce = (-log_p.gather(1, index)[:, 0]).masked_fill(~labelled, math.nan)
    correct = (logits.argmax(-1) == index[:, 0]) & labelled
    rank = (logits > logits.gather(1, index)).sum(-1).masked_fill(~labelled, -1)
    return ce, correct, rank, top[:, 0], entropy, margin
