"""The native relational losses: raw operations, their fake kernels, autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops._autograd import Inputs, graph_is_kept, save_for_backward, with_kept
from fastkd.ops._inputs import REDUCTIONS
from fastkd.ops._relational_formula import (
    DISTANCE,
    Options,
    Tensors,
    over_all_rows,
    result_dtype,
    share,
)

# What the native kernels keep of the distances (csrc/relational/op.h).
KIND_DISTANCE, KIND_SINGLE, KIND_FULL = 0, 1, 2


def run(tensors: Tensors, options: Options) -> Tensor:
    student, teacher, mask = tensors
    if mask is not None:  # a row that does not count may hold NaN
        student, teacher = (x.masked_fill(~mask[:, None], 0) for x in (student, teacher))
    if not (torch.is_grad_enabled() and student.requires_grad):
        loss = _forward(Tensors(student, teacher, mask), options, None, False)[0]
    else:
        loss = _Native.apply(options, student, teacher, mask)
    return loss if mask is None else loss * share(options, mask).to(loss.dtype)


# From so many rows on, distances are taken from a Gram matrix on a GPU with fast float64: chosen by prediction.
GRAM_ROWS = 2048


# csrc/relational/op.cpp registers, all in float64 but for the planes of KIND_SINGLE:
#   sides(x centred [N, D], x x^T, mask [N], kind, eps)
#        -> planes [1 to 3, N, N padded] of the distances relative to their mean, 0 beside rows that do not count;
#           [2] that mean and the number of positive distances
#   loss(planes, planes, student's mean, weight [N] of the N losses, kind, reduction, need_grad)
#        -> loss [] or [N]; the matrix [N, N] whose product with the student's centred rows is the gradient
# and without a Gram matrix, in x's float32 or float64 (of angles in the planes' dtype, and on CUDA alone):
#   distances(x [N, D], mask, kind, eps) -> planes; [3] the distances' mean, their number, the rows' scale; scaled rows
#   pull(matrix of loss, rows, mean, D) -> the gradient [N, D]
# Means are over all N rows; rows that do not count hold zeros.
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.
def _padded(n: int) -> int:
    """As csrc/relational/op.h pads: an odd number of 32s."""
    return ((n + 31) // 32 // 2 * 2 + 1) * 32


def register_fakes(namespace: str) -> None:
    """The shapes that the raw operations of `namespace` return, for torch.compile and torch.export."""

    def planes_of(x: Tensor, kind: int) -> Tensor:
        planes = {KIND_DISTANCE: 1, KIND_SINGLE: 3, KIND_FULL: 2}[kind]
        dtype = torch.float32 if kind == KIND_SINGLE else torch.float64
        return x.new_empty((planes, x.shape[0], _padded(x.shape[0])), dtype=dtype)

    def sides(x: Tensor, gram: Tensor, mask: Tensor | None, kind: int, eps: float) -> tuple[Tensor, ...]:
        return planes_of(x, kind), x.new_empty((2,))

    def loss(
        student: Tensor, teacher: Tensor, mean: Tensor, weight: Tensor | None, kind: int, reduction: int,
        need_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n = student.shape[1]
        square = (n, n) if need_grad else (0, 0)
        return mean.new_empty((n,) if reduction == 0 else ()), mean.new_empty(square)

    def distances(x: Tensor, mask: Tensor | None, kind: int, eps: float) -> tuple[Tensor, ...]:
        rows = x.new_empty((x.shape[0], (x.shape[1] + 15) // 16 * 16))
        return planes_of(x, kind), x.new_empty((3,), dtype=torch.float64), rows

    def pull(laplacian: Tensor, rows: Tensor, mean: Tensor, columns: int) -> Tensor:
        return rows.new_empty((rows.shape[0], columns))

    torch.library.register_fake(f"{namespace}::relational_distances", distances)
    torch.library.register_fake(f"{namespace}::relational_pull", pull)
    torch.library.register_fake(f"{namespace}::relational_sides", sides)
    torch.library.register_fake(f"{namespace}::relational_loss", loss)


def _kind(tensors: Tensors, options: Options) -> int:
    if options.op == DISTANCE:
        return KIND_DISTANCE
    return KIND_FULL if result_dtype(tensors) == torch.float64 else KIND_SINGLE


def _sums_differences(student: Tensor, op: str) -> bool:
    """Whether distances are summed from differences, else taken from a Gram matrix in float64."""
    if _backend.device_kind(student) == "cpu":  # has half of float32's rate for float64
        return op == DISTANCE
    if not _backend.has_fast_float64(student) or torch.compiler.is_exporting():  # an exported program has any N
        return True
    return op == DISTANCE and student.shape[0] < GRAM_ROWS


def centred(x: Tensor, mask: Tensor | None = None) -> Tensor:
    x = x.double()
    if mask is None:
        return x - x.mean(0)
    return (x - x.sum(0) / mask.sum().clamp(min=1)).masked_fill(~mask[:, None], 0)


def _forward(
    tensors: Tensors, options: Options, weight: Tensor | None, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient [N, D] in float32 (float64 where the loss is) of its sum weighted by `weight` [N]."""
    student, teacher, mask = tensors
    ops, dtype, kind = _backend.native_ops(student), result_dtype(tensors), _kind(tensors, options)
    direct = _sums_differences(student, options.op)
    if direct:
        planes, mean, rows = ops.relational_distances(student.to(dtype), mask, kind, options.eps)
        targets, *_ = ops.relational_distances(teacher.to(dtype), mask, kind, options.eps)
    else:
        # float64: from a float32 Gram matrix the distances within tight clusters are noise. Autocast leaves it alone.
        rows, others = centred(student, mask), centred(teacher, mask)
        planes, mean = ops.relational_sides(rows, rows @ rows.T, mask, kind, options.eps)
        targets, _ = ops.relational_sides(others, others @ others.T, mask, kind, options.eps)
    reduction = REDUCTIONS.index(options.reduction)
    loss, laplacian = ops.relational_loss(planes, targets, mean, weight, kind, reduction, need_grad)
    if not need_grad:
        return loss.to(dtype), None
    # Half-precision students, too: in float16 a small gradient would be lost before a loss scale saves it.
    if direct:
        return loss.to(dtype), ops.relational_pull(laplacian, rows, mean, student.shape[1])
    return loss.to(dtype), (laplacian @ rows).to(dtype)


