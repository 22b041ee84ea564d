"""mutual_kd: what a wrong call is told, and what happens to values that cannot be checked."""

import math

import pytest
import torch
from errors_helpers import assert_told, each_wrong_call, wrong_losses, wrong_targets

import fastkd

F = fastkd.functional
Z, T = torch.zeros(4, 6), torch.zeros(4, 6)
NAN = math.nan


def call(logits=(Z, Z, Z), target=None, **options):
    return lambda: F.mutual_kd(logits, target, **options)


WRONG = [
    *wrong_targets(call, "the networks'"),
    *wrong_losses(call),
    ("one network", call([Z]), ValueError, "logits must be at least two networks' logits, got 1"),
    ("no network", call([]), ValueError, "logits must be at least two"),
    ("one stacked", call(torch.zeros(1, 4, 6)), ValueError, r"logits must be M >= 2 networks stacked.*\[1, 4, 6\]"),
    ("a row", call(torch.zeros(6)), ValueError, r"logits must be M >= 2 networks stacked.*got shape \[6\]"),
    ("shapes differ", call([Z, torch.zeros(4, 7)]), ValueError, r"logits\[1\] .*\[4, 6\], got shape \[4, 7\]"),
    ("a number", call(3), TypeError, "logits must be a sequence of logits.*got int"),
    ("a list in it", call([Z, [1.0]]), TypeError, r"logits\[1\].*got list"),
    ("integer logits", call([Z.long(), Z]), TypeError, r"logits\[0\].*floating-point.*torch.int64"),
    ("integer stack", call(torch.zeros(2, 4, 6).int()), TypeError, "logits must be.*floating-point.*torch.int32"),
    ("no classes", call([torch.zeros(4, 0)] * 2), ValueError, r"logits\[0\].*C >= 2"),
    ("one class", call([torch.zeros(4, 1)] * 2), ValueError, r"C >= 2 classes \(a network of one logit has a sigmoid"),
    ("one class, stacked", call(torch.zeros(2, 4, 1)), ValueError, r"C >= 2 classes \(a network of one logit"),
    ("other device", call([Z, Z.to("meta")]), ValueError, r"logits\[1\] must be on .* device cpu, got device meta"),
    ("teacher's shape", call(teachers=[torch.zeros(4, 7)]), ValueError, r"teachers\[0\] .*networks' shape \[4, 6\]"),
    ("teachers of a wrong type", call(teachers=3), TypeError, "teachers must be a sequence.*got int"),
    ("too many dimensions", call(teachers=torch.zeros(1, 2, 4, 6)), ValueError, "teachers must be of the networks'"),
    ("teacher_weights alone", call(teacher_weights=[[1]] * 3), ValueError, "teacher_weights must be None without"),
    ("teacher_weights", call(teachers=[T], teacher_weights=[[1, 2]] * 3), ValueError, "teacher_weights must be 3 rows"),
    (
        "teacher_weights' diagonal",
        call([Z, Z], teachers=[T, T], teacher_weights=[[NAN, 0], [0, 0]]),
        ValueError,
        r"teacher_weights\[0\]\[0\] must be a finite number, got nan",
    ),
    ("divergence", call(divergence="tvd"), ValueError, "divergence must be one of 'forward', 'reverse', 'jsd'"),
    ("divergence a dict", call(divergence={"forward": 1.0}), TypeError, "divergence must be a name, got dict"),
    ("divergence_beta", call(divergence="jsd", divergence_beta=2), ValueError, r"divergence_beta must be .*\[0, 1\]"),
    ("beta of forward", call(divergence_beta=0.5), ValueError, "divergence_beta must be None for"),
    ("mask of labels", call(mask=torch.ones(4)), TypeError, "mask must be a bool tensor, True where a row counts"),
    ("mask's shape", call(mask=torch.ones(3, dtype=torch.bool)), ValueError, r"mask must be of shape \[4\]"),
    ("class_dim", call(class_dim=2), ValueError, r"class_dim must be a dimension of the logits, in \[-2, 2\), got 2"),
    ("class_dim float", call(class_dim=1.0), TypeError, "class_dim must be an integer, got float"),
    ("maps and labels", call([torch.zeros(2, 3, 4, 5)] * 2, torch.zeros(2, 4, 5).long()), ValueError, "class_dim=1"),
    ("logits of one dimension", call([torch.zeros(6)] * 2), ValueError, r"logits\[0\] must be .*logits\[None\]"),
    ("num_items 0", call(num_items=0), ValueError, "num_items must be a finite number > 0"),
    ("num_items of rows", call(num_items=3, reduction="none"), ValueError, "num_items must be None for reduction"),
    ("kd_weight NaN", call(kd_weight=NAN), ValueError, "kd_weight must be a finite number, got nan"),
    ("soft target's shape", call(target=torch.ones(4, 5)), ValueError, r"probabilities of the networks' shape"),
    ("soft target negative", call(target=torch.full((4, 6), -1.0)), ValueError, "probabilities, at least 0"),
    ("temperature 0", call(temperature=0), ValueError, "temperature must be a finite number > 0, got 0"),
    ("temperatures", call(temperature=[1.0, 2.0, 3.0]), TypeError, "temperature.*got list"),
    ("temperatures tensor", call(temperature=torch.ones(3)), ValueError, r"temperature.*shape \[3\]"),
    ("weights, a vector", call(weights=[1.0, 2.0, 3.0]), ValueError, "weights must be 3 rows of 3 numbers.*got"),
    ("weights, one row less", call(weights=[[0, 1, 1]] * 2), ValueError, "weights must be 3 rows of 3 numbers.*2 rows"),
    ("weights, a number", call(weights=0.5), TypeError, r"weights must be a tensor or nested.*\[3, 3\].*got float"),
    ("weights, a string in it", call(weights=[[0, "a", 1]] * 3), TypeError, r"weights\[0\]\[1\] .* got str"),
    (
        "weights, wrong shape",
        call(weights=torch.ones(3, 3, 5)),
        ValueError,
        r"weights must be of shape \[3, 3\] or \[3, 3, 4\], got shape \[3, 3, 5\]",
    ),
    ("weights NaN", call(weights=[[0, NAN, 1]] * 3), ValueError, r"weights\[0\]\[1\] must be a finite number, got nan"),
    ("weights tensor NaN", call(weights=torch.full((3, 3), NAN)), ValueError, r"weights\[0\]\[1\].*got nan"),
    (
        "weights per row NaN",
        call(weights=torch.full((3, 3, 4), NAN)),
        ValueError,
        "weights must be finite beside the diagonal, got a NaN",
    ),
    ("bool weights", call(weights=torch.ones(3, 3, dtype=torch.bool)), TypeError, "weights must be.*torch.bool"),
    ("weights elsewhere", call(weights=torch.ones(3, 3, 4, device="meta")), ValueError, "weights must be on the net"),
]


