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
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _common as common
from fastkd.ops import _networks as networks

OP = "feature_ensemble"
NORMS = ("sample", "position", "channel")
ELEMENTS = ("mean", "sum")
LAUNCH_PAIRS = 16  # pairs of one CUDA launch; more go in groups
STATE_PLANES = 5  # numbers per norm that the backward needs (csrc/feature_ensemble/op.h)
MOST_ELEMENTS = 2**31  # of one sample of a map


class Call(NamedTuple):
    """A checked call. `students` has K maps, or one that is compared with every teacher."""

    students: tuple[Tensor, ...]  # [B, C_k, ...]
    teachers: tuple[Tensor, ...]  # K x [B, C_k, ...]
    weights: Tensor | None  # [K] or [K, B] on the device, where they are not known on the host
    host_weights: tuple[float, ...]  # K numbers, empty where `weights` is a tensor
    p: int
    norm: str
    elements: str
    reduction: str


# --- reference ---------------------------------------------------------------------------------------------------


def _normalised(x: Tensor, norm: str) -> Tensor:
    """x [B, C, ...] over its L2 norm; scaled by its largest magnitude first, so that no square over- or underflows."""
    x = x.reshape(*x.shape[:2], -1)  # [B, C, places]
    dims = {"sample": (1, 2), "position": (1,), "channel": (2,)}[norm]
    largest = x.detach().abs().amax(dims, keepdim=True)
    x = x / largest.where((largest > 0) & largest.isfinite(), 1)
    squares = x.square().sum(dims, keepdim=True)
    empty = squares == 0
    return x * squares.masked_fill(empty, 1).rsqrt().masked_fill(empty, 0)


def reference(call: Call) -> Tensor:
    """The specification in plain PyTorch: the loss by `call.reduction`, differentiable in all of its inputs."""
    students = call.students * (len(call.teachers) if len(call.students) == 1 else 1)
    # A copy, since autograd refuses to keep a tensor made under torch.inference_mode().
    weights = call.host_weights if call.weights is None else call.weights.clone()
    total = 0
    for student, teacher, weight in zip(students, call.teachers, weights, strict=True):
        dtype = common.accumulate_dtype(torch.promote_types(student.dtype, teacher.dtype))
        difference = _normalised(student.to(dtype), call.norm) - _normalised(teacher.to(dtype), call.norm)
        # Times 1, or NaN: the derivative of |NaN| is 0 in torch.
        powers = difference.abs() * (difference.detach() * 0 + 1) if call.p == 1 else difference.square()
        pair = powers.mean((1, 2)) if call.elements == "mean" else powers.sum((1, 2))
        total = total + (weight.to(dtype) if isinstance(weight, Tensor) else weight) * pair
    return common.reduce_rows(total, None, call.reduction, (-1,))


# --- native: raw operations, fake kernels, autograd ---------------------------------------------------------------

# csrc/feature_ensemble/op.cpp registers, with A = float64 for float64 maps, else float32:
#   forward(students, teachers, weights, host_weights, p, norm, mean_elements, reduction, need_grad, store)
#       -> loss A [] or [B]; state A [5, norms], or [0, norms] without a gradient; with `store` (CPU, a loss that is one
#          number) the gradients for grad_output = 1, else none
#   backward(grad_output, students, teachers, weights, state, ...) -> a gradient per student's map, dense, in its layout
# `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def forward(students, teachers, weights, host_weights, p, norm, mean_elements, reduction, need_grad, store):
        student, dtype = students[0], common.accumulate_dtype(students[0].dtype)
        norms = sum(teacher.shape[0] * _norms_of_a_sample(teacher, NORMS[norm]) for teacher in teachers)
        return (
            student.new_empty((student.shape[0],) if reduction == 0 else (), dtype=dtype),
            student.new_empty((STATE_PLANES if need_grad else 0, norms), dtype=dtype),
            [_dense_like(student) for student in students] if store else [],
        )

    def backward(grad, students, *rest):
        return [_dense_like(student) for student in students]

    torch.library.register_fake(f"{namespace}::feature_ensemble_forward", forward)
    torch.library.register_fake(f"{namespace}::feature_ensemble_backward", backward)


