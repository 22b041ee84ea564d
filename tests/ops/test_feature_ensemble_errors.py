"""feature_ensemble: what a wrong call is told."""

import math

import pytest
import torch
from errors_helpers import assert_told, each_wrong_call, unknown_reduction, wrong_weights

import fastkd

F = fastkd.functional
S, T = torch.zeros(4, 6, 3, 3), torch.zeros(4, 6, 3, 3)
SMALL = torch.zeros(4, 5, 2, 2)


def call(students=(S, SMALL), teachers=(T, SMALL), **options):
    return lambda: F.feature_ensemble(students, teachers, **options)


WRONG = [
    *wrong_weights(call),
    unknown_reduction(call),
    (
        "shapes differ",
        call(teachers=[T, T]),
        ValueError,
        r"teachers\[1\] must be of its student's shape \[4, 5, 2, 2\].*got shape \[4, 6, 3, 3\]",
    ),
    ("one map, other shape", call(S, [T, SMALL]), ValueError, r"teachers\[1\].*\[4, 6, 3, 3\].*got shape \[4, 5"),
    ("counts differ", call(teachers=[T]), ValueError, "teachers must be 2 maps, one per student, got 1 maps"),
    ("a list of one", call([S], [T, T]), ValueError, "teachers must be 1 maps, one per student, got 2 maps"),
    ("no student", call([], []), ValueError, "students must be at least one feature map, got none"),
    ("no teacher", call(S, []), ValueError, "teachers must be at least one feature map, got none"),
    ("students of a wrong type", call(3), TypeError, "students must be a feature map or a sequence.*got int"),
    ("a student of a wrong type", call([S, [1.0]]), TypeError, r"students\[1\] must be.*got list"),
    ("a string", call("map"), TypeError, "students must be.*got str"),
    ("integer maps", call([S.long(), SMALL]), TypeError, r"students\[0\].*floating-point.*got dtype torch.int64"),
    ("integer teachers", call(teachers=[T, SMALL.int()]), TypeError, r"teachers\[1\].*floating-point.*torch.int32"),
    ("a vector", call(torch.zeros(4), torch.zeros(4)), ValueError, r"students\[0\] must be of shape \[B, C, \.\.\.\]"),
    ("no channels", call(S[:, :0], T[:, :0]), ValueError, r"students\[0\].*at least one element per sample.*\[4, 0"),
    (
        "batches differ",
        call([S, SMALL[:3]]),
        ValueError,
        r"students\[1\] must be of students\[0\]'s batch size 4, got 3",
    ),
    ("devices differ", call([S, SMALL.to("meta")]), ValueError, r"students\[1\] must be on students\[0\]'s device cpu"),
    ("teacher elsewhere", call(teachers=[T.to("meta"), SMALL]), ValueError, r"teachers\[0\].*student's device cpu"),
    ("p 3", call(p=3), ValueError, "p must be 1 or 2, got 3"),
    ("p True", call(p=True), ValueError, "p must be 1 or 2, got True"),
    ("p string", call(p="1"), ValueError, "p must be 1 or 2, got '1'"),
    (
        "unknown norm",
        call(norm="batch"),
        ValueError,
        "norm must be one of 'sample', 'position', 'channel', got 'batch'",
    ),
    ("unknown elements", call(elements="none"), ValueError, "elements must be one of 'mean', 'sum', got 'none'"),
    ("a mask of numbers", call(mask=torch.ones(4)), TypeError, "mask must be a bool tensor.*got dtype torch.float32"),
    ("mask of a wrong shape", call(mask=S > 0), ValueError, r"mask must be of shape \[4\].*got shape \[4, 6, 3, 3\]"),
    ("num_items 0", call(num_items=0), ValueError, "num_items must be a finite number > 0.*got 0"),
    (
        "num_items of none",
        call(num_items=4, reduction="none"),
        ValueError,
        "num_items must be None for reduction='none'",
    ),
    ("weights infinite", call(weights=torch.full((2, 4), math.inf)), ValueError, "weights must be finite"),
]


@each_wrong_call(WRONG)
def test_wrong_calls(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "feature_ensemble")


def test_too_many_elements_are_refused():
    huge = torch.zeros(1).expand(1, 2**16, 2**15)
    with pytest.raises(ValueError, match=r"fewer than 2\*\*31 elements per sample, got 2147483648"):
        F.feature_ensemble(huge, huge)


def test_unknown_keyword_and_positional_options_are_python_errors():
    with pytest.raises(TypeError, match="norms"):
        F.feature_ensemble(S, T, norms="sample")
    with pytest.raises(TypeError, match="positional"):
        F.feature_ensemble(S, T, None)
