"""M networks that all learn: each from the labels and from the others, all losses and all gradients in one pass.

Per row, with p_n = softmax(z_n / T) of the M learners and the N frozen teachers, sg the stop of the gradient, w the
weights [M, M + N] and n over all networks but m (kernels: csrc/mutual/README.md):

    loss_m = T^2 * sum_n w[m, n] KL(sg p_n || p_m) + ce_weight * cross_entropy(z_m, target, label_smoothing)

which is M calls of multi_teacher_kd, each with the other learners detached. The loss is a vector [M]; the gradient of
its element m flows to z_m alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _common as common
from fastkd.ops import _networks as networks

OP = "mutual_kd"
WHOSE = "the networks'"
POSITIVE = "a finite number > 0"
# Of one CUDA launch (csrc/mutual/op.h); more teachers go in groups.
LAUNCH_LEARNERS, LAUNCH_NETWORKS = 16, 32
STREAM_ALWAYS = False  # the tests': CUDA kernels treat every row as one that does not fit on chip


class Call(NamedTuple):
    """A checked call: rows flattened, options resolved."""

    logits: Tensor | tuple[Tensor, ...]  # M x [R, C], stacked as they were given
    teachers: tuple[Tensor, ...]  # N x [R, C]
    target: Tensor | None  # int64 [R]
    weights: Tensor | None  # [M, M] or [M, M, R] on the device, where they are not known on the host
    teacher_weights: Tensor | None  # the same, [M, N] or [M, N, R]
    host_weights: tuple[float, ...]  # M * (M + N) numbers; 0 on the diagonal and where a tensor holds them
    temperature: float | Tensor  # a 0-d tensor where it requires grad or cannot be read
    ce_weight: float
    label_smoothing: float
    ignore_index: int
    scale_by_t2: bool
    reduction: str

    @property
    def first(self) -> Tensor:
        return self.logits[0]

    def weight(self, m: int, n: int):
        """w[m, n], a number or [R] or [1]; n >= M is a teacher."""
        tensor, at = (self.weights, n) if n < len(self.logits) else (self.teacher_weights, n - len(self.logits))
        return self.host_weights[m * self.total + n] if tensor is None else tensor[m, at].reshape(-1)

    @property
    def total(self) -> int:
        return len(self.logits) + len(self.teachers)


# --- reference ---------------------------------------------------------------------------------------------------


def reference(call: Call) -> Tensor:
    """The specification in plain PyTorch: losses [M] ([M, R] for "none"), differentiable in all inputs but peers."""
    dtype, target = _dtype(call), call.target
    logits, teachers = [z.to(dtype) for z in call.logits], [t.to(dtype) for t in call.teachers]
    if target is not None:
        valid = target != call.ignore_index  # [R]
        inside = (target >= 0) & (target < logits[0].shape[1])
        # Ignored rows leave before any arithmetic: what they hold (NaN, say) must not reach a gradient.
        logits, teachers = ([z.masked_fill(~valid[:, None], 0) for z in group] for group in (logits, teachers))
    t, scale = call.temperature, call.temperature**2 if call.scale_by_t2 else 1.0
    log_p = [networks.log_softmax(z, t) for z in (*[z.detach() for z in logits], *teachers)]
    losses = []
    for m, z in enumerate(logits):
        rows, log_q = z.new_zeros(z.shape[0]), networks.log_softmax(z, t)
        for n in range(call.total):
            if n != m:
                weight = call.weight(m, n)
                weight = weight.to(dtype) if isinstance(weight, Tensor) else weight
                rows = rows + networks.weighted_divergence(log_p[n], log_q, weight, scale)
        if call.ce_weight != 0:
            labels, smoothing = target.where(inside, 0), call.label_smoothing
            ce = torch_functional.cross_entropy(z, labels, reduction="none", label_smoothing=smoothing)
            rows = rows + call.ce_weight * ce
        if target is not None:
            rows = rows * torch.ones_like(rows).masked_fill(valid & ~inside, math.nan)  # NaN in the gradient as well
            rows = rows.masked_fill(~valid, 0)
        losses.append(common.reduce_rows(rows, None if target is None else valid, call.reduction, (-1,)))
    return torch.stack(losses)


def _dtype(call: Call) -> torch.dtype:
    dtype = call.first.dtype
    for z in (*call.logits, *call.teachers):
        dtype = torch.promote_types(dtype, z.dtype)
    return common.accumulate_dtype(dtype)


# --- native: raw operations, fake kernels, autograd ---------------------------------------------------------------

# csrc/mutual/op.cpp registers, with M networks of R rows and C classes, S of which want a gradient (`learners`, their
# indices), and A = float64 for float64 logits, else float32:
#   forward(...) -> loss A [M] or [M, R]; rows [S, R, C]: gradients without reduction and grad_output; saved A [S, R]:
#                   inverse of the power of two that float16 rows were multiplied by ([0, R] for other dtypes);
#                   aux A [2]: the factor that `rows` still lacks (1 / rows that count), targets out of range
#   backward(grad_output, rows, saved, aux, learners, reduction) -> [S, R, C]
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def forward(
        logits, teachers, target, weights, teacher_weights, host_weights, temperature, ce_weight, label_smoothing,
        ignore_index, scale_by_t2, reduction, learners, stream,
    ):  # fmt: skip
        (rows, classes), like = logits[0].shape, logits[0]
        dtype = common.accumulate_dtype(like.dtype)
        return (
            like.new_empty((len(logits), rows) if reduction == 0 else (len(logits),), dtype=dtype),
            like.new_empty((len(learners), rows, classes)),
            like.new_empty((len(learners) if like.dtype == torch.float16 else 0, rows), dtype=dtype),
            like.new_empty((2,), dtype=dtype),
        )

    def backward(grad, rows, saved, aux, learners, reduction):
        return torch.empty_like(rows)

    torch.library.register_fake(f"{namespace}::mutual_forward", forward)
    torch.library.register_fake(f"{namespace}::mutual_backward", backward)


def _arguments(call: Call, learners: Sequence[int]) -> tuple:
    """Those of mutual_forward."""
    logits = call.logits.unbind(0) if isinstance(call.logits, Tensor) else call.logits
    return (
        logits, *call[1:11], common.REDUCTIONS.index(call.reduction), learners, STREAM_ALWAYS
    )  # fmt: skip


def _forward(call: Call, learners: Sequence[int]) -> tuple[Tensor, ...]:
    out = _backend.native_ops(call.first).mutual_forward(*_arguments(call, learners))
    if call.target is not None and common.may_read_values(call.first) and out[3].tolist()[1] != 0:
        raise common.out_of_range(OP, call.target, call.first.shape[1], call.ignore_index)
    return out


class _Native(torch.autograd.Function):
    """The native losses. The backward asked for with create_graph=True goes through the reference formula."""

    @staticmethod
    def forward(ctx, options, learners, given, target, weights, teacher_weights, *tensors):
        """`tensors`: the first `given` of them are the networks (1: all of them stacked), then the teachers."""
        logits = tensors[0] if given == 1 else tensors[:given]
        call = Call(logits, tensors[given:], target, weights, teacher_weights, *options)
        loss, rows, saved, aux = _forward(call, learners)
        ctx.options, ctx.learners, ctx.given, ctx.tensors = options, learners, given, len(tensors)
        ctx.ready = _may_hand_out(call)
        # As tensors of their own, so that autograd sees that they are still saved when they are handed out.
        parts = (rows,) if given == 1 else rows.unbind(0) if ctx.ready else ()
        keep = (*parts, rows, saved, aux, target, weights, teacher_weights, *tensors)
        common.save_for_backward(ctx, keep)
        return loss

    @staticmethod
    def backward(ctx, grad):
        saved_tensors, learners, given = ctx.saved_tensors, ctx.learners, ctx.given
        count = 1 if given == 1 else len(learners) if ctx.ready else 0
        parts = saved_tensors[:count]
        # First the backward of a plain training loop. A fake tensor has no values to look at.
        plain = ctx.ready and type(grad) is Tensor and not torch.is_grad_enabled()
        if plain and all([g == 1.0 for g in grad.tolist()]):
            return _Native._of_inputs(ctx, parts)
        rows, saved, aux, target, weights, teacher_weights, *tensors = common.with_kept(ctx, saved_tensors)[count:]
        call = Call(
            tensors[0] if given == 1 else tuple(tensors[:given]), tuple(tensors[given:]), target, weights,
            teacher_weights, *ctx.options,
        )  # fmt: skip
        if torch.is_grad_enabled():
            result = _differentiable_backward(call, learners, grad)
        else:
            ops, reduction = _backend.native_ops(rows), common.REDUCTIONS.index(call.reduction)
            grads = ops.mutual_backward(grad.contiguous(), rows, saved, aux, learners, reduction)
            result = (grads,) if given == 1 else grads.unbind(0)
        return _Native._of_inputs(ctx, result)

    @staticmethod
    def _of_inputs(ctx, result: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of all inputs, from those of the networks that learn."""
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, gradient in zip((0,) if ctx.given == 1 else ctx.learners, result, strict=True):
            gradients[len(gradients) - ctx.tensors + place] = gradient
        return tuple(gradients)


