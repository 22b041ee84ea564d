"""K pairs of feature maps, a student's and a teacher's: the distance of the maps divided by their norms, in one pass.

Per sample, with a_k the student's map and b_k the teacher's (kernels: csrc/feature_ensemble/README.md):

    sum_k w_k * mean over the pair's elements of |a_k / ||a_k|| - b_k / ||b_k|| |^p,   p in {1, 2}
    norm="sample"      ||.|| is the L2 norm over C*H*W            elements="sum": the sum instead of the mean
    norm="position"    over C, at each place
    norm="channel"     over H*W, in each channel

A norm of 0 leaves its map at 0 and gives it no gradient. p=1 with norm="sample" is the loss of FEED.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import check_choice
from fastkd._core.messages import wrong_value
from fastkd.ops import _feature_ensemble_kernels as kernels
from fastkd.ops import _feature_maps as maps
from fastkd.ops._autograd import why_no_kernels
from fastkd.ops._feature_ensemble_formula import ELEMENTS, NORMS, OP, Elements, Options, Tensors, reference
from fastkd.ops._feature_maps import Norm
from fastkd.ops._formulas import Reduction, accumulate_dtype
from fastkd.ops._inputs import REDUCTIONS, check_mask, check_num_items, why_learning
from fastkd.ops._teachers import check_weights

__all__ = ["ELEMENTS", "NORMS", "Elements", "feature_ensemble"]
SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def feature_ensemble(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    weights: Tensor | Sequence[float] | None = None,
    p: int = 1,
    norm: Norm = "sample",
    elements: Elements = "mean",
    mask: Tensor | None = None,
    reduction: Reduction = "mean",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Distance of K pairs of normalised feature maps, the student's to the teachers'.

    Park and Kwak, "Feature-level Ensemble Knowledge Distillation for Aggregating Knowledge from Multiple Networks"
    (FEED, ECAI 2020, arXiv 1909.10754): p=1, norm="sample", each student's map the output of a transform of its own
    (`fastkd.nn.FeatureTransforms`). With one pair: the loss of Factor Transfer (arXiv 1802.04977). p=2 with
    norm="channel" or "position" compares maps as the attention and similarity losses do.

    >>> student, teacher = torch.tensor([[3.0, 4.0]]), torch.tensor([[4.0, 3.0]])
    >>> fastkd.functional.feature_ensemble(student, [teacher, student])  # |0.6 - 0.8| + 0
    tensor(0.2000)

    Args:
        students: K maps, each pair with its own shape [B, C_k, H_k, W_k] (or [B, D_k], [B, C_k, ...]), or one map,
            compared with all K teachers. float32, float64, float16 or bfloat16, each its own.
        teachers: K maps, or one; each of its student's shape, and of any of these dtypes.
            A tensor with one dimension more than the student's map is K maps stacked.
        weights: none = 1 each; [K]; or [K, B] per sample. Not normalised: they multiply each pair's term. Where one is
            0, the pair is not read (in that sample), so that NaN behind it reaches nothing.
        p: 1 or 2. With p=1 the derivative where both normalised maps are equal is 0.
        norm: what is divided by its L2 norm: the "sample" (over C*H*W), each "position" (over C), each "channel"
            (over H*W). A norm of 0 leaves the map at 0, with gradient 0.
        elements: "mean" or "sum" over a pair's C*H*W elements.
        mask: bool [B]: samples where it is False count nowhere: no loss (0 for "none"), no gradient, not in the mean's
            divisor, and they are not read.
        reduction: "none" (per sample, [B]), "sum", or "mean" over the samples that count.
        num_items: a number or 0-d tensor > 0 that the sum over samples is divided by, for "mean" and "sum" alike.

    Contiguous and channels_last maps are read as they are, also where the two of a pair differ; a map whose samples are
    dense in neither order is copied. The gradient flows to the students, and to a teacher or weight that requires grad.
    On the CPU the maps may be changed in place before the backward; a second derivative then raises.

    Returns:
        The loss in float32 (float64 where a student is): a scalar, or [B] for "none". An empty batch gives 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came.
    """
    tensors, options = _check(students, teachers, weights, p, norm, elements, mask, reduction, num_items)
    return _dispatch(tensors, options)


