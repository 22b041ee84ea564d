"""The modules of the operations on embeddings and feature maps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd._core.typed import like
from fastkd.losses._fixed import Fixed
from fastkd.ops.feature_ensemble import Elements
from fastkd.ops.shared import Norm, Reduction


class RKDDistance(Fixed):
    """`fastkd.functional.rkd_distance` with its hyper-parameters fixed; see there for what they mean.

    >>> embeddings = torch.tensor([[0.0], [1.0], [3.0]])
    >>> fastkd.RKDDistance()(embeddings, 2 * embeddings).item()  # distances are compared relative to their mean
    0.0
    """

    _shown = ("reduction",)

    def __init__(
        self, *, reduction: Reduction = "mean", process_group: torch.distributed.ProcessGroup | None = None
    ) -> None:
        super().__init__(reduction=reduction)
        self.process_group = process_group

    def forward(
        self,
        student: Tensor,  # [N, D]
        teacher: Tensor,  # [N, E]
        *,
        mask: Tensor | None = None,  # bool [N]
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of `rkd_distance`: a scalar, or [N] where `reduction` is "none"."""
        return functional.rkd_distance(
            student,
            teacher,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
            process_group=self.process_group,
        )

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


class RKDAngle(Fixed):
    """`fastkd.functional.rkd_angle` with its hyper-parameters fixed; see there for what they mean.

    >>> square = torch.tensor([[0.0, 0.0], [0.0, 1.0], [1.0, 0.0], [1.0, 1.0]])
    >>> round(fastkd.RKDAngle()(square, square.flip(1)).item(), 6)  # mirrored: the same angles
    0.0
    """

    _shown = ("reduction", "eps")

    def __init__(
        self,
        *,
        reduction: Reduction = "mean",
        eps: float = 1e-6,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(reduction=reduction)
        self.eps, self.process_group = eps, process_group

    def forward(
        self,
        student: Tensor,  # [N, D]
        teacher: Tensor,  # [N, E]
        *,
        mask: Tensor | None = None,  # bool [N]
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of `rkd_angle`: a scalar, or [N] where `reduction` is "none"."""
        return functional.rkd_angle(
            student,
            teacher,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
            eps=self.eps,
            process_group=self.process_group,
        )

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


class FeatureEnsemble(Fixed):
    """`fastkd.functional.feature_ensemble` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights is a buffer: it moves with the module and is in its state dict. It may be set anew, and older
    states load. Weights that change per call go into the call.

    >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    >>> round(fastkd.FeatureEnsemble(elements="sum")(student, [teacher]).item(), 4)  # |0.6 - 0.8| + |0.8 - 0.6|
    0.4
    """

    _tensors = ("weights",)
    _shown = ("weights", "p", "norm", "elements", "reduction")

    def __init__(
        self,
        *,
        weights: Tensor | Sequence[float] | None = None,
        p: int = 1,
        norm: Norm = "sample",
        elements: Elements = "mean",
        reduction: Reduction = "mean",
    ) -> None:
        super().__init__(reduction=reduction)
        self.weights = weights
        self.p, self.norm, self.elements = p, norm, elements

    def forward(
        self,
        students: Tensor | Sequence[Tensor],  # K x [B, C_k, H_k, W_k], or one
        teachers: Tensor | Sequence[Tensor],  # K x [B, C_k, H_k, W_k]
        weights: Tensor | Sequence[float] | None = None,
        *,
        mask: Tensor | None = None,  # bool [B]
        num_items: float | Tensor | None = None,
    ) -> Tensor:
        """The loss of `feature_ensemble`: a scalar, or [B] where `reduction` is "none"."""
        return functional.feature_ensemble(
            students,
            teachers,
            weights=self.weights if weights is None else weights,
            p=self.p,
            norm=self.norm,
            elements=self.elements,
            mask=mask,
            reduction=self.reduction,
            num_items=num_items,
        )

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""
