"""Sparse teachers' rows by the CPU kernel (csrc/topk): values and gradient of one teacher, its autograd.

For float rows x [R, C] and weights w [R], which hold all that multiplies a row's divergence:

    losses = w * divergence(x / T)        gradient = row_factor * w * d divergence / d x
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _topk_formula as formula
from fastkd.ops._autograd import Inputs, graph_is_kept, on_host, why_no_kernels
from fastkd.ops._formulas import Reduction, accumulate_dtype, count_rows, flat_rows
from fastkd.ops.topk import MODES, Mode

NO_CUDA = (
    "TopK teachers have a kernel of the CPU alone: they are plain PyTorch, the dense teachers beside them are native"
)
COMPILED = "TopK teachers are plain PyTorch in a compiled graph, which fuses them"


class Sparse(NamedTuple):
    """One sparse teacher, checked."""

    mode: Mode
    ids: Tensor  # [R, k]
    log_probs: Tensor | None  # [R, k]
    tail: Tensor | None  # [R]
    weight: float | Tensor  # [] or [R]
    temperature: float | Tensor


class Rows(NamedTuple):
    """What a teacher's rows are multiplied by and reduced with."""

    weight: Tensor  # float64 [R]; 0 for a row that is not read
    temperature: float
    reduction: Reduction
    factor: float  # of the rows' sum; 1 for "none"


def why_reference(student: Tensor, teachers: Sequence[Sparse], scalars: Sequence[float | Tensor]) -> str | None:
    """Why plain PyTorch computes the sparse teachers of a call, or None. `scalars`: kd_weight, num_items."""
    reason = why_no_kernels(student)
    if reason is not None:
        return reason
    if _backend.device_kind(student) != "cpu":
        return NO_CUDA
    if torch.compiler.is_compiling():
        return COMPILED
    if not on_host((*scalars, *[t.temperature for t in teachers])):
        return "kd_weight, num_items or the temperature is a tensor that requires grad or is not on the host"
    if torch.is_grad_enabled() and any(isinstance(t.weight, Tensor) and t.weight.requires_grad for t in teachers):
        return "the weights require grad"
    return None


def run_rows(
    student: Tensor, teacher: Sparse, weight: Tensor, temperature: float, row_factor: float, need_grad: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Weighted losses [R]; the gradient [R, C] in the student's dtype; of float16 what its rows lack, [R]."""
    log_probs, tail = teacher.log_probs, teacher.tail
    out: tuple[Tensor, Tensor, Tensor] = torch.ops.fastkd.topk_forward(
        student, teacher.ids.long().contiguous(),
        None if log_probs is None else log_probs.detach().double().contiguous(),
        None if tail is None else tail.detach().double().contiguous(),
        weight, MODES.index(teacher.mode), temperature, row_factor, need_grad,
    )  # fmt: skip
    return out


def has_kernel(student: Tensor) -> bool:
    return _backend.device_kind(student) == "cpu" and _backend.why_not_native(student) is None


def weighted_rows(
    student: Tensor, teacher: Sparse, weight: float | Tensor, temperature: float, need_grad: bool
) -> tuple[Tensor, Tensor]:
    """`weight`, a number or [R], times the divergences [R], and their gradient, of float32 or float64 rows."""
    weights = torch.as_tensor(weight, dtype=torch.float64).expand(student.shape[0]).contiguous()
    return run_rows(student, teacher, weights, temperature, 1.0, need_grad)[:2]


def loss_of(student: Tensor, teacher: Sparse, rows: Rows) -> Tensor:
    """The reduced loss of logits [..., C], or [R] for reduction="none"; in float32, or float64 for float64."""
    loss: Tensor = _Native.apply(student, teacher, rows)
    return loss


class _Native(torch.autograd.Function):
    """The loss with its gradient stored; that of a backward with create_graph=True goes through the formula."""

    @staticmethod
    def forward(ctx: Any, student: Tensor, teacher: Sparse, rows: Rows) -> Tensor:
        need = ctx.needs_input_grad[0]
        losses, *stored = run_rows(student, teacher, rows.weight, rows.temperature, rows.factor, need)
        ctx.rows, ctx.teacher, ctx.shape = rows, teacher, student.shape
        if need:
            missing = rows.factor if student.dtype == torch.float16 else 1.0
            ctx.stored = (*stored, losses.new_tensor([missing, 0.0]))
            ctx.inputs = Inputs((student,))
        if rows.reduction == "none":
            return losses
        return (losses.double().sum() * rows.factor).to(losses.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.stored is None:
            raise RuntimeError(
                "multi_teacher_kd: Trying to backward through the graph a second time; say retain_graph=True the first "
                "time"
            )
        if torch.is_grad_enabled():
            return _second_derivative(ctx, grad), None, None
        kept = graph_is_kept()
        gradient, saved, aux = ctx.stored
        if not kept:
            ctx.stored = ctx.inputs = None
        result = native.gradient_from(ctx.rows.reduction, grad, gradient, saved, aux, given_away=not kept)
        result = result.clone() if kept and result is gradient else result
        return result.view(ctx.shape), None, None


def _second_derivative(ctx: Any, grad: Tensor) -> Tensor:
    (student,) = ctx.inputs.unchanged("multi_teacher_kd")
    rows, teacher = ctx.rows, ctx.teacher
    x = flat_rows(student).to(accumulate_dtype(student.dtype)) / rows.temperature
    x = x.masked_fill((rows.weight == 0)[:, None], 0)
    entries = formula.entries_of(
        teacher.mode, teacher.ids, teacher.log_probs, teacher.tail, rows.temperature, rows.weight != 0
    )
    losses = rows.weight * formula.divergence(teacher.mode, entries, x)
    loss = losses if rows.reduction == "none" else losses.sum() * rows.factor
    result: Tensor = torch.autograd.grad(loss.to(grad.dtype), student, grad, create_graph=True)[0]
    return result


def register_fakes(namespace: str) -> None:
    if namespace != "fastkd":  # the host build of the CUDA kernels has none of it
        return

    def topk_forward(
        student: Tensor, ids: Tensor, log_probs: Tensor | None, log_tail: Tensor | None, weight: Tensor, mode: int,
        temperature: float, row_factor: float, need_grad: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        rows, dtype = count_rows(student), accumulate_dtype(student.dtype)
        scaled = need_grad and student.dtype == torch.float16
        gradient = student.new_empty((rows, student.shape[-1]) if need_grad else (0,))
        return (
            student.new_empty((rows,), dtype=dtype),
            gradient,
            student.new_empty((rows if scaled else 0,), dtype=dtype),
        )

    torch.library.register_fake(f"{namespace}::topk_forward", topk_forward)
