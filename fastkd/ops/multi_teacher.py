"""One learner, K teachers: the KL divergences to all of them and the cross-entropy with the labels, in one pass.

Per row, with p_k = softmax(t_k / T), q = softmax(s / T) and the weights w_k (kernels: csrc/multi_teacher/README.md):

    combine="losses"   T^2 * sum_k w_k KL(p_k || q)                      (several T: each term with its own T and T^2)
    combine="probs"    T^2 * KL(sum_k w_k p_k || q)
    combine="logits"   T^2 * KL(softmax(sum_k w_k t_k / T) || q)
    plus               ce_weight * cross_entropy(s, target, label_smoothing)

A row whose target is `ignore_index` counts nowhere. A class that is -inf in learner and teachers counts 0; a learner
that is -inf where a teacher is finite gives +inf.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _backend
from fastkd.ops import _common as common
from fastkd.ops import _networks as networks
from fastkd.ops import group_stats
from fastkd.ops.group_stats import GroupStats

OP = "multi_teacher_kd"
COMBINE = ("losses", "probs", "logits")
INF = math.inf
LAUNCH_TEACHERS = 16  # teachers of one CUDA launch; more go in groups
# The longest row that a CUDA thread block holds in registers; a longer one is streamed twice (csrc/multi_teacher/op.h).
ON_CHIP_CLASSES = {torch.float64: 2048}
ON_CHIP_CLASSES_DEFAULT = 8192


class DistillationStats(NamedTuple):
    """What `return_stats=True` adds: all detached, in float32 (float64 for float64 logits).

    kl: [K], the mean over the rows that count of KL(p_k || q) at the temperature, without weight and T^2.
    student: GroupStats of the student, each [1, R]. teachers: GroupStats of the teachers, each [K, R].
    """

    kl: Tensor
    student: GroupStats
    teachers: GroupStats


class Call(NamedTuple):
    """A checked call: rows flattened, options resolved."""

    student: Tensor  # [R, C]
    teachers: tuple[Tensor, ...]  # K x [R, C]
    target: Tensor | None  # int64 [R]
    weights: Tensor | None  # [K] or [K, R] on the device, where they are not known on the host
    host_weights: tuple[float, ...]  # K numbers, empty where `weights` is a tensor
    temperatures: tuple  # one number or 0-d tensor, or K of them
    combine: str
    ce_weight: float
    label_smoothing: float
    ignore_index: int
    scale_by_t2: bool
    reduction: str
    leading: torch.Size


# --- reference ---------------------------------------------------------------------------------------------------


def _mixture(log_ps: Sequence[Tensor], weights: Sequence) -> Tensor:
    """log sum_k w_k p_k, [R, C], without underflow and with finite gradients where the sum is 0."""
    top = torch.stack([lp.detach() for lp in log_ps]).amax(0).clamp(min=torch.finfo(log_ps[0].dtype).min)
    total = sum(w * (lp - top).exp() for w, lp in zip(weights, log_ps, strict=True))
    empty = total == 0
    return (total.masked_fill(empty, 1).log() + top).masked_fill(empty, -INF)


def _mean_logits(teachers: Sequence[Tensor], weights: Sequence) -> Tensor:
    """sum_k w_k t_k, [R, C]; -inf where a teacher that counts is."""
    masked = [t == -INF for t in teachers]
    total = sum(w * t.masked_fill(m, 0) for w, t, m in zip(weights, teachers, masked, strict=True))
    return total.masked_fill(sum((m & (w != 0)) for w, m in zip(weights, masked, strict=True)) > 0, -INF)


def _reference_kd(student: Tensor, teachers: Sequence[Tensor], weights: Sequence, call: Call) -> Tensor:
    temperatures = call.temperatures * (len(teachers) if len(call.temperatures) == 1 else 1)
    scales = [t * t if call.scale_by_t2 else 1.0 for t in temperatures]
    if call.combine == "losses":
        total = 0
        for teacher, weight, t, scale in zip(teachers, weights, temperatures, scales, strict=True):
            weight = weight[:, 0] if isinstance(weight, Tensor) else weight
            log_p, log_q = networks.log_softmax(teacher, t), networks.log_softmax(student, t)
            total = total + networks.weighted_divergence(log_p, log_q, weight, scale)
        return total
    if call.combine == "probs":
        log_p = _mixture([networks.log_softmax(t, temperatures[0]) for t in teachers], weights)
    else:
        log_p = networks.log_softmax(_mean_logits(teachers, weights), temperatures[0])
    return scales[0] * networks.divergence(log_p, networks.log_softmax(student, temperatures[0]))


def reference(call: Call) -> Tensor:
    """The specification in plain PyTorch: the loss by `call.reduction`, differentiable in all of its inputs."""
    dtype = common.accumulate_dtype(student_and_teachers_dtype(call))
    student, teachers = call.student.to(dtype), [t.to(dtype) for t in call.teachers]
    weights = call.host_weights  # K numbers, or K x [1 or R, 1]
    if call.weights is not None:
        weights = [w.reshape(-1, 1) for w in call.weights.to(dtype)]
    if call.target is None:
        return common.reduce_rows(_reference_kd(student, teachers, weights, call), None, call.reduction, (-1,))
    valid = call.target != call.ignore_index  # [R]
    inside = (call.target >= 0) & (call.target < student.shape[1])
    # Ignored rows leave before any arithmetic: what they hold (NaN, say) must not reach a gradient.
    student, *teachers = (z.masked_fill(~valid[:, None], 0) for z in (student, *teachers))
    rows = _reference_kd(student, teachers, weights, call)
    if call.ce_weight != 0:
        ce = torch_functional.cross_entropy(
            student, call.target.where(inside, 0), reduction="none", label_smoothing=call.label_smoothing
        )
        rows = rows + call.ce_weight * ce
    rows = rows * torch.ones_like(rows).masked_fill(valid & ~inside, math.nan)  # NaN in the gradient as well
    return common.reduce_rows(rows.masked_fill(~valid, 0), valid, call.reduction, (-1,))


def student_and_teachers_dtype(call: Call) -> torch.dtype:
    dtype = call.student.dtype
    for teacher in call.teachers:
        dtype = torch.promote_types(dtype, teacher.dtype)
    return dtype


def reference_divergences(call: Call) -> Tensor:
    """KL(p_k || q) of each teacher and row, [K, R]: 0 for ignored rows, NaN for labels out of range."""
    dtype, divergences = common.accumulate_dtype(student_and_teachers_dtype(call)), []
    for k, teacher in enumerate(call.teachers):
        temperature = call.temperatures[k if len(call.temperatures) > 1 else 0]
        log_q = networks.log_softmax(call.student.to(dtype), temperature)
        divergences.append(
            networks.divergence(networks.log_softmax(teacher.to(dtype), temperature), log_q).clamp(min=0)
        )
    kl = torch.stack(divergences)
    if call.target is None:
        return kl
    outside = (call.target < 0) | (call.target >= call.student.shape[1])
    return kl.masked_fill(outside, math.nan).masked_fill(call.target == call.ignore_index, 0)


def _statistics(call: Call, kl: Tensor, stats: GroupStats) -> DistillationStats:
    """From divergences [K, R] and the statistics of student and teachers [K + 1, R]."""
    counted = torch.ones_like(kl[:1]) if call.target is None else (call.target != call.ignore_index)[None]
    # Summed with the counts: torch splits a single row among threads, whose number would change the last bits.
    sums = torch.cat([kl.double(), counted.double()]).sum(-1)
    mean = (sums[:-1] / sums[-1].clamp(min=1)).to(kl.dtype)
    return DistillationStats(mean, GroupStats(*[t[:1] for t in stats]), GroupStats(*[t[1:] for t in stats]))


@torch.no_grad()
def _separate_statistics(call: Call) -> DistillationStats:
    """The statistics by a second read of the logits: where the loss's own pass does not give them."""
    stats = group_stats.statistics((call.student, *call.teachers), call.target, call.ignore_index)
    if why_reference(call) is not None:
        with forward_ad._set_fwd_grad_enabled(False):
            kl = reference_divergences(call)
    else:
        one = call._replace(weights=None, host_weights=(1.0,), combine="losses", ce_weight=0.0, scale_by_t2=False)
        one = one._replace(reduction="none")
        several = call.temperatures if len(call.temperatures) > 1 else call.temperatures * len(call.teachers)
        pairs = zip(call.teachers, several, strict=True)
        kl = torch.stack([_forward(one._replace(teachers=(z,), temperatures=(t,)), False)[0] for z, t in pairs])
    return _statistics(call, kl, stats)


