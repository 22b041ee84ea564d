"""Formulas that the references of several operations share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkd.ops._autograd import may_read_values

NEAR = 0.5**6  # a divergence below it lost digits where its parts cancel
NEAR_GAP = {torch.float32: 0.25, torch.float64: 0.5**5}  # up to which |d| the series of exact_divergence() is right

Reduction = Literal["none", "sum", "mean"]


def rows_of(logits: Tensor) -> Tensor:
    """[..., C] as [R, C] where that is a view; else as it is: the kernels read rows anywhere in memory (flat_rows)."""
    if logits.dim() == 2:
        return logits
    if logits.dim() == 1 or _rows_merge(logits.shape, logits.stride()):
        return logits.view(-1, logits.shape[-1])
    return logits if logits.stride(-1) == 1 else logits.reshape(-1, logits.shape[-1])


def _rows_merge(shape: Sequence[int], stride: Sequence[int]) -> bool:
    """Whether the leading dimensions of a tensor can be seen as one."""
    dims = [(n, s) for n, s in zip(shape[:-1], stride[:-1], strict=True) if n != 1]
    pairs = zip(dims, dims[1:])  # noqa: B905, RUF007  # which torch.compile traces
    return 0 in shape or all([s == inner_n * inner_s for (_, s), (inner_n, inner_s) in pairs])


def flat_rows(logits: Tensor) -> Tensor:
    """[..., C] as [R, C], copied where no view can be: for the reference."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def count_rows(logits: Tensor) -> int:
    """R of logits [..., C]."""
    rows = 1
    for size in logits.shape[:-1]:
        rows = rows * size
    return rows


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses of logits of this dtype are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_rows(
    rows: Tensor,
    valid: Tensor | None,
    reduction: Reduction,
    leading: Sequence[int],
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Row losses [R] by "none" | "sum" | "mean"; the mean is over max(1, rows that count), or num_items."""
    if reduction == "none":
        return rows.reshape(leading)
    if num_items is not None:
        return rows.sum() / num_items
    if reduction == "sum":
        return rows.sum()
    count = max(1, rows.shape[0]) if valid is None else valid.sum().clamp(min=1)
    return rows.sum() / count


class LossTerms(NamedTuple):
    """What `return_terms=True` adds: the two parts of kd_weight * kd + ce_weight * ce, without these weights.

    Detached, reduced as the loss, in its dtype. ce is 0 without labels; kd is 0 where kd_weight is: no teacher is read.

    >>> logits, target = torch.zeros(2, 3), torch.tensor([0, 1])
    >>> loss, terms = fastkd.functional.multi_teacher_kd(logits, [logits], target, ce_weight=0.5, return_terms=True)
    >>> [round(value.item(), 4) for value in (terms.kd, terms.ce, loss)]  # 0, log 3, half of it
    [0.0, 1.0986, 0.5493]
    """

    kd: Tensor
    ce: Tensor


def log_softmax(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """log softmax(logits / T); masked classes (-inf) are kept from a T that learns, or its gradient would be NaN."""
    if not isinstance(temperature, Tensor):
        return torch.log_softmax(logits if temperature == 1 else logits / temperature, -1)
    masked = logits == -math.inf
    return torch.log_softmax((logits.masked_fill(masked, 0) / temperature).masked_fill(masked, -math.inf), -1)


def capped(logits: Tensor, softcap: float, scale: float, dtype: torch.dtype) -> Tensor:
    """softcap * tanh(scale * logits / softcap), or scale * logits where softcap is 0; a masked class stays masked."""
    if softcap == 0:
        return logits if scale == 1 else logits.to(dtype) * scale
    masked = logits == -math.inf
    bounded = softcap * torch.tanh(logits.to(dtype).masked_fill(masked, 0) * (scale / softcap))
    return bounded.masked_fill(masked, -math.inf)


def divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum_c p (log p - log q), [R]: 0 where p is masked, +inf where only q is, also where p underflows."""
    p = log_p.exp()
    plain = (p * (log_p - log_q)).sum(-1)
    if may_read_values(plain) and bool(plain.isfinite().all()):  # no masked class, which is NaN or +inf there
        return plain
    masked = log_p == -math.inf
    terms = p * (log_p - log_q).masked_fill(masked, 0)
    return terms.masked_fill((p == 0) & ~masked & (log_q == -math.inf), math.inf).sum(-1)


def exact_divergence(log_p: Tensor, log_q: Tensor) -> Tensor:
    """divergence() of probabilities that sum to 1, with its gradient; near networks keep the digits that cancel in it.

    Its value is the sum of q ((d - 1) e^d + 1), d = log p - log q, by a series where d is small: no term is below 0.
    """
    value = divergence(log_p, log_q)
    rounded = value.detach()
    if may_read_values(rounded) and not bool((rounded < NEAR).any()):
        return value
    log_p, log_q = log_p.detach(), log_q.detach()
    p, q, d = log_p.exp(), log_q.exp(), log_p - log_q
    small, series = d.abs() <= NEAR_GAP[d.dtype], torch.zeros_like(d)
    for k in range(9, 1, -1):
        series = series * d + 1 / (k * math.factorial(k - 2))
    parts = torch.where(small, q * d * d * series, p * d - p + q)
    exact = torch.where(p == 0, q, parts).sum(-1)
    return value + torch.where(rounded < NEAR, exact - rounded, torch.zeros_like(rounded))


def weighted_divergence(log_p: Tensor, log_q: Tensor, weight: float | Tensor, scale: float | Tensor) -> Tensor:
    """weight * scale * KL(p || q), [R], for a weight that is a number or [R]."""
    kl = exact_divergence(log_p, log_q)
    if isinstance(weight, Tensor) or weight == 0:
        kl = kl.masked_fill((weight == 0) & kl.isinf(), 0)  # a weight of 0 removes an infinite divergence as well
    # A KL below zero is rounding. The gradient is kept, which clamp would drop.
    return (weight * scale) * (kl - kl.detach().clamp(max=0))
