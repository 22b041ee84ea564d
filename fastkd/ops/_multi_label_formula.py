"""What one call of multi_label_kd says once it is checked, and its formula in plain PyTorch: the reference.

Each logit is a distribution over two outcomes, so that the formulas of multi_teacher_kd apply to [R, C, 2], the
logarithms of sigmoid(z) and of 1 - sigmoid(z).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd.ops import _teacher_calls as calls
from fastkd.ops._formulas import Reduction, accumulate_dtype, divergence, flat_rows, reduce_rows
from fastkd.ops._multi_teacher_formula import Combine
from fastkd.ops._teachers import Weights, mean_logits, mixture

IGNORED = -100  # in Tensors.target
NOWHERE = -1.0  # in Tensors.labels: this element counts nowhere
NEAR_ODDS = {torch.float32: 0.25, torch.float64: 0.5**6}  # up to which |d| the series of exact_divergence() is right


class Tensors(NamedTuple):
    """The tensors of a checked call; logits as rows_of() gives them, [R, C] where that is a view."""

    student: Tensor  # [R, C]
    teachers: tuple[Tensor, ...]  # K x [R, C]
    target: Tensor | None  # int64 [R]: IGNORED where no element of the row counts, else 0
    labels: Tensor | None  # floating [R, C]: in [0, 1]; below 0, the element counts nowhere; NaN, of a wrong integer
    pos_weight: Tensor | None  # [C]
    weights: Tensor | None  # [K] or [K, R] on the device, where they are not known on the host


class Options(NamedTuple):
    """What else a checked call says. Numbers are 0-d tensors where they require grad or cannot be read."""

    operation: str
    host_weights: tuple[float, ...]  # K numbers, unused beside a tensor of weights
    temperatures: tuple[float | Tensor, ...]  # one, or one of each teacher
    combine: Combine
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    scale_by_t2: bool
    reduction: Reduction
    num_items: float | Tensor | None
    labelled: bool  # `labels` are labels, not only which elements count
    terms: bool
    class_factor: float  # of the sum over a row's classes: 1, or 1 / C for their mean


def reference(tensors: Tensors, options: Options) -> tuple[Tensor, ...]:
    """The specification in plain PyTorch: the loss, and with `terms` KD and CE; differentiable in all inputs."""
    own, dtype = accumulate_dtype(tensors.student.dtype), accumulate_dtype(calls.promoted(tensors))
    student, labels = flat_rows(tensors.student).to(dtype), tensors.labels
    teachers = [flat_rows(t).to(dtype) for t in tensors.teachers]
    labels = None if labels is None else flat_rows(labels).to(dtype)
    counted = _counted(tensors, labels)
    if counted is not None:  # what the others hold (NaN, say) must not reach a gradient
        student, *teachers = [z.masked_fill(~counted, 0) for z in (student, *teachers)]
        labels = None if labels is None else labels.masked_fill(~counted, 0)
    kd = _distillation(student, teachers, tensors, options) if teachers else student[:, :0].sum(-1, keepdim=True)
    kd = kd.expand_as(student)
    loss, ce = kd if calls.is_number(options.kd_weight, 1) else options.kd_weight * kd, torch.zeros_like(kd)
    if options.labelled and labels is not None and (options.terms or not calls.is_number(options.ce_weight, 0)):
        ce = label_losses(student, labels, tensors.pos_weight)
        loss = loss if calls.is_number(options.ce_weight, 0) else loss + options.ce_weight * ce
    elements = [loss, kd.detach(), ce.detach()] if options.terms else [loss]
    if labels is not None:
        factor = torch.ones_like(kd).masked_fill(labels.isnan(), math.nan)  # NaN in the gradient as well
        elements = [element * factor for element in elements]
    if counted is not None:
        elements = [element.masked_fill(~counted, 0) for element in elements]
    rows = [element.sum(-1) * options.class_factor for element in elements]
    valid = None if tensors.target is None else tensors.target != IGNORED
    return tuple([reduce_rows(r, valid, options.reduction, (-1,), options.num_items).to(own) for r in rows])


def _counted(tensors: Tensors, labels: Tensor | None) -> Tensor | None:
    """bool [R, C] or [R, 1]: which elements count; None: all of them."""
    rows = None if tensors.target is None else (tensors.target != IGNORED)[:, None]
    if labels is None:
        return rows
    elements = ~(labels < 0)  # NaN is a label, if a wrong one
    return elements if rows is None else elements & rows


def _distillation(student: Tensor, teachers: Sequence[Tensor], tensors: Tensors, options: Options) -> Tensor:
    """KD of each element, [R, C]. A teacher is read where its weight is not 0."""
    weights, read = _read_teachers(teachers, tensors, options)
    several = len(options.temperatures) > 1
    temperatures = [options.temperatures[k if several else 0] for k, _ in read]
    teachers = [t for _, t in read]
    t = temperatures[0]
    log_q = log_outcomes(student, t)
    scale = t * t if options.scale_by_t2 else 1.0
    if options.combine == "losses":
        total = torch.zeros_like(student)
        for k, (teacher, weight, t) in enumerate(zip(teachers, weights, temperatures, strict=True)):
            log_q = log_outcomes(student, t) if k > 0 and several else log_q
            scale = t * t if options.scale_by_t2 else 1.0
            gap = (student - teacher).detach() / t
            total = total + weighted_divergence(log_outcomes(teacher, t), log_q, weight, scale, gap)
        return total
    uniform = tensors.weights is None and calls.is_uniform(options.host_weights)
    if options.combine == "logits":
        mean = _mean_logits(teachers, weights, uniform)
        gap = (student - mean).detach() / t
        return _none_where_unread(weighted_divergence(log_outcomes(mean, t), log_q, 1.0, scale, gap), tensors)
    outcomes = [w[..., None] if isinstance(w, Tensor) else w for w in weights]
    log_p = mixture([log_outcomes(z, t) for z in teachers], outcomes)
    if uniform:
        return weighted_divergence(log_p, log_q, 1.0, scale)
    # A mixture of mass m is taken literally: KL(m p || q) = m (KL(p || q) + log m).
    mass = torch.as_tensor(sum(weights), dtype=student.dtype, device=student.device)  # [] or [R or 1, 1]
    log_mass = mass.masked_fill(mass == 0, 1).log()
    value = weighted_divergence(log_p - log_mass[..., None], log_q, mass, scale)
    return _none_where_unread(value + mass * log_mass * scale, tensors)


def _none_where_unread(kd: Tensor, tensors: Tensors) -> Tensor:
    return kd if tensors.weights is None else kd.masked_fill((tensors.weights != 0).sum(0).reshape(-1, 1) == 0, 0)


def _read_teachers(
    teachers: Sequence[Tensor], tensors: Tensors, options: Options
) -> tuple[Weights, list[tuple[int, Tensor]]]:
    """The weights, numbers or [1 or R, 1], and (k, teacher [R, C]) of the teachers that are read at all."""
    if tensors.weights is None:
        read = [(k, t) for k, t in enumerate(teachers) if options.host_weights[k] != 0]
        return [options.host_weights[k] for k, _ in read], read
    weights = [w.reshape(-1, 1) for w in tensors.weights.to(teachers[0].dtype)]
    if not tensors.weights.requires_grad:  # else the gradient of a weight of 0 is the divergence itself
        teachers = [t.masked_fill(w == 0, 0) for t, w in zip(teachers, weights, strict=True)]
    return weights, list(enumerate(teachers))


def log_outcomes(logits: Tensor, temperature: float | Tensor) -> Tensor:
    """The logarithms of sigmoid(z / T) and 1 - sigmoid(z / T), [..., 2]."""
    if isinstance(temperature, Tensor):  # which may learn, and infinity / T has a gradient of NaN
        infinite = logits.isinf()
        logits = torch.where(infinite, logits, logits.masked_fill(infinite, 0) / temperature)
    elif temperature != 1:
        logits = logits / temperature
    return torch.stack([torch_functional.logsigmoid(logits), torch_functional.logsigmoid(-logits)], -1)


def exact_divergence(log_p: Tensor, log_q: Tensor, gap: Tensor | None = None) -> Tensor:
    """KL(p || q) of each element, [R, C], with its gradient; near networks keep the digits that cancel in it.

    Their value is the series of it in `gap`, the difference of the log-odds: by the cumulants of one outcome.
    """
    value = divergence(log_p, log_q)
    with torch.no_grad():
        p, rest = log_p.exp().unbind(-1)
        d = (log_q - log_p).diff(dim=-1).squeeze(-1).neg() if gap is None else gap
        v, m = p * rest, rest - p
        series = d * m * (1 + v * (-60 + v * 360)) / 5040
        for coefficient in ((1 + v * (-30 + v * 120)) / 720, m * (1 - 12 * v) / 120, (1 - 6 * v) / 24, m / 6):
            series = d * (coefficient + series)
        near = v * d * d * (series + 0.5)
        is_near = d.abs() <= NEAR_ODDS[d.dtype]
        cancelled, exact = torch.where(is_near, value, 0), torch.where(is_near, near, 0)
    return (value - cancelled) + exact


def weighted_divergence(
    log_p: Tensor, log_q: Tensor, weight: float | Tensor, scale: float | Tensor, gap: Tensor | None = None
) -> Tensor:
    """weight * scale * KL(p || q) of each element, [R, C], for a weight that is a number or [R or 1, 1]."""
    kl = exact_divergence(log_p, log_q, gap)
    if isinstance(weight, Tensor) or weight == 0:
        kl = kl.masked_fill((weight == 0) & kl.isinf(), 0)  # a weight of 0 removes an infinite divergence as well
    # A KL below zero is rounding. The gradient is kept, which clamp would drop.
    return (weight * scale) * (kl - kl.detach().clamp(max=0))


def _mean_logits(teachers: Sequence[Tensor], weights: Weights, uniform: bool) -> Tensor:
    """sum_k w_k t_k, infinite where a teacher that counts is (NaN where two differ in its sign)."""
    infinite = [t.isinf() for t in teachers]
    mean = mean_logits([t.masked_fill(i, 0) for t, i in zip(teachers, infinite, strict=True)], weights, uniform)
    for t, w, i in zip(teachers, weights, infinite, strict=True):
        mean = mean + torch.where(i & (torch.as_tensor(w) != 0), t * (w if isinstance(w, float) else w.sign()), 0)
    return mean


def label_losses(student: Tensor, labels: Tensor, pos_weight: Tensor | None) -> Tensor:
    """binary_cross_entropy_with_logits of each element, without its cancellation; a part of weight 0 counts 0."""
    positive = labels if pos_weight is None else labels * pos_weight.to(student.dtype)
    parts = [(positive, torch_functional.logsigmoid(student)), (1 - labels, torch_functional.logsigmoid(-student))]
    result = torch.zeros_like(student)
    for weight, log_q in parts:
        result = result - weight * log_q.masked_fill((weight == 0) & (log_q == -math.inf), 0)
    return result
