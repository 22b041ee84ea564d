"""Distillation where each class has a probability of its own: multi-label networks, and binary ones of one logit.

Per element, a class of a row, with p_k = sigmoid(t_k / T), q = sigmoid(s / T), the weights w_k, and the divergence of
two outcomes, KL(p || q) = p log(p / q) + (1 - p) log((1 - p) / (1 - q)) (kernels: csrc/multi_label/README.md):

    KD    combine="losses"   T^2 * sum_k w_k KL(p_k || q)                (several T: each term with its own T and T^2)
          combine="probs"    T^2 * KL(sum_k w_k p_k || q)
          combine="logits"   T^2 * KL(sigmoid(sum_k w_k t_k / T) || q)
    CE    -pos_weight * y * log sigmoid(s) - (1 - y) * log(1 - sigmoid(s))
    row   the sum over its classes, or their mean, of kd_weight * KD + ce_weight * CE

An element that is masked, or whose label is `ignore_index`, counts nowhere; a row counts where an element of it does.
The reference is in _multi_label_formula.py, what runs the kernels in _multi_label_kernels.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_label_inputs as inputs
from fastkd.ops import _multi_label_kernels as kernels
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._formulas import LossTerms, Reduction
from fastkd.ops._inputs import classes_last
from fastkd.ops._multi_label_formula import Options, Tensors
from fastkd.ops._multi_label_inputs import OP, Classes
from fastkd.ops._multi_teacher_formula import Combine

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastkd.ops._keywords import MultiLabelCall

__all__ = ["multi_label_kd"]


@overload
def multi_label_kd(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[MultiLabelCall],
) -> Tensor: ...
@overload
def multi_label_kd(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: Unpack[MultiLabelCall],
) -> tuple[Tensor, LossTerms]: ...
@overload
def multi_label_kd(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: bool = False,
    **options: Unpack[MultiLabelCall],
) -> Any: ...
def multi_label_kd(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    weights: Tensor | Sequence[float] | None = None,
    kd_weight: float | Tensor = 1.0,
    temperature: float | Tensor | Sequence[float] = 1.0,
    combine: Combine = "losses",
    ce_weight: float | Tensor = 0.0,
    pos_weight: float | Tensor | None = None,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    class_dim: int = -1,
    classes: Classes = "sum",
    scale_by_t2: bool = True,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    return_terms: bool = False,
) -> Any:
    """Distillation of sigmoid outputs: the binary KL divergences of all classes, with the labels' cross-entropy.

    Yang et al., "Multi-Label Knowledge Distillation" (ICCV 2023, arXiv 2308.06453), their multi-label logits
    distillation (MLD), at any temperature and for K teachers. Also for binary networks, C = 1.

    >>> student, teacher = torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 2.0]] * 2)
    >>> target = torch.tensor([[0, 1, 1], [0, 1, -100]])
    >>> loss = fastkd.functional.multi_label_kd(student, [teacher], target, ce_weight=1.0)
    >>> round(loss.item(), 4)  # the KL of sigmoid(2) in one row, and log 2 of five labels, over two rows
    1.8968

    Args:
        student: logits [..., C], float32, float64, float16 or bfloat16; C may be 1. Leading dimensions are rows.
        teachers: K logits of the student's shape, as a sequence, or stacked [K, ..., C], each in any of these dtypes.
        target: labels of the student's shape (also [...] where C is 1): integers 0 and 1, or `ignore_index`; bool; or
            floating ones in [0, 1].
        weights: none = 1/K each; [K]; or [K, ...] per row. Not normalised. A teacher of weight 0 is not read.
        kd_weight: multiplies the whole distillation term, after `combine`. 0: the teachers are not read.
        temperature: a number > 0, or one per teacher (with combine="losses"). It, kd_weight, ce_weight and num_items
            may be tensors of one element, as in `multi_teacher_kd`.
        combine: "losses" sum of the K divergences | "probs" divergence to the weighted mixture of the teachers'
            probabilities (weights >= 0) | "logits" divergence to the sigmoid of the weighted sum of their logits.
        ce_weight: weight of the binary cross-entropy with the labels, at T = 1, added.
        pos_weight: of positive labels in the cross-entropy, a number or [C], >= 0, as in
            torch.nn.functional.binary_cross_entropy_with_logits. The distillation is as without it.
        ignore_index: an integer label that says that this element counts nowhere, neither in CE nor in KD, whatever
            `ce_weight`. (To distil where there is no label: two calls, one without a target, one with kd_weight=0.)
        mask: bool [...] of rows, or of the student's shape: where it is False nothing counts. What elements that do not
            count hold (NaN) reaches nothing.
        class_dim: the dimension of the classes in student, teachers, target and a mask of their shape: 1 for maps.
        classes: what a row is: the "sum" over its classes (the divergence of all labels together, if independent), or
            the "mean", which is the sum / C whatever counts: TextBrewer's, and PyTorch's of cross-entropies.
        scale_by_t2: multiply each divergence by its temperature squared.
        reduction: "none" (per row, [...]), "sum", or "mean" over the rows that count, those with an element that does.
            For [B, C] the mean with classes="sum" is the "batchmean" of the paper's code.
        num_items: what "sum" and "mean" divide the rows' sum by instead, a number > 0: for gradient accumulation.
        return_terms: also return LossTerms, KD and CE apart (CE also where ce_weight is 0).

    Returns:
        The loss in float32 (float64 for a float64 student): a scalar, or [...] for "none"; or (loss, terms). The
        gradient flows to the student, and to a teacher, weight, temperature or floating target that requires grad.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. An integer label besides 0, 1
            and ignore_index, or a floating one outside [0, 1], raises on the CPU; on a GPU and under torch.compile the
            loss of its row is NaN, and so is the gradient of its element.
    """
    tensors, checked = inputs.check(
        student, teachers, target, weights, kd_weight, temperature, combine, ce_weight, pos_weight, ignore_index, mask,
        class_dim, classes, scale_by_t2, reduction, num_items, return_terms,
    )  # fmt: skip
    return dispatch(tensors, checked, classes_last(student, class_dim).shape[:-1])


def dispatch(tensors: Tensors, options: Options, leading: torch.Size) -> Any:
    """The results of a checked call whose rows are `leading`."""
    results = calls.divided(options, leading, lambda options: kernels.losses_of(tensors, options))
    return tuple(results) if len(results) > 1 else results[0]


def as_sigmoid(op: str, student: Tensor, teachers: Any, target: Tensor | None, given: dict[str, Any]) -> Any:
    """multi_teacher_kd(student, teachers, target, activation="sigmoid", **given)."""
    tensors, options = inputs.check_as_sigmoid(op, student, teachers, target, given)
    return dispatch(tensors, options, classes_last(student, given["class_dim"]).shape[:-1])


def why_sigmoid_reference(op: str, student: Tensor, teachers: Any, target: Tensor | None, **given: Any) -> str | None:
    """Why that call goes to plain PyTorch, or None."""
    return kernels.why_reference(*inputs.check_as_sigmoid(op, student, teachers, target, given))


_backend.register(
    multi_label_kd, OP, lambda arguments: kernels.why_reference(*inputs.check(**arguments)), kernels.register_fakes
)
