"""Sparse teachers beside whole logits: what multi_teacher_kd adds for them to its loss of the dense ones.

By the kernel of _topk_kernels.py, or by the formula in plain PyTorch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.messages import wrong_value
from fastkd.ops import _multi_teacher_inputs as inputs
from fastkd.ops import _topk_formula as formula
from fastkd.ops import _topk_kernels as kernels
from fastkd.ops._autograd import is_transformed, save_for_backward, with_kept
from fastkd.ops._formulas import LossTerms, accumulate_dtype, count_rows, flat_rows, reduce_rows
from fastkd.ops._inputs import check_labels, check_layout, check_range, classes_last
from fastkd.ops._teacher_calls import is_number
from fastkd.ops._teachers import check_left_out, check_temperature, check_weights
from fastkd.ops._topk_kernels import Sparse
from fastkd.ops.topk import Mode, TopK, check_topk
from fastkd.ops.topk import check_temperature as check_sparse_temperature

# The options that whole logits alone take, and what they are beside TopK teachers.
DENSE_ALONE = {
    "divergence": "forward", "divergence_beta": None, "vocab_size": None, "softcap": None, "logit_scale": 1.0,
    "teacher_softcap": None, "teacher_logit_scale": 1.0,
}  # fmt: skip


def has_sparse(teachers: object) -> bool:
    if isinstance(teachers, Tensor) or not isinstance(teachers, Sequence):
        return isinstance(teachers, TopK)
    return any([isinstance(teacher, TopK) for teacher in teachers])


def checked(
    op: str, student: Tensor, teachers: Any, target: Tensor | None, options: dict[str, Any]
) -> tuple[list[Sparse], dict[str, Any]]:
    """The sparse teachers of a call, and the arguments of the same call without them."""
    if options["combine"] != "losses":
        raise wrong_value(op, "combine", "'losses' where a teacher is a TopK", repr(options["combine"]))
    check_left_out(op, options, DENSE_ALONE, "where a teacher is a TopK")
    if options["return_stats"]:
        raise wrong_value(op, "return_stats", "False where a teacher is a TopK", True)
    class_dim = check_layout(op, student, options["class_dim"], target is not None, "student")
    sparse, dense, rest = _split(op, teachers, student, classes_last(student, class_dim), options)
    return sparse, {"student": student, "teachers": dense, "target": target} | options | rest


def with_sparse(
    dense_kd: Callable[..., Any],
    op: str,
    student: Tensor,
    teachers: Any,
    target: Tensor | None,
    options: dict[str, Any],
) -> Any:
    """multi_teacher_kd(student, teachers, target, **options), where `dense_kd` is it without sparse teachers."""
    sparse, arguments = checked(op, student, teachers, target, options)
    unread = is_number(options["kd_weight"], 0)
    read = [teacher for teacher in sparse if not (unread or is_number(teacher.weight, 0))]
    if not read:
        return dense_kd(**arguments)
    rows = classes_last(student, check_layout(op, student, options["class_dim"], True, "student"))
    reason = kernels.why_reference(rows, read, (options["kd_weight"], options["num_items"] or 1))
    if reason is not None:
        _backend.note_fallback(op, reason, student)
    loss, terms = _dense_part(dense_kd, arguments, rows)
    class_dim = check_layout(op, student, options["class_dim"], True, "student")
    labels = check_labels(op, target, options["mask"], options["ignore_index"], rows, class_dim)[0]
    counts = None if labels is None else labels != options["ignore_index"]
    if reason is None:
        kd_weight, kd = _native_losses(rows, read, counts, options)
    else:
        kd_weight, kd = options["kd_weight"], _row_losses(flat_rows(rows), read, counts, options["scale_by_t2"])
        kd = reduce_rows(kd, counts, options["reduction"], rows.shape[:-1], options["num_items"])
    kd = kd.to(loss.dtype)
    loss = loss + (kd if is_number(kd_weight, 1) else kd_weight * kd)
    return loss if terms is None else (loss, LossTerms(terms.kd + kd.detach(), terms.ce))


def _dense_part(dense_kd: Callable[..., Any], call: dict[str, Any], rows: Tensor) -> tuple[Tensor, LossTerms | None]:
    """The loss of the labels and dense teachers, and its terms where they are asked for."""
    alone = isinstance(call["weights"], list) and call["weights"] == [0.0] and is_number(call["ce_weight"], 0)
    if not alone or (call["return_terms"] and call["target"] is not None):
        result = dense_kd(**call)
        return result if call["return_terms"] else (result, None)
    tensors, options = inputs.check(**call)
    if options.labels:
        check_range(inputs.OP, tensors.target, rows.shape[-1], options.ignore_index)
    shape = rows.shape[:-1] if options.reduction == "none" else ()
    nothing = rows.new_zeros(shape, dtype=accumulate_dtype(rows.dtype))
    return nothing, LossTerms(nothing, nothing) if call["return_terms"] else None


def _native_losses(
    rows: Tensor, teachers: list[Sparse], counts: Tensor | None, options: dict[str, Any]
) -> tuple[float | Tensor, Tensor]:
    """The teachers' loss by the kernel, in whose gradient all factors are; what it still is to be multiplied by."""
    reduction, items, number = options["reduction"], options["num_items"], count_rows(rows)
    factor = 1.0
    if reduction != "none" and items is not None:
        factor = 1 / float(items)
    elif reduction == "mean":
        factor = 1 / max(1, number if counts is None else int(counts.sum()))
    inside, left = (1.0, options["kd_weight"]) if options["return_terms"] else (float(options["kd_weight"]), 1.0)
    total = None
    for teacher in teachers:
        t = float(teacher.temperature)
        scale = inside * (t * t if options["scale_by_t2"] else 1.0)
        weight = torch.as_tensor(teacher.weight, dtype=torch.float64).detach().expand(number) * scale
        if counts is not None:
            weight = weight.masked_fill(~counts, 0)
        loss = kernels.loss_of(rows, teacher, kernels.Rows(weight.contiguous(), t, reduction, factor))
        total = loss if total is None else total + loss
    assert total is not None
    return left, total.reshape(rows.shape[:-1]) if reduction == "none" else total


