"""multi_label_kd: what a wrong call is told."""

import math

import pytest
import torch
from errors_helpers import assert_told, each_wrong_call, unknown_reduction, wrong_weights

import fastkd

F = fastkd.functional
Z, T = torch.randn(4, 6), [torch.randn(4, 6), torch.randn(4, 6)]
Y = torch.zeros(4, 6, dtype=torch.int64)


def call(student=Z, teachers=T, **options):
    return lambda: F.multi_label_kd(student, teachers, **options)


WRONG = [
    ("a vector", call(Z[0], [Z[0]]), ValueError, r"student must be of shape \[..., C\] with samples.*got shape \[6\]"),
    ("no class", call(Z[:, :0], [Z[:, :0]]), ValueError, r"student must be of shape \[..., C\] with C >= 1 classes"),
    ("integer logits", call(Y), TypeError, "student must be a floating-point tensor.*int64"),
    ("no teacher", call(teachers=[]), ValueError, "teachers must be at least one tensor of logits, got none"),
    (
        "teacher of another shape",
        call(teachers=[Z[:, :5]]),
        ValueError,
        r"teachers\[0\] must be of the student's shape",
    ),
    ("teacher of one logit", call(teachers=[Z[:, :1]]), ValueError, r"teachers\[0\] must be.*got shape \[4, 1\]"),
    ("no target", call(ce_weight=0.5), ValueError, "target must be given where ce_weight is 0.5"),
    ("a list", call(target=[0, 1]), TypeError, "target must be a tensor of labels, got list"),
    (
        "class indices",
        call(target=Y[:, 0]),
        ValueError,
        r"target must be of the student's shape \[4, 6\]: a label of each",
    ),
    ("label 2", call(target=Y + 2), ValueError, "target must be labels 0, 1 or ignore_index=-100, got label 2"),
    ("label -1", call(target=Y - 1), ValueError, "target must be labels 0, 1 or ignore_index=-100, got label -1"),
    ("label 1.5", call(target=Y + 1.5), ValueError, r"target must be labels in \[0, 1\], got one outside"),
    ("label NaN", call(target=Y + math.nan), ValueError, r"target must be labels in \[0, 1\], got.*NaN"),
    ("complex labels", call(target=Y + 1j), TypeError, "target must be labels of a floating, integer or bool.*complex"),
    ("target elsewhere", call(target=Y.to("meta")), ValueError, "target must be on the student's device cpu"),
    ("pos_weight negative", call(target=Y, pos_weight=-1.0), ValueError, "pos_weight must be a finite number >= 0"),
    ("pos_weight NaN", call(target=Y, pos_weight=torch.full((6,), math.nan)), ValueError, "pos_weight must be finite"),
    ("pos_weight [5]", call(target=Y, pos_weight=torch.ones(5)), ValueError, r"or a tensor of shape \[6\].*got.*\[5\]"),
    ("pos_weight without labels", call(pos_weight="abc"), TypeError, "pos_weight must be a finite number >= 0"),
    ("mask of integers", call(mask=Y), TypeError, "mask must be a bool tensor.*int64"),
    (
        "mask of another shape",
        call(mask=Y[:3] > 0),
        ValueError,
        r"one value per row, or of the student's shape \[4, 6\].*got shape \[3, 6\]",
    ),
    ("unknown classes", call(classes="max"), ValueError, "classes must be one of 'sum', 'mean', got 'max'"),
    ("unknown combine", call(combine="mean"), ValueError, "combine must be one of 'losses', 'probs', 'logits'"),
    ("temperatures of a mixture", call(combine="probs", temperature=[1.0, 2.0]), ValueError, "temperature must be one"),
    ("temperature 0", call(temperature=0.0), ValueError, "temperature must be a finite number > 0"),
    ("negative mixture", call(combine="probs", weights=[1.0, -1.0]), ValueError, "weights must be at least 0"),
    ("class_dim", call(class_dim=2), ValueError, "class_dim must be a dimension of the logits"),
    ("num_items of rows", call(reduction="none", num_items=3), ValueError, "num_items must be None"),
    ("ignore_index", call(target=Y, ignore_index=1.0), TypeError, "ignore_index must be an integer, got float"),
    unknown_reduction(call),
    *wrong_weights(call),
]


@each_wrong_call(WRONG)
def test_what_a_wrong_call_is_told(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "multi_label_kd")


def as_sigmoid(**options):
    return lambda: F.multi_teacher_kd(Z, T, activation="sigmoid", **options)


NO_SIGMOID = dict(
    divergence="jsd", divergence_beta=0.5, label_smoothing=0.1, vocab_size=5, softcap=30.0, logit_scale=2.0,
    teacher_softcap=30.0, teacher_logit_scale=[1.0, 2.0], return_stats=True,
)  # fmt: skip


@pytest.mark.parametrize("name", NO_SIGMOID)
def test_what_has_no_meaning_of_a_sigmoid(name):
    with pytest.raises(ValueError, match=f"^multi_teacher_kd: {name} must be .* for activation='sigmoid', got "):
        as_sigmoid(**{name: NO_SIGMOID[name]})()


def test_a_softmax_of_one_logit_is_told_where_to_go():
    with pytest.raises(ValueError, match="a network of one logit has a sigmoid: multi_label_kd"):
        F.multi_teacher_kd(Z[:, :1], [Z[:, :1]])
    assert as_sigmoid()().dim() == 0


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("wrong", [9, -7, math.nan, 2.5])
def test_labels_behind_a_mask_are_not_looked_at(wrong, rows):
    target = torch.zeros(4, 6, dtype=torch.float32 if isinstance(wrong, float) else torch.int64)
    mask = torch.ones(4, 6, dtype=torch.bool)
    mask[1] = False
    student, clean = Z.clone().requires_grad_(), F.multi_label_kd(Z, T, target, ce_weight=1.0, mask=mask[:, 0])
    target[1] = wrong
    loss = F.multi_label_kd(student, T, target, ce_weight=1.0, mask=mask[:, 0] if rows else mask)
    assert loss.item() == pytest.approx(clean.item(), rel=1e-6)
    assert float(torch.autograd.grad(loss, student)[0][1].abs().max()) == 0


@pytest.mark.parametrize("wrong", [-100.0, -0.5, 1.5, math.nan])
def test_floating_labels_that_nobody_could_check_make_their_row_nan(wrong, values_unreadable):
    target = torch.zeros(4, 6)
    target[1, 2] = wrong
    student = Z.clone().requires_grad_()
    loss = F.multi_label_kd(student, T, target, ce_weight=1.0, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False]
    (gradient,) = torch.autograd.grad(loss.nansum(), student)
    assert bool(gradient[[0, 2, 3]].isfinite().all())
