"""What one call of multi_teacher_kd says once it is checked, and its formula in plain PyTorch: the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastkd.ops import _divergences as divergences
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._autograd import may_read_values
from fastkd.ops._divergences import Divergence
from fastkd.ops._formulas import (
    Reduction,
    accumulate_dtype,
    capped,
    exact_divergence,
    flat_rows,
    log_softmax,
    reduce_rows,
)
from fastkd.ops._teachers import Weights, label_losses, mean_logits, mixture

Combine = Literal["losses", "probs", "logits"]
Activation = Literal["softmax", "sigmoid"]


class Tensors(NamedTuple):
    """The tensors of a checked call; logits as rows_of() gives them, [R, C] where that is a view."""

    student: Tensor  # [R, C], or with more columns, of which Options.classes are classes
    teachers: tuple[Tensor, ...]  # K x [R, C]
    target: Tensor | None  # int64 [R]: classes, or only which rows are ignored
    soft: Tensor | None  # [R, C], probabilities in the place of classes
    weights: Tensor | None  # [K] or [K, R] on the device, where they are not known on the host
    shares: Tensor | None = None  # [2] or [2, R]: weights of the forward and the reverse divergence, in the same case


class Options(NamedTuple):
    """What else a checked call says. Numbers are 0-d tensors where they require grad or cannot be read."""

    operation: str
    host_weights: tuple[float, ...]  # K numbers, unused beside a tensor of weights
    temperatures: tuple[float | Tensor, ...]  # one, or one of each teacher
    combine: Combine
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float
    ignore_index: int
    scale_by_t2: bool
    reduction: Reduction
    num_items: float | Tensor | None
    labels: bool  # the target holds classes
    terms: bool
    divergence: Divergence = divergences.FORWARD
    classes: int = 0  # of the student's columns; 0: all of them
    softcaps: tuple[float, ...] = ()  # of the student, then of the teachers; 0: none. (): nobody has one, nor a scale
    logit_scales: tuple[float, ...] = ()


def without_zeros(tensors: Tensors, options: Options) -> tuple[Tensors, Options]:
    """Without the teachers whose weight is known to be 0."""
    keep = calls.of_weight(tensors, options)
    return (tensors, options) if keep is None else only(tensors, options, keep)


def only(tensors: Tensors, options: Options, keep: Sequence[int]) -> tuple[Tensors, Options]:
    """The call with these of its teachers alone, as calls.only()."""
    tensors, options = calls.only(tensors, options, keep)
    return tensors, with_caps_of(options, keep)


def with_caps_of(options: Options, teachers: Sequence[int]) -> Options:
    """With the softcaps and logit scales of the student and of these teachers."""
    if not options.softcaps:
        return options
    networks = [0, *[k + 1 for k in teachers]]
    softcaps, scales = ([values[n] for n in networks] for values in (options.softcaps, options.logit_scales))
    return options._replace(softcaps=tuple(softcaps), logit_scales=tuple(scales))


def classes_of(tensors: Tensors, options: Options) -> int:
    return options.classes or tensors.student.shape[-1]


def plain(tensors: Tensors, options: Options) -> Tensors:
    """The student without its padding, and what softcaps and logit scales make of all networks."""
    return _capped(_cut(tensors, options), options)


def _cut(tensors: Tensors, options: Options) -> Tensors:
    return tensors._replace(student=tensors.student[..., : options.classes]) if options.classes else tensors


def _capped(tensors: Tensors, options: Options) -> Tensors:
    if not options.softcaps:
        return tensors
    dtype, caps = (
        accumulate_dtype(calls.promoted(tensors)),
        list(zip(options.softcaps, options.logit_scales, strict=True)),
    )
    teachers = [capped(t, *cap, dtype) for t, cap in zip(tensors.teachers, caps[1:], strict=True)]
    return tensors._replace(student=capped(tensors.student, *caps[0], dtype), teachers=tuple(teachers))


def _reference_kd(student: Tensor, tensors: Tensors, options: Options) -> Tensor:
    """KD of each row, [R]. A teacher is read where its weight is not 0."""
    weights, read = _read_teachers(tensors, options, student.dtype)
    several = len(options.temperatures) > 1
    temperatures = [options.temperatures[k if several else 0] for k, _ in read]
    teachers = [t for _, t in read]
    if not teachers:
        return student[:, :0].sum(-1)  # 0, and so is its gradient
    t = temperatures[0]
    scales = [t * t if options.scale_by_t2 else 1.0 for t in temperatures]
    log_q = log_softmax(student, t)
    if options.combine == "losses":
        total: Tensor = 0  # type: ignore[assignment]  # until the first one
        for k, (teacher, weight, t) in enumerate(zip(teachers, weights, temperatures, strict=True)):
            log_q = log_softmax(student, t) if k > 0 and several else log_q
            weight = weight[:, 0] if isinstance(weight, Tensor) else weight
            log_p = log_softmax(teacher, t)
            total = total + divergences.weighted(log_p, log_q, options.divergence, tensors.shares, weight, scales[k])
        return total
    if options.combine == "probs":
        log_p = mixture([log_softmax(z, t) for z in teachers], weights)
    else:
        log_p = log_softmax(mean_logits(teachers, weights, calls.is_uniform(options.host_weights)), t)
    normalised = options.combine == "logits"  # a mixture sums to its weights
    kd = scales[0] * divergences.unweighted(log_p, log_q, options.divergence, tensors.shares, normalised)
    if tensors.weights is None:
        return kd
    return kd.masked_fill((tensors.weights != 0).sum(0) == 0, 0)


def _read_teachers(tensors: Tensors, options: Options, dtype: torch.dtype) -> tuple[Weights, list[tuple[int, Tensor]]]:
    """The weights, numbers or [1 or R, 1], and (k, teacher [R, C]) of the teachers that are read at all."""
    teachers = [(k, flat_rows(t).to(dtype)) for k, t in enumerate(tensors.teachers)]
    if tensors.weights is None:
        teachers = [(k, t) for k, t in teachers if options.host_weights[k] != 0]
        return [options.host_weights[k] for k, _ in teachers], teachers
    weights = [w.reshape(-1, 1) for w in tensors.weights.to(dtype)]
    if not tensors.weights.requires_grad:  # else the gradient of a weight of 0 is the divergence itself
        teachers = [(k, t.masked_fill(weights[k] == 0, 0)) for k, t in teachers]
    return weights, teachers


def reference(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
    """The specification in plain PyTorch: the loss, and with `terms` KD and CE; differentiable in all inputs."""
    own, dtype = accumulate_dtype(tensors.student.dtype), accumulate_dtype(calls.promoted(tensors))
    tensors = _cut(tensors, options)
    target, soft = tensors.target, tensors.soft
    valid: Tensor | None = None
    outside: Tensor | None = None
    if target is not None:
        valid = target != options.ignore_index  # [R]
        outside = valid & ((target < 0) | (target >= tensors.student.shape[-1]))
        if not (may_read_values(valid) and bool(valid.all())):
            # Ignored rows leave before any arithmetic: what they hold (NaN, say) must not reach a gradient.
            ignored = ~valid[:, None]
            soft = None if soft is None else flat_rows(soft).masked_fill(ignored, 0)
            teachers = tuple([flat_rows(t).masked_fill(ignored, 0) for t in tensors.teachers])
            student = flat_rows(tensors.student).masked_fill(ignored, 0)
            tensors = tensors._replace(student=student, teachers=teachers)
        target = target.where(valid & ~outside, 0)
    tensors = _capped(tensors, options)
    student = flat_rows(tensors.student).to(dtype)
    no_kd = calls.is_number(options.kd_weight, 0)
    kd = _reference_kd(student, tensors._replace(teachers=()) if no_kd else tensors, options)
    loss, ce = kd if calls.is_number(options.kd_weight, 1) else options.kd_weight * kd, torch.zeros_like(kd)
    if (options.labels or soft is not None) and (options.terms or not calls.is_number(options.ce_weight, 0)):
        soft = None if soft is None else flat_rows(soft)
        ce = label_losses(student, target, soft, options.label_smoothing)
        loss = loss if calls.is_number(options.ce_weight, 0) else loss + options.ce_weight * ce
    rows = [loss, kd.detach(), ce.detach()] if options.terms else [loss]
    if valid is not None and outside is not None:
        factor = torch.ones_like(kd).masked_fill(outside, math.nan)  # NaN in the gradient as well
        rows = [(row * factor).masked_fill(~valid, 0) for row in rows]
    return tuple([reduce_rows(r, valid, options.reduction, (-1,), options.num_items).to(own) for r in rows])


def reference_divergences(tensors: Tensors, options: Options) -> Tensor:
    """KL(p_k || q) of each teacher and row, [K, R]: 0 for ignored rows, NaN for labels out of range."""
    dtype, result = accumulate_dtype(calls.promoted(tensors)), []
    tensors = plain(tensors, options)
    student = flat_rows(tensors.student).to(dtype)
    for k, teacher in enumerate(tensors.teachers):
        t = options.temperatures[k if len(options.temperatures) > 1 else 0]
        log_p, log_q = log_softmax(flat_rows(teacher).to(dtype), t), log_softmax(student, t)
        result.append(exact_divergence(log_p, log_q).clamp(min=0))
    kl, target = torch.stack(result), tensors.target
    if target is None:
        return kl
    outside = (target < 0) | (target >= student.shape[1])
    return kl.masked_fill(outside, math.nan).masked_fill(target == options.ignore_index, 0)
