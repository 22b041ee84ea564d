"""The native feature_ensemble: raw operations, their fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _feature_maps as maps
from fastkd.ops._autograd import Inputs, graph_is_kept, save_for_backward, with_kept
from fastkd.ops._feature_ensemble_formula import NORMS, OP, Options, Tensors, reference
from fastkd.ops._formulas import accumulate_dtype

LAUNCH_PAIRS = 16  # pairs of one CUDA launch; more go in groups
STATE_PLANES = 5  # numbers per norm that the backward needs (csrc/feature_ensemble/op.h)


def run(tensors: Tensors, options: Options) -> Tensor:
    if not (torch.is_grad_enabled() and any([s.requires_grad for s in tensors.students])):
        return _forward(tensors, options, False)[0]
    students, teachers, weights, mask = tensors
    loss: Tensor = _Native.apply(options, len(students), weights, mask, *students, *teachers)
    return loss


def on_cpu(tensors: Tensors) -> bool:
    return _backend.device_kind(tensors.students[0]) == "cpu"


# csrc/feature_ensemble/op.cpp registers, with A = float64 for float64 students, else float32:
#   forward(students, teachers, weights, mask, *Options.native(), need_grad, store)
#       -> loss A [] or [B]; state A [5, norms], or [0, norms] without a gradient; with `store` (on the CPU) the
#          gradients for grad_output = 1 (those of float16 in float32), else none
#   backward(grad_output, students, teachers, weights, mask, state, *Options.native())
#       -> a gradient per student's map, dense, in its layout
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    """The shapes that the raw operations of `namespace` return, for torch.compile and torch.export."""

    def forward(
        students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor | None, mask: Tensor | None,
        host_weights: Sequence[float], p: int, norm: int, mean_elements: bool, reduction: int, items: float,
        need_grad: bool, store: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        student, dtype = students[0], accumulate_dtype(students[0].dtype)
        norms = sum(teacher.shape[0] * maps.norms_of_a_sample(teacher, NORMS[norm]) for teacher in teachers)
        return (
            student.new_empty((student.shape[0],) if reduction == 0 else (), dtype=dtype),
            student.new_empty((STATE_PLANES if need_grad else 0, norms), dtype=dtype),
            [maps.dense_like(s, dtype if s.dtype == torch.float16 else s.dtype) for s in students] if store else [],
        )

    def backward(grad: Tensor, students: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        return [maps.dense_like(student, student.dtype) for student in students]

    torch.library.register_fake(f"{namespace}::feature_ensemble_forward", forward)
    torch.library.register_fake(f"{namespace}::feature_ensemble_backward", backward)


def _forward(
    tensors: Tensors, options: Options, need_grad: bool, store: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    ops = _backend.native_ops(tensors.students[0])
    out: tuple[Tensor, Tensor, list[Tensor]] = ops.feature_ensemble_forward(
        *tensors, *options.native(), need_grad, store
    )
    return out


class _Native(torch.autograd.Function):
    """The native loss. The backward asked for with create_graph=True goes through the reference formula.

    On the CPU the forward writes the gradients for grad_output = 1 while the maps are in cache, and the backward does
    not read them. On CUDA the backward computes the gradients, from the maps.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, count: int, weights: Tensor | None, mask: Tensor | None, *both: Tensor
    ) -> Tensor:
        tensors = Tensors(both[:count], both[count:], weights, mask)
        store = on_cpu(tensors) and not torch.compiler.is_compiling()
        loss, state, gradients = _forward(tensors, options, True, store)
        ctx.options, ctx.count, ctx.dtype = options, count, tensors.students[0].dtype
        ctx.inputs = ctx.gradients = None
        if store:
            ctx.gradients, ctx.inputs = gradients, Inputs((weights, mask, *both))
        else:
            save_for_backward(ctx, (state, weights, mask, *both))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept: Sequence[Any] | None
        saved = ctx.saved_tensors  # an error where the graph was freed
        wanted = ctx.needs_input_grad[4 : 4 + ctx.count]
        if ctx.inputs is None:
            state, *kept = with_kept(ctx, saved)
        else:
            kept = ctx.inputs.unchanged(OP) if torch.is_grad_enabled() else None
        if kept is None:
            grads = _stored(ctx, grad, wanted)
        else:
            tensors = Tensors(tuple(kept[2 : 2 + ctx.count]), tuple(kept[2 + ctx.count :]), *kept[:2])
            if torch.is_grad_enabled():
                grads = _of_the_reference(tensors, ctx.options, grad, wanted)
            else:
                ops = _backend.native_ops(tensors.students[0])
                grads = ops.feature_ensemble_backward(grad.contiguous(), *tensors, state, *ctx.options.native())
        if ctx.inputs is not None and not graph_is_kept():
            ctx.inputs = ctx.gradients = None
        return None, None, None, None, *grads, *([None] * (len(ctx.needs_input_grad) - 4 - ctx.count))


def _of_the_reference(tensors: Tensors, options: Options, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    learners = [s for s, learns in zip(tensors.students, wanted, strict=True) if learns]
    found = iter(torch.autograd.grad(reference(tensors, options), learners, grad, create_graph=True))
    return [next(found) if learns else None for learns in wanted]


def _stored(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The stored gradients times grad_output, [] or [B]: the caller's own tensors."""
    mine = not graph_is_kept()  # nobody will see them again
    # A fake tensor has no value to look at.
    plain = type(grad) is Tensor and (grad.item() == 1.0 if grad.dim() == 0 else bool((grad == 1).all()))
    factor = None if plain else grad
    pairs = zip(ctx.gradients, wanted, strict=True)
    return [_handed_out(gradient, factor, mine, ctx.dtype) if learns else None for gradient, learns in pairs]


def _handed_out(gradient: Tensor, factor: Tensor | None, mine: bool, dtype: torch.dtype) -> Tensor:
    if factor is not None:
        factor = factor.reshape(-1, *[1] * (gradient.dim() - 1)) if factor.dim() else factor
        gradient, mine = (gradient.mul_(factor) if mine else gradient * factor), True
    if gradient.dtype != dtype:  # rounded once, after the factor
        return gradient.to(dtype)
    return gradient if mine else gradient.clone()
