"""Which kernels run a checked call of multi_label_kd, or why plain PyTorch does; autograd; the fake kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._autograd import (
    Inputs,
    graph_is_kept,
    save_for_backward,
    with_kept,
)
from fastkd.ops._formulas import accumulate_dtype, count_rows
from fastkd.ops._inputs import REDUCTIONS
from fastkd.ops._multi_label_formula import Options, Tensors, reference
from fastkd.ops._multi_teacher_native import COMBINE, gradient_from


def losses_of(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    if (reason := why_reference(tensors, options)) is not None:
        _backend.note_fallback(options.operation, reason, tensors.student)
        return reference(tensors, options)
    return _in_groups(tensors, options) if calls.too_many(tensors) else _run(tensors, options)


def _in_groups(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """More teachers than one launch takes: the terms of combine="losses" add up, the cross-entropy goes first."""

    def run(part: range) -> Sequence[Tensor]:
        some, rest = calls.only(tensors, options, part)
        return _run(some, rest if part.start == 0 else rest._replace(ce_weight=0.0, labelled=False))

    return calls.in_groups(len(tensors.teachers), run)


def why_reference(tensors: Tensors, options: Options) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    others = (("the target requires", tensors.labels), ("the pos_weight requires", tensors.pos_weight))
    return calls.why_reference(tensors, options, others)


def _run(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    options, scalars = calls.split(options)
    student, teachers, *rest = tensors
    if not (torch.is_grad_enabled() and student.requires_grad):
        losses = _forward(tensors, options, scalars, False)[0]
        return losses.unbind(0) if options.terms else (losses,)
    out = _Native.apply(options, scalars, student, *rest, *teachers)
    return (out,) if isinstance(out, Tensor) else out


def _forward(tensors: Tensors, options: Options, scalars: Tensor | None, need_grad: bool) -> tuple[Tensor, ...]:
    student, teachers, target, labels, pos_weight, weights = tensors
    if pos_weight is not None:  # and the largest, which bounds the gradient
        pos_weight = torch.cat([pos_weight, pos_weight.amax().clamp(min=1)[None]])
    out: tuple[Tensor, ...] = _backend.native_ops(student).multi_label_forward(
        student, teachers, target, labels, pos_weight, weights, scalars, options.host_weights, options.temperatures,
        COMBINE.index(options.combine), options.kd_weight, options.ce_weight, options.scale_by_t2,
        REDUCTIONS.index(options.reduction), options.num_items or 0.0,
        bool(options.host_weights) and calls.is_uniform(options.host_weights), options.labelled, options.terms,
        options.class_factor, need_grad,
    )  # fmt: skip
    return out


class _Native(torch.autograd.Function):
    """The native loss, with `terms` KD and CE. The backward asked for with create_graph=True goes through the formula.

    The last pass through a graph that is not compiled gives the stored gradient away. The inputs may change in place
    before, if nobody asks for a second derivative.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, scalars: Tensor | None, student: Tensor, target: Tensor | None,
        labels: Tensor | None, pos_weight: Tensor | None, weights: Tensor | None, *teachers: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        tensors = Tensors(student, teachers, target, labels, pos_weight, weights)
        losses, *stored = _forward(tensors, options, scalars, True)
        inputs = (scalars, student, target, labels, pos_weight, weights, *teachers)
        ctx.options, ctx.shape, ctx.stored, ctx.inputs = options, student.shape, None, None
        ctx.compiled = torch.compiler.is_compiling()
        if ctx.compiled:
            save_for_backward(ctx, (*stored, *inputs))
        else:
            ctx.stored, ctx.inputs = stored, Inputs(inputs)
        if not options.terms:
            return losses
        loss, *terms = [z.clone() for z in losses.unbind(0)]  # views of one tensor could not be changed in place
        ctx.mark_non_differentiable(*terms)
        return loss, *terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # an error where the graph was freed
        inputs: Sequence[Any] = ()
        if ctx.compiled:
            rows, factors, aux, *inputs = with_kept(ctx, saved)
        else:
            rows, factors, aux = ctx.stored
            inputs = ctx.inputs.unchanged(ctx.options.operation) if torch.is_grad_enabled() else ()
        if torch.is_grad_enabled():
            result = _second_derivative(ctx.options, grad, *inputs)
        elif ctx.compiled:
            reduction = REDUCTIONS.index(ctx.options.reduction)
            ops = _backend.native_ops(rows)
            result = ops.multi_teacher_backward(grad.contiguous(), rows, factors, aux, reduction)
        else:
            kept = graph_is_kept()
            if not kept:
                ctx.stored = ctx.inputs = None
            result = gradient_from(ctx.options.reduction, grad, rows, factors, aux, given_away=not kept)
            result = result.clone() if result is rows and kept else result
        return None, None, result.view(ctx.shape), *([None] * (len(ctx.needs_input_grad) - 3))


def _second_derivative(
    options: Options, grad: Tensor, scalars: Tensor | None, student: Tensor, target: Tensor | None,
    labels: Tensor | None, pos_weight: Tensor | None, weights: Tensor | None, *teachers: Tensor,
) -> Tensor:  # fmt: skip
    tensors = Tensors(student, teachers, target, labels, pos_weight, weights)
    loss = reference(tensors, calls.joined(options, scalars))[0]
    return torch.autograd.grad(loss, student, grad, create_graph=True)[0]


# csrc/multi_label/op.cpp registers, with R rows of C classes, A = float64 for float64 logits, else float32, and L = 3
# with `terms` (the loss, KD, CE), else one loss without that dimension:
#   forward(student, teachers, target, labels, pos_weight, weights, scalars, host_weights, temperatures, combine,
#           kd_weight, ce_weight, scale_by_t2, reduction, num_items, uniform, labelled, terms, class_factor, need_grad)
#       logits [..., C], each of its own dtype and strides, and so are labels; `labelled`: they are labels, not only
#       which elements count; `pos_weight` A [C + 1], with the largest behind it; `scalars` as multi_teacher's
#    -> losses A [L] or [L, R]; rows, saved and aux as of multi_teacher_forward, for multi_teacher_backward
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def forward(student: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        reduction, terms, need_grad = rest[12], rest[16], rest[18]
        rows, classes = count_rows(student), student.shape[-1]
        dtype, three = accumulate_dtype(student.dtype), (3,) if terms else ()
        scaled = need_grad and student.dtype == torch.float16
        return (
            student.new_empty((*three, rows) if reduction == 0 else three, dtype=dtype),
            student.new_empty((rows, classes) if need_grad else (0,)),
            student.new_empty((rows,) if scaled else (0,), dtype=dtype),
            student.new_empty((2,), dtype=dtype),
        )

    torch.library.register_fake(f"{namespace}::multi_label_forward", forward)
