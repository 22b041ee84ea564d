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

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops import _gather
from fastkd.ops._autograd import Inputs, graph_is_kept, is_transformed, save_for_backward, with_kept
from fastkd.ops._formulas import Reduction, accumulate_dtype, reduce_rows
from fastkd.ops._inputs import REDUCTIONS, check_mask, check_num_items, why_learning

DISTANCE, ANGLE = "rkd_distance", "rkd_angle"
# What the native kernels keep of the distances (csrc/relational/op.h).
KIND_DISTANCE, KIND_SINGLE, KIND_FULL = 0, 1, 2


class Tensors(NamedTuple):
    """What an operation on two sets of embeddings reads."""

    student: Tensor  # [N, D]
    teacher: Tensor  # [N, E]
    mask: Tensor | None  # bool [N]: the rows that count


class Options(NamedTuple):
    """Its name and hyper-parameters."""

    op: str
    eps: float
    reduction: Reduction


# --- public functions -----------------------------------------------------------------------------------------------


def rkd_distance(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, E]
    *,
    mask: Tensor | None = None,  # [N]
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Distance-wise relational distillation: Huber loss between the distances in a batch, each network's over its mean.

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations 4 and 5; the mean is over the
    positive distances. Collapsed embeddings (all rows equal) have distances 0. The gradient flows to the student, and
    to the teacher where it requires grad.

    >>> student = torch.tensor([[0.0], [1.0], [3.0]])
    >>> fastkd.functional.rkd_distance(student, 2 * student), fastkd.functional.rkd_distance(student, student**2)
    (tensor(0.), tensor(0.0247))

    Args:
        student: embeddings [N, D], float32, float64, float16 or bfloat16.
        teacher: embeddings [N, E] of the same N samples; width and dtype may differ.
        mask: bool [N]: the loss of `student[mask]` and `teacher[mask]`, out of the mean distance too; "none" gives 0
            at the other rows. They are not compared with, so that NaN in them reaches nothing.
        reduction: "none" (per anchor [N], the mean over the other index), "sum", or "mean" over the anchors that count,
            which is the usual loss.
        num_items: a number or 0-d tensor > 0 that the sum over the anchors is divided by, for "mean" and "sum" alike.
        process_group: embeddings of all processes of this torch.distributed group are compared with each other, in the
            order of the ranks; their numbers of rows, and of those that count, may differ (num_items is the same for
            all). Every process gets the loss of the whole batch, and the backward sums the gradients of all processes'
            losses: averaged over the processes, as DistributedDataParallel does, the parameters' gradients are those of
            one process with the whole batch. Reads the sizes of the parts on the host, so it waits for the device;
            forward and backward communicate, so every process must run both.

    The embeddings may be changed in place before the backward of "sum" and "mean", not before that of "none".

    Returns:
        The loss in float32 (float64 where an input is float64): a scalar, or [N] for "none". NaN or infinity in a row
        that counts makes all of it NaN. N = 0 gives 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came.
    """
    return _run(*_check(DISTANCE, student, teacher, mask, reduction, num_items, process_group), process_group)


def rkd_angle(
    student: Tensor,  # [N, D]
    teacher: Tensor,  # [N, E]
    *,
    mask: Tensor | None = None,  # [N]
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    eps: float = 1e-6,
    process_group: torch.distributed.ProcessGroup | None = None,
) -> Tensor:
    """Angle-wise relational distillation: Huber loss between the cosines of the angles in all triplets of a batch.

    Park et al., "Relational Knowledge Distillation" (arXiv 1904.05068), equations 6 and 7, over all N^3 ordered
    triplets. O(N^2 D + N^3) operations and O(N^2) memory, in float64 up to the distances and in float32 from there
    (float64 where an input is float64).

    >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> fastkd.functional.rkd_angle(square, 0 * square)  # collapsed: all cosines are 0
    tensor(0.1562)

    Args:
        student, teacher, mask, num_items, process_group: as in `rkd_distance`.
        reduction: "none" (per vertex [N], the mean over the other two indices), "sum", or "mean" over the vertices that
            count: the usual loss.
        eps: a side no longer than eps times the network's mean side has cosine 0 with every other, and no gradient.

    Returns, raises: as `rkd_distance`.
    """
    return _run(*_check(ANGLE, student, teacher, mask, reduction, num_items, process_group, eps), process_group)


def _run(
    tensors: Tensors,
    options: Options,
    num_items: float | Tensor | None,
    process_group: torch.distributed.ProcessGroup | None,
) -> Tensor:
    if process_group is not None:
        tensors = Tensors(*_gather.gather_pair(options.op, *tensors, process_group))
    if num_items is not None:
        options = options._replace(reduction="sum")
    if (reason := why_reference(tensors)) is not None:
        _backend.note_fallback(options.op, reason, tensors.student)
        loss = reference(tensors, options)
    else:
        loss = _native(tensors, options)
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.dtype) if isinstance(num_items, Tensor) else num_items)


def _native(tensors: Tensors, options: Options) -> Tensor:
    student, teacher, mask = tensors
    if mask is not None:  # a row that does not count may hold NaN
        student, teacher = (x.masked_fill(~mask[:, None], 0) for x in (student, teacher))
    if not (torch.is_grad_enabled() and student.requires_grad):
        loss = _forward(Tensors(student, teacher, mask), options, None, False)[0]
    else:
        loss = _Native.apply(options, student, teacher, mask)
    return loss if mask is None else loss * _share(options, mask).to(loss.dtype)


def _share(options: Options, mask: Tensor) -> Tensor:
    """What the kernels' means over all N rows are multiplied by, to be those over the rows that count."""
    means = (1 if options.op == DISTANCE else 2) + (options.reduction == "mean")
    return (mask.shape[0] / mask.sum(dtype=torch.float64).clamp(min=1)) ** means


