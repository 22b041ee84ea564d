"""The loss of feature_ensemble in plain PyTorch: its specification."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastkd.ops import _feature_maps as maps
from fastkd.ops._feature_maps import Norm
from fastkd.ops._formulas import Reduction, accumulate_dtype, reduce_rows
from fastkd.ops._inputs import REDUCTIONS

OP = "feature_ensemble"
Elements = Literal["mean", "sum"]
NORMS, ELEMENTS = get_args(Norm), get_args(Elements)


class Tensors(NamedTuple):
    """The tensors of a checked call. `students` has K maps, or one that is compared with every teacher."""

    students: tuple[Tensor, ...]  # [B, C_k, ...]
    teachers: tuple[Tensor, ...]  # K x [B, C_k, ...]
    weights: Tensor | None  # [K] or [K, B] on the device, where they are not known on the host
    mask: Tensor | None  # bool [B]


class Options(NamedTuple):
    """What is known on the host."""

    host_weights: tuple[float, ...]  # K numbers, empty where Tensors.weights is a tensor
    p: int
    norm: Norm
    elements: Elements
    reduction: Reduction
    num_items: float | Tensor | None

    def native(self) -> tuple[Any, ...]:
        """The arguments that the raw forward and backward share after the tensors."""
        norm, reduction = NORMS.index(self.norm), REDUCTIONS.index(self.reduction)
        return self.host_weights, self.p, norm, self.elements == "mean", reduction, self.num_items or 0.0


def _skipped(weight: float | Tensor, mask: Tensor | None) -> Tensor | None:
    """bool [B] or []: the samples that a pair is not read at; None for none. A weight that learns has a derivative."""
    skipped = None if mask is None else ~mask
    if isinstance(weight, Tensor) and not (weight.requires_grad and torch.is_grad_enabled()):
        skipped = weight == 0 if skipped is None else skipped | (weight == 0)
    return skipped


def _pair(student: Tensor, teacher: Tensor, weight: float | Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """The weighted distances of one pair, [B]."""
    dtype = accumulate_dtype(torch.promote_types(student.dtype, teacher.dtype))
    if not isinstance(weight, Tensor) and weight == 0:
        return student.new_zeros(student.shape[:1], dtype=dtype) + student[:0].sum()  # with a gradient of 0
    x, y, skipped = student.to(dtype), teacher.to(dtype), _skipped(weight, mask)
    if skipped is not None:
        skipped = skipped.reshape(-1, *[1] * (x.dim() - 1))
        x, y = x.masked_fill(skipped, 0), y.masked_fill(skipped, 0)
    difference = maps.normalised(x, options.norm) - maps.normalised(y, options.norm)
    # Times 1, or NaN: the derivative of |NaN| is 0 in torch.
    powers = difference.abs() * (difference.detach() * 0 + 1) if options.p == 1 else difference.square()
    distances = powers.mean((1, 2)) if options.elements == "mean" else powers.sum((1, 2))
    return (weight.to(dtype) if isinstance(weight, Tensor) else weight) * distances


def reference(tensors: Tensors, options: Options) -> Tensor:
    """The specification in plain PyTorch: the loss by `options.reduction`, differentiable in all of its inputs."""
    students, teachers, weights, mask = tensors
    students = students * (len(teachers) if len(students) == 1 else 1)
    # A copy, since autograd refuses to keep a tensor made under torch.inference_mode().
    each: Sequence[float | Tensor] = options.host_weights if weights is None else weights.clone().unbind(0)
    total: Tensor = 0  # type: ignore[assignment]  # until the first pair
    for student, teacher, weight in zip(students, teachers, each, strict=True):
        pair = _pair(student, teacher, weight, mask, options)
        total = total + pair.to(accumulate_dtype(student.dtype))
    items = options.num_items
    items = items.to(total.dtype) if isinstance(items, Tensor) else items
    return reduce_rows(total, mask, options.reduction, (-1,), items)
