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
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import check_choice
from fastkd._core.messages import wrong_value
from fastkd.ops import _feature_maps as maps
from fastkd.ops._autograd import Inputs, graph_is_kept, is_transformed, save_for_backward, with_kept
from fastkd.ops._feature_maps import Norm
from fastkd.ops._formulas import Reduction, accumulate_dtype, reduce_rows
from fastkd.ops._inputs import REDUCTIONS, check_mask, check_num_items, why_learning
from fastkd.ops._teachers import check_weights

OP = "feature_ensemble"
Elements = Literal["mean", "sum"]
NORMS, ELEMENTS = get_args(Norm), get_args(Elements)
LAUNCH_PAIRS = 16  # pairs of one CUDA launch; more go in groups
STATE_PLANES = 5  # numbers per norm that the backward needs (csrc/feature_ensemble/op.h)
SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class Tensors(NamedTuple):
    """The tensors of a checked call. `students` has K maps, or one that is compared with every teacher."""

    students: tuple[Tensor, ...]  # [B, C_k, ...]
    teachers: tuple[Tensor, ...]  # K x [B, C_k, ...]
    weights: Tensor | None  # [K] or [K, B] on the device, where they are not known on the host
    mask: Tensor | None  # bool [B]


class Options(NamedTuple):
    """What is known on the host."""

    host_weights: tuple[float, ...]  # K numbers, empty where Tensors.weights is a tensor
    p: int
    norm: Norm
    elements: Elements
    reduction: Reduction
    num_items: float | Tensor | None

    def native(self) -> tuple[Any, ...]:
        """The arguments that the raw forward and backward share after the tensors."""
        norm, reduction = NORMS.index(self.norm), REDUCTIONS.index(self.reduction)
        return self.host_weights, self.p, norm, self.elements == "mean", reduction, self.num_items or 0.0


# --- public function ------------------------------------------------------------------------------------------------


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
        if tensors.mask is not None and options.reduction == "mean" and not _on_cpu(tensors) and not options.num_items:
            divisor = tensors.mask.sum().clamp(min=1)  # the kernels' host code reads no tensor of a device
    if divisor is not None:
        options = options._replace(reduction="sum", num_items=None)
    losses = [_native(*part) for part in _in_groups(tensors, options)]
    total = losses[0]
    for loss in losses[1:]:
        total = total + loss
    return total if divisor is None else total / divisor.to(total.dtype)


def _native(tensors: Tensors, options: Options) -> Tensor:
    if not (torch.is_grad_enabled() and any([s.requires_grad for s in tensors.students])):
        return _forward(tensors, options, False)[0]
    students, teachers, weights, mask = tensors
    loss: Tensor = _Native.apply(options, len(students), weights, mask, *students, *teachers)
    return loss


def _on_cpu(tensors: Tensors) -> bool:
    return _backend.device_kind(tensors.students[0]) == "cpu"


def _in_groups(tensors: Tensors, options: Options) -> Sequence[tuple[Tensors, Options]]:
    """Parts for one call of the kernels each: students of one dtype, no more pairs than a launch takes."""
    students, k = tensors.students, len(tensors.teachers)
    most = k if _on_cpu(tensors) else LAUNCH_PAIRS
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
    reason = _backend.why_not_native(tensors.students[0])
    if reason is not None:
        return reason
    if is_transformed():
        return "a torch.func transform or forward-mode AD is active"
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


# --- checks ---------------------------------------------------------------------------------------------------------


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


# --- reference ------------------------------------------------------------------------------------------------------


def _skipped(weight: float | Tensor, mask: Tensor | None) -> Tensor | None:
    """bool [B] or []: the samples that a pair is not read at; None for none. A weight that learns has a derivative."""
    skipped = None if mask is None else ~mask
    if isinstance(weight, Tensor) and not (weight.requires_grad and torch.is_grad_enabled()):
        skipped = weight == 0 if skipped is None else skipped | (weight == 0)
    return skipped


