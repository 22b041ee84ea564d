"""The checks of multi_teacher_kd and of one network's cross-entropy: what was given, as Tensors and Options."""

from __future__ import annotations

from torch import Tensor

from fastkd._core.checks import check_choice, check_index, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._divergences import check_divergence
from fastkd.ops._formulas import Reduction, rows_of
from fastkd.ops._inputs import (
    REDUCTIONS,
    check_layout,
    check_logits,
    check_mask,
    check_not_probabilities,
    check_num_items,
    check_scalar,
    check_soft_target,
    check_target,
    classes_last,
    with_mask,
)
from fastkd.ops._multi_teacher_formula import Combine, Options, Tensors, without_zeros
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.ops._teachers import check_caps, check_teachers, check_temperature, check_vocabulary, check_weights

OP = "multi_teacher_kd"


def check(
    student: Tensor, teachers: object, target: Tensor | None, weights: object, kd_weight: object,
    temperature: object, combine: Combine, divergence: object, divergence_beta: object, ce_weight: object,
    label_smoothing: object, ignore_index: int, mask: object, class_dim: int, vocab_size: object, softcap: object,
    logit_scale: object, teacher_softcap: object, teacher_logit_scale: object, scale_by_t2: object,
    reduction: Reduction, num_items: object, return_terms: object = False, return_stats: object = False,
) -> tuple[Tensors, Options]:  # fmt: skip
    _check_tensor(OP, "student", student)
    class_dim = check_layout(OP, student, class_dim, target is not None, "student")
    whole = student
    if vocab_size is not None:
        student, teachers, target = check_vocabulary(OP, vocab_size, class_dim, student, teachers, target)
    dense = check_teachers(OP, teachers, student)
    if class_dim != -1:
        whole, student, *dense = [z.movedim(class_dim, -1) for z in (whole, student, *dense)]
    tensors, options = _check_rows(
        OP, "student", student, target, label_smoothing, ignore_index, mask, class_dim, reduction, num_items
    )
    check_not_probabilities(OP, "teachers", dense)
    check_choice(OP, "combine", combine, COMBINE)
    which, shares = check_divergence(OP, divergence, divergence_beta, student, combine)
    kd_weight = check_scalar(OP, "kd_weight", kd_weight, "a finite number")
    ce_weight = check_scalar(OP, "ce_weight", ce_weight, "a finite number")
    if target is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise wrong_value(OP, "target", f"given where ce_weight is {ce_weight}", None)
    temperatures = check_temperature(OP, temperature, len(dense))
    if len(temperatures) > 1 and combine != "losses":
        expected = f"one number for combine={combine!r}"
        raise wrong_value(OP, "temperature", expected, f"{len(temperatures)} numbers")
    weights, host_weights = check_weights(OP, weights, len(dense), student, combine == "probs")
    softcaps, scales = check_caps(OP, softcap, logit_scale, teacher_softcap, teacher_logit_scale, len(dense))
    if vocab_size is not None:
        tensors, options = tensors._replace(student=rows_of(whole)), options._replace(classes=student.shape[-1])
    rows = tuple([rows_of(t) for t in dense])
    tensors = Tensors(tensors.student, rows, tensors.target, tensors.soft, weights, shares)
    options = options._replace(
        host_weights=host_weights, temperatures=temperatures, combine=combine, kd_weight=kd_weight,
        ce_weight=ce_weight, scale_by_t2=bool(scale_by_t2), terms=bool(return_terms), divergence=which,
        softcaps=softcaps, logit_scales=scales,
    )  # fmt: skip
    return (tensors, options) if return_stats else without_zeros(tensors, options)


def check_one(
    logits: Tensor, target: Tensor | None, label_smoothing: object, ignore_index: int, mask: object, class_dim: int,
    reduction: Reduction, num_items: object,
) -> tuple[Tensors, Options]:  # fmt: skip
    op = "cross_entropy"
    _check_tensor(op, "logits", logits)
    class_dim = check_layout(op, logits, class_dim, target is not None)
    logits = classes_last(logits, class_dim)
    if target is None:
        raise wrong_type(op, "target", "class indices or probabilities", "None")
    return _check_rows(
        op, "logits", logits, target, label_smoothing, ignore_index, mask, class_dim, reduction, num_items
    )


def _check_tensor(op: str, name: str, logits: object) -> None:
    if not isinstance(logits, Tensor) or not logits.is_floating_point():
        check_logits(op, name, logits)  # which raises


def _check_rows(
    op: str, name: str, student: Tensor, target: Tensor | None, label_smoothing: object, ignore_index: int,
    mask: object, class_dim: int, reduction: Reduction, num_items: object,
) -> tuple[Tensors, Options]:  # fmt: skip
    """One network, its classes last, and its labels: a call without teachers."""
    check_logits(op, name, student)
    check_not_probabilities(op, name, student)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    label_smoothing = check_number(op, "label_smoothing", label_smoothing, "a number in [0, 1]", 0, 1)
    check_index(op, "ignore_index", ignore_index)
    mask = check_mask(op, mask, student.shape[:-1], student.device)
    whose, soft = f"the {name}'s" if name == "student" else "the logits'", None
    if isinstance(target, Tensor) and target.is_floating_point():
        soft = classes_last(target, class_dim) if target.dim() == student.dim() else target
        soft, target = check_soft_target(op, soft, student, whose), None
    elif target is not None:
        target = check_target(op, target, student, whose)
    options = Options(
        op, (), (1.0,), "losses", 1.0, 1.0, label_smoothing, ignore_index, True, reduction,
        check_num_items(op, num_items, reduction), target is not None, False,
    )  # fmt: skip
    target = with_mask(target, mask, ignore_index)
    return Tensors(rows_of(student), (), target, soft, None), options
