"""multi_teacher_kd: what a wrong call is told, and what happens to values that cannot be checked."""

import math

import pytest
import torch
from errors_helpers import Y, assert_told, each_wrong_call, wrong_losses, wrong_targets, wrong_weights

import fastkd

F = fastkd.functional
S, T = torch.zeros(4, 6), torch.zeros(4, 6)


def call(student=S, teachers=(T, T), target=None, **options):
    return lambda: F.multi_teacher_kd(student, teachers, target, **options)


WRONG = [
    *wrong_targets(call, "the student's"),
    *wrong_losses(call),
    *wrong_weights(call),
    (
        "shapes differ",
        call(teachers=[T, torch.zeros(4, 7)]),
        ValueError,
        r"teachers\[1\] .* student's shape \[4, 6\], got .*\[4, 7\]",
    ),
    ("one shape differs", call(teachers=torch.zeros(4, 7)), ValueError, r"teachers\[0\].*\[4, 6\], got shape \[4, 7\]"),
    ("too many dimensions", call(teachers=torch.zeros(2, 3, 4, 6)), ValueError, r"teachers .*K stacked.*got shape"),
    ("no teacher", call(teachers=[]), ValueError, "teachers must be at least one"),
    ("no stacked teacher", call(teachers=torch.zeros(0, 4, 6)), ValueError, "teachers must be at least one"),
    ("teachers of a wrong type", call(teachers=3), TypeError, "teachers must be a sequence.*got int"),
    (
        "labels for teachers",
        call(teachers=Y),
        TypeError,
        r"before the labels, got torch.int64 of shape \[4\]",
    ),
    (
        "a network",
        call(teachers=[T, torch.nn.Linear(6, 6)]),
        TypeError,
        r"teachers\[1\].*Linear: call it first",
    ),
    ("a teacher of a wrong type", call(teachers=[T, [1.0]]), TypeError, r"teachers\[1\].*got list"),
    ("student of a wrong type", call(student=[1.0]), TypeError, "student must be.*got list"),
    ("integer logits", call(student=S.long()), TypeError, "student must be.*floating-point.*got dtype torch.int64"),
    ("integer teacher", call(teachers=[T.int()]), TypeError, r"teachers\[0\].*floating-point.*int32"),
    ("0-d logits", call(student=torch.tensor(1.0)), ValueError, r"student.*\[..., C\]"),
    ("no classes", call(student=torch.zeros(4, 0), teachers=torch.zeros(4, 0)), ValueError, "student.*C >= 2"),
    ("one class", call(student=T[:, :1], teachers=T[:, :1]), ValueError, r"C >= 2 .*sigmoid.*got shape \[4, 1\]"),
    ("one sample", call(student=S[0], teachers=T[0]), ValueError, r"one sample is logits\[None\].*got shape \[6\]"),
    ("temperature 0", call(temperature=0), ValueError, "temperature must be a finite number > 0.*got 0"),
    ("temperature < 0", call(temperature=-1.0), ValueError, "temperature.*got -1"),
    ("temperature infinite", call(temperature=math.inf), ValueError, "temperature.*got inf"),
    ("temperature string", call(temperature="4"), TypeError, "temperature.*got str"),
    (
        "temperatures, wrong length",
        call(temperature=[1.0, 2.0, 3.0]),
        ValueError,
        "temperature must be one number or 2.*3 numbers",
    ),
    ("temperatures, one NaN", call(temperature=[1.0, math.nan]), ValueError, "temperature.*got nan"),
    (
        "temperatures and probs",
        call(temperature=[1.0, 2.0], combine="probs"),
        ValueError,
        "temperature must be one number for combine='probs'",
    ),
    ("weights tensor infinite", call(weights=torch.tensor([1.0, math.inf])), ValueError, "weights must be finite"),
    ("weights per row NaN", call(weights=torch.full((2, 4), math.nan)), ValueError, "weights must be finite"),
    (
        "negative weight and probs",
        call(weights=[1.0, -1.0], combine="probs"),
        ValueError,
        "weights must be at least 0 for combine='probs'",
    ),
    (
        "negative row and probs",
        call(weights=-torch.ones(2, 4), combine="probs"),
        ValueError,
        "weights must be at least 0",
    ),
    (
        "unknown combine",
        call(combine="mean"),
        ValueError,
        "combine must be one of 'losses', 'probs', 'logits', got 'mean'",
    ),
    ("ce_weight tensor", call(target=Y, ce_weight=torch.ones(2)), ValueError, "ce_weight must be a finite number"),
    ("ce_weight tensor, no target", call(ce_weight=torch.tensor(1.0)), ValueError, "target must be given where"),
    ("kd_weight", call(kd_weight=math.inf), ValueError, "kd_weight must be a finite number, got inf"),
    ("kd_weight string", call(kd_weight="1"), TypeError, "kd_weight must be a finite number, got str"),
    ("num_items 0", call(num_items=0), ValueError, "num_items must be a finite number > 0.*got 0"),
    (
        "num_items and none",
        call(num_items=3, reduction="none"),
        ValueError,
        "num_items must be None for reduction='none'",
    ),
    ("mask of a wrong dtype", call(mask=Y), TypeError, "mask must be a bool tensor.*int64"),
    ("mask of a wrong shape", call(mask=Y[:3] > 0), ValueError, r"mask must be of shape \[4\].*got shape \[3\]"),
    ("class_dim", call(class_dim=2), ValueError, r"class_dim must be a dimension of the logits, in \[-2, 2\), got 2"),
    (
        "maps with labels",
        call(student=torch.zeros(2, 3, 4, 5), teachers=torch.zeros(2, 3, 4, 5), target=torch.zeros(2, 4, 5).long()),
        ValueError,
        "classes must be last, or say class_dim=1",
    ),
    (
        "soft target of a wrong shape",
        call(target=S[:3]),
        ValueError,
        r"probabilities of .*\[4, 6\], got shape \[3, 6\]",
    ),
    ("soft target below 0", call(target=S - 1), ValueError, "target must be probabilities, at least 0"),
    (
        "mixed devices",
        call(teachers=[T, T.to("meta")]),
        ValueError,
        r"teachers\[1\] must be on the student's device cpu, got device meta",
    ),
]


