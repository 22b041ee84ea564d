"""The matrix products of linear_multi_teacher_kd: PyTorch's. Weights in half precision are converted in blocks."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fastkd.ops._linear_inputs import Projection

CONVERTED_BYTES = 16 << 20  # of a weight in half precision that is converted at a time


def project(hidden: Tensor, projection: Projection, out: Tensor) -> None:
    """Logits [n, V] into `out`, of hidden states [n, H] that carry the projection's scale."""
    weight, bias, softcap, scale = projection
    for classes, block in _converted(weight[: out.shape[1]], out.dtype):
        torch.mm(hidden, block.t(), out=out[:, classes])
    if bias is not None:
        out.add_(bias[: out.shape[1]].to(out.dtype) * scale)
    if softcap:
        out.div_(softcap).tanh_().mul_(softcap)


def project_back(gradient: Tensor, weight: Tensor) -> Tensor:  # [n, V], [V, H] -> [n, H]
    out = gradient.new_zeros(gradient.shape[0], weight.shape[1])
    for classes, block in _converted(weight, gradient.dtype):
        out.addmm_(gradient[:, classes], block)
    return out


def _converted(weight: Tensor, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """A weight in this dtype, in blocks of classes where it has to be converted: never all of it at once."""
    step = weight.shape[0]
    if weight.dtype != dtype:
        step = max(1, CONVERTED_BYTES // (weight.shape[1] * dtype.itemsize))
    for start in range(0, weight.shape[0], step):
        classes = slice(start, min(start + step, weight.shape[0]))
        yield classes, weight[classes].to(dtype)
