"""Checks of what operations over several networks take: teachers, temperatures, weights."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd._core.checks import LARGEST, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import may_read_values
from fastkd.ops._formulas import accumulate_dtype
from fastkd.ops._inputs import check_like, check_scalar
from fastkd.ops._teacher_calls import is_number

Weights = Sequence[float | Tensor]  # w_k: numbers, or [R, 1] or [1, 1]
POSITIVE = "a finite number > 0, or one per teacher"


def check_left_out(op: str, given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> None:
    """The options that mean nothing `where`, such as "for activation='sigmoid'", have their defaults."""
    for name, default in defaults.items():
        if not is_number(given[name], default):
            raise wrong_value(op, name, f"{default!r} {where}", repr(given[name]))


def check_teachers(
    op: str, teachers: object, student: Tensor, whose: str = "the student's", least: int = 2
) -> Sequence[Tensor]:
    """K logits of the student's shape, from a sequence or from one tensor; views, never copies."""
    if isinstance(teachers, Tensor):
        if not teachers.is_floating_point():
            expected = "logits, which stand before the labels"
            raise wrong_type(op, "teachers", expected, f"{teachers.dtype} of shape {list(teachers.shape)}")
        if teachers.dim() == student.dim():
            teachers = (teachers,)
        elif teachers.dim() == student.dim() + 1:
            teachers = teachers.unbind(0)
        else:
            expected = f"of {whose} shape {list(student.shape)} or with K stacked in front of it"
            raise wrong_value(op, "teachers", expected, f"shape {list(teachers.shape)}")
    elif not isinstance(teachers, Sequence) or isinstance(teachers, str):
        expected = "a sequence of logits tensors or one stacked tensor"
        raise wrong_type(op, "teachers", expected, type(teachers).__name__)
    if len(teachers) == 0:
        raise wrong_value(op, "teachers", "at least one tensor of logits", "none")
    shape, device = student.shape, student.device
    for k, teacher in enumerate(teachers):
        # The usual case in one look: this runs for every teacher of every step.
        if not (
            isinstance(teacher, Tensor)
            and teacher.shape == shape
            and teacher.device == device
            and teacher.is_floating_point()
        ):
            check_like(op, f"teachers[{k}]", teacher, student, whose, least)
    return teachers


def check_vocabulary(
    op: str, vocab_size: object, class_dim: int, student: Tensor, teachers: object, target: object
) -> tuple[Tensor, Any, Any]:
    """Student, teachers and soft targets with their first `vocab_size` classes; what is no tensor is left as it is."""
    expected = "an integer of at least 2"
    if isinstance(vocab_size, bool) or not isinstance(vocab_size, int):
        raise wrong_type(op, "vocab_size", expected, type(vocab_size).__name__)
    if vocab_size < 2:
        raise wrong_value(op, "vocab_size", expected, vocab_size)

    def cut(name: str, z: Any) -> Any:
        if not isinstance(z, Tensor) or z.dim() < -class_dim:
            return z
        if z.shape[class_dim] < vocab_size:
            raise wrong_value(op, "vocab_size", f"at most the {z.shape[class_dim]} classes of {name}", vocab_size)
        return z.narrow(class_dim, 0, vocab_size)

    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        teachers = [cut(f"teachers[{k}]", t) for k, t in enumerate(teachers)]
    else:
        teachers = cut("teachers", teachers)
    if isinstance(target, Tensor) and target.is_floating_point() and target.dim() == student.dim():
        target = cut("target", target)
    return cut("student", student), teachers, target


