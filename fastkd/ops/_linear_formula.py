"""linear_multi_teacher_kd in plain PyTorch, with whole logits: the specification. In chunks, recomputed, where
teachers, weights or temperatures learn and in the second derivative."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastkd.ops import _multi_teacher_formula as multi_teacher
from fastkd.ops import _topk_formula as topk
from fastkd.ops._formulas import flat_rows, reduce_rows
from fastkd.ops._linear_inputs import HEAD, SPARSE, Call, Projection, given
from fastkd.ops._multi_teacher_formula import Tensors
from fastkd.ops._teacher_calls import is_number


def logits_of(hidden: Tensor, projection: Projection, classes: int) -> Tensor:  # [R, H] -> [R, V]
    """Logits in the dtype of `hidden`."""
    weight, bias, softcap, scale = projection
    z = hidden @ weight[:classes].to(hidden.dtype).t()
    if bias is not None:
        z = z + bias[:classes].to(hidden.dtype)
    z = z if scale == 1 else z * scale
    return z if softcap == 0 else softcap * torch.tanh(z / softcap)


def reference(call: Call) -> tuple[Tensor, ...]:
    """The loss, and with `terms` KD and CE; differentiable in all inputs."""
    rows = _row_losses(call, slice(None))
    return _reduced(call, rows)


def recomputed(call: Call, chunk_rows: int) -> tuple[Tensor, ...]:
    """As reference(), with the logits of `chunk_rows` rows in memory at a time, made again in the backward."""
    weight = call.projection.weight.to(call.dtype)  # so that chunks' gradients add up in this dtype
    call = call._replace(projection=call.projection._replace(weight=weight))
    chunks = [slice(i, i + chunk_rows) for i in range(0, call.hidden.shape[0], chunk_rows)] or [slice(None)]
    parts = [checkpoint(_row_losses, call, rows, use_reentrant=False) for rows in chunks]
    return _reduced(call, [torch.cat(part) for part in zip(*parts, strict=True)])


def _reduced(call: Call, rows: Sequence[Tensor]) -> tuple[Tensor, ...]:
    valid = None if call.target is None else call.target != call.options.ignore_index
    reduction, items = call.options.reduction, call.options.num_items
    return tuple([reduce_rows(r, valid, reduction, (-1,), items) for r in rows])


def _row_losses(call: Call, rows: slice) -> tuple[Tensor, ...]:
    """The loss of these rows [n], with `terms` KD and CE; 0 where a row does not count."""
    target = None if call.target is None else call.target[rows]
    counts = None if target is None else target != call.options.ignore_index
    hidden = _cleaned(call.hidden[rows].to(call.dtype), counts)
    student = logits_of(hidden, call.projection, call.classes)
    dense = [k for k, t in enumerate(call.teachers) if t.kind < SPARSE]
    members = {k: _member(call, k, rows) for k in dense if call.teachers[k].rows is not None}
    teachers = tuple([_teacher_logits(call, k, rows, members.get(k), counts) for k in dense])
    weights, host = _weights(call, dense, rows, members)
    soft = None if call.soft is None else flat_rows(call.soft)[rows]
    t = call.options.temperatures
    options = call.options._replace(
        host_weights=host, temperatures=t if len(t) == 1 else tuple([t[k] for k in dense]) or (1.0,),
        reduction="none", num_items=None,
    )  # fmt: skip
    tensors = Tensors(student, teachers, target, soft, weights, shares_of_rows(call, rows))
    losses = multi_teacher.reference(tensors, options)
    if len(dense) == len(call.teachers) or is_number(options.kd_weight, 0):
        return losses
    kd = _sparse_kd(call, rows, student, counts).to(losses[0].dtype)
    loss = losses[0] + call.options.kd_weight * kd
    return (loss, losses[1] + kd.detach(), losses[2]) if options.terms else (loss,)


def _cleaned(rows: Tensor, counts: Tensor | None) -> Tensor:
    """0 in rows that do not count: what they hold must reach neither weight nor gradient."""
    return rows if counts is None else rows.masked_fill(~counts[:, None], 0)


def _member(call: Call, k: int, rows: slice) -> Tensor:
    """int64 [n]: the row of a routed teacher's hidden states for each of these rows, -1 where it does not speak."""
    spoken = given(call.teachers[k].rows)
    place = torch.full_like(call.hidden[:, 0], -1, dtype=torch.int64)
    return place.scatter(0, spoken, torch.arange(spoken.shape[0], device=spoken.device))[rows]


