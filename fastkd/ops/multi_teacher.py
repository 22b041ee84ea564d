"""One learner, K teachers: the KL divergences to all of them and the cross-entropy with the labels, in one pass.

Per row, with p_k = softmax(t_k / T), q = softmax(s / T) and the weights w_k (kernels: csrc/multi_teacher/README.md):

    KD    combine="losses"   T^2 * sum_k w_k D(p_k, q)                   (several T: each term with its own T and T^2)
          combine="probs"    T^2 * D(sum_k w_k p_k, q)
          combine="logits"   T^2 * D(softmax(sum_k w_k t_k / T), q)
          D                  KL(p || q), or another divergence of _divergences.py
    CE    cross_entropy(s, target, label_smoothing)
    loss  kd_weight * KD + ce_weight * CE

A row that is masked, or whose target is `ignore_index`, counts nowhere. A teacher of weight 0 is not read, and KD is 0
where no teacher is left. A class that is -inf in learner and teachers counts 0; a learner that is -inf where a teacher
is finite gives +inf. The reference is in _multi_teacher_formula.py, what runs the kernels in _multi_teacher_kernels.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, get_args, overload

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import check_choice
from fastkd.ops import _multi_teacher_inputs as inputs
from fastkd.ops import _multi_teacher_kernels as kernels
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _multi_teacher_statistics as statistics
from fastkd.ops import _multi_teacher_usual as usual
from fastkd.ops import _teacher_calls as calls
from fastkd.ops import _topk_kernels as topk_kernels
from fastkd.ops._formulas import LossTerms, Reduction
from fastkd.ops._inputs import classes_last
from fastkd.ops._multi_teacher_formula import Activation, Combine, Options, Tensors
from fastkd.ops._multi_teacher_inputs import OP
from fastkd.ops._multi_teacher_statistics import DistillationStats
from fastkd.ops._topk_logits import has_sparse, with_sparse
from fastkd.ops._topk_logits import why_reference as why_sparse_reference
from fastkd.ops.multi_label import as_sigmoid, why_sigmoid_reference
from fastkd.ops.topk import TopK

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastkd.ops._keywords import DistillationCall

__all__ = ["DistillationStats", "LossTerms", "cross_entropy_one", "multi_teacher_kd"]
USUAL = (
    "kd_weight", "temperature", "combine", "divergence", "divergence_beta", "ce_weight", "label_smoothing",
    "ignore_index", "class_dim", "softcap", "logit_scale", "teacher_softcap", "teacher_logit_scale", "scale_by_t2",
    "reduction", "return_terms",
)  # fmt: skip


@overload
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationCall],
) -> Tensor: ...
@overload
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
    *,
    return_terms: Literal[True],
    return_stats: Literal[False] = False,
    **options: Unpack[DistillationCall],
) -> tuple[Tensor, LossTerms]: ...
@overload
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    return_stats: Literal[True],
    **options: Unpack[DistillationCall],
) -> tuple[Tensor, DistillationStats]: ...
@overload
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
    *,
    return_terms: Literal[True],
    return_stats: Literal[True],
    **options: Unpack[DistillationCall],
) -> tuple[Tensor, LossTerms, DistillationStats]: ...
@overload
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
    *,
    return_terms: bool = False,
    return_stats: bool = False,
    **options: Unpack[DistillationCall],
) -> Any: ...
def multi_teacher_kd(
    student: Tensor,
    teachers: Tensor | TopK | Sequence[Tensor | TopK],
    target: Tensor | None = None,
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
    mask: Tensor | None = None,
    class_dim: int = -1,
    vocab_size: int | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    teacher_softcap: float | Sequence[float | None] | None = None,
    teacher_logit_scale: float | Sequence[float] = 1.0,
    scale_by_t2: bool = True,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    return_terms: bool = False,
    return_stats: bool = False,
) -> Any:
    """Distillation loss of one student and K teachers, with the labels' cross-entropy in the same pass.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), summed over teachers; the
    gradient flows to the student, and to a teacher, weight or temperature where it requires grad.

    >>> student, teachers = torch.zeros(2, 3), [torch.zeros(2, 3), torch.tensor([[0.0, 0.0, 4.0]] * 2)]
    >>> loss = fastkd.functional.multi_teacher_kd(student, teachers, torch.tensor([2, -100]), ce_weight=0.5)
    >>> round(loss.item(), 4)  # 16 * KL / 2 + 0.5 * log 3, of the row with a label
    1.5356

    Args:
        student: logits [..., C], float32, float64, float16 or bfloat16. Leading dimensions are rows: [B, C], [B, T, V].
        teachers: K logits of the student's shape, as a sequence, or stacked [K, ..., C] (a tensor of the student's
            own shape is one teacher), each in any of these dtypes. Never converted or concatenated, and copied only
            where the classes do not lie next to each other. Among them, or alone, `fastkd.TopK`: k classes a row (on
            a GPU in plain PyTorch); with combine="losses", and a temperature of 1 but for modes "teacher" and "both".
        target: class indices [...] of an integer dtype, or probabilities [..., C] of a floating one (one that requires
            grad gets a gradient, in plain PyTorch). Rows equal to `ignore_index` count nowhere, whatever `ce_weight`.
        weights: none = 1/K each; [K]; or [K, ...] per row. Not normalised: they multiply each teacher's term. A teacher
            of weight 0 (in that row) is not read: neither NaN nor infinity in it reaches anything but `stats`.
        kd_weight: multiplies the whole distillation term, after `combine`. 0: the teachers are not read.
        temperature: a number > 0, or one per teacher (with combine="losses"). Like kd_weight, ce_weight and num_items,
            it may be a tensor of one element, which a compiled graph takes as an input; on a GPU, or where it requires
            grad, all but num_items then go to plain PyTorch.
        combine: "losses" sum of the K divergences | "probs" divergence to the weighted mixture of the teachers'
            probabilities (weights >= 0) | "logits" divergence to the softmax of the weighted sum of their logits.
        divergence: of a teacher p and the student q: "forward" KL(p || q) | "reverse" KL(q || p) | "jsd"
            beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q, TRL's | "tvd" sum |p - q| / 2 |
            "skew_forward" KL(p || beta p + (1 - beta) q) | "skew_reverse" KL(q || (1 - beta) p + beta q), DistiLLM's |
            {"forward": w, "reverse": w}, the sum of both by numbers or tensors [...], one weight a row.
            The mixtures of combine="probs" and "logits" take forward, reverse, their sum, and jsd.
        divergence_beta: of jsd (none = 0.5; 0 is forward and 1 is reverse, as in TRL) and of the two skewed ones
            (none = 0.1, DistiLLM's lambda), in [0, 1].
        activation: "softmax" | "sigmoid": each class has a probability of its own, as in multi-label and binary
            networks (C >= 1). The call is then `multi_label_kd`, which says what target and mask may be; divergence,
            label_smoothing, vocab_size, softcaps, logit scales and return_stats keep their defaults.
        ce_weight: weight of cross_entropy(student, target), added; the KD term is not multiplied by 1 - ce_weight.
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].
        ignore_index: does nothing to probabilities.
        mask: bool [...]: a row where it is False counts nowhere, as if its target were `ignore_index`.
        class_dim: the dimension of the classes in student, teachers (counted in one of them) and soft targets: 1 for
            maps [B, C, H, W], whose rows are [B, H, W]. Maps in channels_last are not copied.
        vocab_size: classes from here on are padding, in every network: they are not read, and get a gradient of 0.
            The teachers may then have other numbers of columns than the student. Nothing is copied.
        softcap, logit_scale: the student's logits are softcap * tanh(logit_scale * logits / softcap) (none =
            logit_scale * logits), as in Gemma and Cohere; a masked class stays masked.
        teacher_softcap, teacher_logit_scale: the teachers', one for all or one per teacher.
        scale_by_t2: multiply each divergence by its temperature squared.
        reduction: "none" (per row, shape [...]; 0 for a row that does not count), "sum", or "mean" over the rows that
            count. For [B, C] the mean is torch's kl_div "batchmean"; for [B, T, V] batchmean is T times it.
        num_items: what "sum" and "mean" divide the rows' sum by instead, a number > 0: for gradient accumulation.
        return_terms: also return LossTerms, KD and CE apart (CE also where ce_weight is 0).
        return_stats: also return DistillationStats of the same logits, from the same pass (from a second read for rows
            that a GPU streams, for soft targets, and for more than 16 teachers there).

    Returns:
        The loss in float32 (float64 for a float64 student): a scalar, or [...] for "none"; or (loss, terms),
        (loss, stats), (loss, terms, stats). No row that counts: 0 with gradient 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row's loss
            and gradient are NaN (FASTKD_CHECKS=1 makes it raise there too, without compile).
    """
    softmax = activation == "softmax"
    if softmax and mask is None and num_items is None and vocab_size is None and not return_stats:
        values = (
            kd_weight, temperature, combine, divergence, divergence_beta, ce_weight, label_smoothing, ignore_index,
            class_dim, softcap, logit_scale, teacher_softcap, teacher_logit_scale, scale_by_t2, reduction, return_terms,
        )  # fmt: skip
        losses = usual.losses((inputs.check, student, teachers, target, weights, USUAL, values))
        if losses is not None:
            return (losses[0], LossTerms(*losses[1:])) if return_terms else losses[0]
    if not softmax or has_sparse(teachers):
        given = dict(
            weights=weights, kd_weight=kd_weight, temperature=temperature, combine=combine, divergence=divergence,
            divergence_beta=divergence_beta, ce_weight=ce_weight, label_smoothing=label_smoothing,
            ignore_index=ignore_index, mask=mask, class_dim=class_dim, vocab_size=vocab_size, softcap=softcap,
            logit_scale=logit_scale, teacher_softcap=teacher_softcap, teacher_logit_scale=teacher_logit_scale,
            scale_by_t2=scale_by_t2, reduction=reduction, num_items=num_items, return_terms=return_terms,
            return_stats=return_stats,
        )  # fmt: skip
        if softmax:
            return with_sparse(multi_teacher_kd, OP, student, teachers, target, given)
        check_choice(OP, "activation", activation, get_args(Activation))
        return as_sigmoid(OP, student, teachers, target, given)
    tensors, options = inputs.check(
        student, teachers, target, weights, kd_weight, temperature, combine, divergence, divergence_beta, ce_weight,
        label_smoothing, ignore_index, mask, class_dim, vocab_size, softcap, logit_scale, teacher_softcap,
        teacher_logit_scale, scale_by_t2, reduction, num_items, return_terms, return_stats,
    )  # fmt: skip
    return _results(tensors, options, classes_last(student, class_dim).shape[:-1], return_stats)


def cross_entropy_one(
    logits: Tensor, target: Tensor, *, label_smoothing: float = 0.0, ignore_index: int = -100,
    mask: Tensor | None = None, class_dim: int = -1, reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The cross-entropy of one network, which is a call without teachers."""
    tensors, options = inputs.check_one(
        logits, target, label_smoothing, ignore_index, mask, class_dim, reduction, num_items
    )
    loss: Tensor = _results(tensors, options, classes_last(logits, class_dim).shape[:-1], False)
    return loss