class _Native(torch.autograd.Function):
    """The native loss. The backward asked for with create_graph=True goes through the reference formula."""

    @staticmethod
    def forward(ctx: Any, options: Options, student: Tensor, teacher: Tensor, mask: Tensor | None) -> Tensor:
        tensors = Tensors(student, teacher, mask)
        # The gradient of N losses with N factors is known in the backward only, which computes all again.
        loss, grad = _forward(tensors, options, None, options.reduction != "none")
        ctx.options, ctx.dtype, ctx.grad, ctx.inputs = options, student.dtype, None, None
        if grad is not None and not torch.compiler.is_compiling():
            ctx.grad, ctx.inputs = grad, Inputs(tensors)
        else:
            save_for_backward(ctx, (grad, *tensors))
        return loss

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[None, Tensor | None, None, None]:
        tensors: Sequence[Any]
        result: Tensor | None
        saved = ctx.saved_tensors  # an error where the graph was freed
        if ctx.inputs is None:
            grad, *tensors = with_kept(ctx, saved)
        else:
            grad, tensors = ctx.grad, ctx.inputs.unchanged(ctx.options.op) if torch.is_grad_enabled() else []
            if not graph_is_kept():
                ctx.grad = ctx.inputs = None
        if torch.is_grad_enabled():
            loss = over_all_rows(Tensors(*tensors), ctx.options)
            (result,) = torch.autograd.grad(loss, tensors[0], grad_loss, create_graph=True)
        elif grad is None:
            _, result = _forward(Tensors(*tensors), ctx.options, grad_loss.double(), True)
        else:
            result = grad * grad_loss
        return None, None if result is None else result.to(ctx.dtype), None, None