def _teacher_logits(call: Call, k: int, rows: slice, member: Tensor | None, counts: Tensor | None) -> Tensor:
    teacher, first = call.teachers[k], given(call.teachers[k].first)
    if teacher.kind != HEAD:
        return first[rows]
    dtype = torch.promote_types(call.dtype, torch.promote_types(first.dtype, given(teacher.second).dtype))
    hidden = first.to(dtype)
    if member is None:
        hidden = hidden[rows]
    elif hidden.shape[0] == 0:
        hidden = hidden.new_zeros(member.shape[0], hidden.shape[1])
    else:
        hidden = _cleaned(hidden[member.clamp(min=0)], member >= 0)
    return logits_of(_cleaned(hidden, counts), teacher.projection, call.classes)


def _weights(
    call: Call, teachers: list[int], rows: slice, members: dict[int, Tensor]
) -> tuple[Tensor | None, tuple[float, ...]]:
    """(weights [k, n], ()), or (None, numbers) where they are known on the host and every teacher speaks everywhere."""
    if not teachers or (call.weights is None and not members):
        return None, tuple([call.options.host_weights[k] for k in teachers])
    rest = [weights_of_rows(call, k, rows) for k in teachers]
    full = [w * torch.ones_like(call.hidden[rows][:, 0], dtype=call.dtype) for w in rest]
    full = [w if k not in members else w * (members[k] >= 0) for k, w in zip(teachers, full, strict=True)]
    return torch.stack(full), ()


def weights_of_rows(call: Call, k: int, rows: slice | Tensor) -> float | Tensor:
    """A teacher's weight: a number, or [] or [n]."""
    if call.weights is None:
        return call.options.host_weights[k]
    return call.weights[k] if call.weights.dim() == 1 else call.weights[k][rows]


def shares_of_rows(call: Call, rows: slice | Tensor) -> Tensor | None:
    """The weights of forward and reverse, [2] or [2, n]."""
    shares = call.shares
    return shares if shares is None or shares.dim() == 1 else shares[:, rows].contiguous()


def sparse_entries(
    call: Call, k: int, rows: slice | Tensor, counts: Tensor | None, temperature: float | Tensor
) -> topk.Entries:
    """The classes of a sparse teacher in these rows, none in rows that it does not count in."""
    teacher, weight = call.teachers[k], weights_of_rows(call, k, rows)
    read = counts
    if isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad:
        read = weight != 0 if read is None else read & (weight != 0)
    values, tail = (None if t is None else t[rows] for t in (teacher.first, teacher.third))
    assert teacher.mode is not None
    return topk.entries_of(teacher.mode, given(teacher.second)[rows], values, tail, temperature, read)


def _sparse_kd(call: Call, rows: slice, student: Tensor, counts: Tensor | None) -> Tensor:
    """The weighted divergences to the sparse teachers, float64 [n]."""
    total, temperatures = torch.zeros_like(student[:, 0], dtype=torch.float64), call.options.temperatures
    for k, teacher in enumerate(call.teachers):
        weight = weights_of_rows(call, k, rows)
        if teacher.mode is None or is_number(weight, 0):
            continue
        t = temperatures[k % len(temperatures)]
        entries = sparse_entries(call, k, rows, counts, t)
        x = student if not isinstance(t, Tensor) and t == 1 else student / t
        scale = t * t if call.options.scale_by_t2 else 1.0
        total = total + weight * (scale * topk.divergence(teacher.mode, entries, x))
    if (
        call.options.labels and call.target is not None
    ):  # a label that is no class makes its row's loss NaN, in the other terms as well
        target = call.target[rows]
        bad = (target != call.options.ignore_index) & ((target < 0) | (target >= call.classes))
        total = total.masked_fill(bad, math.nan)
    return total if counts is None else total.masked_fill(~counts, 0)
