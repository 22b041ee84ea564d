"""What `return_stats=True` adds to multi_teacher_kd: from the loss's own pass, or from a second read of the logits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _backend
from fastkd.ops import _multi_teacher_formula as formula
from fastkd.ops import _multi_teacher_kernels as kernels
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import group_stats
from fastkd.ops._divergences import FORWARD
from fastkd.ops._multi_teacher_formula import Options, Tensors
from fastkd.ops.group_stats import GroupStats


class DistillationStats(NamedTuple):
    """What `return_stats=True` adds: all detached, in float32 (float64 for float64 logits).

    kl: [K], the mean over the rows that count of KL(p_k || q) at the temperature, without weight and T^2.
    student: GroupStats of the student, each [1, R]. teachers: GroupStats of the teachers, each [K, R].

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 1e4]])
    >>> loss, stats = fastkd.functional.multi_teacher_kd(student, [teacher], temperature=1.0, return_stats=True)
    >>> round(stats.kl.item(), 4), stats.teachers.confidence.item()  # a sure teacher, a student without a clue: log 2
    (0.6931, 1.0)
    """

    kl: Tensor
    student: GroupStats
    teachers: GroupStats


def with_statistics(tensors: Tensors, options: Options) -> tuple[Sequence[Tensor], DistillationStats]:
    """The losses and the statistics of their inputs, from one pass where the row is at hand as a whole."""
    apart = kernels.why_reference(tensors, options) is not None or kernels.runs_apart(tensors, options)
    if options.divergence != FORWARD and _backend.device_kind(tensors.student) != "cpu":
        apart = True
    if apart or tensors.soft is not None:
        left, rest = formula.without_zeros(tensors, options)
        return kernels.losses_of(left, rest), _separate_statistics(tensors, options)
    losses, (kl, *stats) = native.run(tensors, options, True)
    return losses, _statistics(tensors, options, kl, GroupStats(*stats))


def _statistics(tensors: Tensors, options: Options, kl: Tensor, stats: GroupStats) -> DistillationStats:
    """From divergences [K, R] and the statistics of student and teachers [K + 1, R]."""
    target = tensors.target
    counted = torch.ones_like(kl[:1]) if target is None else (target != options.ignore_index)[None]
    # Summed with the counts: torch splits a single row among threads, whose number would change the last bits.
    sums = torch.cat([kl.double(), counted.double()]).sum(-1)
    mean = (sums[:-1] / sums[-1].clamp(min=1)).to(kl.dtype)
    return DistillationStats(mean, GroupStats(*[t[:1] for t in stats]), GroupStats(*[t[1:] for t in stats]))


@torch.no_grad()
def _separate_statistics(tensors: Tensors, options: Options) -> DistillationStats:
    """The statistics by a second read of the logits: where the loss's own pass does not give them."""
    labelled = options.labels or tensors.soft is not None
    soft = {} if tensors.soft is None else {"soft": tensors.soft.detach()}
    target = tensors.target if labelled else None
    networks = formula.plain(tensors, options)
    stats = group_stats.statistics((networks.student, *networks.teachers), target, options.ignore_index, **soft)
    if kernels.why_reference(tensors, options) is not None:
        with forward_ad._set_fwd_grad_enabled(False):
            kl = formula.reference_divergences(tensors, options)
    else:
        kl = torch.stack([_divergences(tensors, options, k) for k in range(len(tensors.teachers))])
    return _statistics(tensors, options, kl, stats)


def _divergences(tensors: Tensors, options: Options, k: int) -> Tensor:
    """KL(p_k || q) of each row, [R], by the kernels."""
    t = options.temperatures[k if len(options.temperatures) > 1 else 0]
    one = options._replace(
        host_weights=(1.0,), temperatures=(t,), combine="losses", kd_weight=1.0, ce_weight=0.0, scale_by_t2=False,
        reduction="none", num_items=None, terms=False, divergence=FORWARD,
    )  # fmt: skip
    alone = tensors._replace(teachers=(tensors.teachers[k],), soft=None, weights=None, shares=None)
    return native.run(alone, formula.with_caps_of(one, [k]), False)[0][0]