def why_reference(tensors: Tensors) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    reason = _backend.why_not_native(tensors.student)
    if reason is not None:
        return reason
    if is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if tensors.teacher.requires_grad and torch.is_grad_enabled():
        return why_learning("teacher", (tensors.student,))
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(
    op: str, student: Tensor, teacher: Tensor, mask: object, reduction: Reduction, num_items: object,
    process_group: object, eps: object = 0.0,
) -> tuple[Tensors, Options, float | Tensor | None]:  # fmt: skip
    for name, value in (("student", student), ("teacher", teacher)):
        if not isinstance(value, Tensor):
            raise wrong_type(op, name, "a floating-point tensor [N, D]", type(value).__name__)
        if not value.is_floating_point():
            raise wrong_type(op, name, "a floating-point tensor of embeddings", f"dtype {value.dtype}")
        if value.dim() != 2 or value.shape[1] == 0:
            raise wrong_value(op, name, "of shape [N, D] with D >= 1", f"shape {list(value.shape)}")
    if teacher.shape[0] != student.shape[0]:
        expected = f"of {student.shape[0]} rows, as many as the student's"
        raise wrong_value(op, "teacher", expected, f"shape {list(teacher.shape)}")
    if teacher.device != student.device:
        raise wrong_value(op, "teacher", f"on the student's device {student.device}", f"device {teacher.device}")
    check_choice(op, "reduction", reduction, REDUCTIONS)
    mask = check_mask(op, mask, student.shape[:1], student.device)
    items = check_num_items(op, num_items, reduction)
    eps = check_number(op, "eps", eps, "a finite number >= 0", low=0)
    _gather.check_process_group(op, process_group)
    return Tensors(student, teacher, mask), Options(op, eps, reduction), items


# --- reference ------------------------------------------------------------------------------------------------------


