"""Feature maps [B, C, ...]: the checks of pairs of them, their norms, and how they lie in memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from fastkd._core.messages import wrong_type, wrong_value

Norm = Literal["sample", "position", "channel"]
MOST_ELEMENTS = 2**31  # of one sample of a map


def _as_tuple(op: str, name: str, maps: object) -> tuple[Tensor, ...]:
    """One map or a sequence of maps, as a tuple."""
    if isinstance(maps, Tensor):
        maps = (maps,)
    elif not isinstance(maps, Sequence) or isinstance(maps, str):
        raise wrong_type(op, name, "a feature map or a sequence of them", type(maps).__name__)
    if len(maps) == 0:
        raise wrong_value(op, name, "at least one feature map", "none")
    for k, value in enumerate(maps):
        if not isinstance(value, Tensor):
            raise wrong_type(op, f"{name}[{k}]", "a floating-point tensor [B, C, ...]", type(value).__name__)
        if not value.is_floating_point():
            raise wrong_type(op, f"{name}[{k}]", "a floating-point tensor", f"dtype {value.dtype}")
    return tuple(maps)


def _check_map(op: str, k: int, student: Tensor, first: Tensor) -> None:
    shape = list(student.shape)
    if len(shape) < 2 or any([size == 0 for size in shape[1:]]):
        expected = "of shape [B, C, ...] with at least one element per sample"
        raise wrong_value(op, f"students[{k}]", expected, f"shape {shape}")
    if shape[0] != first.shape[0]:
        raise wrong_value(op, f"students[{k}]", f"of students[0]'s batch size {first.shape[0]}", shape[0])
    if student.device != first.device:
        raise wrong_value(op, f"students[{k}]", f"on students[0]'s device {first.device}", student.device)
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements >= MOST_ELEMENTS:
        raise wrong_value(op, f"students[{k}]", "of fewer than 2**31 elements per sample", elements)


def check_pairs(op: str, students: object, teachers: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """K students' maps, or one, and K teachers', each of its student's shape."""
    one, students = isinstance(students, Tensor), _as_tuple(op, "students", students)
    if isinstance(teachers, Tensor) and teachers.dim() == students[0].dim() + 1:
        teachers = teachers.unbind(0)
    teachers = _as_tuple(op, "teachers", teachers)
    for k, student in enumerate(students):
        _check_map(op, k, student, students[0])
    if not one and len(teachers) != len(students):
        raise wrong_value(op, "teachers", f"{len(students)} maps, one per student", f"{len(teachers)} maps")
    for k, teacher in enumerate(teachers):
        student = students[0 if one else k]
        if teacher.shape != student.shape:
            expected = f"of its student's shape {list(student.shape)} (pool the larger map first)"
            raise wrong_value(op, f"teachers[{k}]", expected, f"shape {list(teacher.shape)}")
        if teacher.device != student.device:
            raise wrong_value(op, f"teachers[{k}]", f"on the student's device {student.device}", teacher.device)
    return students, teachers


def normalised(x: Tensor, norm: Norm) -> Tensor:
    """x [B, C, ...] over its L2 norm; scaled by its largest magnitude first, so that no square over- or underflows."""
    x = x.reshape(*x.shape[:2], -1)  # [B, C, places]
    dims = {"sample": (1, 2), "position": (1,), "channel": (2,)}[norm]
    largest = x.detach().abs().amax(dims, keepdim=True)
    x = x / largest.where((largest > 0) & largest.isfinite(), 1)
    squares = x.square().sum(dims, keepdim=True)
    empty = squares == 0
    return x * squares.masked_fill(empty, 1).rsqrt().masked_fill(empty, 0)


def norms_of_a_sample(x: Tensor, norm: Norm) -> int:
    places = 1
    for size in x.shape[2:]:
        places *= size
    return {"sample": 1, "position": places, "channel": x.shape[1]}[norm]


def _is_dense(x: Tensor, order: Sequence[int]) -> bool:
    """Whether each sample is dense with its dimensions in this order in memory, the last one fastest."""
    expected = 1
    for d in reversed(order):
        if x.shape[d] != 1:
            if x.stride(d) != expected:
                return False
            expected *= x.shape[d]
    return True


def dense_like(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Uninitialised, with the map's shape: channels_last where only that describes its samples, else contiguous."""
    contiguous, last = list(range(1, x.dim())), [*range(2, x.dim()), 1]
    order = contiguous if _is_dense(x, contiguous) or not _is_dense(x, last) else last
    if all(size == 1 for size in x.shape[2:]):
        order = last
    strides, step = [0] * x.dim(), 1
    for d in reversed([0, *order]):
        strides[d] = step
        step *= x.shape[d]
    return x.new_empty_strided(x.shape, strides, dtype=dtype)