# --- native: raw operations, fake kernels, autograd ---------------------------------------------------------------

# csrc/multi_teacher/op.cpp registers, with R rows of C classes and A = float64 for float64 logits, else float32:
#   forward(...) -> loss A [] or [R]; rows [R, C]: the row's gradient without reduction and grad_output;
#                   saved A: [R] the power of two that float16 rows were multiplied by, or [R, 3K + 2] states to stream
#                   again; aux A [2]: the factor that `rows` still lacks (1 / rows that count), targets out of range
#   forward_stats(...), without `stream` -> these; kl A [K, R]; the GroupStats of student and teachers, each [K + 1, R]
#   backward(grad_output, rows, saved, aux, reduction) -> [R, C];   stream_backward(...) -> [R, C]
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def forward(
        student, teachers, target, weights, host_weights, temperatures, combine, ce_weight, label_smoothing,
        ignore_index, scale_by_t2, reduction, need_grad, stream,
    ):  # fmt: skip
        (rows, classes), k = student.shape, len(teachers)
        dtype = common.accumulate_dtype(student.dtype)
        stored, streamed = need_grad and not stream, need_grad and stream
        scaled = stored and student.dtype == torch.float16
        return (
            student.new_empty((rows,) if reduction == 0 else (), dtype=dtype),
            student.new_empty((rows, classes) if stored else (0,)),
            student.new_empty((rows, 3 * k + 2) if streamed else (rows,) if scaled else (0,), dtype=dtype),
            student.new_empty((2,), dtype=dtype),
        )

    def forward_stats(student, teachers, *rest):
        shape, dtype = (len(teachers) + 1, student.shape[0]), common.accumulate_dtype(student.dtype)
        dtypes = (dtype, torch.bool, torch.int64, dtype, dtype, dtype)
        stats = [student.new_empty(shape, dtype=d) for d in dtypes]
        kl = student.new_empty((len(teachers), student.shape[0]), dtype=dtype)
        return (*forward(student, teachers, *rest, False), kl, *stats)

    def backward(grad, rows, saved, aux, reduction):
        return torch.empty_like(rows)

    def stream_backward(grad, student, *rest):
        return student.new_empty(student.shape)

    torch.library.register_fake(f"{namespace}::multi_teacher_forward", forward)
    torch.library.register_fake(f"{namespace}::multi_teacher_forward_stats", forward_stats)
    torch.library.register_fake(f"{namespace}::multi_teacher_backward", backward)
    torch.library.register_fake(f"{namespace}::multi_teacher_stream_backward", stream_backward)


