"""Relational knowledge distillation: the distances and the angles between the embeddings of a batch (RKD).

With d_ij = ||x_i - x_j|| of one network, m the mean of its positive distances, and h the Huber loss (smooth_l1,
beta = 1) of the student's value against the teacher's (kernels: csrc/relational/README.md):

    rkd_distance   loss_i = mean_j h(d_ij / m)
    rkd_angle      loss_j = mean_ik h(cos_ijk),   cos_ijk = <x_i - x_j, x_k - x_j> / (d_ij d_kj), the angle at vertex j

A side no longer than eps * m has cosine 0 with every other. Equal rows have distance 0, and no gradient through it. The
native kernels build neither [N, N, D] nor [N, N, N]: they take the distances from a Gram matrix in float64, or from the
differences, by operation, device and N.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops import _gather
from fastkd.ops import _relational_kernels as kernels
from fastkd.ops._autograd import why_no_kernels
from fastkd.ops._formulas import Reduction
from fastkd.ops._inputs import REDUCTIONS, check_mask, check_num_items, why_learning
from fastkd.ops._relational_formula import ANGLE, DISTANCE, Options, Tensors, reference


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
    triplets. O(N^2 D + N^3) operations and O(N^2) memory, in float64 or two float32 numbers up to the distances and in
    float32 from there (float64 where an input is float64).

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
        loss = kernels.run(tensors, options)
    if num_items is None:
        return loss
    return loss / (num_items.to(loss.dtype) if isinstance(num_items, Tensor) else num_items)


def why_reference(tensors: Tensors) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    reason = why_no_kernels(tensors.student)
    if reason is not None:
        return reason
    if tensors.teacher.requires_grad and torch.is_grad_enabled():
        return why_learning("teacher", (tensors.student,))
    return None


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


def _why(op: str) -> Callable[[dict[str, Any]], str | None]:
    return lambda arguments: why_reference(_check(op, **arguments)[0])


_backend.register(rkd_distance, DISTANCE, _why(DISTANCE), kernels.register_fakes)
_backend.register(rkd_angle, ANGLE, _why(ANGLE), lambda namespace: None)