def _split(
    op: str, teachers: Any, student: Tensor, rows: Tensor, options: dict[str, Any]
) -> tuple[list[Sparse], list[Tensor], dict[str, Any]]:
    """The sparse teachers, the dense ones, and the weights and temperatures of these; none is a dense one of weight 0,
    which is not read."""
    teachers = [teachers] if isinstance(teachers, TopK) else list(teachers)
    temperatures = check_temperature(op, options["temperature"], len(teachers))
    weights, host = check_weights(op, options["weights"], len(teachers), rows, False)
    sparse, dense = [], [k for k, teacher in enumerate(teachers) if not isinstance(teacher, TopK)]
    for k, teacher in enumerate(teachers):
        if k in dense:
            continue
        name, t = f"teachers[{k}]", temperatures[k % len(temperatures)]
        ids, log_probs, tail = check_topk(op, name, teacher, rows)
        check_sparse_temperature(op, name, teacher.mode, t)
        weight = host[k] if weights is None else weights[k]
        sparse.append(Sparse(teacher.mode, ids, log_probs, tail, weight, t))
    if not dense:
        return sparse, [student.detach()], {"weights": [0.0], "temperature": 1.0}
    given: Tensor | list[float]
    if weights is None:
        given = [host[k] for k in dense]
    else:
        given = weights[dense] if weights.dim() == 1 else weights[dense].reshape(len(dense), *rows.shape[:-1])
    some = temperatures[0] if len(temperatures) == 1 else [temperatures[k] for k in dense]
    return sparse, [teachers[k] for k in dense], {"weights": given, "temperature": some}


def _row_losses(student: Tensor, teachers: list[Sparse], counts: Tensor | None, by_t2: bool) -> Tensor:
    """The weighted sum of the divergences, [R], 0 in rows that do not count."""
    z = student.to(accumulate_dtype(student.dtype))
    if counts is not None:
        z = z.masked_fill(~counts[:, None], 0)
    total = torch.zeros_like(z[:, 0])
    for teacher in teachers:
        weight, t = teacher.weight, teacher.temperature
        read = counts
        if isinstance(weight, Tensor) and weight.dim() == 1 and not weight.requires_grad:
            read = weight != 0 if counts is None else counts & (weight != 0)
        entries = formula.entries_of(teacher.mode, teacher.ids, teacher.log_probs, teacher.tail, t, read)
        x = z if is_number(t, 1) else z / t
        total = total + weight * ((t * t if by_t2 else 1.0) * _divergence(teacher.mode, entries, x))
    return total


def why_reference(
    op: str, student: Tensor, teachers: Any, target: Tensor | None, options: dict[str, Any]
) -> str | None:
    """Why plain PyTorch computes the sparse teachers of this call, or None; it is checked."""
    sparse, arguments = checked(op, student, teachers, target, options)
    inputs.check(**arguments)
    read = [teacher for teacher in sparse if not is_number(teacher.weight, 0)]
    return kernels.why_reference(student, read, (options["kd_weight"], options["num_items"] or 1))


def _divergence(mode: Mode, entries: formula.Entries, x: Tensor) -> Tensor:
    """[R] in x's dtype, with the closed-form gradient where PyTorch's autograd is not needed."""
    learns = torch.is_grad_enabled() and x.requires_grad
    if not learns or is_transformed() or entries.log_p.requires_grad:  # through a temperature that learns
        return formula.divergence(mode, entries, x).to(x.dtype)
    value: Tensor = _Divergence.apply(mode, x, *entries)
    return value


class _Divergence(torch.autograd.Function):
    """Value and gradient in one pass; of the backward with create_graph=True, the formula."""

    @staticmethod
    def forward(ctx: Any, mode: Mode, x: Tensor, *entries: Any) -> Tensor:
        value, gradient = formula.divergence_and_gradient(mode, formula.Entries(*entries), x)
        ctx.mode = mode
        save_for_backward(ctx, (gradient, x, *entries))
        return value.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x, *entries = with_kept(ctx, ctx.saved_tensors)
        if torch.is_grad_enabled():
            value = formula.divergence(ctx.mode, formula.Entries(*entries), x).to(x.dtype)
            gradient = torch.autograd.grad(value, x, grad, create_graph=True)[0]
        else:
            gradient = gradient * grad[:, None]
        return None, gradient, None, None, None
