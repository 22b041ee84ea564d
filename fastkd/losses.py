"""One nn.Module per operation: hyper-parameters in the constructor, tensors in the call, no mathematics."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from fastkd import functional


class MultiTeacherKD(nn.Module):
    """`fastkd.functional.multi_teacher_kd` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights or temperatures is a buffer: it moves with the module and is in its state dict. Weights that
    change per call go into the call.
    """

    def __init__(
        self,
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
    ) -> None:
        super().__init__()
        _keep(self, "weights", weights)
        _keep(self, "temperature", temperature)
        self.combine, self.ce_weight, self.label_smoothing = combine, ce_weight, label_smoothing
        self.ignore_index, self.scale_by_t2 = ignore_index, scale_by_t2
        self.reduction, self.return_stats = reduction, return_stats

    def forward(
        self,
        student: Tensor,  # [..., C]
        teachers: Tensor | Sequence[Tensor],  # K x [..., C]
        target: Tensor | None = None,  # [...]
        weights: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        return functional.multi_teacher_kd(
            student,
            teachers,
            target,
            weights=self.weights if weights is None else weights,
            temperature=self.temperature,
            combine=self.combine,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            scale_by_t2=self.scale_by_t2,
            reduction=self.reduction,
            return_stats=self.return_stats,
        )

    def extra_repr(self) -> str:
        shown = ("temperature", "combine", "ce_weight", "label_smoothing", "ignore_index", "scale_by_t2", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class MutualKD(nn.Module):
    """`fastkd.functional.mutual_kd` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights or a temperature tensor is a buffer: it moves with the module and is in its state dict.
    Weights that change per call go into the call.
    """

    def __init__(
        self,
        *,
        weights: Tensor | Sequence[Sequence[float]] | None = None,
        teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
        temperature: float | Tensor = 1.0,
        ce_weight: float = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        scale_by_t2: bool = True,
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _keep(self, "weights", weights)
        _keep(self, "teacher_weights", teacher_weights)
        _keep(self, "temperature", temperature)
        self.ce_weight, self.label_smoothing, self.ignore_index = ce_weight, label_smoothing, ignore_index
        self.scale_by_t2, self.reduction = scale_by_t2, reduction

    def forward(
        self,
        logits: Tensor | Sequence[Tensor],  # M x [..., C]
        target: Tensor | None = None,  # [...]
        weights: Tensor | Sequence[Sequence[float]] | None = None,
        teachers: Tensor | Sequence[Tensor] = (),  # N x [..., C]
        teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
    ) -> Tensor:
        return functional.mutual_kd(
            logits,
            target,
            weights=self.weights if weights is None else weights,
            teachers=teachers,
            teacher_weights=self.teacher_weights if teacher_weights is None else teacher_weights,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            scale_by_t2=self.scale_by_t2,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        shown = ("temperature", "ce_weight", "label_smoothing", "ignore_index", "scale_by_t2", "reduction")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


class RKDDistance(nn.Module):
    """`fastkd.functional.rkd_distance` with its hyper-parameters fixed; see there for what they mean."""

    def __init__(self, *, reduction: str = "mean", process_group=None) -> None:
        super().__init__()
        self.reduction, self.process_group = reduction, process_group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:  # [N, D], [N, E]
        return functional.rkd_distance(student, teacher, reduction=self.reduction, process_group=self.process_group)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}"


class RKDAngle(nn.Module):
    """`fastkd.functional.rkd_angle` with its hyper-parameters fixed; see there for what they mean."""

    def __init__(self, *, reduction: str = "mean", eps: float = 1e-6, process_group=None) -> None:
        super().__init__()
        self.reduction, self.eps, self.process_group = reduction, eps, process_group

    def forward(self, student: Tensor, teacher: Tensor) -> Tensor:  # [N, D], [N, E]
        return functional.rkd_angle(
            student, teacher, reduction=self.reduction, eps=self.eps, process_group=self.process_group
        )

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, eps={self.eps!r}"


class FeatureEnsemble(nn.Module):
    """`fastkd.functional.feature_ensemble` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights is a buffer: it moves with the module and is in its state dict. Weights that change per call go
    into the call.
    """

    def __init__(
        self,
        *,
        weights: Tensor | Sequence[float] | None = None,
        p: int = 1,
        norm: str = "sample",
        elements: str = "mean",
        reduction: str = "mean",
    ) -> None:
        super().__init__()
        _keep(self, "weights", weights)
        self.p, self.norm, self.elements, self.reduction = p, norm, elements, reduction

    def forward(
        self,
        students: Tensor | Sequence[Tensor],  # K x [B, C_k, H_k, W_k], or one
        teachers: Tensor | Sequence[Tensor],  # K x [B, C_k, H_k, W_k]
        weights: Tensor | Sequence[float] | None = None,
    ) -> Tensor:
        return functional.feature_ensemble(
            students,
            teachers,
            weights=self.weights if weights is None else weights,
            p=self.p,
            norm=self.norm,
            elements=self.elements,
            reduction=self.reduction,
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in ("p", "norm", "elements", "reduction"))


def _keep(module: nn.Module, name: str, value: object) -> None:
    """A parameter as a parameter, a tensor as a buffer, anything else as it is."""
    if isinstance(value, nn.Parameter):
        module.register_parameter(name, value)
    elif isinstance(value, Tensor):
        module.register_buffer(name, value)
    else:
        setattr(module, name, value)