def _norms_of_a_sample(map: Tensor, norm: str) -> int:
    places = 1
    for size in map.shape[2:]:
        places *= size
    return {"sample": 1, "position": places, "channel": map.shape[1]}[norm]


def _is_dense(map: Tensor, order: Sequence[int]) -> bool:
    """Whether each sample is dense with its dimensions in this order in memory, the last one fastest."""
    expected = 1
    for d in reversed(order):
        if map.shape[d] != 1:
            if map.stride(d) != expected:
                return False
            expected *= map.shape[d]
    return True


def _dense_like(map: Tensor) -> Tensor:
    """Uninitialised, with the map's shape: channels_last where only that describes its samples, else contiguous."""
    contiguous, last = list(range(1, map.dim())), [*range(2, map.dim()), 1]
    order = contiguous if _is_dense(map, contiguous) or not _is_dense(map, last) else last
    if all(size == 1 for size in map.shape[2:]):
        order = last
    strides, step = [0] * map.dim(), 1
    for d in reversed([0, *order]):
        strides[d] = step
        step *= map.shape[d]
    return map.new_empty_strided(map.shape, strides)


def _options(call: Call) -> tuple:
    """The arguments that forward and backward share after the tensors."""
    return (
        call.host_weights, call.p, NORMS.index(call.norm), call.elements == "mean",
        common.REDUCTIONS.index(call.reduction),
    )  # fmt: skip


def _forward(call: Call, need_grad: bool, store: bool = False) -> tuple[Tensor, Tensor, list[Tensor]]:
    ops = _backend.native_ops(call.students[0])
    return ops.feature_ensemble_forward(call.students, call.teachers, call.weights, *_options(call), need_grad, store)


def _stores(call: Call) -> bool:
    """Whether the forward writes the gradients while the maps are in cache: on the CPU, of a loss that is one number.

    Half precision would round them before grad_output comes to it.
    """
    if torch.compiler.is_compiling() or _backend.device_kind(call.students[0]) != "cpu":
        return False
    return call.reduction != "none" and call.students[0].dtype in (torch.float32, torch.float64)


def _times(gradients: Sequence[Tensor], grad: Tensor) -> Sequence[Tensor]:
    """Handing out the saved tensors is safe: autograd copies them where they are still saved (retain_graph=True)."""
    return gradients if grad.item() == 1.0 else [gradient * grad for gradient in gradients]


class _Native(torch.autograd.Function):
    """The native loss. The backward asked for with create_graph=True goes through the reference formula."""

    @staticmethod
    def forward(ctx, count, weights, options, *maps):
        call = Call(maps[:count], maps[count:], weights, *options)
        loss, state, gradients = _forward(call, True, _stores(call))
        ctx.options, ctx.count, ctx.stored = options, count, len(gradients)
        common.save_for_backward(ctx, (*gradients, state, weights, *maps))
        return loss

    @staticmethod
    def backward(ctx, grad):
        saved = ctx.saved_tensors
        gradients = saved[: ctx.stored]
        # First the backward of a plain training loop. A fake tensor has no value to look at.
        if gradients and type(grad) is Tensor and not torch.is_grad_enabled():
            return None, None, None, *_times(gradients, grad), *([None] * (len(ctx.needs_input_grad) - 3 - ctx.count))
        state, weights, *maps = common.with_kept(ctx, saved)[ctx.stored :]
        students = tuple(maps[: ctx.count])
        call = Call(students, tuple(maps[ctx.count :]), weights, *ctx.options)
        if torch.is_grad_enabled():
            wanted = [s for s in students if s.requires_grad]
            found = iter(torch.autograd.grad(reference(call), wanted, grad, create_graph=True))
            grads = [next(found) if s.requires_grad else None for s in students]
        else:
            ops = _backend.native_ops(students[0])
            grads = ops.feature_ensemble_backward(
                grad.contiguous(), students, call.teachers, call.weights, state, *_options(call)
            )
        return None, None, None, *grads, *([None] * len(call.teachers))