def _pair(student: Tensor, teacher: Tensor, weight: float | Tensor, mask: Tensor | None, options: Options) -> Tensor:
    """The weighted distances of one pair, [B]."""
    dtype = accumulate_dtype(torch.promote_types(student.dtype, teacher.dtype))
    if not isinstance(weight, Tensor) and weight == 0:
        return student.new_zeros(student.shape[:1], dtype=dtype) + student[:0].sum()  # with a gradient of 0
    x, y, skipped = student.to(dtype), teacher.to(dtype), _skipped(weight, mask)
    if skipped is not None:
        skipped = skipped.reshape(-1, *[1] * (x.dim() - 1))
        x, y = x.masked_fill(skipped, 0), y.masked_fill(skipped, 0)
    difference = maps.normalised(x, options.norm) - maps.normalised(y, options.norm)
    # Times 1, or NaN: the derivative of |NaN| is 0 in torch.
    powers = difference.abs() * (difference.detach() * 0 + 1) if options.p == 1 else difference.square()
    distances = powers.mean((1, 2)) if options.elements == "mean" else powers.sum((1, 2))
    return (weight.to(dtype) if isinstance(weight, Tensor) else weight) * distances


def reference(tensors: Tensors, options: Options) -> Tensor:
    """The specification in plain PyTorch: the loss by `options.reduction`, differentiable in all of its inputs."""
    students, teachers, weights, mask = tensors
    students = students * (len(teachers) if len(students) == 1 else 1)
    # A copy, since autograd refuses to keep a tensor made under torch.inference_mode().
    each: Sequence[float | Tensor] = options.host_weights if weights is None else weights.clone().unbind(0)
    total: Tensor = 0  # type: ignore[assignment]  # until the first pair
    for student, teacher, weight in zip(students, teachers, each, strict=True):
        pair = _pair(student, teacher, weight, mask, options)
        total = total + pair.to(accumulate_dtype(student.dtype))
    items = options.num_items
    items = items.to(total.dtype) if isinstance(items, Tensor) else items
    return reduce_rows(total, mask, options.reduction, (-1,), items)


# --- native: raw operations, fake kernels, autograd -----------------------------------------------------------------

# csrc/feature_ensemble/op.cpp registers, with A = float64 for float64 students, else float32:
#   forward(students, teachers, weights, mask, *Options.native(), need_grad, store)
#       -> loss A [] or [B]; state A [5, norms], or [0, norms] without a gradient; with `store` (on the CPU) the
#          gradients for grad_output = 1 (those of float16 in float32), else none
#   backward(grad_output, students, teachers, weights, mask, state, *Options.native())
#       -> a gradient per student's map, dense, in its layout
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    """The shapes that the raw operations of `namespace` return, for torch.compile and torch.export."""

    def forward(
        students: Sequence[Tensor], teachers: Sequence[Tensor], weights: Tensor | None, mask: Tensor | None,
        host_weights: Sequence[float], p: int, norm: int, mean_elements: bool, reduction: int, items: float,
        need_grad: bool, store: bool,
    ) -> tuple[Tensor, Tensor, list[Tensor]]:  # fmt: skip
        student, dtype = students[0], accumulate_dtype(students[0].dtype)
        norms = sum(teacher.shape[0] * maps.norms_of_a_sample(teacher, NORMS[norm]) for teacher in teachers)
        return (
            student.new_empty((student.shape[0],) if reduction == 0 else (), dtype=dtype),
            student.new_empty((STATE_PLANES if need_grad else 0, norms), dtype=dtype),
            [maps.dense_like(s, dtype if s.dtype == torch.float16 else s.dtype) for s in students] if store else [],
        )

    def backward(grad: Tensor, students: Sequence[Tensor], *rest: Any) -> list[Tensor]:
        return [maps.dense_like(student, student.dtype) for student in students]

    torch.library.register_fake(f"{namespace}::feature_ensemble_forward", forward)
    torch.library.register_fake(f"{namespace}::feature_ensemble_backward", backward)


