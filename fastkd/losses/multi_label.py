"""The module of multi_label_kd, a part of fastkd.losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, overload

from torch import Tensor

from fastkd import functional
from fastkd._core.typed import like
from fastkd.losses._fixed import Fixed
from fastkd.losses.logits import Logits, Loss, logits_of, several_logits
from fastkd.ops.shared import Classes, Combine, LossTerms, Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastkd.ops.shared import MultiLabel


class MultiLabelKD(Fixed, Generic[Loss]):
    """`fastkd.functional.multi_label_kd` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights, positive weights or temperatures is a buffer: it moves with the module and is in its state
    dict. It may be set anew, also to a number, and older states load. Weights that change per call go into the call.

    >>> loss = fastkd.MultiLabelKD(ce_weight=0.5)
    >>> logits = torch.zeros(2, 4)
    >>> round(loss(logits, [logits, logits], torch.ones(2, 4)).item(), 4)  # equal teachers: 0.5 * 4 log 2 alone
    1.3863
    """

    _tensors = ("weights", "temperature", "pos_weight")
    _shown = (
        "weights", "temperature", "combine", "kd_weight", "ce_weight", "pos_weight", "ignore_index", "class_dim",
        "classes", "scale_by_t2", "reduction", "return_terms",
    )  # fmt: skip

    @overload
    def __init__(self: MultiLabelKD[Tensor], **options: Unpack[MultiLabel]) -> None: ...
    @overload
    def __init__(
        self: MultiLabelKD[tuple[Tensor, LossTerms]],
        *,
        return_terms: Literal[True],
        **options: Unpack[MultiLabel],
    ) -> None: ...
    def __init__(
        self,
        *,
        weights: Tensor | Sequence[float] | None = None,
        kd_weight: float | Tensor = 1.0,
        temperature: float | Tensor | Sequence[float] = 1.0,
        combine: Combine = "losses",
        ce_weight: float | Tensor = 0.0,
        pos_weight: float | Tensor | None = None,
        ignore_index: int = -100,
        class_dim: int = -1,
        classes: Classes = "sum",
        scale_by_t2: bool = True,
        reduction: Reduction = "mean",
        return_terms: bool = False,
    ) -> None:
        super().__init__(reduction=reduction)
        self.weights, self.temperature, self.combine = weights, temperature, combine
        self.kd_weight, self.ce_weight, self.pos_weight = kd_weight, ce_weight, pos_weight
        self.ignore_index, self.class_dim, self.classes = ignore_index, class_dim, classes
        self.scale_by_t2, self.return_terms = scale_by_t2, return_terms

    def forward(
        self,
        student: Logits,  # [..., C]
        teachers: Logits | Sequence[Logits],  # K x [..., C]
        target: Tensor | None = None,  # [..., C]
        weights: Tensor | Sequence[float] | None = None,
        *,
        mask: Tensor | None = None,  # bool [...] or [..., C]
        num_items: float | Tensor | None = None,
    ) -> Loss:
        """The loss, a Tensor; with return_terms=True the loss and `LossTerms`."""
        loss: Loss = functional.multi_label_kd(
            logits_of(student),
            several_logits(teachers),
            target,
            weights=self.weights if weights is None else weights,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            combine=self.combine,
            ce_weight=self.ce_weight,
            pos_weight=self.pos_weight,
            ignore_index=self.ignore_index,
            mask=mask,
            class_dim=self.class_dim,
            classes=self.classes,
            scale_by_t2=self.scale_by_t2,
            reduction=self.reduction,
            num_items=num_items,
            return_terms=self.return_terms,
        )
        return loss

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""