# --- public function ------------------------------------------------------------------------------------------------


def feature_ensemble(
    students: Tensor | Sequence[Tensor],
    teachers: Tensor | Sequence[Tensor],
    *,
    weights: Tensor | Sequence[float] | None = None,
    p: int = 1,
    norm: str = "sample",
    elements: str = "mean",
    reduction: str = "mean",
) -> Tensor:
    """Distance of K pairs of normalised feature maps, the student's to the teachers'.

    Park and Kwak, "Feature-level Ensemble Knowledge Distillation for Aggregating Knowledge from Multiple Networks"
    (FEED, ECAI 2020, arXiv 1909.10754): p=1, norm="sample", each student's map the output of a transform of its own
    (`fastkd.nn.FeatureTransforms`). With one pair: the loss of Factor Transfer (arXiv 1802.04977). p=2 with
    norm="channel" or "position" compares maps as the attention and similarity losses do.

    Args:
        students: K maps, each pair with its own shape [B, C_k, H_k, W_k] (or [B, D_k], [B, C_k, ...]), or one map,
            compared with all K teachers. float32, float64, float16 or bfloat16.
        teachers: K maps, or one; each of its student's shape. In the students' dtype or float32 natively.
            A tensor with one dimension more than the student's map is K maps stacked.
        weights: none = 1 each; [K]; or [K, B] per sample. Not normalised: they multiply each pair's term.
        p: 1 or 2. With p=1 the derivative where both normalised maps are equal is 0.
        norm: what is divided by its L2 norm: the "sample" (over C*H*W), each "position" (over C), each "channel"
            (over H*W). A norm of 0 leaves the map at 0, with gradient 0.
        elements: "mean" or "sum" over a pair's C*H*W elements.
        reduction: "none" (per sample, [B]), "sum" or "mean" over the samples.

    Contiguous and channels_last maps are read as they are, also where the two of a pair differ; a map whose samples are
    dense in neither order is copied. The gradient flows to the students, and to a teacher or weight that requires grad.

    Returns:
        The loss in float32 (float64 for float64 maps): a scalar, or [B] for "none". An empty batch gives 0.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came.
    """
    return _dispatch(_check(students, teachers, weights, p, norm, elements, reduction))


def _dispatch(call: Call) -> Tensor:
    if (reason := why_reference(call)) is not None:
        _backend.note_fallback(OP, reason, call.students[0])
        return reference(call)
    if len(call.teachers) > LAUNCH_PAIRS and _backend.device_kind(call.students[0]) != "cpu":
        return _in_groups(call)
    if not (torch.is_grad_enabled() and any([s.requires_grad for s in call.students])):
        return _forward(call, False)[0]
    return _Native.apply(len(call.students), call.weights, tuple(call[3:]), *call.students, *call.teachers)


def _in_groups(call: Call) -> Tensor:
    """More pairs than one launch takes: their terms add up."""
    total = 0
    for k in range(0, len(call.teachers), LAUNCH_PAIRS):
        part = slice(k, k + LAUNCH_PAIRS)
        total = total + _dispatch(
            call._replace(
                students=call.students if len(call.students) == 1 else call.students[part],
                teachers=call.teachers[part],
                weights=None if call.weights is None else call.weights[part],
                host_weights=call.host_weights[part],
            )
        )
    return total


def why_reference(call: Call) -> str | None:
    """Why this call goes to plain PyTorch, or None where the native kernels take it."""
    student = call.students[0]
    reason = _backend.why_not_native(student)
    if reason is not None:
        return reason
    if common.is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if torch.is_grad_enabled():
        for k, teacher in enumerate(call.teachers):
            if teacher.requires_grad:
                return common.why_learning(f"teachers[{k}]", call.students)
        if call.weights is not None and call.weights.requires_grad:
            return "the weights require grad"
    if any([s.dtype != student.dtype for s in call.students]):
        return "the students' dtypes differ"
    teacher = call.teachers[0]
    if any([t.dtype != teacher.dtype for t in call.teachers]):
        return "the teachers' dtypes differ"
    if teacher.dtype != student.dtype and (teacher.dtype != torch.float32 or student.dtype == torch.float64):
        return f"teachers in {teacher.dtype} for students in {student.dtype}: only the students' dtype or float32"
    return None


