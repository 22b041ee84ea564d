"""multi_teacher_kd_with_gradient: the loss and gradient that multi_teacher_kd and its backward give, to the bit."""

import math

import pytest
import torch

import fastkd
from fastkd import functional as F


def logits(rows=6, classes=5, k=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(rows * classes + k)
    zs = [(torch.randn(rows, classes, generator=generator, dtype=torch.float64) * 3).to(dtype) for _ in range(k + 1)]
    target = torch.randint(0, classes, (rows,), generator=generator)
    target[1] = -100
    return zs[0].requires_grad_(), zs[1:], target


def expected(student, teachers, target, **options):
    loss = F.multi_teacher_kd(student, teachers, target, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def check(student, teachers, target, **options):
    loss, gradient = F.multi_teacher_kd_with_gradient(student, teachers, target, **options)
    wanted, wanted_gradient = expected(student, teachers, target, **options)
    assert loss.dtype == wanted.dtype and torch.equal(loss, wanted)
    assert gradient.dtype == student.dtype and gradient.shape == student.shape
    assert torch.equal(gradient, wanted_gradient)
    assert not loss.requires_grad and not gradient.requires_grad and student.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_values(dtype, reduction, backend):
    with fastkd.use_backend(backend):
        check(*logits(dtype=dtype), ce_weight=0.5, reduction=reduction)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 1, "combine": "probs", "scale_by_t2": False},
        {"combine": "logits", "label_smoothing": 0.1, "ce_weight": 1.0},
        {"weights": [0.5, 0.0, 0.2], "temperature": (1.0, 2.0, 3.0)},
        {"weights": torch.rand(3, 6), "num_items": 4},
        {"mask": torch.arange(6) > 2},
        {"kd_weight": 0.0, "ce_weight": 1.0},
        {"kd_weight": torch.tensor(0.25)},
    ],
)
def test_options(options):
    check(*logits(), **options)


def test_by_hand():
    """One row, T = 1: the gradient of KL(p || q) is q - p."""
    student, teacher = torch.zeros(1, 2), torch.tensor([[0.0, 3.0]]).log1p()
    loss, gradient = F.multi_teacher_kd_with_gradient(student, [teacher], temperature=1.0)
    torch.testing.assert_close(gradient, torch.tensor([[0.3, -0.3]]))
    torch.testing.assert_close(loss, torch.tensor(0.2 * math.log(0.4) + 0.8 * math.log(1.6)))


def test_soft_labels_sequences_and_maps():
    student, teachers, _ = logits()
    check(student, teachers, torch.full((6, 5), 0.2), ce_weight=0.5)
    check(student.detach().view(2, 3, 5).requires_grad_(), torch.stack(teachers).view(3, 2, 3, 5), None)
    image = torch.randn(2, 4, 3, 3, requires_grad=True)
    check(image, [torch.randn(2, 4, 3, 3)], torch.randint(0, 4, (2, 3, 3)), class_dim=1, ce_weight=1.0)


def test_a_step_by_it_is_a_step_by_the_loss():
    torch.manual_seed(0)
    network, images = torch.nn.Linear(4, 3), torch.randn(8, 4)
    teachers = [torch.randn(8, 3, requires_grad=True)]
    out = network(images)
    _, gradient = F.multi_teacher_kd_with_gradient(out, teachers)
    out.backward(gradient)
    by_gradient = network.weight.grad.clone()
    network.zero_grad()
    F.multi_teacher_kd(network(images), [teachers[0].detach()]).backward()
    assert torch.equal(by_gradient, network.weight.grad) and teachers[0].grad is None


def test_no_autograd_function_is_made():
    student, teachers, target = logits()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        F.multi_teacher_kd_with_gradient(student, teachers, target, ce_weight=0.5)
    names = {event.name for event in profile.events()}
    assert "fastkd::multi_teacher_forward" in names and not [n for n in names if "_Usual" in n or "_Stored" in n]


def test_errors():
    student, teachers, target = logits()
    with pytest.raises(ValueError, match=r"multi_teacher_kd: teachers\[1\] must be of the student's shape"):
        F.multi_teacher_kd_with_gradient(student, [teachers[0], teachers[1][:2]], target)
    with pytest.raises(ValueError, match="multi_teacher_kd: target must be class indices in"):
        F.multi_teacher_kd_with_gradient(student, teachers, target + 5, ce_weight=1.0)
    with pytest.raises(TypeError, match="return_terms"):
        F.multi_teacher_kd_with_gradient(student, teachers, target, return_terms=True)
    with pytest.raises(TypeError, match="temperatur"):
        F.multi_teacher_kd_with_gradient(student, teachers, target, temperatur=1.0)


def test_explain():
    student, teachers, target = logits()
    native = fastkd.explain(F.multi_teacher_kd_with_gradient, student, teachers, target, ce_weight=0.5)
    assert native.backend == "native"
    with fastkd.use_backend("reference"):
        assert fastkd.explain(F.multi_teacher_kd_with_gradient, student, teachers).backend == "reference"
