"""The checks of M networks that learn together, and of how much each learns from each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops import _formulas as formulas
from fastkd.ops._autograd import may_read_values
from fastkd.ops._formulas import Reduction, accumulate_dtype
from fastkd.ops._inputs import (
    REDUCTIONS,
    check_layout,
    check_like,
    check_logits,
    check_not_probabilities,
    check_num_items,
    check_scalar,
    classes_last,
)
from fastkd.ops._teachers import check_teachers

OP = "mutual_kd"
WHOSE = "the networks'"


def rows_of(networks: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Logits [..., C] as rows [R, C] where that is a view, else as they are."""
    return tuple([z if z.dim() == 2 else formulas.rows_of(z) for z in networks])


def check_smoothing(op: str, label_smoothing: object) -> float:
    """`label_smoothing` as a float; ValueError, TypeError where it is none in [0, 1]."""
    return check_number(op, "label_smoothing", label_smoothing, "a number in [0, 1]", 0, 1)


def check_reduction(op: str, reduction: Reduction, num_items: object) -> float | Tensor:
    """What the sum of the rows is divided by, 0: the reduction's own."""
    check_choice(op, "reduction", reduction, REDUCTIONS)
    items = check_num_items(op, num_items, reduction)
    return 0.0 if items is None else items


def check_networks(
    op: str, logits: object, class_dim: int, labelled: bool, least: int, name: str = "logits[0]"
) -> tuple[tuple[Tensor, ...], Tensor | None, int]:
    """Logits of one shape and device with their classes last; the tensor that they are stacked in; their class_dim."""
    stacked = None
    if isinstance(logits, Tensor):
        if logits.dim() < 2 or logits.shape[0] < least:
            check_logits(op, "logits", logits)
            expected = f"M >= {least} networks stacked [M, ..., C], or a sequence of them"
            raise wrong_value(op, "logits", expected, f"shape {list(logits.shape)}")
        class_dim = check_layout(op, logits[0], class_dim, labelled, "logits")
        stacked = check_logits(op, "logits", classes_last(logits, class_dim))
        check_not_probabilities(op, "logits", stacked)
        return stacked.detach().unbind(0), stacked, class_dim
    if not isinstance(logits, Sequence) or isinstance(logits, str):
        expected = "a sequence of logits tensors or one stacked tensor"
        raise wrong_type(op, "logits", expected, type(logits).__name__)
    if len(logits) < least:
        many = "two networks'" if least == 2 else "one network's"
        raise wrong_value(op, "logits", f"at least {many} logits", len(logits))
    first = logits[0]
    if not isinstance(first, Tensor):
        check_logits(op, name, first)
    class_dim = check_layout(op, first, class_dim, labelled, name)
    networks: Sequence[Any] = logits if class_dim == -1 else [_moved(z, class_dim) for z in logits]
    first = check_logits(op, name, networks[0])
    for k, z in enumerate(networks):
        # The usual case in one look: this runs for every network of every step.
        if not (
            isinstance(z, Tensor) and z.shape == first.shape and z.device == first.device and z.is_floating_point()
        ):
            check_like(op, f"logits[{k}]", z, first, "logits[0]'s")
    check_not_probabilities(op, "logits", networks if name == "logits[0]" else first)
    return tuple(networks), stacked, class_dim


def _moved(logits: object, class_dim: int) -> object:
    if isinstance(logits, Tensor) and logits.dim() >= -class_dim:
        return classes_last(logits, class_dim)
    return logits


def check_frozen(teachers: object, first: Tensor, class_dim: int) -> Sequence[Tensor]:
    if isinstance(teachers, Tensor):
        teachers = _moved(teachers, class_dim)
    elif isinstance(teachers, Sequence) and not isinstance(teachers, str):
        if len(teachers) == 0:
            return ()
        if class_dim != -1:
            teachers = [_moved(t, class_dim) for t in teachers]
    return check_teachers(OP, teachers, first, WHOSE)


def check_temperature(temperature: object) -> float | Tensor:
    expected = "a finite number > 0"
    number = check_scalar(OP, "temperature", temperature, expected)
    if not isinstance(number, Tensor) and number <= 0:
        raise wrong_value(OP, "temperature", expected, number)
    return number