def _differences(x: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """x_i - x_j [N, N, D] at [j, i]; their norms [N, N]; the mean of the positive norms."""
    if mask is not None:
        x = x.masked_fill(~mask[:, None], 0)
    differences = (x - x.mean(0))[None] - (x - x.mean(0))[:, None]
    squares = differences.square().sum(-1)
    equal = squares == 0  # sqrt has no finite derivative there
    if mask is not None:
        equal = equal | ~(mask[None] & mask[:, None])
    norms = squares.masked_fill(equal, 1).sqrt().masked_fill(equal, 0)
    return differences, norms, norms.sum() / (~equal).sum().clamp(min=1)


def _relative_distances(x: Tensor, mask: Tensor | None) -> Tensor:
    _, norms, mean = _differences(x, mask)
    return norms / mean.masked_fill(mean == 0, 1)


def _cosines(x: Tensor, mask: Tensor | None, eps: float) -> Tensor:
    """[N, N, N]: at [j, i, k] the cosine of the angle at j between i and k."""
    differences, norms, mean = _differences(x, mask)
    short = norms <= eps * mean.detach()
    units = (differences / norms.masked_fill(short, 1)[..., None]).masked_fill(short[..., None], 0)
    return units @ units.mT


def reference(tensors: Tensors, options: Options) -> Tensor:
    """The specification in plain PyTorch, differentiable in both networks. Memory: [N, N, D], for angles [N, N, N]."""
    loss = _over_all_rows(tensors, options)
    return loss if tensors.mask is None else loss * _share(options, tensors.mask).to(loss.dtype)


def _over_all_rows(tensors: Tensors, options: Options) -> Tensor:
    """The same, but as the kernels count: means over all N rows, those outside of the mask at distance 0 from all."""
    dtype, (student, teacher, mask) = result_dtype(tensors), tensors
    with torch.autocast(student.device.type, enabled=False):
        student, teacher = student.to(dtype), teacher.to(dtype)
        others: int | tuple[int, int]
        if options.op == DISTANCE:
            pair, others = (_relative_distances(student, mask), _relative_distances(teacher, mask)), 1
        else:
            pair, others = (_cosines(student, mask, options.eps), _cosines(teacher, mask, options.eps)), (1, 2)
        rows = torch_functional.smooth_l1_loss(*pair, reduction="none").mean(others)
    return reduce_rows(rows, None, options.reduction, rows.shape)


def result_dtype(tensors: Tensors) -> torch.dtype:
    """The dtype of the loss: float64 where an embedding is, else float32."""
    return accumulate_dtype(torch.promote_types(tensors.student.dtype, tensors.teacher.dtype))


# --- native: raw operations, fake kernels, autograd ---------------------------------------------------------------


# csrc/relational/op.cpp registers, all in float64 but for the planes of KIND_SINGLE:
#   sides(x centred [N, D], x x^T, mask [N], kind, eps)
#        -> planes [1 to 3, N, N padded] of the distances relative to their mean, 0 beside rows that do not count;
#           [2] that mean and the number of positive distances
#   loss(planes, planes, student's mean, weight [N] of the N losses, kind, reduction, need_grad)
#        -> loss [] or [N]; the matrix [N, N] whose product with the student's centred rows is the gradient
# and for the CPU, without a Gram matrix, in x's float32 or float64:
#   distances(x [N, D], mask) -> planes; [3] the distances' mean, their number, the scale of the rows; scaled rows
#   pull(matrix of loss, rows, mean, D) -> the gradient [N, D]
# Means are over all N rows; rows that do not count hold zeros.
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.
def _padded(n: int) -> int:
    """As csrc/relational/op.h pads: an odd number of 32s."""
    return ((n + 31) // 32 // 2 * 2 + 1) * 32


def register_fakes(namespace: str) -> None:
    """The shapes that the raw operations of `namespace` return, for torch.compile and torch.export."""

    def sides(x: Tensor, gram: Tensor, mask: Tensor | None, kind: int, eps: float) -> tuple[Tensor, ...]:
        n = x.shape[0]
        dtype = torch.float32 if kind == KIND_SINGLE else torch.float64
        planes = {KIND_DISTANCE: 1, KIND_SINGLE: 3, KIND_FULL: 2}[kind]
        return x.new_empty((planes, n, _padded(n)), dtype=dtype), x.new_empty((2,))

    def loss(
        student: Tensor, teacher: Tensor, mean: Tensor, weight: Tensor | None, kind: int, reduction: int,
        need_grad: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        n = student.shape[1]
        square = (n, n) if need_grad else (0, 0)
        return mean.new_empty((n,) if reduction == 0 else ()), mean.new_empty(square)

    def distances(x: Tensor, mask: Tensor | None) -> tuple[Tensor, ...]:
        n, width = x.shape[0], (x.shape[1] + 15) // 16 * 16
        planes = x.new_empty((1, n, _padded(n)), dtype=torch.float64)
        return planes, x.new_empty((3,), dtype=torch.float64), x.new_empty((n, width))

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


def _centred(x: Tensor, mask: Tensor | None = None) -> Tensor:
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
    direct = options.op == DISTANCE and _backend.device_kind(student) == "cpu"
    if direct:
        planes, mean, rows = ops.relational_distances(student.to(dtype), mask)
        targets, *_ = ops.relational_distances(teacher.to(dtype), mask)
    else:
        # float64: from a float32 Gram matrix the distances within tight clusters are noise. Autocast leaves it alone.
        rows, others = _centred(student, mask), _centred(teacher, mask)
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
            loss = _over_all_rows(Tensors(*tensors), ctx.options)
            (result,) = torch.autograd.grad(loss, tensors[0], grad_loss, create_graph=True)
        elif grad is None:
            _, result = _forward(Tensors(*tensors), ctx.options, grad_loss.double(), True)
        else:
            result = grad * grad_loss
        return None, None if result is None else result.to(ctx.dtype), None, None


def _why(op: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda arguments: why_reference(_check(op, **arguments)[0])


_backend.register(rkd_distance, DISTANCE, _why(DISTANCE), register_fakes)
_backend.register(rkd_angle, ANGLE, _why(ANGLE), lambda namespace: None)
