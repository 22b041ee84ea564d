"""One launch of the native losses of multi_teacher_kd: the raw operations, their fake kernels, autograd."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, get_args

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_formula as formula
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._autograd import (
    Inputs,
    graph_is_kept,
    may_read_values,
    save_for_backward,
    with_kept,
)
from fastkd.ops._divergences import KINDS
from fastkd.ops._formulas import Reduction, accumulate_dtype, count_rows
from fastkd.ops._inputs import REDUCTIONS, out_of_range
from fastkd.ops._multi_teacher_formula import Combine, Options, Tensors, classes_of

COMBINE = get_args(Combine)
# The longest row that a CUDA thread block holds in registers; a longer one is streamed twice (csrc/multi_teacher/op.h).
ON_CHIP_CLASSES = {torch.float64: 2048}
ON_CHIP_CLASSES_DEFAULT = 8192


def streams(student: Tensor, options: Options) -> bool:
    """Whether the backward reads all logits again instead of a stored gradient: rows too long for one CUDA block, or
    under softcaps and logit scales, which these kernels alone know."""
    if _backend.device_kind(student) == "cpu":
        return False
    if _backend.machine.stream_always or options.softcaps:
        return True
    return student.shape[-1] > ON_CHIP_CLASSES.get(student.dtype, ON_CHIP_CLASSES_DEFAULT)


def numbers_of(options: Options) -> tuple[Any, ...]:
    """The arguments that forward and stream_backward share after the tensors."""
    return (
        options.host_weights, options.temperatures, COMBINE.index(options.combine), options.kd_weight,
        options.ce_weight, options.label_smoothing, options.ignore_index, options.scale_by_t2,
        REDUCTIONS.index(options.reduction), options.num_items or 0.0, calls.is_uniform(options.host_weights),
        options.labels, options.terms, KINDS.index(options.divergence.kind), options.divergence.numbers,
        options.classes, options.softcaps, options.logit_scales,
    )  # fmt: skip


_remembered_numbers = functools.lru_cache(maxsize=128)(numbers_of)


def run(tensors: Tensors, options: Options, with_stats: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The losses, as losses_of() gives them; with_stats also kl [K, R] and the GroupStats [K + 1, R]."""
    options, scalars = calls.split(options)
    student, teachers, target, soft, weights, shares = tensors
    if torch.is_grad_enabled() and student.requires_grad:
        if not (torch.compiler.is_compiling() or streams(student, options)):
            return _stored(tensors, options, scalars, with_stats)
        out = _Native.apply(options, with_stats, student, target, soft, weights, shares, scalars, *teachers)
        out = (out,) if isinstance(out, Tensor) else out
    else:
        losses, _, _, _, *stats = forward(tensors, options, scalars, False, with_stats)
        out = (*(losses.unbind(0) if options.terms else (losses,)), *stats)
    count = 3 if options.terms else 1
    return out[:count], out[count:]


def forward(
    tensors: Tensors, options: Options, scalars: Tensor | None, need_grad: bool, with_stats: bool
) -> tuple[Tensor, ...]:
    student, teachers, target, _, weights, shares = tensors
    ops = _backend.native_ops(student)
    numbers = numbers_of(options) if torch.compiler.is_compiling() else _remembered_numbers(options)
    out: tuple[Tensor, ...]
    if with_stats:
        out = ops.multi_teacher_forward_stats(student, teachers, target, weights, shares, scalars, *numbers, need_grad)
    else:
        out = ops.multi_teacher_forward(*tensors, scalars, *numbers, need_grad, streams(student, options))
    if target is not None and options.labels and may_read_values(student) and out[3].tolist()[1] != 0:
        raise out_of_range(options.operation, target, classes_of(tensors, options), options.ignore_index)
    return out