def _dispatch(tensors: Tensors, options: Options) -> Tensor:
    if (reason := why_reference(tensors)) is not None:
        _backend.note_fallback(OP, reason, tensors.students[0])
        return reference(tensors, options)
    divisor = options.num_items
    if not isinstance(divisor, Tensor):
        divisor = None
        if (
            tensors.mask is not None
            and options.reduction == "mean"
            and not kernels.on_cpu(tensors)
            and not options.num_items
        ):
            divisor = tensors.mask.sum().clamp(min=1)  # the kernels' host code reads no tensor of a device
    if divisor is not None:
        options = options._replace(reduction="sum", num_items=None)
    losses = [kernels.run(*part) for part in _in_groups(tensors, options)]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total if divisor is None else total / divisor.to(total.dtype)


def _in_groups(tensors: Tensors, options: Options) -> Sequence[tuple[Tensors, Options]]:
    """Parts for one call of the kernels each: students of one dtype, no more pairs than a launch takes."""
    students, k = tensors.students, len(tensors.teachers)
    most = k if kernels.on_cpu(tensors) else kernels.LAUNCH_PAIRS
    dtypes = [s.dtype for s in students]
    if k <= most and dtypes.count(dtypes[0]) == len(dtypes):
        return [(tensors, options)]
    alike = [
        [i for i in range(k) if dtypes[0 if len(students) == 1 else i] == dtype] for dtype in dict.fromkeys(dtypes)
    ]
    return [_selected(tensors, options, pairs[i : i + most]) for pairs in alike for i in range(0, len(pairs), most)]


def _selected(tensors: Tensors, options: Options, pairs: Sequence[int]) -> tuple[Tensors, Options]:
    students, teachers, weights, mask = tensors
    chosen = students if len(students) == 1 else tuple([students[k] for k in pairs])
    if weights is not None:
        weights = weights[list(pairs)].to(accumulate_dtype(chosen[0].dtype))
    part = Tensors(chosen, tuple([teachers[k] for k in pairs]), weights, mask)
    return part, options._replace(host_weights=tuple([options.host_weights[k] for k in pairs if weights is None]))


def why_reference(tensors: Tensors) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    reason = why_no_kernels(tensors.students[0])
    if reason is not None:
        return reason
    if torch.is_grad_enabled():
        for k, teacher in enumerate(tensors.teachers):
            if teacher.requires_grad:
                return why_learning(f"teachers[{k}]", tensors.students)
        if tensors.weights is not None and tensors.weights.requires_grad:
            return "the weights require grad"
    for x in (*tensors.students, *tensors.teachers):
        if x.dtype not in SUPPORTED:
            return f"there are no native kernels for {x.dtype}"
    return None


def _check(
    students: object, teachers: object, weights: object, p: Any, norm: Norm, elements: Elements, mask: object,
    reduction: Reduction, num_items: object,
) -> tuple[Tensors, Options]:  # fmt: skip
    pairs = maps.check_pairs(OP, students, teachers)
    if isinstance(p, bool) or p not in (1, 2):
        raise wrong_value(OP, "p", "1 or 2", repr(p))
    check_choice(OP, "norm", norm, NORMS)
    check_choice(OP, "elements", elements, ELEMENTS)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    first, k = pairs[0][0], len(pairs[1])
    mask = check_mask(OP, mask, first.shape[:1], first.device)
    items = check_num_items(OP, num_items, reduction)
    known: Tensor | None = None
    host_weights: tuple[float, ...] = (1.0,) * k
    if weights is not None:
        widest = next((s for s in pairs[0] if s.dtype == torch.float64), first)  # whose dtype weights are converted to
        first_values: tuple[slice | int, ...] = (slice(None), *[0] * (widest.dim() - 2))
        rows = widest[first_values]  # [B, anything]: a weight per row of it
        known, host_weights = check_weights(OP, weights, k, rows, False)
    options = Options(host_weights, int(p), norm, elements, reduction, items)
    return Tensors(*pairs, known, mask), options


_backend.register(feature_ensemble, OP, lambda arguments: why_reference(_check(**arguments)[0]), kernels.register_fakes)
