"""The keyword arguments of operations whose result's type depends on two flags, for their overloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypedDict

from torch import Tensor

from fastkd.ops._formulas import Reduction
from fastkd.ops._multi_label_inputs import Classes
from fastkd.ops._multi_teacher_formula import Activation, Combine


class Shared(TypedDict, total=False):
    kd_weight: float | Tensor
    ce_weight: float | Tensor
    label_smoothing: float
    ignore_index: int
    class_dim: int
    scale_by_t2: bool
    reduction: Reduction


class Distillation(Shared, total=False):
    """Arguments of MultiTeacherKD that do not change what it returns."""

    weights: Tensor | Sequence[float] | None
    temperature: float | Tensor | Sequence[float]
    combine: Combine
    divergence: str | Mapping[str, float | Tensor]
    divergence_beta: float | None
    activation: Activation
    vocab_size: int | None
    softcap: float | None
    logit_scale: float
    teacher_softcap: float | Sequence[float | None] | None
    teacher_logit_scale: float | Sequence[float]


class DistillationCall(Distillation, total=False):
    """Arguments of multi_teacher_kd."""

    mask: Tensor | None
    num_items: float | Tensor | None


class MultiLabel(TypedDict, total=False):
    """Arguments of MultiLabelKD that do not change what it returns."""

    weights: Tensor | Sequence[float] | None
    kd_weight: float | Tensor
    temperature: float | Tensor | Sequence[float]
    combine: Combine
    ce_weight: float | Tensor
    pos_weight: float | Tensor | None
    ignore_index: int
    class_dim: int
    classes: Classes
    scale_by_t2: bool
    reduction: Reduction


class MultiLabelCall(MultiLabel, total=False):
    """Arguments of multi_label_kd."""

    mask: Tensor | None
    num_items: float | Tensor | None


class Mutual(Shared, total=False):
    """Arguments of MutualKD that do not change what it returns."""

    weights: Tensor | Sequence[Sequence[float]] | None
    teacher_weights: Tensor | Sequence[Sequence[float]] | None
    temperature: float | Tensor
    divergence: str
    divergence_beta: float | None


class MutualCall(Mutual, total=False):
    """Arguments of mutual_kd."""

    teachers: Tensor | Sequence[Tensor]
    mask: Tensor | None
    num_items: float | Tensor | None
