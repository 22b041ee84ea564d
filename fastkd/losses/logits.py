"""The modules of the operations on logits: one student with several teachers, and networks that teach each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar, overload

from torch import Tensor

from fastkd import functional
from fastkd._core.typed import like
from fastkd._outputs import find_logits
from fastkd.losses._fixed import Fixed
from fastkd.ops.multi_teacher import DistillationStats
from fastkd.ops.shared import Activation, Combine, LossTerms, Reduction

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastkd.ops.shared import Distillation, Mutual

Logits = Any  # Tensor [..., C], or an object or dict with one in `logits`
Loss = TypeVar("Loss")


class MultiTeacherKD(Fixed, Generic[Loss]):
    """`fastkd.functional.multi_teacher_kd` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights or temperatures is a buffer: it moves with the module and is in its state dict. It may be set
    anew, also to a number, and older states load. Weights that change per call go into the call.

    >>> loss = fastkd.MultiTeacherKD(ce_weight=0.5, weights=[0.75, 0.25])
    >>> logits = torch.zeros(2, 4)
    >>> round(loss(logits, [logits, logits], torch.tensor([0, 3])).item(), 4)  # equal teachers: 0.5 * log 4 alone
    0.6931
    """

    _tensors = ("weights", "temperature")
    _shown = (
        "weights", "temperature", "combine", "divergence", "divergence_beta", "activation", "kd_weight", "ce_weight",
        "label_smoothing", "ignore_index", "class_dim", "vocab_size", "softcap", "logit_scale", "teacher_softcap",
        "teacher_logit_scale", "scale_by_t2", "reduction", "return_terms", "return_stats",
    )  # fmt: skip

    @overload
    def __init__(self: MultiTeacherKD[Tensor], **options: Unpack[Distillation]) -> None: ...
    @overload
    def __init__(
        self: MultiTeacherKD[tuple[Tensor, DistillationStats]],
        *,
        return_stats: Literal[True],
        **options: Unpack[Distillation],
    ) -> None: ...
    @overload
    def __init__(
        self: MultiTeacherKD[tuple[Tensor, LossTerms]],
        *,
        return_terms: Literal[True],
        **options: Unpack[Distillation],
    ) -> None: ...
    @overload
    def __init__(
        self: MultiTeacherKD[tuple[Tensor, LossTerms, DistillationStats]],
        *,
        return_terms: Literal[True],
        return_stats: Literal[True],
        **options: Unpack[Distillation],
    ) -> None: ...
    def __init__(
        self,
        *,
        weights: Tensor | Sequence[float] | None = None,
        kd_weight: float | Tensor = 1.0,
        temperature: float | Tensor | Sequence[float] = 4.0,
        combine: Combine = "losses",
        divergence: str | Mapping[str, float | Tensor] = "forward",
        divergence_beta: float | None = None,
        activation: Activation = "softmax",
        ce_weight: float | Tensor = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int = -1,
        vocab_size: int | None = None,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        teacher_softcap: float | Sequence[float | None] | None = None,
        teacher_logit_scale: float | Sequence[float] = 1.0,
        scale_by_t2: bool = True,
        reduction: Reduction = "mean",
        return_terms: bool = False,
        return_stats: bool = False,
    ) -> None:
        super().__init__(reduction=reduction)
        self.weights, self.temperature, self.combine = weights, temperature, combine
        self.kd_weight, self.ce_weight, self.label_smoothing = kd_weight, ce_weight, label_smoothing
        self.divergence, self.divergence_beta, self.vocab_size = divergence, divergence_beta, vocab_size
        self.softcap, self.logit_scale, self.activation = softcap, logit_scale, activation
        self.teacher_softcap, self.teacher_logit_scale = teacher_softcap, teacher_logit_scale
        self.ignore_index, self.class_dim, self.scale_by_t2 = ignore_index, class_dim, scale_by_t2
        self.return_terms, self.return_stats = return_terms, return_stats

    def forward(
        self,
        student: Logits,  # [..., C]
        teachers: Logits | Sequence[Logits],  # K x [..., C]
        target: Tensor | None = None,  # [...]
        weights: Tensor | Sequence[float] | None = None,
        *,
        mask: Tensor | None = None,  # bool [...]
        num_items: float | Tensor | None = None,
    ) -> Loss:
        """The loss, a Tensor; behind it, where wanted, `LossTerms` (return_terms) and `DistillationStats`."""
        loss: Loss = functional.multi_teacher_kd(
            logits_of(student),
            several_logits(teachers),
            target,
            weights=self.weights if weights is None else weights,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            combine=self.combine,
            divergence=self.divergence,
            divergence_beta=self.divergence_beta,
            activation=self.activation,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            mask=mask,
            class_dim=self.class_dim,
            vocab_size=self.vocab_size,
            softcap=self.softcap,
            logit_scale=self.logit_scale,
            teacher_softcap=self.teacher_softcap,
            teacher_logit_scale=self.teacher_logit_scale,
            scale_by_t2=self.scale_by_t2,
            reduction=self.reduction,
            num_items=num_items,
            return_terms=self.return_terms,
            return_stats=self.return_stats,
        )
        return loss

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


class MutualKD(Fixed, Generic[Loss]):
    """`fastkd.functional.mutual_kd` with its hyper-parameters fixed; see there for what they mean.

    A tensor of weights or a temperature tensor is a buffer: it moves with the module and is in its state dict. It may
    be set anew, also to a number, and older states load. Weights that change per call go into the call.

    >>> loss = fastkd.MutualKD(ce_weight=1.0)
    >>> logits = torch.zeros(2, 4)
    >>> losses = loss([logits, logits, logits], torch.tensor([0, 3]))
    >>> [round(each, 4) for each in losses.tolist()]  # log 4, no divergence
    [1.3863, 1.3863, 1.3863]
    """

    _tensors = ("weights", "teacher_weights", "temperature")
    _shown = (
        "weights", "teacher_weights", "kd_weight", "temperature", "divergence", "divergence_beta", "ce_weight",
        "label_smoothing", "ignore_index", "class_dim", "scale_by_t2", "reduction", "return_terms",
    )  # fmt: skip

    @overload
    def __init__(self: MutualKD[Tensor], **options: Unpack[Mutual]) -> None: ...
    @overload
    def __init__(
        self: MutualKD[tuple[Tensor, LossTerms]],
        *,
        return_terms: Literal[True],
        **options: Unpack[Mutual],
    ) -> None: ...
    def __init__(
        self,
        *,
        weights: Tensor | Sequence[Sequence[float]] | None = None,
        teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
        kd_weight: float | Tensor = 1.0,
        temperature: float | Tensor = 1.0,
        divergence: str = "forward",
        divergence_beta: float | None = None,
        ce_weight: float | Tensor = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        class_dim: int = -1,
        scale_by_t2: bool = True,
        reduction: Reduction = "mean",
        return_terms: bool = False,
    ) -> None:
        super().__init__(reduction=reduction)
        self.weights, self.teacher_weights, self.temperature = weights, teacher_weights, temperature
        self.kd_weight, self.ce_weight, self.label_smoothing = kd_weight, ce_weight, label_smoothing
        self.ignore_index, self.class_dim, self.scale_by_t2 = ignore_index, class_dim, scale_by_t2
        self.return_terms, self.divergence, self.divergence_beta = return_terms, divergence, divergence_beta

    def forward(
        self,
        logits: Logits | Sequence[Logits],  # M x [..., C]
        target: Tensor | None = None,  # [...]
        weights: Tensor | Sequence[Sequence[float]] | None = None,
        teachers: Logits | Sequence[Logits] = (),  # N x [..., C]
        teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
        *,
        mask: Tensor | None = None,  # bool [...]
        num_items: float | Tensor | None = None,
    ) -> Loss:
        """The losses, a Tensor [M]; with return_terms=True the losses and `LossTerms`."""
        losses: Loss = functional.mutual_kd(
            several_logits(logits),
            target,
            weights=self.weights if weights is None else weights,
            teachers=several_logits(teachers),
            teacher_weights=self.teacher_weights if teacher_weights is None else teacher_weights,
            kd_weight=self.kd_weight,
            temperature=self.temperature,
            divergence=self.divergence,
            divergence_beta=self.divergence_beta,
            ce_weight=self.ce_weight,
            label_smoothing=self.label_smoothing,
            ignore_index=self.ignore_index,
            mask=mask,
            class_dim=self.class_dim,
            scale_by_t2=self.scale_by_t2,
            reduction=self.reduction,
            num_items=num_items,
            return_terms=self.return_terms,
        )
        return losses

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


def logits_of(output: Logits) -> Any:
    """The logits of a network's output; what holds none as it is, for the operation to say what is wrong with it."""
    logits = find_logits(output)
    return output if logits is None else logits


def several_logits(outputs: Logits | Sequence[Logits]) -> Any:
    """Those of several networks; a NamedTuple or dict with logits is the output of one."""
    if isinstance(outputs, Tensor):
        return outputs
    logits = find_logits(outputs)
    if logits is not None:
        return [logits]
    return [logits_of(output) for output in outputs] if isinstance(outputs, Sequence) else outputs
