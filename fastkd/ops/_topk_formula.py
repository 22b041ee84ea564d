"""The five divergences of a sparse teacher, each row's value and closed-form gradient, in plain PyTorch.

All take the student's logits over temperature, x [R, C] in float32 or float64. What the teacher gives is [R, k] and
computed in float64. csrc/topk does the same on the CPU (_topk_kernels.py).
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops._autograd import may_read_values
from fastkd.ops._teacher_calls import is_number
from fastkd.ops.topk import ABSENT, Mode


class Entries(NamedTuple):
    """A sparse teacher's classes, each once a row."""

    ids: Tensor  # int64 [R, k]; an absent entry repeats the row's first id, or holds 0 where the row has none
    log_p: Tensor  # float64 [R, k], -inf for an absent entry; as `mode` normalises them, at the temperature
    log_tail: Tensor | None  # float64 [R], for "tail" alone

    def tail(self) -> Tensor:
        """`log_tail` of the mode that has it."""
        assert self.log_tail is not None
        return self.log_tail


def entries_of(
    mode: Mode,
    ids: Tensor,  # [R, k]
    log_probs: Tensor | None,  # [R, k]
    tail: Tensor | None,  # [R]
    temperature: float | Tensor = 1.0,
    read: Tensor | None = None,  # bool [R]: rows that are read at all
) -> Entries:
    """What check_topk() gave, each id once, normalised for `mode`."""
    ids = ids.long()
    log_p = torch.zeros_like(ids, dtype=torch.float64) if log_probs is None else log_probs.double()
    absent = (ids < 0) | (log_p <= ABSENT)
    if read is not None:
        absent = absent | ~read[:, None]
    log_p = log_p.masked_fill(absent, -math.inf)
    if log_probs is None:
        log_p = log_p - (~absent).sum(-1, keepdim=True).clamp(min=1).log()
    ids, log_p = _each_once(ids.masked_fill(absent, torch.iinfo(torch.int64).max), log_p)
    present = log_p > -math.inf
    ids = ids.where(present, ids[:, :1]).masked_fill(~present[:, :1], 0)  # present ones come first
    if mode == "tail":
        return Entries(ids, log_p, _log_tail(log_p, tail))
    if mode in ("teacher", "both"):
        if not is_number(temperature, 1):  # a tensor may learn, or hide its value
            log_p = log_p / temperature
        log_p = log_p - log_p.logsumexp(-1, keepdim=True).masked_fill(~present[:, :1], 0)
    return Entries(ids, log_p, None)


def _each_once(ids: Tensor, log_p: Tensor) -> tuple[Tensor, Tensor]:
    """Sorted by id, absent entries last, those of one id added up."""
    ids, order = ids.sort(-1)
    log_p = log_p.gather(-1, order)
    new = torch.ones_like(ids, dtype=torch.bool)
    new[:, 1:] = ids[:, 1:] != ids[:, :-1]
    if may_read_values(ids) and bool((new | (log_p == -math.inf)).all()):
        return ids, log_p
    place = new.cumsum(-1) - 1
    top = log_p.amax(-1, keepdim=True).clamp(min=ABSENT)
    total = torch.zeros_like(log_p).scatter_add(-1, place, (log_p - top).exp())
    once = torch.full_like(ids, torch.iinfo(torch.int64).max).scatter(-1, place, ids)
    return once, total.log() + top


def _log_tail(log_p: Tensor, tail: Tensor | None) -> Tensor:
    """log p_t, -inf where nothing is left (a sum above 1 is rounding), and where the row has no entry at all."""
    if tail is None:
        inside = log_p.logsumexp(-1)
        left = inside < 0
        tail = (-torch.expm1(inside.where(left, -1.0))).log().where(left, -math.inf)
    else:
        tail = tail.double()
        tail = tail.masked_fill(tail <= ABSENT, -math.inf)
    return tail.masked_fill(log_p[:, 0] == -math.inf, -math.inf)