@each_wrong_call(WRONG)
def test_wrong_calls(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "mutual_kd")


def test_a_diagonal_that_is_not_a_number_is_fine():
    expected = F.mutual_kd([Z, T + 1])
    for weights in ([[NAN, 1.0], [1.0, NAN]], [[None, 1], [1, None]], torch.tensor([[NAN, 1.0], [1.0, math.inf]])):
        assert torch.equal(F.mutual_kd([Z, T + 1], weights=weights), expected)


@pytest.mark.usefixtures("values_unreadable")
@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream", "cuda"])
@pytest.mark.parametrize("bad", [-1, 6, 2**40])
def test_a_target_that_cannot_be_checked_makes_its_row_nan(bad, place, at):
    """As on a GPU, where reading the target would wait: NaN for its row, no access out of range."""
    device = at(place)
    logits = [torch.randn(4, 6, device=device, requires_grad=True) for _ in range(3)]
    target = torch.tensor([0, bad, 2, -100], device=device)
    for backend in ("native", "reference"):
        for options in (dict(ce_weight=1.0), dict()):
            with fastkd.use_backend(backend):
                loss = F.mutual_kd(logits, target, reduction="none", **options)
                grads = torch.autograd.grad(loss.sum(), logits)
                assert loss.isnan().tolist() == [[False, True, False, False]] * 3
                assert all(g.isnan().all(1).tolist() == [False, True, False, False] for g in grads)
                assert bool(F.mutual_kd(logits, target, **options).isnan().all())
