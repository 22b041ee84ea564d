"""The usual call of multi_teacher_kd without its checks: matrices of logits, options that are plain numbers and words.

Options are checked once, on stand-ins of one row, and remembered; shapes are compared in one look, and the operation
itself refuses the rest. A call that is anything else, or wrong, is nothing to this file: multi_teacher_kd then checks
it word by word.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_kernels as kernels
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops._autograd import is_transformed, may_read_values
from fastkd.ops._inputs import out_of_range
from fastkd.ops._multi_teacher_formula import Options, Tensors

PLAIN = frozenset((float, int, bool, str, type(None)))  # types of which equal values are the same option
MATRICES = frozenset((Tensor, torch.nn.Parameter))
ROW, LABEL = torch.zeros(1, 2, device="cpu"), torch.zeros(1, dtype=torch.int64, device="cpu")  # stand-ins
Check: TypeAlias = Callable[..., tuple[Tensors, Options]]
# A call as it was made: check, student, teachers, target, weights, the options' names and values. A plain tuple, since
# every call makes one.
Given: TypeAlias = tuple[Check, Tensor, object, Tensor | None, object, tuple[str, ...], Sequence[object]]


class _Remembered(NamedTuple):
    options: Options
    numbers: tuple[Any, ...]  # of the raw operation


@functools.lru_cache(maxsize=128, typed=True)
def _remembered(
    check: Check, k: int, labels: bool, weights: tuple[float, ...] | None, names: tuple[str, ...], *values: object
) -> _Remembered | None:
    """The options of a call with K teachers, as check() makes them; None where it refuses them or drops teachers."""
    given = dict(zip(names, values, strict=True)) | dict.fromkeys(("mask", "num_items", "vocab_size"))
    try:
        tensors, options = check(ROW, (ROW,) * k, LABEL if labels else None, weights, **given)
    except (TypeError, ValueError):
        return None
    return _Remembered(options, native.numbers_of(options)) if len(tensors.teachers) == k else None


def losses(given: Given) -> Sequence[Tensor] | None:
    """The loss, with return_terms KD and CE, where all is as usual and native kernels take it in one pass; or None."""
    learns = torch.is_grad_enabled()
    call = _call(given, learns)
    if call is None:
        return None
    try:
        if learns and call[0].student.requires_grad:
            beside: list[Tensor] = []
            return _Usual.apply(call[0].student, call, beside), *beside
        result = _run(*call, False)[0]
    except RuntimeError:  # dtypes, most of all: the sentence comes from check()
        return None
    return result.unbind(0) if call[1].options.terms else (result,)


@torch.no_grad()
def loss_and_gradient(given: Given) -> tuple[Tensor, Tensor] | None:
    """The loss and what its sum's backward would give to the student, in the same case."""
    call = _call(given, False)
    if call is None:
        return None
    try:
        loss, rows, saved, aux = _run(*call, True)
    except RuntimeError:
        return None
    return loss, native.gradient_from(
        call[1].options.reduction, torch.ones_like(loss), rows, saved, aux, given_away=True
    )


def _call(given: Given, learns: bool) -> tuple[Tensors, _Remembered] | None:
    check, student, teachers, target, weights, names, values = given
    if torch.compiler.is_compiling() or is_transformed() or _backend.machine.check_everywhere:
        return None
    if type(student) not in MATRICES or not isinstance(teachers, (list, tuple)):
        return None
    if not PLAIN.issuperset(map(type, values)):
        return None
    if weights is not None:
        if not isinstance(weights, (list, tuple)) or set(map(type, weights)) != {float}:
            return None
        weights = tuple(weights)
    if not _alike(student, teachers, target, learns) or _backend.why_not_native(student) is not None:
        return None
    tensors = Tensors(student, tuple(teachers), target, None, None)
    found = _remembered(check, len(teachers), target is not None, weights, names, *values)
    if found is None or kernels.runs_apart(tensors, found.options):
        return None
    return tensors, found


def _alike(student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, learns: bool) -> bool:
    shape, device = student.shape, student.device
    if len(shape) != 2 or shape[1] < 2:
        return False
    for teacher in teachers:
        if type(teacher) not in MATRICES or teacher.shape != shape or teacher.device != device:
            return False
        if learns and teacher.requires_grad:
            return False
    return target is None or (
        type(target) is Tensor and target.dtype == torch.int64 and target.device == device and target.shape == shape[:1]
    )


def _run(tensors: Tensors, found: _Remembered, need_grad: bool) -> Sequence[Tensor]:
    student, teachers, target = tensors[:3]
    operation = _backend.native_ops(student).multi_teacher_forward
    nothing = (None, None, None, None)  # soft labels, weights, shares, scalars
    out: Sequence[Tensor] = operation(student, teachers, target, *nothing, *found.numbers, need_grad, False)
    if target is not None and may_read_values(student) and out[3].tolist()[1] != 0:
        raise out_of_range(found.options.operation, target, student.shape[1], found.options.ignore_index)
    return out


class _Usual(native.Stored):
    """With nothing to look up in the forward."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: tuple[Any, ...], beside: list[Tensor]) -> Tensor:
        tensors, found = call
        return native.keep(ctx, tensors, found.options, None, _run(tensors, found, True), beside)
