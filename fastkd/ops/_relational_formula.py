"""The two relational losses in plain PyTorch: their specification."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as torch_functional
from torch import Tensor

from fastkd.ops._formulas import Reduction, accumulate_dtype, reduce_rows

DISTANCE, ANGLE = "rkd_distance", "rkd_angle"


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


def share(options: Options, mask: Tensor) -> Tensor:
    """What the kernels' means over all N rows are multiplied by, to be those over the rows that count."""
    means = (1 if options.op == DISTANCE else 2) + (options.reduction == "mean")
    return (mask.shape[0] / mask.sum(dtype=torch.float64).clamp(min=1)) ** means


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
    if units.dtype == torch.float32 and _may_round_products(units.device.type):
        return (units.double() @ units.double().mT).to(units.dtype)
    return units @ units.mT


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # compiled code is made anew by set_float32_matmul_precision
def _may_round_products(device_type: str) -> bool:
    """Whether torch may round what float32 products read: to bfloat16 or TF32, where the device has such products.

    Asked of the backend: torch.get_float32_matmul_precision() raises once one was set by its own fp32_precision.
    """
    backend = torch.backends.cuda if device_type == "cuda" else torch.backends.mkldnn
    return backend.matmul.fp32_precision not in ("none", "ieee")


def reference(tensors: Tensors, options: Options) -> Tensor:
    """The specification in plain PyTorch, differentiable in both networks. Memory: [N, N, D], for angles [N, N, N]."""
    loss = over_all_rows(tensors, options)
    return loss if tensors.mask is None else loss * share(options, tensors.mask).to(loss.dtype)


def over_all_rows(tensors: Tensors, options: Options) -> Tensor:
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