def _options(call: Call) -> tuple:
    """The arguments that forward and stream_backward share after the tensors."""
    combine, reduction = COMBINE.index(call.combine), common.REDUCTIONS.index(call.reduction)
    return (
        call.host_weights, call.temperatures, combine, call.ce_weight, call.label_smoothing, call.ignore_index,
        call.scale_by_t2, reduction,
    )  # fmt: skip


def _streams(call: Call) -> bool:
    """Whether the backward reads all logits again instead of a stored gradient: rows too long for one CUDA block."""
    if _backend.device_kind(call.student) == "cpu":
        return False
    return call.student.shape[1] > ON_CHIP_CLASSES.get(call.student.dtype, ON_CHIP_CLASSES_DEFAULT)


def _forward(call: Call, need_grad: bool, with_stats: bool = False) -> tuple[Tensor, ...]:
    ops, inputs = _backend.native_ops(call.student), (call.student, call.teachers, call.target, call.weights)
    if with_stats:
        out = ops.multi_teacher_forward_stats(*inputs, *_options(call), need_grad)
    else:
        out = ops.multi_teacher_forward(*inputs, *_options(call), need_grad, _streams(call))
    if call.target is not None and common.may_read_values(call.student) and out[3].tolist()[1] != 0:
        raise common.out_of_range(OP, call.target, call.student.shape[1], call.ignore_index)
    return out


