"""Which kernels run a checked call of multi_teacher_kd, or why plain PyTorch does; autograd; the fake kernels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_formula as formula
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops._autograd import (
    is_transformed,
    on_host,
)
from fastkd.ops._inputs import check_range, why_learning
from fastkd.ops._multi_teacher_formula import Options, Tensors, classes_of

LAUNCH_TEACHERS = 16  # teachers of one CUDA launch; more go in groups


def losses_of(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    if (reason := why_reference(tensors, options)) is not None:
        _backend.note_fallback(options.operation, reason, tensors.student)
        if options.labels:
            check_range(options.operation, tensors.target, classes_of(tensors, options), options.ignore_index)
        return formula.reference(tensors, options)
    return _in_groups(tensors, options) if _too_many(tensors) else native.run(tensors, options, False)[0]


def _too_many(tensors: Tensors) -> bool:
    return len(tensors.teachers) > LAUNCH_TEACHERS and _backend.device_kind(tensors.student) != "cpu"


def runs_apart(tensors: Tensors, options: Options) -> bool:
    """Whether one launch does not take the call, or leaves states in the place of a gradient."""
    return _too_many(tensors) or native.streams(tensors.student, options)


def _in_groups(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """More teachers than one launch takes: the terms of combine="losses" add up, the cross-entropy goes first."""
    total: Sequence[Tensor] = []
    for k in range(0, len(tensors.teachers), LAUNCH_TEACHERS):
        part, weights, temperatures = slice(k, k + LAUNCH_TEACHERS), tensors.weights, options.temperatures
        some = tensors._replace(teachers=tensors.teachers[part], weights=None if weights is None else weights[part])
        rest = options._replace(
            host_weights=options.host_weights[part],
            temperatures=temperatures if len(temperatures) == 1 else temperatures[part],
        )
        rest = formula.with_caps_of(rest, range(k, k + len(some.teachers)))
        if k > 0:
            some, rest = some._replace(soft=None), rest._replace(ce_weight=0.0)
        losses = native.run(some, rest, False)[0]
        # The loss and KD add up; CE is the first group's.
        total = [*(a + b for a, b in zip(total[:2], losses, strict=False)), *total[2:]] if total else losses
    return total


def why_reference(tensors: Tensors, options: Options) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    student, learns = tensors.student, torch.is_grad_enabled()
    reason = _backend.why_not_native(student)
    if reason is not None:
        return reason
    if is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if learns:
        for k, teacher in enumerate(tensors.teachers):
            if teacher.requires_grad:
                return why_learning(f"teachers[{k}]", (student,))
        if tensors.weights is not None and tensors.weights.requires_grad:
            return "the weights require grad"
        if tensors.soft is not None and tensors.soft.requires_grad:
            return "the target requires grad"
        if tensors.shares is not None and tensors.shares.requires_grad:
            return "the weights of the divergences require grad"
    for name, scalar in (("kd_weight", options.kd_weight), ("ce_weight", options.ce_weight)):
        if not on_host((scalar,)):
            return f"{name} is a tensor that requires grad or whose value is not known on the host"
    if not on_host(options.temperatures):
        return "the temperature is a tensor that requires grad or whose value is not known on the host"
    if options.combine != "losses" and _too_many(tensors):
        return f"combine={options.combine!r} with more than {LAUNCH_TEACHERS} teachers"
    return None