# --- checks ---------------------------------------------------------------------------------------------------------


def _maps(name: str, maps: object) -> tuple[Tensor, ...]:
    """One map or a sequence of maps, as a tuple."""
    if isinstance(maps, Tensor):
        maps = (maps,)
    elif not isinstance(maps, Sequence) or isinstance(maps, str):
        raise common.wrong_type(OP, name, "a feature map or a sequence of them", type(maps).__name__)
    if len(maps) == 0:
        raise common.wrong_value(OP, name, "at least one feature map", "none")
    for k, value in enumerate(maps):
        if not isinstance(value, Tensor):
            raise common.wrong_type(OP, f"{name}[{k}]", "a floating-point tensor [B, C, ...]", type(value).__name__)
        if not value.is_floating_point():
            raise common.wrong_type(OP, f"{name}[{k}]", "a floating-point tensor", f"dtype {value.dtype}")
    return tuple(maps)


def _check_map(k: int, student: Tensor, first: Tensor) -> None:
    shape = list(student.shape)
    if len(shape) < 2 or any([size == 0 for size in shape[1:]]):
        expected = "of shape [B, C, ...] with at least one element per sample"
        raise common.wrong_value(OP, f"students[{k}]", expected, f"shape {shape}")
    if shape[0] != first.shape[0]:
        raise common.wrong_value(OP, f"students[{k}]", f"of students[0]'s batch size {first.shape[0]}", shape[0])
    if student.device != first.device:
        raise common.wrong_value(OP, f"students[{k}]", f"on students[0]'s device {first.device}", student.device)
    elements = 1
    for size in shape[1:]:
        elements *= size
    if elements >= MOST_ELEMENTS:
        raise common.wrong_value(OP, f"students[{k}]", "of fewer than 2**31 elements per sample", elements)


def _check_pairs(students: object, teachers: object) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    one, students = isinstance(students, Tensor), _maps("students", students)
    if isinstance(teachers, Tensor) and teachers.dim() == students[0].dim() + 1:
        teachers = teachers.unbind(0)
    teachers = _maps("teachers", teachers)
    for k, student in enumerate(students):
        _check_map(k, student, students[0])
    if not one and len(teachers) != len(students):
        raise common.wrong_value(OP, "teachers", f"{len(students)} maps, one per student", f"{len(teachers)} maps")
    for k, teacher in enumerate(teachers):
        student = students[0 if one else k]
        if teacher.shape != student.shape:
            expected = f"of its student's shape {list(student.shape)} (pool the larger map first)"
            raise common.wrong_value(OP, f"teachers[{k}]", expected, f"shape {list(teacher.shape)}")
        if teacher.device != student.device:
            raise common.wrong_value(OP, f"teachers[{k}]", f"on the student's device {student.device}", teacher.device)
    return students, teachers


def _check(students, teachers, weights, p, norm, elements, reduction) -> Call:
    students, teachers = _check_pairs(students, teachers)
    if isinstance(p, bool) or p not in (1, 2):
        raise common.wrong_value(OP, "p", "1 or 2", repr(p))
    common.check_choice(OP, "norm", norm, NORMS)
    common.check_choice(OP, "elements", elements, ELEMENTS)
    common.check_choice(OP, "reduction", reduction, common.REDUCTIONS)
    k = len(teachers)
    if weights is None:
        weights, host_weights = None, (1.0,) * k
    else:
        rows = students[0][(slice(None), *[0] * (students[0].dim() - 2))]  # [B, anything]: a weight per row of it
        weights, host_weights = networks.check_weights(OP, weights, k, rows, False)
    return Call(students, teachers, weights, host_weights, int(p), norm, elements, reduction)


_backend.register(feature_ensemble, OP, lambda arguments: why_reference(_check(**arguments)), register_fakes)
