"""M networks that all learn: each from the labels and from the others, all losses and all gradients in one pass.

Per row, with p_n = softmax(z_n / T) of the M learners and the N frozen teachers, sg the stop of the gradient, w the
weights [M, M + N] and n over all networks but m (kernels: csrc/mutual/README.md):

    loss_m = kd_weight * T^2 * sum_n w[m, n] D(sg p_n, p_m) + ce_weight * cross_entropy(z_m, target, label_smoothing)

which is M calls of multi_teacher_kd, each with the other learners detached. The loss is a vector [M]; the gradient of
its element m flows to z_m alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal, overload

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.messages import wrong_value
from fastkd.ops import _losses
from fastkd.ops import _peer_groups as groups
from fastkd.ops import _peer_kernels as kernels
from fastkd.ops._autograd import host_scalars, on_host, why_no_kernels
from fastkd.ops._divergences import check_mutual
from fastkd.ops._formulas import LossTerms, Reduction
from fastkd.ops._inputs import (
    check_labels,
    check_not_probabilities,
    check_range,
    check_scalar,
    why_learning,
)
from fastkd.ops._peer_inputs import (
    OP,
    WHOSE,
    check_all_weights,
    check_frozen,
    check_networks,
    check_reduction,
    check_smoothing,
    check_temperature,
    rows_of,
)
from fastkd.ops._peer_losses import SCALARS, Options, Tensors, reference

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from fastkd.ops._keywords import MutualCall


@overload
def mutual_kd(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: Literal[False] = False,
    **options: Unpack[MutualCall],
) -> Tensor: ...
@overload
def mutual_kd(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: Literal[True],
    **options: Unpack[MutualCall],
) -> tuple[Tensor, LossTerms]: ...
@overload
def mutual_kd(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    return_terms: bool = False,
    **options: Unpack[MutualCall],
) -> Any: ...
def mutual_kd(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    weights: Tensor | Sequence[Sequence[float]] | None = None,
    teachers: Tensor | Sequence[Tensor] = (),
    teacher_weights: Tensor | Sequence[Sequence[float]] | None = None,
    kd_weight: float | Tensor = 1.0,
    temperature: float | Tensor = 1.0,
    divergence: str = "forward",
    divergence_beta: float | None = None,
    ce_weight: float | Tensor = 0.0,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    class_dim: int = -1,
    scale_by_t2: bool = True,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
    return_terms: bool = False,
) -> Any:
    """Losses of M networks that teach each other, with the labels' cross-entropy in the same pass.

    Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), eq. 8, with weights, a temperature and frozen teachers.
    The same as M calls of `multi_teacher_kd`, each with the other networks detached: element m of the result gives a
    gradient to network m alone, so that `losses.sum().backward()` trains all of them.

    >>> networks = [torch.randn(8, 10, requires_grad=True) for _ in range(3)]
    >>> losses = fastkd.functional.mutual_kd(networks, torch.arange(8), ce_weight=1.0)
    >>> losses.sum().backward()

    Args:
        logits: M >= 2 networks' logits [..., C], C >= 2, as a sequence, or stacked [M, ..., C]; float32, float64,
            float16 or bfloat16. Rows are read where they lie, never copied. A network that does not require grad only
            teaches. Networks of several dtypes take one pass for each dtype.
        target: class indices [...], an integer dtype, or probabilities [..., C] of a floating dtype. Rows equal to
            `ignore_index` count nowhere, whatever `ce_weight`; beside probabilities, ignore_index does nothing.
        weights: w[m, n] = how much network m learns from network n: none = 1/(M-1) each; [M, M]; or [M, M, ...] per
            row. The diagonal is never read. Not normalised: they multiply the divergences. A weight of 0 means that n
            is not read for m (in that row): what it holds, NaN say, reaches nothing, and the pair costs nothing.
        teachers: N networks that do not learn, of the same shape, as a sequence, or stacked [N, ..., C]; of any
            floating dtypes, each its own.
        teacher_weights: the same for them: none = 1/N each; [M, N]; or [M, N, ...] per row.
        kd_weight: a number that multiplies the divergences' sum. At 0 nobody reads another, and terms.kd is 0.
        temperature: a number > 0, of all networks.
        divergence: of another network p and network m, q: "forward" KL(p || q), "reverse" KL(q || p) or "jsd"; as in
            multi_teacher_kd, whose kernels the last two do not have here: they are plain PyTorch.
        divergence_beta: of jsd, none = 0.5; as in multi_teacher_kd.
        ce_weight: weight of cross_entropy(logits[m], target), added to each loss. kd_weight, temperature and ce_weight
            may be 0-d tensors: a schedule under torch.compile then needs one graph.
        label_smoothing: as in torch.nn.functional.cross_entropy, in [0, 1].
        mask: bool [...]: rows where it is False count nowhere, as if their target were `ignore_index`.
        class_dim: where one network's logits (and soft targets) have their classes; 1 for maps [B, C, H, W], whose
            labels, masks and losses are [B, H, W].
        scale_by_t2: multiply each divergence by the temperature squared.
        reduction: "none" (per row), "sum", or "mean" over the rows that count, at least one. For [B, C] that is also
            F.kl_div's "batchmean"; for [B, T, V], batchmean is T times it.
        num_items: what "mean" and "sum" divide the sum of the rows by instead: a number or a 0-d tensor, such as the
            rows of all micro-batches. Refused for "none".
        return_terms: also return LossTerms(kd, ce), detached, of the losses' shape, without kd_weight and ce_weight.

    Returns:
        [M] ([M, ...] for "none"), in float32 (float64 where a learner is). No row that counts: 0 with gradient 0.
        `losses[m]` has a graph of its own: its backward reaches network m alone and may be followed by the optimizer's
        step and the backward of the next network's. With return_terms: (losses, terms).

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row's losses
            and gradients are NaN (FASTKD_CHECKS=1 makes it raise there too, without compile).
        RuntimeError: a second derivative of inputs that were changed in place (a first one may follow such a change).
    """
    tensors, options, leading = _check(
        logits, target, weights, teachers, teacher_weights, kd_weight, temperature, divergence, divergence_beta,
        ce_weight, label_smoothing, ignore_index, mask, class_dim, scale_by_t2, reduction, num_items, return_terms,
    )  # fmt: skip
    return dispatch(OP, tensors, options, leading)


def dispatch(op: str, tensors: Tensors, options: Options, leading: Sequence[int]) -> Any:
    """The losses of a checked call, and with return_terms their terms."""
    items = options.num_items
    outside = items if isinstance(items, Tensor) and not on_host([items]) else None  # divides outside of the kernels
    if outside is not None:
        options = options._replace(num_items=0.0, reduction="sum")
    loss, terms = _losses_and_terms(op, tensors, options)
    if outside is not None:
        loss = _losses.mapped(loss, lambda x: x / outside, lambda x: x / outside)
    if options.reduction == "none" and len(leading) != 1:
        loss = _losses.mapped(loss, lambda x: x.reshape(-1, *leading), lambda x: x.reshape(leading))
    if terms is None:
        return loss
    terms = (terms if outside is None else terms / outside).detach()
    return loss, LossTerms(*[t.reshape(loss.shape) for t in terms.unbind(0)])


def _losses_and_terms(op: str, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """([M] or [M, R]; with return_terms the terms [2, M] or [2, M, R])."""
    if (reason := why_reference(tensors, options)) is not None:
        _backend.note_fallback(op, reason, tensors.logits[0])
        check_range(op, tensors.target, tensors.logits[0].shape[-1], options.ignore_index)
        return reference(tensors, options)
    numbers = (options.temperature, options.kd_weight, options.ce_weight, options.num_items)
    scalars = host_scalars(numbers)
    if scalars is not None:
        tensors = tensors._replace(scalars=scalars)
        options = options._replace(temperature=1.0, kd_weight=1.0, ce_weight=0.0, num_items=0.0)
    return groups.losses(op, tensors, options)


def why_reference(tensors: Tensors, options: Options) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    learning = torch.is_grad_enabled()
    reason = why_no_kernels(tensors.logits[0])
    if reason is not None:
        return reason
    if options.divergence.kind != "forward":
        return "there are kernels of divergence='forward' alone"
    for k, teacher in enumerate(tensors.teachers):
        if teacher.requires_grad and learning:
            return why_learning(f"teachers[{k}]", tensors.logits)
    for weights in (tensors.weights, tensors.teacher_weights):
        if weights is not None and weights.requires_grad and learning:
            return "the weights require grad"
    if tensors.soft is not None and tensors.soft.requires_grad and learning:
        return "the target's probabilities require grad"
    if not on_host((options.temperature, options.kd_weight, options.ce_weight)):
        name = next(name for name in SCALARS if not on_host([getattr(options, name)]))
        return f"the {name} is a tensor that requires grad or lies on another device than the CPU"
    return None


def _check(
    logits: Tensor | Sequence[Tensor], target: Tensor | None, weights: object, teachers: object,
    teacher_weights: object, kd_weight: object, temperature: object, divergence: object, divergence_beta: object,
    ce_weight: object, label_smoothing: object, ignore_index: int, mask: object, class_dim: int, scale_by_t2: object,
    reduction: Reduction, num_items: object, return_terms: object,
) -> tuple[Tensors, Options, torch.Size]:  # fmt: skip
    """Tensors, options, the leading shape of one network's logits without their classes."""
    logits, stacked, class_dim = check_networks(OP, logits, class_dim, target is not None, least=2)
    first = logits[0]
    teachers = check_frozen(teachers, first, class_dim)
    check_not_probabilities(OP, "teachers", teachers)
    kd_weight = check_scalar(OP, "kd_weight", kd_weight, "a finite number")
    ce_weight = check_scalar(OP, "ce_weight", ce_weight, "a finite number")
    weighted = isinstance(ce_weight, Tensor) or ce_weight != 0
    if target is None and weighted:
        raise wrong_value(OP, "target", f"given where ce_weight is {ce_weight}", None)
    cross_entropy = target is not None and (weighted or bool(return_terms))
    weights, teacher_weights, teachers, numbers = check_all_weights(
        weights, teacher_weights, kd_weight, logits, teachers
    )
    target, soft = check_labels(OP, target, mask, ignore_index, first, class_dim, WHOSE)
    tensors = Tensors(rows_of(logits), rows_of(teachers), stacked, target, soft, weights, teacher_weights)
    options = Options(
        numbers, check_temperature(temperature), kd_weight, ce_weight, check_reduction(OP, reduction, num_items),
        cross_entropy, check_smoothing(OP, label_smoothing), ignore_index, bool(scale_by_t2), reduction,
        bool(return_terms), check_mutual(OP, divergence, divergence_beta, first),
    )  # fmt: skip
    return tensors, options, first.shape[:-1]


_backend.register(mutual_kd, OP, lambda arguments: why_reference(*_check(**arguments)[:2]), kernels.register_fakes)