@each_wrong_call(WRONG)
def test_wrong_calls(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "multi_teacher_kd")


def test_too_many_classes_are_refused():
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 classes"):
        F.multi_teacher_kd(*[torch.zeros(1, 1).expand(1, 2**31)] * 2)


def test_unknown_keyword_and_positional_options_are_python_errors():
    with pytest.raises(TypeError, match="temprature"):
        F.multi_teacher_kd(S, [T], temprature=2.0)
    with pytest.raises(TypeError, match="positional"):
        F.multi_teacher_kd(S, [T], Y, None, 4.0)


@pytest.mark.usefixtures("values_unreadable")
@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream", "cuda"])
@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
def test_a_target_that_cannot_be_checked_makes_its_row_nan(bad, place, at):
    """As on a GPU, where reading the target would wait: NaN for its row, no access out of range."""
    device = at(place)
    student = torch.randn(4, 6, device=device, requires_grad=True)
    target = torch.tensor([0, bad, 2, -100], device=device)
    for options in (dict(ce_weight=1.0), dict()):
        loss = F.multi_teacher_kd(student, torch.randn(4, 6, device=device), target, reduction="none", **options)
        (grad,) = torch.autograd.grad(loss.sum(), student)
        assert loss.isnan().tolist() == [False, True, False, False]
        assert grad.isnan().all(1).tolist() == [False, True, False, False]
        assert F.multi_teacher_kd(student, torch.randn(4, 6, device=device), target, **options).isnan()


@pytest.mark.usefixtures("values_unreadable")
def test_the_reference_agrees_on_a_target_that_cannot_be_checked():
    student = torch.randn(3, 6, requires_grad=True)
    with fastkd.use_backend("reference"):
        loss = F.multi_teacher_kd(student, torch.randn(3, 6), torch.tensor([0, 9, 2]), ce_weight=1.0, reduction="none")
        (grad,) = torch.autograd.grad(loss.sum(), student)
    assert loss.isnan().tolist() == [False, True, False] == grad.isnan().all(1).tolist()


def test_bad_backend_names():
    expected = "use_backend: name must be 'auto', 'native' or 'reference', got 'cuda'"
    with pytest.raises(ValueError, match=expected), fastkd.use_backend("cuda"):
        pass
