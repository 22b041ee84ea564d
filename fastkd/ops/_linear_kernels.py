"""linear_multi_teacher_kd as one operator of torch.library, and its autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _linear_chunks as chunks
from fastkd.ops import _linear_formula as formula
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._autograd import (
    Inputs,
    graph_is_kept,
    hand_out,
    is_transformed,
    on_host,
    save_for_backward,
    why_no_kernels,
    with_kept,
)
from fastkd.ops._divergences import KINDS, Divergence
from fastkd.ops._formulas import accumulate_dtype
from fastkd.ops._inputs import REDUCTIONS, check_range, why_learning
from fastkd.ops._linear_inputs import OP, SPARSE, Call, Projection, Teacher
from fastkd.ops._multi_teacher_formula import Options
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.ops._teacher_calls import LAUNCH_TEACHERS

Wants = tuple[bool, bool, bool]  # gradients of hidden, weight, bias
Static = tuple[list[Any], list[Any], list[Any], list[Any]]  # host weights, temperatures, floats, integers
SLOTS = 4  # tensors of a teacher: first, second, third, rows


def losses_of(call: Call) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    reason = why_reference(call)
    if reason is None or reason in (SPARSE_REASON, INSIDE_REASON):
        if reason is not None and _backend._chosen == "native":
            _backend.note_fallback(OP, reason)  # which raises
        return _native(call)
    _backend.note_fallback(OP, reason, call.hidden)
    if call.options.labels:
        check_range(OP, call.target, call.classes, call.options.ignore_index)
    if _backend._chosen == "reference" or is_transformed():
        return formula.reference(call)
    return formula.recomputed(call, chunks.chunk_rows(call, len(call.teachers)))


SPARSE_REASON = "TopK teachers have a kernel of the CPU alone: their rows are plain PyTorch, chunk by chunk"
INSIDE_REASON = 'TopK teachers of mode "both" alone need k classes of the head, whose rows are plain PyTorch'


def why_reference(call: Call) -> str | None:
    """Why this call goes to plain PyTorch, or None where native kernels do the arithmetic of its rows."""
    reason = why_no_kernels(call.hidden)
    if reason is not None:
        return reason
    if torch.is_grad_enabled() and (reason := _why_learning(call)) is not None:
        return reason
    options = call.options
    scalars = {
        "kd_weight": (options.kd_weight,),
        "ce_weight": (options.ce_weight,),
        "temperature": options.temperatures,
    }
    for name, values in scalars.items():
        if not on_host(values):
            return f"{name} is a tensor that requires grad or whose value is not known on the host"
    if len(call.teachers) > LAUNCH_TEACHERS and _backend.device_kind(call.hidden) != "cpu":
        return f"more than {LAUNCH_TEACHERS} teachers on a GPU"
    if not any(t.kind >= SPARSE for t in call.teachers):
        return None
    if _backend.device_kind(call.hidden) != "cpu":
        return SPARSE_REASON
    return INSIDE_REASON if chunks.only_inside(call, tuple(range(len(call.teachers)))) else None


def _why_learning(call: Call) -> str | None:
    for k, teacher in enumerate(call.teachers):
        if any([t is not None and t.requires_grad for t in teacher[1:5]]):
            return why_learning(f"teachers[{k}]", _learners(call))
    if call.weights is not None and call.weights.requires_grad:
        return "the weights require grad"
    if call.shares is not None and call.shares.requires_grad:
        return "the weights of forward and reverse require grad"
    if call.soft is not None and call.soft.requires_grad:
        return "the target requires grad"
    return None


def _learners(call: Call) -> list[Tensor]:
    return [t for t in (call.hidden, call.projection.weight, call.projection.bias) if t is not None]


def _native(call: Call) -> Sequence[Tensor]:
    if torch.is_grad_enabled() and any([t.requires_grad for t in _learners(call)]):
        bias = call.projection.bias
        wants = (
            call.hidden.requires_grad, call.projection.weight.requires_grad, bias is not None and bias.requires_grad
        )  # fmt: skip
        tensors, static = _flat(call)
        tensors, places = _each_once(tensors)
        out = _Linear.apply(static, wants, places, *tensors)
        return (out,) if isinstance(out, Tensor) else out
    return _run(call, (False, False, False), None)[0].unbind(0)


# --- a call as what an operator takes ------------------------------------------------------------------------------


def _flat(call: Call) -> tuple[list[Tensor | None], Static]:
    """The tensors, hidden, weight and bias first, and the rest as numbers and words."""
    options, scalars = calls.split(call.options)
    weight, bias, softcap, scale = call.projection
    slots = [tensor for teacher in call.teachers for tensor in teacher[1:5]]
    tensors = [call.hidden, weight, bias, call.target, call.soft, call.weights, scalars, call.shares, *slots]
    floats = [
        options.kd_weight, options.ce_weight, options.label_smoothing, options.num_items or 0.0, softcap, scale,
        *[number for teacher in call.teachers for number in (teacher.softcap, teacher.scale)],
        *options.divergence.numbers,
    ]  # fmt: skip
    integers = [
        COMBINE.index(options.combine), options.ignore_index, int(options.scale_by_t2),
        REDUCTIONS.index(options.reduction), int(options.labels), int(options.terms), call.classes, call.chunk_rows,
        KINDS.index(options.divergence.kind),
        *[teacher.kind for teacher in call.teachers],
    ]  # fmt: skip
    return tensors, (list(options.host_weights), list(options.temperatures), floats, integers)


def _unflat(tensors: Sequence[Any], static: Static) -> Call:
    """What _flat() took apart, with the numbers of `scalars` in their places."""
    hidden, weight, bias, target, soft, weights, scalars, shares, *slots = tensors
    host_weights, temperatures, floats, integers = static
    kd_weight, ce_weight, smoothing, items, softcap, scale, *shapes = floats
    combine, ignore_index, by_t2, reduction, labels, terms, classes, chunk_rows, kind, *kinds = integers
    teachers = [
        Teacher(its, *slots[SLOTS * k : SLOTS * (k + 1)], *shapes[2 * k : 2 * k + 2]) for k, its in enumerate(kinds)
    ]
    options = Options(
        operation=OP, host_weights=tuple(host_weights), temperatures=tuple(temperatures), combine=COMBINE[combine],
        kd_weight=kd_weight, ce_weight=ce_weight, label_smoothing=smoothing, ignore_index=ignore_index,
        scale_by_t2=bool(by_t2), reduction=REDUCTIONS[reduction], num_items=items or None, labels=bool(labels),
        terms=bool(terms), divergence=Divergence(KINDS[kind], tuple(shapes[2 * len(kinds) :])),
    )  # fmt: skip
    options = calls.joined(options, scalars)
    projection = Projection(weight, bias, softcap, scale)
    return Call(hidden, projection, tuple(teachers), target, soft, weights, options, classes, chunk_rows, shares)


def _each_once(tensors: Sequence[Tensor | None]) -> tuple[list[Tensor | None], list[int]]:
    """The tensors behind hidden, weight and bias each once, and where in these each one is: networks may share a head,
    but torch.compile takes no tensor twice."""
    once, places = list(tensors[:3]), [0, 1, 2]
    for tensor in tensors[3:]:
        same = [i for i, other in enumerate(once) if other is tensor]
        places.append(same[0] if same else len(once))
        if not same:
            once.append(tensor)
    return once, places


_SCHEMA = (
    "linear_multi_teacher_forward(Tensor hidden, Tensor weight, Tensor? bias, Tensor? target, Tensor? soft, "
    "Tensor? weights, Tensor? scalars, Tensor?[] shares_and_teachers, Tensor? row_scale, float[] host_weights, "
    "float[] temperatures, float[] floats, SymInt[] integers, bool[] wants) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY = torch.library.Library("fastkd", "FRAGMENT")
_LIBRARY.define(_SCHEMA)


def _implementation(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *tensors, teachers, row_scale, host_weights, temperatures, floats, integers, wants = arguments
    call = _unflat([*tensors, *teachers], (host_weights, temperatures, floats, integers))
    with torch.no_grad(), torch.autocast(call.hidden.device.type, enabled=False):
        losses, gradients = chunks.forward(call, wants, row_scale)
    nothing = [call.hidden.new_empty(0, dtype=call.dtype) for g in gradients if g is None]
    hidden, weight, bias = (nothing.pop() if g is None else g for g in gradients)
    return losses, hidden, weight, bias


def _fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    hidden, weight = arguments[:2]
    integers, wants = arguments[-2:]
    reduction, terms = integers[3], integers[5]
    dtype = accumulate_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    losses = hidden.new_empty((3 if terms else 1, *(hidden.shape[:1] if reduction == 0 else ())), dtype=dtype)
    made = [hidden.new_empty(s if w else (0,), dtype=dtype) for s, w in zip(shapes, wants, strict=True)]
    return losses, made[0], made[1], made[2]


_LIBRARY.impl("linear_multi_teacher_forward", _implementation, "CompositeExplicitAutograd")
torch.library.register_fake("fastkd::linear_multi_teacher_forward", _fake, lib=_LIBRARY)


def _run(call: Call, wants: Wants, row_scale: Tensor | None) -> tuple[Tensor, ...]:
    tensors, static = _flat(call)
    return call_operator(tensors, static, wants, row_scale)


def call_operator(
    tensors: Sequence[Tensor | None], static: Static, wants: Wants, row_scale: Tensor | None
) -> tuple[Tensor, ...]:
    operator = torch.ops.fastkd.linear_multi_teacher_forward.default
    out: tuple[Tensor, ...] = operator(*tensors[:7], list(tensors[7:]), row_scale, *static, list(wants))
    return out


class _Linear(torch.autograd.Function):
    """The losses; gradients are made in the forward, for reduction="none" in the backward by a second pass.

    The backward asked for with create_graph=True goes through the formula, recomputed chunk by chunk.
    """

    @staticmethod
    def forward(
        ctx: Any, static: Static, wants: Wants, places: list[int], *once: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        tensors, ctx.places = [once[i] for i in places], places
        ctx.static, ctx.wants = static, wants
        ctx.dtypes = [None if t is None else t.dtype for t in tensors[:3]]
        ctx.again = static[3][3] == 0  # reduction="none"
        out = call_operator(tensors, static, (False, False, False) if ctx.again else wants, None)
        losses, *gradients = out
        ctx.saves_inputs = ctx.again or torch.compiler.is_compiling()
        if ctx.saves_inputs:
            save_for_backward(ctx, (*gradients, *once))
        else:
            save_for_backward(ctx, ())
            ctx.inputs = Inputs(once)
            ctx.hidden, ctx.weight, ctx.bias = gradients
        loss, *terms = [z.clone() for z in losses.unbind(0)]
        ctx.mark_non_differentiable(*terms)
        return (loss, *terms) if terms else loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = with_kept(ctx, ctx.saved_tensors)  # an error where the graph was freed
        if torch.is_grad_enabled():
            once = saved[3:] if ctx.saves_inputs else ctx.inputs.unchanged(OP)
            gradients = _second_derivative(ctx, grad, [once[i] for i in ctx.places])
        elif ctx.again:
            tensors = [saved[3 + i] for i in ctx.places]
            again = call_operator(tensors, ctx.static, ctx.wants, grad.contiguous())[1:]
            gradients = [g.to(d) if w else None for g, d, w in zip(again, ctx.dtypes, ctx.wants, strict=True)]
        elif ctx.saves_inputs:
            made = zip(saved[:3], ctx.dtypes, ctx.wants, strict=True)
            gradients = [(g * grad).to(d) if w else None for g, d, w in made]
        else:
            gradients = _handed_out(ctx, grad)
        return None, None, None, *gradients, *([None] * (len(ctx.needs_input_grad) - 6))


def _handed_out(ctx: Any, grad: Tensor) -> list[Tensor | None]:
    """The stored gradients times `grad`, rounded once; given away with the last pass."""
    one = grad.device.type == "cpu" and type(grad) is Tensor and grad.item() == 1.0
    gradients: list[Tensor | None] = []
    for name, dtype, wanted in zip(("hidden", "weight", "bias"), ctx.dtypes, ctx.wants, strict=True):
        if not wanted:
            gradients.append(None)
            continue
        gradient = hand_out(ctx, name)
        gradients.append((gradient if one else gradient.mul_(grad)).to(dtype))
    if not graph_is_kept():
        ctx.inputs = None
    return gradients


def _second_derivative(ctx: Any, grad: Tensor, tensors: Sequence[Any]) -> list[Tensor | None]:
    call = _unflat(tensors, ctx.static)
    loss = formula.recomputed(call, chunks.chunk_rows(call, len(call.teachers)))[0]
    wanted = [t for t, w in zip(tensors[:3], ctx.wants, strict=True) if w]
    made = list(torch.autograd.grad(loss, wanted, grad, create_graph=True))
    return [made.pop(0) if w else None for w in ctx.wants]
