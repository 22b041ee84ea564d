"""Checks of values that all operations share: numbers of NumPy, probabilities that came as logits."""

import math
import re
import warnings
from fractions import Fraction

import numpy as np
import pytest
import torch

import fastkd
import fastkd.functional as F
from fastkd import _backend
from fastkd._core.checks import check_number

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def checks_everywhere():
    with _backend.pretend(check_everywhere=True):
        yield


Z, Y = torch.randn(4, 6), torch.tensor([0, 1, 2, 5])
STATS = F.group_stats([Z, -Z], Y)

# Each argument that takes a number.
NUMBERS = {
    "multi_teacher_kd temperature": lambda x: F.multi_teacher_kd(Z, [-Z], temperature=x),
    "multi_teacher_kd temperatures": lambda x: F.multi_teacher_kd(Z, [-Z, Z], temperature=[x, 1.0]),
    "multi_teacher_kd weights": lambda x: F.multi_teacher_kd(Z, [-Z, Z], weights=[x, 0.5]),
    "multi_teacher_kd ce_weight": lambda x: F.multi_teacher_kd(Z, [-Z], Y, ce_weight=x),
    "multi_teacher_kd label_smoothing": lambda x: F.multi_teacher_kd(Z, [-Z], Y, ce_weight=1.0, label_smoothing=x),
    "multi_label_kd temperature": lambda x: F.multi_label_kd(Z, [-Z], temperature=x),
    "multi_label_kd pos_weight": lambda x: F.multi_label_kd(Z, [-Z], Z > 0, ce_weight=1.0, pos_weight=x),
    "mutual_kd temperature": lambda x: F.mutual_kd([Z, -Z], temperature=x),
    "mutual_kd weights": lambda x: F.mutual_kd([Z, -Z], weights=[[0.0, x], [x, 0.0]]),
    "mutual_kd ce_weight": lambda x: F.mutual_kd([Z, -Z], Y, ce_weight=x, label_smoothing=x),
    "feature_ensemble weights": lambda x: F.feature_ensemble(Z, [-Z], weights=[x]),
    "rkd_angle eps": lambda x: F.rkd_angle(Z, Z.sin(), eps=x),
    "hard_samples proportions": lambda x: F.hard_samples(STATS, [x, 1.0], 3),
    "MultiTeacherKD temperature": lambda x: fastkd.MultiTeacherKD(temperature=x)(Z, [-Z]),
}


@pytest.mark.parametrize("argument", NUMBERS)
def test_a_number_of_numpy_is_the_number(argument):
    call = NUMBERS[argument]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        right = call(0.5)
        for dtype in (np.float16, np.float32, np.float64):
            assert torch.equal(call(dtype(0.5)), right)


@pytest.mark.parametrize("value", [np.float32(np.inf), np.float32(np.nan), np.float16(-1), 10**400, Fraction(10**400)])
def test_a_number_out_of_range_is_refused_whatever_its_type(value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(ValueError, match=r"^multi_teacher_kd: temperature must be a finite number > 0"):
            F.multi_teacher_kd(Z, [-Z], temperature=value)
    assert check_number("op", "x", np.float32(3e38), "finite") == float(np.float32(3e38))


P = Z.softmax(-1)
PROBABILITIES = {
    "multi_teacher_kd: student": lambda p: F.multi_teacher_kd(p, [Z]),
    "multi_teacher_kd: teachers[1]": lambda p: F.multi_teacher_kd(Z, [Z, p]),
    "mutual_kd: logits[1]": lambda p: F.mutual_kd([Z, p]),
    "mutual_kd: logits": lambda p: F.mutual_kd(torch.stack([p, p])),
    "mutual_kd: teachers[0]": lambda p: F.mutual_kd([Z, -Z], teachers=[p]),
    "group_stats: logits[0]": lambda p: F.group_stats([p, Z], Y),
}


@pytest.mark.parametrize("where", PROBABILITIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_probabilities_are_told_from_logits_where_checks_are_on(where, dtype, request):
    call = PROBABILITIES[where]
    call(P)
    request.getfixturevalue("checks_everywhere")
    with pytest.raises(ValueError, match="^" + re.escape(f"{where} must be logits, got probabilities")):
        call(P.to(dtype).requires_grad_())
    call(P.log())
    call(P * 1.01)
    call(torch.cat([P[:3], Z[:1]]))  # one row that is none


def test_probabilities_of_many_classes_in_half_precision_are_found_and_empty_batches_pass(checks_everywhere):
    z = torch.randn(2, 32000)
    for dtype in (torch.float16, torch.bfloat16):
        with pytest.raises(ValueError, match="student must be logits"):
            F.multi_teacher_kd(z.softmax(-1).to(dtype), [z.to(dtype)])
    assert math.isfinite(F.multi_teacher_kd(Z[:0], [Z[:0]]).item())