def check_caps(
    op: str, softcap: object, scale: object, teacher_softcap: object, teacher_scale: object, k: int
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """The softcaps (0: none) and logit scales of the student and K teachers; both () where nobody has one."""
    if softcap is None and teacher_softcap is None and _is_one(scale) and _is_one(teacher_scale):
        return (), ()
    cap, factor = "a number > 0 or None", "a number > 0"
    given = [("teacher_softcap", teacher_softcap, cap), ("teacher_logit_scale", teacher_scale, factor)]
    teacher_caps, teacher_scales = [_per_teacher(op, name, value, k, expected) for name, value, expected in given]
    caps = (_number_or_none(op, "softcap", softcap, cap), *teacher_caps)
    scales = (_number_or_none(op, "logit_scale", scale, factor), *teacher_scales)
    return (caps, scales) if set(caps) != {0.0} or set(scales) != {1.0} else ((), ())


def _is_one(scale: object) -> bool:
    return isinstance(scale, int | float) and scale == 1


def _per_teacher(op: str, name: str, value: object, k: int, expected: str) -> list[float]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        return [_number_or_none(op, name, value, expected)] * k
    if len(value) != k:
        raise wrong_value(op, name, f"one value or {k}, one per teacher", f"{len(value)} values")
    return [_number_or_none(op, f"{name}[{i}]", v, expected) for i, v in enumerate(value)]


def _number_or_none(op: str, name: str, value: object, expected: str) -> float:
    if value is None and "None" in expected:
        return 0.0
    number = check_number(op, name, value, expected)
    if number <= 0:
        raise wrong_value(op, name, expected, number)
    return number


def check_temperature(op: str, temperature: object, k: int) -> tuple[float | Tensor, ...]:
    """One temperature or K of them, as numbers; as 0-d tensors where they require grad or cannot be read."""
    if isinstance(temperature, Tensor) and temperature.dim() > 0:
        if temperature.dim() > 1 or not temperature.is_floating_point():
            got = f"a tensor of {temperature.dtype} and shape {list(temperature.shape)}"
            raise wrong_value(op, "temperature", POSITIVE, got)
        readable = may_read_values(temperature) and not temperature.requires_grad
        single = False
        given: Sequence[object] = temperature.tolist() if readable else temperature.unbind(0)
    elif isinstance(temperature, Sequence) and not isinstance(temperature, str):
        single, given = False, temperature
    else:
        single, given = True, (temperature,)
    values = tuple([_positive(op, t) for t in given])
    if not single and len(values) != k:
        raise wrong_value(op, "temperature", f"one number or {k}, one per teacher", f"{len(values)} numbers")
    return values


def _positive(op: str, value: object) -> float | Tensor:
    number = check_scalar(op, "temperature", value, POSITIVE)
    if not isinstance(number, Tensor) and number <= 0:
        raise wrong_value(op, "temperature", POSITIVE, number)
    return number


def check_weights(
    op: str, weights: object, k: int, student: Tensor, nonnegative: bool
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(None, K numbers) where the weights are known on the host, else (a tensor [K] or [K, R] on the device, ())."""
    if weights is None:
        return None, (1.0 / k,) * k
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise wrong_type(op, "weights", "a sequence of K numbers or a tensor", type(weights).__name__)
        if all([isinstance(w, (int, float)) for w in weights]):
            if len(weights) != k:
                raise wrong_value(op, "weights", f"{k} numbers, one per teacher", f"{len(weights)} numbers")
            return None, _host_weights(op, weights, nonnegative)
        if any(isinstance(w, Tensor) for w in weights):
            weights = torch.stack([torch.as_tensor(w, device=student.device) for w in weights])
        else:
            weights = torch.as_tensor(weights, dtype=accumulate_dtype(student.dtype), device=student.device)
    return _tensor_weights(op, weights, k, student, nonnegative)


def _tensor_weights(
    op: str, weights: Tensor, k: int, student: Tensor, nonnegative: bool
) -> tuple[Tensor | None, tuple[float, ...]]:
    shape, per_row = list(weights.shape), [k, *student.shape[:-1]]
    if weights.dtype == torch.bool or weights.is_complex():
        raise wrong_type(op, "weights", "of a floating-point dtype", f"dtype {weights.dtype}")
    if shape != [k] and shape != per_row:
        raise wrong_value(op, "weights", f"of shape [{k}] or {per_row}", f"shape {shape}")
    readable = may_read_values(weights)
    if weights.dim() == 1 and readable and not weights.requires_grad:
        return None, _host_weights(op, weights.tolist(), nonnegative)
    if weights.device != student.device:
        if weights.dim() != 1 or weights.device.type != "cpu":
            expected = f"on the student's device {student.device}"
            raise wrong_value(op, "weights", expected, f"device {weights.device}")
        weights = weights.to(student.device, non_blocking=True)
    if readable and not bool(weights.isfinite().all()):
        raise wrong_value(op, "weights", "finite", "a NaN or infinite weight")
    if readable and nonnegative and bool((weights < 0).any()):
        raise wrong_value(op, "weights", "at least 0 for combine='probs'", "a negative weight")
    weights = weights.to(accumulate_dtype(student.dtype))
    return (weights if weights.dim() == 1 else weights.reshape(k, -1)), ()


def _host_weights(op: str, weights: Sequence[float], nonnegative: bool) -> tuple[float, ...]:
    weights = tuple([float(w) for w in weights])
    for weight in weights:
        if not -LARGEST <= weight <= LARGEST:
            raise wrong_value(op, "weights", "finite", list(weights))
        if nonnegative and weight < 0:
            raise wrong_value(op, "weights", "at least 0 for combine='probs'", list(weights))
    return weights


def mixture(log_ps: Sequence[Tensor], weights: Weights) -> Tensor:
    """log sum_k w_k p_k, [R, C], without underflow and with finite gradients where the sum is 0."""
    top = torch.stack([lp.detach() for lp in log_ps]).amax(0).clamp(min=torch.finfo(log_ps[0].dtype).min)
    uniform = not isinstance(weights[0], Tensor) and len(set(weights)) == 1
    total: Tensor = sum(  # type: ignore[assignment]  # of one at least
        lp.sub(top).exp() if uniform else w * (lp - top).exp() for w, lp in zip(weights, log_ps, strict=True)
    )
    if uniform:  # equal networks have exactly their own mixture
        total = (total / len(log_ps)) * (weights[0] * len(log_ps))
    empty = total == 0
    return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -math.inf)


def mean_logits(teachers: Sequence[Tensor], weights: Weights, uniform: bool) -> Tensor:
    """sum_k w_k t_k, [R, C]; -inf where a teacher that counts is. `uniform`: all w_k are 1/K, a running mean."""
    masked = [(t == -math.inf) & (w != 0) for t, w in zip(teachers, weights, strict=True)]
    total: Tensor = 0  # type: ignore[assignment]  # until the first one
    for k, (t, w) in enumerate(zip(teachers, weights, strict=True)):
        t = t.masked_fill(t == -math.inf, 0)
        total = t if uniform and k == 0 else total + ((t - total) / (k + 1) if uniform else w * t)
    return total.masked_fill(sum(masked) > 0, -math.inf)  # type: ignore[arg-type]  # of one at least


def label_losses(student: Tensor, target: Tensor | None, soft: Tensor | None, smoothing: float) -> Tensor:
    """Cross-entropy [R] with classes [R], or with probabilities [R, C]; a class of probability 0 counts 0."""
    if soft is None:
        assert target is not None
        return torch_functional.cross_entropy(student, target, reduction="none", label_smoothing=smoothing)
    soft = soft.to(student.dtype) * (1 - smoothing) + smoothing / student.shape[-1]
    log_q = torch.log_softmax(student, -1)
    return -(soft * log_q.masked_fill((soft == 0) & (log_q == -math.inf), 0)).sum(-1)