class _Native(torch.autograd.Function):
    """The native loss, and with_stats its statistics: kl [K, R], those of GroupStats.

    The backward asked for with create_graph=True goes through the reference formula.
    """

    @staticmethod
    def forward(ctx, student, target, weights, options, with_stats, *teachers):
        call = Call(student, teachers, target, weights, *options)
        loss, rows, saved, aux, *stats = _forward(call, True, with_stats)
        ctx.options, ctx.ready = options, _rows_are_gradient(call)
        common.save_for_backward(ctx, (student, rows, saved, aux, target, weights, *teachers))
        if not with_stats:
            return loss
        ctx.mark_non_differentiable(*stats)
        return loss, *stats

    @staticmethod
    def backward(ctx, grad, *_):
        tensors = ctx.saved_tensors
        # First the backward of a plain training loop. A fake tensor has no value to look at.
        if ctx.ready and type(grad) is Tensor and not torch.is_grad_enabled() and grad.item() == 1.0:
            return tensors[1], None, None, None, None, *([None] * (len(ctx.needs_input_grad) - 5))
        student, rows, saved, aux, target, weights, *teachers = common.with_kept(ctx, tensors)
        call = Call(student, tuple(teachers), target, weights, *ctx.options)
        if torch.is_grad_enabled():
            (result,) = torch.autograd.grad(reference(call), student, grad, create_graph=True)
        elif _streams(call):
            ops = _backend.native_ops(student)
            result = ops.multi_teacher_stream_backward(
                grad.contiguous(), student, call.teachers, target, weights, saved, aux, *_options(call)
            )
        else:
            ops = _backend.native_ops(student)
            result = ops.multi_teacher_backward(
                grad.contiguous(), rows, saved, aux, common.REDUCTIONS.index(call.reduction)
            )
        return result, None, None, None, None, *([None] * len(teachers))


def _rows_are_gradient(call: Call) -> bool:
    """Whether the stored rows are the gradient as they are for a grad_output of 1: on the CPU, in `loss.backward()`.

    Handing out the saved tensor is safe: autograd copies it where it is still saved (retain_graph=True).
    """
    if torch.compiler.is_compiling() or _backend.device_kind(call.student) != "cpu":
        return False
    return call.reduction != "none" and call.student.dtype != torch.float16


# --- public function ------------------------------------------------------------------------------------------------


def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    temperature: float | Tensor | Sequence[float] = 4.0,
    combine: str = "losses",
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    scale_by_t2: bool = True,
    reduction: str = "mean",
    return_stats: bool = False,
) -> Tensor | tuple[Tensor, DistillationStats]:
    """Distillation loss of one student and K teachers, with the labels' cross-entropy in the same pass.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), summed over teachers; the
    gradient flows to the student, and to a teacher, weight or temperature where it requires grad.

    Args:
        student: logits [..., C], float32, float64, float16 or bfloat16. Leading dimensions are rows: [B, C], [B, T, V].
        teachers: K logits of the student's shape, as a sequence, or stacked [K, ..., C] (a tensor of the student's
            own shape is one teacher). Never copied or concatenated; in the student's dtype or float32 natively.
        target: class indices [...], an integer dtype; rows equal to `ignore_index` count nowhere, whatever `ce_weight`.
        weights: none = 1/K each; [K]; or [K, ...] per row. Not normalised: they multiply each teacher's term.
        temperature: a number > 0, or one per teacher (with combine="losses").
        combine: "losses" sum of the K divergences | "probs" divergence to the weighted mixture of the teachers'
            probabilities (weights >= 0) | "logits" divergence to the softmax of the weighted sum of their logits.
        ce_weight: weight of cross_entropy(student, target), added; the KD term is not multiplied by 1 - ce_weight.
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].
        scale_by_t2: multiply each divergence by its temperature squared.
        reduction: "none" (per row, shape [...]), "sum", or "mean" over the rows that count (KL: "batchmean").
        return_stats: also return DistillationStats of the same logits, from the same pass (from a second read for rows
            that a GPU streams, and for more than 16 teachers there).

    Returns:
        The loss in float32 (float64 for float64 logits): a scalar, or [...] for "none". No row that counts: 0 with
        gradient 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row's loss
            and gradient are NaN (FASTKD_CHECKS=1 makes it raise there too, without compile).
    """
    call = _check(
        student, teachers, target, weights, temperature, combine, ce_weight, label_smoothing, ignore_index,
        scale_by_t2, reduction,
    )  # fmt: skip
    loss, stats = _with_statistics(call) if return_stats else (_dispatch(call), None)
    if reduction == "none":
        loss = loss.reshape(call.leading)
    return (loss, stats) if return_stats else loss


def _dispatch(call: Call) -> Tensor:
    if (reason := why_reference(call)) is not None:
        _backend.note_fallback(OP, reason, call.student)
        return _checked_reference(call)
    if len(call.teachers) > LAUNCH_TEACHERS and _backend.device_kind(call.student) != "cpu":
        return _in_groups(call)
    if not (torch.is_grad_enabled() and call.student.requires_grad):
        return _forward(call, False)[0]
    return _Native.apply(call.student, call.target, call.weights, tuple(call[4:]), False, *call.teachers)