def _expected(p: Tensor, log_p: Tensor, log_q: Tensor) -> Tensor:
    """sum p (log p - log q) over the last dimension, absent entries 0."""
    return (p * (log_p - log_q).masked_fill(log_p == -math.inf, 0)).sum(-1)


def _outside(entries: Entries, x: Tensor) -> tuple[Tensor, Tensor]:
    """x with -inf at the ids [R, C], and the log of the sum of its exponentials [R]: the classes outside, exactly."""
    rest = x.scatter(1, entries.ids, -math.inf)
    return rest, rest.logsumexp(-1)


def _tail_divergence(entries: Entries, log_rest: Tensor, log_z: Tensor) -> Tensor:
    log_p, log_q = entries.tail(), (log_rest - log_z).masked_fill(log_rest == -math.inf, 0)
    none = (log_p == -math.inf) | (log_rest == -math.inf)
    return (log_p.exp() * (log_p - log_q).masked_fill(none, 0)).masked_fill(none, 0)


def divergence_both(entries: Entries, x: Tensor) -> Tensor:
    """[R], from the student's logits at the ids, x [R, k] over temperature: no other class is read."""
    log_q = _log_q_inside(entries, x)
    return _expected(entries.log_p.exp(), entries.log_p, log_q)


def _log_q_inside(entries: Entries, x: Tensor) -> Tensor:
    absent = entries.log_p == -math.inf
    z = x.double().masked_fill(absent, -math.inf)
    return (z - z.logsumexp(-1, keepdim=True)).masked_fill(absent, 0)


def gradient_both(entries: Entries, x: Tensor) -> Tensor:
    """d divergence_both / d x, float64 [R, k]."""
    q = _log_q_inside(entries, x).exp().masked_fill(entries.log_p == -math.inf, 0)
    return q - entries.log_p.exp()


def divergence(mode: Mode, entries: Entries, x: Tensor) -> Tensor:
    """The divergence of each row, float64 [R]; differentiable in x."""
    if mode == "both":
        return divergence_both(entries, x.gather(1, entries.ids))
    log_z = x.logsumexp(-1)
    value = _inside(mode, entries, x, log_z)
    return value if mode != "tail" else value + _tail_divergence(entries, _outside(entries, x)[1], log_z)


def _inside(mode: Mode, entries: Entries, x: Tensor, log_z: Tensor) -> Tensor:
    log_q = x.gather(1, entries.ids) - log_z[:, None]
    log_p = torch.zeros_like(entries.log_p) if mode == "sampled" else entries.log_p
    return _expected(entries.log_p.exp(), log_p, log_q.masked_fill(entries.log_p == -math.inf, 0))


@torch.no_grad()
def divergence_and_gradient(mode: Mode, entries: Entries, x: Tensor) -> tuple[Tensor, Tensor]:
    """The divergence of each row, float64 [R], and its gradient in x, [R, C] of x's dtype."""
    p = entries.log_p.exp()
    if mode == "both":
        z = x.gather(1, entries.ids)
        gradient = torch.zeros_like(x).scatter_add_(1, entries.ids, gradient_both(entries, z).to(x.dtype))
        return divergence_both(entries, z), gradient
    log_z = x.logsumexp(-1)
    value, mass = _inside(mode, entries, x, log_z), p.sum(-1)
    gradient = (x - log_z[:, None]).exp_()
    if mode == "tail":
        rest, log_rest = _outside(entries, x)
        value = value + _tail_divergence(entries, log_rest, log_z)
        p_tail = entries.tail().exp().masked_fill(log_rest == -math.inf, 0)
        outside = rest.sub_(log_rest.masked_fill(log_rest == -math.inf, 0)[:, None]).exp_()
        gradient.mul_((mass + p_tail).to(x.dtype)[:, None]).sub_(outside.mul_(p_tail.to(x.dtype)[:, None]))
    else:
        gradient.mul_(mass.to(x.dtype)[:, None])
    return value, gradient.scatter_add_(1, entries.ids, p.neg_().to(x.dtype))