def check_all_weights(
    weights: object, teacher_weights: object, kd_weight: object, logits: Sequence[Tensor], teachers: Sequence[Tensor]
) -> tuple[Tensor | None, Tensor | None, Sequence[Tensor], tuple[float, ...]]:
    """(weights and teacher_weights that the host does not know, the teachers that are read, the host's numbers)."""
    first, m, n = logits[0], len(logits), len(teachers)
    if teacher_weights is not None and n == 0:
        raise wrong_value(OP, "teacher_weights", "None without teachers", type(teacher_weights).__name__)
    given = teacher_weights is not None
    weights, peers = _check_weights("weights", weights, m, m, first, diagonal=False)
    teacher_weights, frozen = _check_weights("teacher_weights", teacher_weights, m, n, first, diagonal=True)
    if not isinstance(kd_weight, Tensor) and kd_weight == 0:
        return None, None, (), (0.0,) * (m * m)
    if n == 0:
        return weights, teacher_weights, (), peers
    rows: list[Sequence[float]] = [frozen[i * n : i * n + n] for i in range(m)]
    if given and teacher_weights is None and 0.0 in frozen:
        read = [k for k in range(n) if any([row[k] != 0 for row in rows])]
        teachers, rows = [teachers[k] for k in read], [[row[k] for k in read] for row in rows]
    numbers = [w for i in range(m) for w in (*peers[i * m : i * m + m], *rows[i])]
    return weights, teacher_weights, teachers, tuple(numbers)


def _check_weights(
    name: str, weights: object, m: int, n: int, like: Tensor, diagonal: bool
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(a tensor [m, n] or [m, n, R] where the host does not know them, or None; m * n numbers, 0 where unknown)."""
    if weights is None:
        if diagonal:
            return None, (1.0 / n,) * (m * n) if n > 0 else ()
        return None, tuple([0.0 if i == j else 1.0 / (n - 1) for i in range(m) for j in range(n)])
    expected = f"of shape [{m}, {n}] or {[m, n, *like.shape[:-1]]}"
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise wrong_type(OP, name, f"a tensor or nested sequence {expected}", type(weights).__name__)
        if len(weights) > 0 and all(isinstance(row, Tensor) and row.shape == weights[0].shape for row in weights):
            weights = torch.stack(tuple(weights))
        else:
            return None, _host_weights(name, weights, m, n, diagonal)
    shape = list(weights.shape)
    if weights.dtype == torch.bool or weights.is_complex():
        raise wrong_type(OP, name, "of a floating-point dtype", f"dtype {weights.dtype}")
    if shape != [m, n] and shape != [m, n, *like.shape[:-1]]:
        raise wrong_value(OP, name, expected, f"shape {shape}")
    readable = may_read_values(weights)
    if weights.dim() == 2 and readable and not weights.requires_grad:
        return None, _host_weights(name, weights.tolist(), m, n, diagonal)
    if weights.device != like.device:
        if weights.dim() != 2 or weights.device.type != "cpu":
            raise wrong_value(OP, name, f"on {WHOSE} device {like.device}", f"device {weights.device}")
        weights = weights.to(like.device, non_blocking=True)
    if readable:
        finite = weights.isfinite().reshape(m, n, -1).all(-1)
        if not diagonal:
            finite = finite | torch.eye(m, dtype=torch.bool, device=finite.device)
        if not bool(finite.all()):
            raise wrong_value(OP, name, "finite" + _beside(diagonal), "a NaN or infinite weight")
    weights = weights.to(accumulate_dtype(like.dtype))
    return weights if weights.dim() == 2 else weights.reshape(m, n, -1), (0.0,) * (m * n)


def _beside(diagonal: bool) -> str:
    return "" if diagonal else " beside the diagonal"


def _host_weights(name: str, weights: Sequence[Any], m: int, n: int, diagonal: bool) -> tuple[float, ...]:
    """m * n numbers of nested sequences, the diagonal as 0 where it is not read."""
    lengths = [len(row) if isinstance(row, Sequence) and not isinstance(row, str) else -1 for row in weights]
    if lengths != [n] * m:
        got = f"{len(lengths)} rows of {lengths} numbers" if -1 not in lengths else "something else"
        raise wrong_value(OP, name, f"{m} rows of {n} numbers, one row per network that learns", got)
    numbers = []
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            if i == j and not diagonal:
                numbers.append(0.0)
                continue
            numbers.append(check_number(OP, f"{name}[{i}][{j}]", weight, "a finite number"))
    return tuple(numbers)
