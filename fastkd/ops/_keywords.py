"""The keyword arguments of operations whose result's type depends on two flags, for their overloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor


class Shared(TypedDict, total=False):
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float
    ignore_index: int
    class_dim: int
    scale_by_t2: bool
    reduction: str


class Distillation(Shared, total=False):
    """Of MultiTeacherKD: those that do not change what it returns."""

    weights: Tensor | Sequence[float] | None
    temperature: float | Tensor | Sequence[float]
    combine: str
    divergence: str | Mapping[str, float | Tensor]
    divergence_beta: float | None
    vocab_size: int | None
    softcap: float | None
    logit_scale: float
    teacher_softcap: float | None | Sequence[float | None]
    teacher_logit_scale: float | Sequence[float]


class DistillationCall(Distillation, total=False):
    """Of multi_teacher_kd."""

    mask: Tensor | None
    num_items: float | Tensor | None


class MutualCall(Shared, total=False):
    """Of mutual_kd."""

    weights: Tensor | Sequence[Sequence[float]] | None
    teachers: Tensor | Sequence[Tensor]
    teacher_weights: Tensor | Sequence[Sequence[float]] | None
    temperature: float | Tensor
    mask: Tensor | None
    num_items: float | Tensor | None
