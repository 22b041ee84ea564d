"""Relational knowledge distillation: the distances and the angles between the embeddings of a batch (RKD).

With d_ij = ||x_i - x_j|| of one network, m the mean of its positive distances, and h the Huber loss (smooth_l1,
beta = 1) of the student's value against the teacher's (kernels: csrc/relational/README.md):

    rkd_distance   loss_i = mean_j h(d_ij / m)
    rkd_angle      loss_j = mean_ik h(cos_ijk),   cos_ijk = <x_i - x_j, x_k - x_j> / (d_ij d_kj), the angle at vertex j

A side no longer than eps * m has cosine 0 with every other. Equal rows have distance 0, and no gradient through it. The
native kernels build neither [N, N, D] nor [N, N, N]: they take the distances from a Gram matrix in float64, or on the
CPU, where nothing but distances is wanted, from the differences.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _common as common
from fastkd.ops import _gather

DISTANCE, ANGLE = "rkd_distance", "rkd_angle"
# What the native kernels keep of the distances (csrc/relational/op.h).
KIND_DISTANCE, KIND_SINGLE, KIND_FULL = 0, 1, 2


class Call(NamedTuple):
    """A checked call."""

    student: Tensor  # [N, D]
    teacher: Tensor  # [N, E]
    op: str
    eps: float
    reduction: str


# --- reference ---------------------------------------------------------------------------------------------------


def _differences(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """x_i - x_j [N, N, D] at [j, i]; their norms [N, N]; the mean of the positive norms."""
    differences = (x - x.mean(0))[None] - (x - x.mean(0))[:, None]
    squares = differences.square().sum(-1)
    equal = squares == 0  # sqrt has no finite derivative there
    norms = squares.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)
    return differences, norms, norms.sum() / (~equal).sum().clamp(min=1)


def _relative_distances(x: Tensor) -> Tensor:
    _, norms, mean = _differences(x)
    return norms / mean.masked_fill(mean == 0, 1)


def _cosines(x: Tensor, eps: float) -> Tensor:
    """[N, N, N]: at [j, i, k] the cosine of the angle at j between i and k."""
    differences, norms, mean = _differences(x)
    short = norms <= eps * mean.detach()
    units = (differences / norms.masked_fill(short, 1)[..., None]).masked_fill(short[..., None], 0)
    return units @ units.mT


def reference(call: Call) -> Tensor:
    """The specification in plain PyTorch, differentiable in both networks. Memory: [N, N, D], for angles [N, N, N]."""
    dtype = result_dtype(call)
    with torch.autocast(call.student.device.type, enabled=False):
        student, teacher = call.student.to(dtype), call.teacher.to(dtype)
        if call.op == DISTANCE:
            pair, others = (_relative_distances(student), _relative_distances(teacher)), 1
        else:
            pair, others = (_cosines(student, call.eps), _cosines(teacher, call.eps)), (1, 2)
        rows = torch_functional.smooth_l1_loss(*pair, reduction="none").mean(others)
    return common.reduce_rows(rows, None, call.reduction, rows.shape)


def result_dtype(call: Call) -> torch.dtype:
    return common.accumulate_dtype(torch.promote_types(call.student.dtype, call.teacher.dtype))


# --- native: raw operations, fake kernels, autograd ---------------------------------------------------------------


# csrc/relational/op.cpp registers, all in float64 but for the planes of KIND_SINGLE:
#   sides(x centred [N, D], x x^T, kind, eps) -> planes [1 to 3, N, N padded] of the distances relative to their mean;
#                                                [2] that mean and the number of positive distances
#   loss(planes, planes, student's mean, weight [N] of the N losses, kind, reduction, need_grad)
#        -> loss [] or [N]; the matrix [N, N] whose product with the student's centred rows is the gradient
# and for the CPU, without a Gram matrix, in x's float32 or float64:
#   distances(x [N, D]) -> planes of the distances; [3] their mean, their number, the scale of the rows; scaled rows
#   pull(matrix of loss, rows, mean, D) -> the gradient [N, D]
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.
def _padded(n: int) -> int:
    """As csrc/relational/op.h pads: an odd number of 32s."""
    return ((n + 31) // 32 // 2 * 2 + 1) * 32


def register_fakes(namespace: str) -> None:
    def sides(x, gram, kind, eps):
        n = x.shape[0]
        dtype = torch.float32 if kind == KIND_SINGLE else torch.float64
        planes = {KIND_DISTANCE: 1, KIND_SINGLE: 3, KIND_FULL: 2}[kind]
        return x.new_empty((planes, n, _padded(n)), dtype=dtype), x.new_empty((2,))

    def loss(student, teacher, mean, weight, kind, reduction, need_grad):
        n = student.shape[1]
        square = (n, n) if need_grad else (0, 0)
        return mean.new_empty((n,) if reduction == 0 else ()), mean.new_empty(square)

    def distances(x):
        n, width = x.shape[0], (x.shape[1] + 15) // 16 * 16
        planes = x.new_empty((1, n, _padded(n)), dtype=torch.float64)
        return planes, x.new_empty((3,), dtype=torch.float64), x.new_empty((n, width))

    def pull(laplacian, rows, mean, columns):
        return rows.new_empty((rows.shape[0], columns))

    torch.library.register_fake(f"{namespace}::relational_distances", distances)
    torch.library.register_fake(f"{namespace}::relational_pull", pull)
    torch.library.register_fake(f"{namespace}::relational_sides", sides)
    torch.library.register_fake(f"{namespace}::relational_loss", loss)


def _kind(call: Call) -> int:
    if call.op == DISTANCE:
        return KIND_DISTANCE
    return KIND_FULL if result_dtype(call) == torch.float64 else KIND_SINGLE


def _centred(x: Tensor) -> Tensor:
    x = x.double()
    return x - x.mean(0)


def _sides(x: Tensor, call: Call) -> tuple[Tensor, Tensor]:
    # float64: from a float32 Gram matrix the distances within tight clusters are noise. Autocast leaves it alone.
    return _backend.native_ops(call.student).relational_sides(x, x @ x.T, _kind(call), call.eps)


def _forward(call: Call, weight: Tensor | None, need_grad: bool) -> tuple[Tensor, Tensor | None]:
    """The loss, and the gradient [N, D] in float32 (float64 where the loss is) of its sum weighted by `weight` [N]."""
    ops, dtype = _backend.native_ops(call.student), result_dtype(call)
    direct = call.op == DISTANCE and _backend.device_kind(call.student) == "cpu"
    if direct:
        planes, mean, rows = ops.relational_distances(call.student.to(dtype))
        targets, *_ = ops.relational_distances(call.teacher.to(dtype))
    else:
        rows = _centred(call.student)
        planes, mean = _sides(rows, call)
        targets, _ = _sides(_centred(call.teacher), call)
    loss, laplacian = ops.relational_loss(
        planes, targets, mean, weight, _kind(call), common.REDUCTIONS.index(call.reduction), need_grad
    )
    if not need_grad:
        return loss.to(dtype), None
    # Half-precision students, too: in float16 a small gradient would be lost before a loss scale saves it.
    if direct:
        return loss.to(dtype), ops.relational_pull(laplacian, rows, mean, call.student.shape[1])
    return loss.to(dtype), (laplacian @ rows).to(dtype)


class _Native(torch.autograd.Function):
    """The native loss. The backward asked for with create_graph=True goes through the reference formula."""

    @staticmethod
    def forward(ctx, student, teacher, options):
        call = Call(student, teacher, *options)
        # The gradient of N losses with N factors is known in the backward only, which computes all again.
        loss, grad = _forward(call, None, call.reduction != "none")
        ctx.options = options
        common.save_for_backward(ctx, (student, grad, teacher))
        return loss

    @staticmethod
    def backward(ctx, grad_loss):
        student, grad, teacher = common.with_kept(ctx, ctx.saved_tensors)
        call = Call(student, teacher, *ctx.options)
        if torch.is_grad_enabled():
            (result,) = torch.autograd.grad(reference(call), student, grad_loss, create_graph=True)
        elif grad is None:
            result = _forward(call, grad_loss.double(), True)[1]
        else:
            result = grad * grad_loss
        return result.to(student.dtype), None, None


# --- public functions -----------------------------------------------------------------------------------------------


def rkd_distance(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, E]
    *,
    reduction: str = "mean",
    process_group=None,
) -> Tensor:
    """Distance-wise relational distillation: Huber loss between the distances in a batch, each network's over its mean.

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations 4 and 5; the mean is over the
    positive distances. Collapsed embeddings (all rows equal) have distances 0. The gradient flows to the student, and
    to the teacher where it requires grad.

    Args:
        student: embeddings [N, D], float32, float64, float16 or bfloat16.
        teacher: embeddings [N, E] of the same N samples; width and dtype may differ.
        reduction: "none" (per anchor [N], the mean over the other index), "sum", or "mean" over the anchors, which is
            the usual loss.
        process_group: embeddings of all processes of this torch.distributed group are compared with each other, in the
            order of the ranks; their numbers of rows may differ. Every process gets the loss of the whole batch, and
            the backward sums the gradients of all processes' losses: averaged over the processes, as
            DistributedDataParallel does, the parameters' gradients are those of one process with the whole batch.
            Reads the sizes of the parts on the host, so it waits for the device; forward and backward communicate, so
            every process must run both.

    Returns:
        The loss in float32 (float64 where an input is float64): a scalar, or [N] for "none". NaN or infinity in an
        input makes all of it NaN. N = 0 gives 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came.
    """
    return _run(_check(DISTANCE, student, teacher, reduction, process_group), process_group)


def rkd_angle(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, E]
    *,
    reduction: str = "mean",
    eps: float = 1e-6,
    process_group=None,
) -> Tensor:
    """Angle-wise relational distillation: Huber loss between the cosines of the angles in all triplets of a batch.

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations 6 and 7, over all N^3 ordered
    triplets. O(N^2 D + N^3) operations and O(N^2) memory, in float64 up to the distances and in float32 from there
    (float64 where an input is float64).

    Args:
        student, teacher, process_group: as in `rkd_distance`.
        reduction: "none" (per vertex [N], the mean over the other two indices), "sum", or "mean" over the vertices: the
            usual loss.
        eps: a side no longer than eps times the network's mean side has cosine 0 with every other, and no gradient.

    Returns, raises: as `rkd_distance`.
    """
    return _run(_check(ANGLE, student, teacher, reduction, process_group, eps), process_group)


def _run(call: Call, process_group) -> Tensor:
    if process_group is not None:
        student, teacher = _gather.gather_pair(call.op, call.student, call.teacher, process_group)
        call = call._replace(student=student, teacher=teacher)
    if (reason := why_reference(call)) is not None:
        _backend.note_fallback(call.op, reason, call.student)
        return reference(call)
    if not (torch.is_grad_enabled() and call.student.requires_grad):
        return _forward(call, None, False)[0]
    return _Native.apply(call.student, call.teacher, tuple(call[2:]))


def why_reference(call: Call) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    reason = _backend.why_not_native(call.student)
    if reason is not None:
        return reason
    if common.is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if call.teacher.requires_grad and torch.is_grad_enabled():
        return common.why_learning("teacher", (call.student,))
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(op: str, student, teacher, reduction, process_group, eps: object = 0.0) -> Call:
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise common.wrong_type(op, name, "a floating-point tensor [N, D]", type(value).__name__)
        if not value.is_floating_point():
            raise common.wrong_type(op, name, "a floating-point tensor of embeddings", f"dtype {value.dtype}")
        if value.dim() != 2 or value.shape[1] == 0:
            raise common.wrong_value(op, name, "of shape [N, D] with D >= 1", f"shape {list(value.shape)}")
    if teacher.shape[0] != student.shape[0]:
        expected = f"of {student.shape[0]} rows, as many as the student's"
        raise common.wrong_value(op, "teacher", expected, f"shape {list(teacher.shape)}")
    if teacher.device != student.device:
        raise common.wrong_value(op, "teacher", f"on the student's device {student.device}", f"device {teacher.device}")
    common.check_choice(op, "reduction", reduction, common.REDUCTIONS)
    eps = common.check_number(op, "eps", eps, "a finite number >= 0", low=0)
    _gather.check_process_group(op, process_group)
    return Call(student, teacher, op, eps, reduction)


def _why(op: str):
    return lambda arguments: why_reference(_check(op, **arguments))


_backend.register(rkd_distance, DISTANCE, _why(DISTANCE), register_fakes)
_backend.register(rkd_angle, ANGLE, _why(ANGLE), lambda namespace: None)