def _forward(
    tensors: Tensors, options: Options, need_grad: bool, store: bool = False
) -> tuple[Tensor, Tensor, list[Tensor]]:
    ops = _backend.native_ops(tensors.students[0])
    out: tuple[Tensor, Tensor, list[Tensor]] = ops.feature_ensemble_forward(
        *tensors, *options.native(), need_grad, store
    )
    return out


class _Native(torch.autograd.Function):
    """The native loss. The backward asked for with create_graph=True goes through the reference formula.

    On the CPU the forward writes the gradients for grad_output = 1 while the maps are in cache, and the backward does
    not read them. On CUDA the backward computes the gradients, from the maps.
    """

    @staticmethod
    def forward(
        ctx: Any, options: Options, count: int, weights: Tensor | None, mask: Tensor | None, *both: Tensor
    ) -> Tensor:
        tensors = Tensors(both[:count], both[count:], weights, mask)
        store = _on_cpu(tensors) and not torch.compiler.is_compiling()
        loss, state, gradients = _forward(tensors, options, True, store)
        ctx.options, ctx.count, ctx.dtype = options, count, tensors.students[0].dtype
        ctx.inputs = ctx.gradients = None
        if store:
            ctx.gradients, ctx.inputs = gradients, Inputs((weights, mask, *both))
        else:
            save_for_backward(ctx, (state, weights, mask, *both))
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        kept: Sequence[Any] | None
        saved = ctx.saved_tensors  # an error where the graph was freed
        wanted = ctx.needs_input_grad[4 : 4 + ctx.count]
        if ctx.inputs is None:
            state, *kept = with_kept(ctx, saved)
        else:
            kept = ctx.inputs.unchanged(OP) if torch.is_grad_enabled() else None
        if kept is None:
            grads = _stored(ctx, grad, wanted)
        else:
            tensors = Tensors(tuple(kept[2 : 2 + ctx.count]), tuple(kept[2 + ctx.count :]), *kept[:2])
            if torch.is_grad_enabled():
                grads = _of_the_reference(tensors, ctx.options, grad, wanted)
            else:
                ops = _backend.native_ops(tensors.students[0])
                grads = ops.feature_ensemble_backward(grad.contiguous(), *tensors, state, *ctx.options.native())
        if ctx.inputs is not None and not graph_is_kept():
            ctx.inputs = ctx.gradients = None
        return None, None, None, None, *grads, *([None] * (len(ctx.needs_input_grad) - 4 - ctx.count))


def _of_the_reference(tensors: Tensors, options: Options, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    learners = [s for s, learns in zip(tensors.students, wanted, strict=True) if learns]
    found = iter(torch.autograd.grad(reference(tensors, options), learners, grad, create_graph=True))
    return [next(found) if learns else None for learns in wanted]


def _stored(ctx: Any, grad: Tensor, wanted: Sequence[bool]) -> list[Tensor | None]:
    """The stored gradients times grad_output, [] or [B]: the caller's own tensors."""
    mine = not graph_is_kept()  # nobody will see them again
    # A fake tensor has no value to look at.
    plain = type(grad) is Tensor and (grad.item() == 1.0 if grad.dim() == 0 else bool((grad == 1).all()))
    factor = None if plain else grad
    pairs = zip(ctx.gradients, wanted, strict=True)
    return [_handed_out(gradient, factor, mine, ctx.dtype) if learns else None for gradient, learns in pairs]


def _handed_out(gradient: Tensor, factor: Tensor | None, mine: bool, dtype: torch.dtype) -> Tensor:
    if factor is not None:
        factor = factor.reshape(-1, *[1] * (gradient.dim() - 1)) if factor.dim() else factor
        gradient, mine = (gradient.mul_(factor) if mine else gradient * factor), True
    if gradient.dtype != dtype:  # rounded once, after the factor
        return gradient.to(dtype)
    return gradient if mine else gradient.clone()


_backend.register(feature_ensemble, OP, lambda arguments: why_reference(_check(**arguments)[0]), register_fakes)
