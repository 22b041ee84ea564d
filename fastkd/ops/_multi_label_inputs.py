"""The checks of multi_label_kd, and of multi_teacher_kd with activation="sigmoid"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from fastkd._core.checks import check_choice, check_index, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops import _teacher_calls as calls
from fastkd.ops._autograd import is_transformed, may_read_values
from fastkd.ops._formulas import Reduction, accumulate_dtype, rows_of
from fastkd.ops._inputs import (
    REDUCTIONS,
    check_layout,
    check_logits,
    check_mask,
    check_num_items,
    check_scalar,
    classes_last,
)
from fastkd.ops._multi_label_formula import IGNORED, NOWHERE, Options, Tensors
from fastkd.ops._multi_teacher_formula import Combine
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.ops._teachers import check_left_out, check_teachers, check_temperature, check_weights

OP = "multi_label_kd"
Classes = Literal["sum", "mean"]
CLASSES = get_args(Classes)
SAMPLES_FIRST = "of shape [..., C] with samples before the classes (one logit of each sample is logits[:, None])"


def check(
    student: Tensor, teachers: object, target: object, weights: object, kd_weight: object, temperature: object,
    combine: Combine, ce_weight: object, pos_weight: object, ignore_index: int, mask: object, class_dim: int,
    classes: Classes, scale_by_t2: object, reduction: Reduction, num_items: object, return_terms: object = False,
    op: str = OP,
) -> tuple[Tensors, Options]:  # fmt: skip
    if not isinstance(student, Tensor) or not student.is_floating_point():
        check_logits(op, "student", student)  # which raises
    if student.dim() < 2 and not is_transformed():
        raise wrong_value(op, "student", SAMPLES_FIRST, f"shape {list(student.shape)}")
    class_dim = check_layout(op, student, class_dim, target is not None, "student")
    dense = check_teachers(op, teachers, student, least=1)
    student, *dense = [classes_last(z, class_dim) for z in (student, *dense)]
    check_logits(op, "student", student, least=1)
    check_choice(op, "reduction", reduction, REDUCTIONS)
    check_choice(op, "classes", classes, CLASSES)
    check_choice(op, "combine", combine, COMBINE)
    check_index(op, "ignore_index", ignore_index)
    kd_weight = check_scalar(op, "kd_weight", kd_weight, "a finite number")
    ce_weight = check_scalar(op, "ce_weight", ce_weight, "a finite number")
    if target is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise wrong_value(op, "target", f"given where ce_weight is {ce_weight}", None)
    temperatures = check_temperature(op, temperature, len(dense))
    if len(temperatures) > 1 and combine != "losses":
        expected = f"one number for combine={combine!r}"
        raise wrong_value(op, "temperature", expected, f"{len(temperatures)} numbers")
    weights, host_weights = check_weights(op, weights, len(dense), student, combine == "probs")
    counted = _check_mask(op, mask, student, class_dim)
    labels, partial = None, False
    if target is not None:
        labels, partial = _check_labels(op, target, student, class_dim, ignore_index, counted)
    rows, labels = _with_mask(labels, partial, counted, student)
    tensors = Tensors(
        rows_of(student), tuple([rows_of(t) for t in dense]), rows, None if labels is None else rows_of(labels),
        _check_pos_weight(op, pos_weight, student, target), weights,
    )  # fmt: skip
    options = Options(
        op, host_weights, temperatures, combine, kd_weight, ce_weight, bool(scale_by_t2), reduction,
        check_num_items(op, num_items, reduction), target is not None, bool(return_terms),
        1.0 / student.shape[-1] if classes == "mean" else 1.0,
    )  # fmt: skip
    keep = calls.of_weight(tensors, options)
    return (tensors, options) if keep is None else calls.only(tensors, options, keep)


def _check_mask(op: str, mask: object, student: Tensor, class_dim: int) -> Tensor | None:
    """bool [..., C] of elements or [..., 1] of rows; None: all count."""
    if not isinstance(mask, Tensor) or mask.dim() != student.dim():
        rows = check_mask(op, mask, student.shape[:-1], student.device)
        return None if rows is None else rows.reshape(*student.shape[:-1], 1)
    shape = student.movedim(-1, class_dim).shape
    if mask.shape != shape:
        expected = f"of shape {list(student.shape[:-1])}, one value per row, or of the student's shape {list(shape)}"
        raise wrong_value(op, "mask", expected, f"shape {list(mask.shape)}")
    check_mask(op, mask, shape, student.device)
    return classes_last(mask, class_dim)


def _check_labels(
    op: str, target: object, student: Tensor, class_dim: int, ignore_index: int, counted: Tensor | None
) -> tuple[Tensor, bool]:
    """Labels [..., C] of a floating dtype, as given or 0, 1, NOWHERE and NaN; whether NOWHERE may occur.

    NaN: no label, where that cannot be read. Where `counted` is False the label is 0, whatever it was.
    """
    if not isinstance(target, Tensor):
        raise wrong_type(op, "target", "a tensor of labels", type(target).__name__)
    if target.is_complex():
        raise wrong_type(op, "target", "labels of a floating, integer or bool dtype", f"dtype {target.dtype}")
    shape = student.movedim(-1, class_dim).shape
    if target.shape != shape and not (shape[class_dim] == 1 and target.shape == student.shape[:-1]):
        expected = f"of the student's shape {list(shape)}: a label of each class"
        raise wrong_value(op, "target", expected, f"shape {list(target.shape)}")
    if target.device != student.device:
        raise wrong_value(op, "target", f"on the student's device {student.device}", f"device {target.device}")
    labels = classes_last(target, class_dim) if target.shape == shape else target[..., None]
    if counted is not None:
        labels = labels.masked_fill(~counted, 0)
    readable = may_read_values(labels) and labels.numel() > 0
    if target.is_floating_point():
        inside = (labels >= 0) & (labels <= 1)
        if not readable:
            return labels.masked_fill(~inside, torch.nan), False
        if not bool(inside.all()):
            raise wrong_value(op, "target", "labels in [0, 1]", "one outside, or NaN")
        return labels, False
    if target.dtype == torch.bool:
        return labels.to(torch.bfloat16), False
    if readable:
        low, high = (int(x) for x in labels.aminmax())  # the usual case in one operation: all are labels
        if low >= 0 and high <= 1 and ignore_index not in (0, 1):
            return labels.to(torch.bfloat16), False
    ignored, wrong = labels == ignore_index, (labels < 0) | (labels > 1)
    if readable and bool((wrong & ~ignored).any()):
        bad = labels[wrong & ~ignored]
        raise wrong_value(op, "target", f"labels 0, 1 or ignore_index={ignore_index}", f"label {int(bad[0])}")
    return labels.to(torch.bfloat16).masked_fill(wrong, torch.nan).masked_fill(ignored, NOWHERE), True


def _with_mask(
    labels: Tensor | None, partial: bool, counted: Tensor | None, student: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Tensors.target and Tensors.labels, from labels [..., C] (`partial`: NOWHERE may occur) and what counts."""
    rows: Tensor | None = None
    if counted is not None and counted.shape[-1] > 1:
        if labels is None:
            labels = torch.zeros(student.shape, dtype=torch.bfloat16, device=student.device)
        labels, partial = labels.masked_fill(~counted, NOWHERE), True
    elif counted is not None:
        rows = counted.reshape(-1)
    if labels is not None and partial:
        some = (~(labels < 0)).any(-1).reshape(-1)
        rows = some if rows is None else rows & some
    if rows is None:
        return None, labels
    return torch.zeros_like(rows, dtype=torch.int64).masked_fill(~rows, IGNORED), labels


