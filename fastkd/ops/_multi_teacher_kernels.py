"""Which kernels run a checked call of multi_teacher_kd, or why plain PyTorch does; autograd; the fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_formula as formula
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._inputs import check_range
from fastkd.ops._multi_teacher_formula import Options, Tensors, classes_of


def losses_of(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    if (reason := why_reference(tensors, options)) is not None:
        _backend.note_fallback(options.operation, reason, tensors.student)
        if options.labels:
            check_range(options.operation, tensors.target, classes_of(tensors, options), options.ignore_index)
        return formula.reference(tensors, options)
    return _in_groups(tensors, options) if calls.too_many(tensors) else native.run(tensors, options, False)[0]


def runs_apart(tensors: Tensors, options: Options) -> bool:
    """Whether one launch does not take the call, or leaves states in the place of a gradient."""
    return calls.too_many(tensors) or native.streams(tensors.student, options)


def _in_groups(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """More teachers than one launch takes: the terms of combine="losses" add up, the cross-entropy goes first."""

    def run(part: range) -> Sequence[Tensor]:
        some, rest = formula.only(tensors, options, part)
        if part.start > 0:
            some, rest = some._replace(soft=None), rest._replace(ce_weight=0.0)
        return native.run(some, rest, False)[0]

    return calls.in_groups(len(tensors.teachers), run)


def why_reference(tensors: Tensors, options: Options) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    others = (("the target requires", tensors.soft), ("the weights of the divergences require", tensors.shares))
    return calls.why_reference(tensors, options, others)