class _Native(torch.autograd.Function):
    """The native loss, with `terms` KD and CE, and with_stats its statistics: kl [K, R], those of GroupStats.

    For rows that stream, whose backward reads the inputs, and for compiled graphs, which prune what they do not need.
    The backward asked for with create_graph=True goes through the reference formula.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, with_stats: bool, student: Tensor, target: Tensor | None, soft: Tensor | None,
        weights: Tensor | None, shares: Tensor | None, scalars: Tensor | None, *teachers: Tensor,
    ) -> Tensor | tuple[Tensor, ...]:  # fmt: skip
        tensors = Tensors(student, teachers, target, soft, weights, shares)
        inputs = (student, target, soft, weights, shares, scalars, *teachers)
        losses, rows, saved, aux, *stats = forward(tensors, options, scalars, True, with_stats)
        ctx.options, ctx.shape = options, student.shape
        save_for_backward(ctx, (saved, aux, rows, *inputs))
        if not (options.terms or with_stats):
            return losses
        # Clones: views of one tensor could not be changed in place.
        loss, *terms = [z.clone() for z in losses.unbind(0)] if options.terms else [losses]
        ctx.mark_non_differentiable(*terms, *stats)
        return loss, *terms, *stats

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        tensors = with_kept(ctx, ctx.saved_tensors)  # an error where the graph was freed
        result = _backward_of_inputs(ctx.options, grad, *tensors)
        result = result if result.shape == ctx.shape else result.view(ctx.shape)
        return None, None, result, *([None] * (len(ctx.needs_input_grad) - 3))


def _stored(
    tensors: Tensors, options: Options, scalars: Tensor | None, with_stats: bool
) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """native() of a student that learns, with a gradient that the kernels store."""
    beside: list[Tensor] = []
    loss: Tensor = Stored.apply(tensors.student, (tensors, options, scalars, with_stats), beside)
    terms = 2 if options.terms else 0
    return (loss, *beside[:terms]), beside[terms:]


class Stored(torch.autograd.Function):
    """_Native as a call at a time pays least for it: one tensor in, one out; what has no gradient goes to `beside`.

    The last pass through the graph gives the stored gradient away. A second derivative goes through the reference
    formula, from inputs that may have changed in place if nobody asks for one.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, call: tuple[Any, ...], beside: list[Tensor]) -> Tensor:
        tensors, options, scalars, with_stats = call
        out = forward(tensors, options, scalars, True, with_stats)
        loss = keep(ctx, tensors, options, scalars, out, beside)
        beside.extend(out[4:])
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.stored is None:
            raise RuntimeError(
                f"{ctx.options.operation}: Trying to backward through the graph a second time; say retain_graph=True "
                "the first time"
            )
        if torch.is_grad_enabled():
            result = _second_derivative(ctx.options, grad, *ctx.inputs.unchanged(ctx.options.operation))
        else:
            result = _backward_of_rows(ctx, grad, *ctx.stored)
        return result if result.shape == ctx.shape else result.view(ctx.shape), None, None


def keep(
    ctx: Any, tensors: Tensors, options: Options, scalars: Tensor | None, out: Sequence[Tensor], beside: list[Tensor]
) -> Tensor:
    """For Stored.backward, from what the operation returned; the loss. Its terms go to `beside`."""
    losses, *stored = out[:4]
    ctx.options, ctx.shape, ctx.stored = options, tensors.student.shape, stored
    student, teachers, *rest = tensors
    ctx.inputs = Inputs((student, *rest, scalars, *teachers))
    if not options.terms:
        return losses
    loss, *terms = [z.clone() for z in losses.unbind(0)]  # views of one tensor could not be changed in place
    beside.extend(terms)
    return loss


def _second_derivative(
    options: Options, grad: Tensor, student: Tensor, target: Tensor | None, soft: Tensor | None,
    weights: Tensor | None, shares: Tensor | None, scalars: Tensor | None, *teachers: Tensor,
) -> Tensor:  # fmt: skip
    tensors = Tensors(student, teachers, target, soft, weights, shares)
    loss = formula.reference(tensors, calls.joined(options, scalars))[0]
    return torch.autograd.grad(loss, student, grad, create_graph=True)[0]