def _differentiable_backward(call: Call, learners: Sequence[int], grad: Tensor) -> tuple[Tensor, ...]:
    """Through the reference. Of views, so that a network that was given twice gets each of its two gradients."""
    if isinstance(call.logits, Tensor):
        inputs = [call.logits]
    else:
        call = call._replace(logits=tuple([z.view_as(z) for z in call.logits]))
        inputs = [call.logits[m] for m in learners]
    return torch.autograd.grad(reference(call), inputs, grad, create_graph=True)


def _may_hand_out(call: Call) -> bool:
    """Whether the stored rows may be the gradients as they are: on the CPU for a plain `loss.sum().backward()`.

    Handing out saved tensors is safe: autograd copies them where they are still saved (retain_graph=True).
    """
    if torch.compiler.is_compiling() or _backend.device_kind(call.first) != "cpu":
        return False
    return call.reduction != "none" and call.first.dtype != torch.float16


# --- public function ------------------------------------------------------------------------------------------------


def mutual_kd(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    weights: Tensor | Sequence[Sequence[float]] | None = None,
    teachers: Tensor | Sequence[Tensor] = (),
    teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
    temperature: float | Tensor = 1.0,
    ce_weight: float = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    scale_by_t2: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """Losses of M networks that teach each other, with the labels' cross-entropy in the same pass.

    Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), eq. 8, with weights, a temperature and frozen teachers.
    The same as M calls of `multi_teacher_kd`, each with the other networks detached: element m of the result gives a
    gradient to network m alone, so that `loss.sum().backward()` trains all of them.

    Args:
        logits: M >= 2 networks' logits [..., C], as a sequence, or stacked [M, ..., C]; float32, float64, float16 or
            bfloat16. Never copied. A network that does not require grad only teaches.
        target: class indices [...], an integer dtype; rows equal to `ignore_index` count nowhere, whatever `ce_weight`.
        weights: w[m, n] = how much network m learns from network n: none = 1/(M-1) each; [M, M]; or [M, M, ...] per
            row. The diagonal is never read. Not normalised: they multiply the divergences.
        teachers: N networks that do not learn, of the same shape, as a sequence, or stacked [N, ..., C]; in the
            networks' dtype or float32 natively.
        teacher_weights: the same for them: none = 1/N each; [M, N]; or [M, N, ...] per row.
        temperature: a number > 0, of all networks.
        ce_weight: weight of cross_entropy(logits[m], target), added to each loss.
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].
        scale_by_t2: multiply each divergence by the temperature squared.
        reduction: "none" (per row), "sum", or "mean" over the rows that count (KL: "batchmean").

    Returns:
        [M] ([M, ...] for "none"), in float32 (float64 for float64 logits). No row that counts: 0 with gradient 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row's losses
            and gradients are NaN (FASTKD_CHECKS=1 makes it raise there too, without compile).
    """
    call, leading = _check(
        logits, target, weights, teachers, teacher_weights, temperature, ce_weight, label_smoothing, ignore_index,
        scale_by_t2, reduction,
    )  # fmt: skip
    loss = _dispatch(call)
    return loss.reshape(-1, *leading) if reduction == "none" and len(leading) != 1 else loss


def _dispatch(call: Call) -> Tensor:
    if (reason := why_reference(call)) is not None:
        _backend.note_fallback(OP, reason, call.first)
        return _checked_reference(call)
    if call.total > LAUNCH_NETWORKS and _backend.device_kind(call.first) != "cpu":
        return _in_groups(call)
    stacked = isinstance(call.logits, Tensor)
    if not torch.is_grad_enabled():
        learners = []
    elif stacked:
        learners = list(range(len(call.logits))) if call.logits.requires_grad else []
    else:
        learners = [m for m, z in enumerate(call.logits) if z.requires_grad]
    if not learners:
        return _forward(call, learners)[0]
    networks_given = (call.logits,) if stacked else call.logits
    return _Native.apply(call[5:], learners, len(networks_given), *call[2:5], *networks_given, *call.teachers)


def _in_groups(call: Call) -> Tensor:
    """More teachers than one launch takes: the terms add up; the peers' and the cross-entropy go with the first."""
    m, n = len(call.logits), call.total
    table = torch.tensor(call.host_weights, dtype=torch.float64).reshape(m, n).tolist()
    total, size = 0, LAUNCH_NETWORKS - m
    for k in range(0, n - m, size):
        rows = [(row[:m] if k == 0 else [0.0] * m) + row[m + k : m + k + size] for row in table]
        total = total + _dispatch(
            call._replace(
                teachers=call.teachers[k : k + size],
                weights=call.weights if k == 0 else None,
                teacher_weights=None if call.teacher_weights is None else call.teacher_weights[:, k : k + size],
                host_weights=tuple([w for row in rows for w in row]),
                ce_weight=call.ce_weight if k == 0 else 0.0,
            )
        )
    return total


def _checked_reference(call: Call) -> Tensor:
    common.check_range(OP, call.target, call.first.shape[1], call.ignore_index)
    return reference(call)


def why_reference(call: Call) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    first, learning = call.first, torch.is_grad_enabled()
    reason = _backend.why_not_native(first)
    if reason is not None:
        return reason
    if common.is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if not isinstance(call.logits, Tensor) and any([z.dtype != first.dtype for z in call.logits]):
        return "the networks' dtypes differ"
    for k, teacher in enumerate(call.teachers):
        if teacher.requires_grad and learning:
            return common.why_learning(f"teachers[{k}]", call.logits)
        if teacher.dtype != call.teachers[0].dtype:
            return "the teachers' dtypes differ"
        if teacher.dtype != first.dtype and (teacher.dtype != torch.float32 or first.dtype == torch.float64):
            return f"teachers in {teacher.dtype} for networks in {first.dtype}: only the networks' dtype or float32"
    for weights in (call.weights, call.teacher_weights):
        if weights is not None and weights.requires_grad and learning:
            return "the weights require grad"
    if isinstance(call.temperature, Tensor):
        return "the temperature is a tensor that requires grad or whose value is not known on the host"
    if len(call.logits) > LAUNCH_LEARNERS and _backend.device_kind(first) != "cpu":
        return f"more than {LAUNCH_LEARNERS} networks that learn"
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(
    logits, target, weights, teachers, teacher_weights, temperature, ce_weight, label_smoothing, ignore_index,
    scale_by_t2, reduction,
) -> tuple[Call, torch.Size]:  # fmt: skip
    logits = _check_networks(logits)
    first = logits[0]
    if isinstance(teachers, Tensor) or not isinstance(teachers, Sequence) or len(teachers) > 0:
        teachers = networks.check_teachers(OP, teachers, first, WHOSE)
    common.check_not_probabilities(OP, "logits", logits)
    common.check_not_probabilities(OP, "teachers", teachers)
    common.check_choice(OP, "reduction", reduction, common.REDUCTIONS)
    ce_weight = common.check_number(OP, "ce_weight", ce_weight, "a finite number")
    label_smoothing = common.check_number(OP, "label_smoothing", label_smoothing, "a number in [0, 1]", 0, 1)
    common.check_index(OP, "ignore_index", ignore_index)
    if target is not None:
        target = common.check_target(OP, target, first, WHOSE)
    elif ce_weight != 0:
        raise common.wrong_value(OP, "target", f"given where ce_weight is {ce_weight}", None)
    m, n = len(logits), len(teachers)
    if teacher_weights is not None and n == 0:
        raise common.wrong_value(OP, "teacher_weights", "None without teachers", type(teacher_weights).__name__)
    weights, peers = _check_weights("weights", weights, m, m, first, diagonal=False)
    teacher_weights, frozen = _check_weights("teacher_weights", teacher_weights, m, n, first, diagonal=True)
    host_weights = peers
    if n > 0:
        host_weights = tuple([w for i in range(m) for w in (*peers[i * m : i * m + m], *frozen[i * n : i * n + n])])
    if isinstance(logits, Tensor):
        rows = logits if logits.dim() == 3 else logits.reshape(m, -1, logits.shape[-1])
    else:
        rows = tuple([common.flat_rows(z) for z in logits])
    call = Call(
        rows, tuple([common.flat_rows(t) for t in teachers]), target, weights, teacher_weights, host_weights,
        _check_temperature(temperature), ce_weight, label_smoothing, ignore_index, bool(scale_by_t2), reduction,
    )  # fmt: skip
    return call, first.shape[:-1]


def _check_networks(logits: object) -> Tensor | Sequence[Tensor]:
    """M logits of one shape and device: one stacked tensor as it is, or a sequence."""
    if isinstance(logits, Tensor):
        common.check_logits(OP, "logits", logits)
        if logits.dim() < 2 or logits.shape[0] < 2:
            expected = "M >= 2 networks stacked [M, ..., C], or a sequence of them"
            raise common.wrong_value(OP, "logits", expected, f"shape {list(logits.shape)}")
        return logits
    if not isinstance(logits, Sequence) or isinstance(logits, str):
        expected = "a sequence of logits tensors or one stacked tensor"
        raise common.wrong_type(OP, "logits", expected, type(logits).__name__)
    if len(logits) < 2:
        raise common.wrong_value(OP, "logits", "at least two networks' logits", len(logits))
    first = common.check_logits(OP, "logits[0]", logits[0])
    for k, z in enumerate(logits):
        # The usual case in one look: this runs for every network of every step.
        if not (
            isinstance(z, Tensor) and z.shape == first.shape and z.device == first.device and z.is_floating_point()
        ):
            common.check_like(OP, f"logits[{k}]", z, first, "logits[0]'s")
    return logits


def _check_temperature(temperature: object) -> float | Tensor:
    """A number; a 0-d tensor where it requires grad or cannot be read."""
    tensor = None
    if isinstance(temperature, Tensor):
        if temperature.numel() != 1 or temperature.dim() > 1 or not temperature.is_floating_point():
            got = f"a tensor of {temperature.dtype} and shape {list(temperature.shape)}"
            raise common.wrong_value(OP, "temperature", POSITIVE, got)
        tensor = temperature.reshape(())
        if not common.may_read_values(tensor):
            return tensor
        temperature = tensor.item()
    number = common.check_number(OP, "temperature", temperature, POSITIVE)
    if number <= 0:
        raise common.wrong_value(OP, "temperature", POSITIVE, number)
    return tensor if tensor is not None and tensor.requires_grad else number


def _check_weights(
    name: str, weights: object, m: int, n: int, like: Tensor, diagonal: bool
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(a tensor [m, n] or [m, n, R] where the host does not know them, or None; m * n numbers, 0 where unknown)."""
    if weights is None:
        if diagonal:
            return None, (1.0 / n,) * (m * n) if n > 0 else ()
        return None, tuple([0.0 if i == j else 1.0 / (n - 1) for i in range(m) for j in range(n)])
    expected = f"of shape [{m}, {n}] or {[m, n, *like.shape[:-1]]}"
    if not isinstance(weights, Tensor):
        if not isinstance(weights, Sequence) or isinstance(weights, str):
            raise common.wrong_type(OP, name, f"a tensor or nested sequence {expected}", type(weights).__name__)
        if len(weights) > 0 and all(isinstance(row, Tensor) and row.shape == weights[0].shape for row in weights):
            weights = torch.stack(tuple(weights))
        else:
            return None, _host_weights(name, weights, m, n, diagonal)
    shape = list(weights.shape)
    if weights.dtype == torch.bool or weights.is_complex():
        raise common.wrong_type(OP, name, "of a floating-point dtype", f"dtype {weights.dtype}")
    if shape != [m, n] and shape != [m, n, *like.shape[:-1]]:
        raise common.wrong_value(OP, name, expected, f"shape {shape}")
    readable = common.may_read_values(weights)
    if weights.dim() == 2 and readable and not weights.requires_grad:
        return None, _host_weights(name, weights.tolist(), m, n, diagonal)
    if weights.device != like.device:
        if weights.dim() != 2 or weights.device.type != "cpu":
            raise common.wrong_value(OP, name, f"on {WHOSE} device {like.device}", f"device {weights.device}")
        weights = weights.to(like.device, non_blocking=True)
    if readable:
        finite = weights.isfinite().reshape(m, n, -1).all(-1)
        if not diagonal:
            finite = finite | torch.eye(m, dtype=torch.bool, device=finite.device)
        if not bool(finite.all()):
            raise common.wrong_value(OP, name, "finite" + _beside(diagonal), "a NaN or infinite weight")
    weights = weights.to(common.accumulate_dtype(like.dtype))
    return weights if weights.dim() == 2 else weights.reshape(m, n, -1), (0.0,) * (m * n)


def _beside(diagonal: bool) -> str:
    return "" if diagonal else " beside the diagonal"


def _host_weights(name: str, weights: Sequence, m: int, n: int, diagonal: bool) -> tuple[float, ...]:
    """m * n numbers of nested sequences, the diagonal as 0 where it is not read."""
    lengths = [len(row) if isinstance(row, Sequence) and not isinstance(row, str) else -1 for row in weights]
    if lengths != [n] * m:
        got = f"{len(lengths)} rows of {lengths} numbers" if -1 not in lengths else "something else"
        raise common.wrong_value(OP, name, f"{m} rows of {n} numbers, one row per network that learns", got)
    numbers = []
    for i, row in enumerate(weights):
        for j, weight in enumerate(row):
            if i == j and not diagonal:
                numbers.append(0.0)
                continue
            numbers.append(common.check_number(OP, f"{name}[{i}][{j}]", weight, "a finite number"))
    return tuple(numbers)


_backend.register(mutual_kd, OP, lambda arguments: why_reference(_check(**arguments)[0]), register_fakes)
