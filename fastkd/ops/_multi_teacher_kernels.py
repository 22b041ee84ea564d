"""Which kernels run a checked call of multi_teacher_kd, or why plain PyTorch does; autograd; the fake kernels."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _backend
from fastkd.ops import _multi_teacher_formula as formula
from fastkd.ops import group_stats
from fastkd.ops._autograd import (
    Inputs,
    graph_is_kept,
    host_scalars,
    is_transformed,
    may_read_values,
    on_host,
    save_for_backward,
    with_kept,
)
from fastkd.ops._divergences import FORWARD, KINDS
from fastkd.ops._formulas import accumulate_dtype, count_rows
from fastkd.ops._inputs import REDUCTIONS, check_range, out_of_range, why_learning
from fastkd.ops._multi_teacher_formula import Combine, Options, Tensors, classes_of
from fastkd.ops.group_stats import GroupStats

COMBINE = get_args(Combine)
LAUNCH_TEACHERS = 16  # teachers of one CUDA launch; more go in groups
# The longest row that a CUDA thread block holds in registers; a longer one is streamed twice (csrc/multi_teacher/op.h).
ON_CHIP_CLASSES = {torch.float64: 2048}
ON_CHIP_CLASSES_DEFAULT = 8192


class DistillationStats(NamedTuple):
    """What `return_stats=True` adds: all detached, in float32 (float64 for float64 logits).

    kl: [K], the mean over the rows that count of KL(p_k || q) at the temperature, without weight and T^2.
    student: GroupStats of the student, each [1, R]. teachers: GroupStats of the teachers, each [K, R].

    >>> student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 1e4]])
    >>> loss, stats = fastkd.functional.multi_teacher_kd(student, [teacher], temperature=1.0, return_stats=True)
    >>> round(stats.kl.item(), 4), stats.teachers.confidence.item()  # a sure teacher, a student without a clue: log 2
    (0.6931, 1.0)
    """

    kl: Tensor
    student: GroupStats
    teachers: GroupStats


def losses_of(tensors: Tensors, options: Options) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    if (reason := why_reference(tensors, options)) is not None:
        _backend.note_fallback(options.operation, reason, tensors.student)
        if options.labels:
            check_range(options.operation, tensors.target, classes_of(tensors, options), options.ignore_index)
        return formula.reference(tensors, options)
    return _in_groups(tensors, options) if _too_many(tensors) else _native(tensors, options, False)[0]


def _too_many(tensors: Tensors) -> bool:
    return len(tensors.teachers) > LAUNCH_TEACHERS and _backend.device_kind(tensors.student) != "cpu"


def _streams(student: Tensor) -> bool:
    """Whether the backward reads all logits again instead of a stored gradient: rows too long for one CUDA block."""
    if _backend.device_kind(student) == "cpu":
        return False
    if _backend.machine.stream_always:
        return True
    return student.shape[-1] > ON_CHIP_CLASSES.get(student.dtype, ON_CHIP_CLASSES_DEFAULT)


def runs_apart(tensors: Tensors) -> bool:
    """Whether one launch does not take the call, or leaves states in the place of a gradient."""
    return _too_many(tensors) or _streams(tensors.student)


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
        losses = _native(some, rest, False)[0]
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
    if _backend.device_kind(student) != "cpu":
        if options.divergence != FORWARD and _streams(student):
            return "the CUDA kernels take divergences besides forward in rows of at most 8192 classes (float64: 2048)"
        if options.softcaps:
            return "the CUDA kernels take neither softcap nor logit_scale"
    if options.combine != "losses" and _too_many(tensors):
        return f"combine={options.combine!r} with more than {LAUNCH_TEACHERS} teachers"
    return None


def _split(options: Options) -> tuple[Options, Tensor | None]:
    """The options without tensors, and the numbers that the kernels read from `scalars` in their place."""
    items = 0.0 if options.num_items is None else options.num_items
    scalars = host_scalars((options.kd_weight, options.ce_weight, items, *options.temperatures))
    if scalars is None:
        return options, None
    ones = (1.0,) * len(options.temperatures)
    weight = 1.0 if isinstance(options.ce_weight, Tensor) else options.ce_weight
    return options._replace(kd_weight=1.0, ce_weight=weight, num_items=None, temperatures=ones), scalars


def _joined(options: Options, scalars: Tensor | None) -> Options:
    """What _split() took apart."""
    if scalars is None:
        return options
    kd_weight, ce_weight, items, *temperatures = scalars.tolist()
    return options._replace(
        kd_weight=kd_weight, ce_weight=ce_weight, num_items=items or None, temperatures=tuple(temperatures)
    )


def _numbers(options: Options) -> tuple[Any, ...]:
    """The arguments that forward and stream_backward share after the tensors."""
    return (
        options.host_weights, options.temperatures, COMBINE.index(options.combine), options.kd_weight,
        options.ce_weight, options.label_smoothing, options.ignore_index, options.scale_by_t2,
        REDUCTIONS.index(options.reduction), options.num_items or 0.0, formula.is_uniform(options),
        options.labels, options.terms, KINDS.index(options.divergence.kind), options.divergence.numbers,
        options.classes, options.softcaps, options.logit_scales,
    )  # fmt: skip


_remembered_numbers = functools.lru_cache(maxsize=128)(_numbers)


def _native(tensors: Tensors, options: Options, with_stats: bool) -> tuple[Sequence[Tensor], Sequence[Tensor]]:
    """The losses, as losses_of() gives them; with_stats also kl [K, R] and the GroupStats [K + 1, R]."""
    options, scalars = _split(options)
    student, teachers, target, soft, weights, shares = tensors
    if torch.is_grad_enabled() and student.requires_grad:
        if not (torch.compiler.is_compiling() or _streams(student)):
            return _stored(tensors, options, scalars, with_stats)
        out = _Native.apply(options, with_stats, student, target, soft, weights, shares, scalars, *teachers)
        out = (out,) if isinstance(out, Tensor) else out
    else:
        losses, _, _, _, *stats = _forward(tensors, options, scalars, False, with_stats)
        out = (*(losses.unbind(0) if options.terms else (losses,)), *stats)
    count = 3 if options.terms else 1
    return out[:count], out[count:]


def _forward(
    tensors: Tensors, options: Options, scalars: Tensor | None, need_grad: bool, with_stats: bool
) -> tuple[Tensor, ...]:
    student, teachers, target, _, weights, shares = tensors
    ops = _backend.native_ops(student)
    numbers = _numbers(options) if torch.compiler.is_compiling() else _remembered_numbers(options)
    out: tuple[Tensor, ...]
    if with_stats:
        out = ops.multi_teacher_forward_stats(student, teachers, target, weights, shares, scalars, *numbers, need_grad)
    else:
        out = ops.multi_teacher_forward(*tensors, scalars, *numbers, need_grad, _streams(student))
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
        losses, rows, saved, aux, *stats = _forward(tensors, options, scalars, True, with_stats)
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
    """_native() of a student that learns, with a gradient that the kernels store."""
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
        out = _forward(tensors, options, scalars, True, with_stats)
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
    loss = formula.reference(tensors, _joined(options, scalars))[0]
    return torch.autograd.grad(loss, student, grad, create_graph=True)[0]


def _backward_of_inputs(
    options: Options, grad: Tensor, saved: Tensor, aux: Tensor, rows: Tensor, student: Tensor, target: Tensor | None,
    soft: Tensor | None, weights: Tensor | None, shares: Tensor | None, scalars: Tensor | None,
    *teachers: Tensor,
) -> Tensor:  # fmt: skip
    if torch.is_grad_enabled():
        return _second_derivative(options, grad, student, target, soft, weights, shares, scalars, *teachers)
    ops = _backend.native_ops(student)
    if not _streams(student):
        reduction = REDUCTIONS.index(options.reduction)
        result: Tensor = ops.multi_teacher_backward(grad.contiguous(), rows, saved, aux, reduction)
        return result
    result = ops.multi_teacher_stream_backward(
        grad.contiguous(), student, teachers, target, soft, weights, shares, scalars, saved, aux, *_numbers(options)
    )
    return result


def gradient_from(
    options: Options, grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, given_away: bool = False
) -> Tensor:
    """The student's gradient [R, C], for a gradient of the losses, from what the forward stored: maybe `rows`.

    given_away: nobody reads `rows` again. On a GPU it then becomes the gradient in place, where a kernel sees whether
    anything is left to do.
    """
    reduction = REDUCTIONS.index(options.reduction)
    if given_away and _backend.device_kind(rows) != "cpu":
        _backend.native_ops(rows).multi_teacher_backward_(grad.contiguous(), rows, saved, aux, reduction)
        return rows
    # On the CPU the mean's factor is in the stored rows.
    ready = options.reduction != "none" and rows.dtype != torch.float16 and _backend.device_kind(rows) == "cpu"
    # A fake tensor has no value to look at.
    if ready and type(grad) is Tensor and grad.item() == 1.0:
        return rows
    result: Tensor = _backend.native_ops(rows).multi_teacher_backward(grad.contiguous(), rows, saved, aux, reduction)
    return result


def _backward_of_rows(ctx: Any, grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor) -> Tensor:
    """From the stored gradient. The last pass through the graph gives it away, or frees it."""
    kept = graph_is_kept()
    if not kept:
        ctx.stored = ctx.inputs = None
    result = gradient_from(ctx.options, grad, rows, saved, aux, given_away=not kept)
    return result.clone() if kept and result is rows else result


def with_statistics(tensors: Tensors, options: Options) -> tuple[Sequence[Tensor], DistillationStats]:
    """The losses and the statistics of their inputs, from one pass where the row is at hand as a whole."""
    apart = why_reference(tensors, options) is not None or _too_many(tensors) or _streams(tensors.student)
    if options.divergence != FORWARD and _backend.device_kind(tensors.student) != "cpu":
        apart = True
    if apart or tensors.soft is not None:
        left, rest = formula.without_zeros(tensors, options)
        return losses_of(left, rest), _separate_statistics(tensors, options)
    losses, (kl, *stats) = _native(tensors, options, True)
    return losses, _statistics(tensors, options, kl, GroupStats(*stats))


def _statistics(tensors: Tensors, options: Options, kl: Tensor, stats: GroupStats) -> DistillationStats:
    """From divergences [K, R] and the statistics of student and teachers [K + 1, R]."""
    target = tensors.target
    counted = torch.ones_like(kl[:1]) if target is None else (target != options.ignore_index)[None]
    # Summed with the counts: torch splits a single row among threads, whose number would change the last bits.
    sums = torch.cat([kl.double(), counted.double()]).sum(-1)
    mean = (sums[:-1] / sums[-1].clamp(min=1)).to(kl.dtype)
    return DistillationStats(mean, GroupStats(*[t[:1] for t in stats]), GroupStats(*[t[1:] for t in stats]))


@torch.no_grad()
def _separate_statistics(tensors: Tensors, options: Options) -> DistillationStats:
    """The statistics by a second read of the logits: where the loss's own pass does not give them."""
    labelled = options.labels or tensors.soft is not None
    soft = {} if tensors.soft is None else {"soft": tensors.soft.detach()}
    target = tensors.target if labelled else None
    networks = formula.plain(tensors, options)
    stats = group_stats.statistics((networks.student, *networks.teachers), target, options.ignore_index, **soft)
    if why_reference(tensors, options) is not None:
        with forward_ad._set_fwd_grad_enabled(False):
            kl = formula.reference_divergences(tensors, options)
    else:
        kl = torch.stack([_divergences(tensors, options, k) for k in range(len(tensors.teachers))])
    return _statistics(tensors, options, kl, stats)


def _divergences(tensors: Tensors, options: Options, k: int) -> Tensor:
    """KL(p_k || q) of each row, [R], by the kernels."""
    t = options.temperatures[k if len(options.temperatures) > 1 else 0]
    one = options._replace(
        host_weights=(1.0,), temperatures=(t,), combine="losses", kd_weight=1.0, ce_weight=0.0, scale_by_t2=False,
        reduction="none", num_items=None, terms=False, divergence=FORWARD,
    )  # fmt: skip
    alone = tensors._replace(teachers=(tensors.teachers[k],), soft=None, weights=None, shares=None)
    return _native(alone, formula.with_caps_of(one, [k]), False)[0][0]


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
#       (3K + 3 with soft targets); aux A [2]: the factor that `rows` still lacks (1 / rows that count), targets out of
#       range
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
        reduction, terms, (need_grad, stream) = options[8], options[12], options[-2:]
        rows, classes = count_rows(student), student.shape[-1]
        dtype, three = accumulate_dtype(student.dtype), (3,) if terms else ()
        stored, streamed = need_grad and not stream, need_grad and stream
        scaled = stored and student.dtype == torch.float16
        states = 3 * len(teachers) + (2 if soft is None else 3)
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