def _backward_of_inputs(
    options: Options, grad: Tensor, saved: Tensor, aux: Tensor, rows: Tensor, student: Tensor, target: Tensor | None,
    soft: Tensor | None, weights: Tensor | None, shares: Tensor | None, scalars: Tensor | None,
    *teachers: Tensor,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return _second_derivative(options, grad, student, target, soft, weights, shares, scalars, *teachers)
    ops = _backend.native_ops(student)
    if not streams(student, options):
        reduction = REDUCTIONS.index(options.reduction)
        result: Tensor = ops.multi_teacher_backward(grad.contiguous(), rows, saved, aux, reduction)
        return result
    result = ops.multi_teacher_stream_backward(
        grad.contiguous(), student, teachers, target, soft, weights, shares, scalars, saved, aux, *numbers_of(options)
    )
    return result


def gradient_from(
    reduction: Reduction, grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, given_away: bool = False
) -> Tensor:
    """The student's gradient [R, C], for a gradient of the losses, from what the forward stored: maybe `rows`.

    given_away: nobody reads `rows` again. On a GPU it then becomes the gradient in place, where a kernel sees whether
    anything is left to do.
    """
    number = REDUCTIONS.index(reduction)
    if given_away and _backend.device_kind(rows) != "cpu":
        _backend.native_ops(rows).multi_teacher_backward_(grad.contiguous(), rows, saved, aux, number)
        return rows
    # On the CPU the mean's factor is in the stored rows.
    ready = reduction != "none" and rows.dtype != torch.float16 and _backend.device_kind(rows) == "cpu"
    # A fake tensor has no value to look at.
    if ready and type(grad) is Tensor and grad.item() == 1.0:
        return rows
    result: Tensor = _backend.native_ops(rows).multi_teacher_backward(grad.contiguous(), rows, saved, aux, number)
    return result


def _backward_of_rows(ctx: Any, grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor) -> Tensor:
    """From the stored gradient. The last pass through the graph gives it away, or frees it."""
    kept = graph_is_kept()
    if not kept:
        ctx.stored = ctx.inputs = None
    result = gradient_from(ctx.options.reduction, grad, rows, saved, aux, given_away=not kept)
    return result.clone() if kept and result is rows else result


# csrc/multi_teacher/op.cpp registers, with R rows of C classes, A = float64 for float64 logits, else float32, and L = 3
# with `terms` (the loss, KD, CE), else one loss without that dimension:
#   forward(student, teachers, target, soft, weights, shares, scalars, host_weights, temperatures, combine, kd_weight,
#           ce_weight, label_smoothing, ignore_index, scale_by_t2, reduction, num_items, uniform, labels, terms,
#           divergence, divergence_numbers, classes, softcaps, logit_scales, need_grad, stream)
#       logits [..., C], each of its own dtype and strides; `scalars` float64 [3 + temperatures] on the CPU, or None:
#       kd_weight, ce_weight, num_items (0: none), temperatures, in the place of the numbers; `labels`: the target holds
#       classes, not only the rows that are ignored; `divergence`: an index of KINDS; `shares` A [2] or [2, R], or None,
#       in the place of its numbers; `classes`: of the student's columns (0: all), whose gradient is 0 behind them
#    -> losses A [L] or [L, R]; rows [R, C]: the row's gradient without reduction and grad_output;
#       saved A: [R] the power of two that float16 rows were multiplied by, or [R, 3K + 2] states to stream again
#       (one more with soft targets, K more of divergences besides forward, also without gradient); aux A [2]: the
#       factor that `rows` still lacks (1 / rows that count), targets out of range
#   forward_stats(...), without `soft` and `stream` -> these; kl A [K, R]; the GroupStats of student and teachers, each
#       [K + 1, R]
#   backward(grad_output, rows, saved, aux, reduction) -> [R, C]
#   backward_(grad_output, rows, saved, aux, reduction): the same in place
#   stream_backward(grad_output, student, ..., scalars, saved, aux, host_weights, ..., terms) -> [R, C]
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def forward(
        student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, soft: Tensor | None,
        weights: Tensor | None, shares: Tensor | None, scalars: Tensor | None, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        reduction, terms, other, (need_grad, stream) = options[8], options[12], options[13] != 0, options[-2:]
        rows, classes = count_rows(student), student.shape[-1]
        dtype, three = accumulate_dtype(student.dtype), (3,) if terms else ()
        stored, streamed = need_grad and not stream, stream and (need_grad or other)
        scaled = stored and student.dtype == torch.float16
        states = (4 if other else 3) * len(teachers) + (2 if soft is None else 3)
        return (
            student.new_empty((*three, rows) if reduction == 0 else three, dtype=dtype),
            student.new_empty((rows, classes) if stored else (0,)),
            student.new_empty((rows, states) if streamed else (rows,) if scaled else (0,), dtype=dtype),
            student.new_empty((2,), dtype=dtype),
        )

    def forward_stats(
        student: Tensor, teachers: Sequence[Tensor], target: Tensor | None, weights: Tensor | None,
        shares: Tensor | None, scalars: Tensor | None, *options: Any,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        rows, dtype = count_rows(student), accumulate_dtype(student.dtype)
        dtypes = (dtype, torch.bool, torch.int64, dtype, dtype, dtype)
        stats = [student.new_empty((len(teachers) + 1, rows), dtype=d) for d in dtypes]
        kl = student.new_empty((len(teachers), rows), dtype=dtype)
        return (*forward(student, teachers, target, None, weights, shares, scalars, *options, False), kl, *stats)

    def backward(grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, reduction: int) -> Tensor:
        return torch.empty_like(rows)

    def backward_(grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, reduction: int) -> None: ...

    def stream_backward(grad: Tensor, student: Tensor, *rest: Any) -> Tensor:
        return student.new_empty((count_rows(student), student.shape[-1]))

    torch.library.register_fake(f"{namespace}::multi_teacher_forward", forward)
    torch.library.register_fake(f"{namespace}::multi_teacher_forward_stats", forward_stats)
    torch.library.register_fake(f"{namespace}::multi_teacher_backward", backward)
    torch.library.register_fake(f"{namespace}::multi_teacher_backward_", backward_)
    torch.library.register_fake(f"{namespace}::multi_teacher_stream_backward", stream_backward)