def why_one_reference(logits: Tensor, target: Tensor, **options: Any) -> str | None:
    """why_reference() of cross_entropy_one(logits, target, **options), all of them given."""
    return kernels.why_reference(*inputs.check_one(logits, target, **options))


def _results(tensors: Tensors, options: Options, leading: torch.Size, return_stats: bool) -> Any:
    beside: list[DistillationStats] = []

    def compute(options: Options) -> Sequence[Tensor]:
        if not return_stats:
            return kernels.losses_of(tensors, options)
        losses, stats = statistics.with_statistics(tensors, options)
        beside.append(stats)
        return losses

    results = [*calls.divided(options, leading, compute), *beside]
    return tuple(results) if len(results) > 1 else results[0]


def why_reference(arguments: dict[str, Any]) -> str | None:
    """Why multi_teacher_kd(**arguments), all of them given, goes to plain PyTorch, or None."""
    arguments = dict(arguments)
    if arguments.pop("activation") != "softmax":
        return why_sigmoid_reference(OP, **arguments)
    if not has_sparse(arguments["teachers"]):
        return kernels.why_reference(*inputs.check(**arguments))
    options = {name: value for name, value in arguments.items() if name not in ("student", "teachers", "target")}
    student, teachers, target = (arguments[name] for name in ("student", "teachers", "target"))
    return why_sparse_reference(OP, student, teachers, target, options)


def _register_fakes(namespace: str) -> None:
    native.register_fakes(namespace)
    topk_kernels.register_fakes(namespace)


_backend.register(multi_teacher_kd, OP, why_reference, _register_fakes)