def _with_statistics(call: Call) -> tuple[Tensor, DistillationStats]:
    """The loss and the statistics of its inputs, from one pass where the row is at hand as a whole."""
    too_many = len(call.teachers) > LAUNCH_TEACHERS and _backend.device_kind(call.student) != "cpu"
    if why_reference(call) is not None or too_many or _streams(call):
        return _dispatch(call), _separate_statistics(call)
    if torch.is_grad_enabled() and call.student.requires_grad:
        loss, *out = _Native.apply(call.student, call.target, call.weights, tuple(call[4:]), True, *call.teachers)
    else:
        loss, _, _, _, *out = _forward(call, False, True)
    return loss, _statistics(call, out[0], GroupStats(*out[1:]))


def _in_groups(call: Call) -> Tensor:
    """More teachers than one launch takes: the terms of combine="losses" add up, the cross-entropy goes first."""
    total = 0
    for k in range(0, len(call.teachers), LAUNCH_TEACHERS):
        part = slice(k, k + LAUNCH_TEACHERS)
        total = total + _dispatch(
            call._replace(
                teachers=call.teachers[part],
                weights=None if call.weights is None else call.weights[part],
                host_weights=call.host_weights[part],
                temperatures=call.temperatures if len(call.temperatures) == 1 else call.temperatures[part],
                ce_weight=call.ce_weight if k == 0 else 0.0,
            )
        )
    return total


def _checked_reference(call: Call) -> Tensor:
    common.check_range(OP, call.target, call.student.shape[1], call.ignore_index)
    return reference(call)


def why_reference(call: Call) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    student = call.student
    reason = _backend.why_not_native(student)
    if reason is not None:
        return reason
    if common.is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    for k, teacher in enumerate(call.teachers):
        if teacher.requires_grad and torch.is_grad_enabled():
            return common.why_learning(f"teachers[{k}]", (student,))
        if teacher.dtype != call.teachers[0].dtype:
            return "the teachers' dtypes differ"
    teacher = call.teachers[0]
    if teacher.dtype != student.dtype and (teacher.dtype != torch.float32 or student.dtype == torch.float64):
        return f"teachers in {teacher.dtype} for a student in {student.dtype}: only the student's dtype or float32"
    if call.weights is not None and call.weights.requires_grad and torch.is_grad_enabled():
        return "the weights require grad"
    if any(isinstance(t, Tensor) for t in call.temperatures):
        return "the temperature is a tensor that requires grad or whose value is not known on the host"
    if len(call.teachers) > LAUNCH_TEACHERS and call.combine != "losses" and _backend.device_kind(student) != "cpu":
        return f"combine={call.combine!r} with more than {LAUNCH_TEACHERS} teachers"
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(
    student, teachers, target, weights, temperature, combine, ce_weight, label_smoothing, ignore_index,
    scale_by_t2, reduction, return_stats=False,
) -> Call:  # fmt: skip
    common.check_logits(OP, "student", student)
    teachers = networks.check_teachers(OP, teachers, student)
    common.check_not_probabilities(OP, "student", student)
    common.check_not_probabilities(OP, "teachers", teachers)
    common.check_choice(OP, "combine", combine, COMBINE)
    common.check_choice(OP, "reduction", reduction, common.REDUCTIONS)
    ce_weight = common.check_number(OP, "ce_weight", ce_weight, "a finite number")
    label_smoothing = common.check_number(OP, "label_smoothing", label_smoothing, "a number in [0, 1]", 0, 1)
    common.check_index(OP, "ignore_index", ignore_index)
    if target is not None:
        target = common.check_target(OP, target, student)
    elif ce_weight != 0:
        raise common.wrong_value(OP, "target", f"given where ce_weight is {ce_weight}", None)
    temperatures = networks.check_temperature(OP, temperature, len(teachers))
    if len(temperatures) > 1 and combine != "losses":
        raise common.wrong_value(
            OP, "temperature", f"one number for combine={combine!r}", f"{len(temperatures)} numbers"
        )
    weights, host_weights = networks.check_weights(OP, weights, len(teachers), student, combine == "probs")
    return Call(
        common.flat_rows(student), tuple([common.flat_rows(t) for t in teachers]), target, weights, host_weights,
        temperatures, combine, ce_weight, label_smoothing, ignore_index, bool(scale_by_t2), reduction,
        student.shape[:-1],
    )  # fmt: skip


_backend.register(multi_teacher_kd, OP, lambda arguments: why_reference(_check(**arguments)), register_fakes)