def _check_pos_weight(op: str, pos_weight: object, student: Tensor, target: object) -> Tensor | None:
    """[C] in the dtype that is computed in, or None where every label counts alike, or there is none."""
    if pos_weight is None:
        return None
    classes, dtype = student.shape[-1], accumulate_dtype(student.dtype)
    if not isinstance(pos_weight, Tensor):
        number = check_number(op, "pos_weight", pos_weight, "a finite number >= 0, or a tensor [C]", low=0)
        plain = number == 1 or target is None
        return None if plain else torch.full((classes,), number, dtype=dtype, device=student.device)
    if pos_weight.is_complex() or pos_weight.dtype == torch.bool or pos_weight.shape not in ((), (1,), (classes,)):
        got = f"a tensor of {pos_weight.dtype} and shape {list(pos_weight.shape)}"
        raise wrong_value(op, "pos_weight", f"a number, or a tensor of shape [{classes}]", got)
    if pos_weight.device != student.device and pos_weight.numel() > 1:
        raise wrong_value(op, "pos_weight", f"on the student's device {student.device}", f"device {pos_weight.device}")
    if may_read_values(pos_weight) and not bool(((pos_weight >= 0) & pos_weight.isfinite()).all()):
        raise wrong_value(op, "pos_weight", "finite and at least 0", "another one")
    return None if target is None else pos_weight.to(student.device, dtype).expand(classes)


# Of multi_teacher_kd: what has no meaning of a sigmoid, and what it is then.
NONE_OF_A_SIGMOID = dict(
    divergence="forward", divergence_beta=None, label_smoothing=0.0, vocab_size=None, softcap=None, logit_scale=1.0,
    teacher_softcap=None, teacher_logit_scale=1.0, return_stats=False,
)  # fmt: skip


def check_as_sigmoid(
    op: str, student: Tensor, teachers: object, target: object, given: Mapping[str, Any]
) -> tuple[Tensors, Options]:
    """check() of the arguments of multi_teacher_kd."""
    check_left_out(op, given, NONE_OF_A_SIGMOID, "for activation='sigmoid'")
    rest = {name: value for name, value in given.items() if name not in NONE_OF_A_SIGMOID}
    return check(student, teachers, target, classes="sum", pos_weight=None, op=op, **rest)
