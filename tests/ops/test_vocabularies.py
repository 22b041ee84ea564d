"""multi_teacher_kd: padded vocabularies, softcaps and logit scales, against slicing and the plain formula."""

import math

import pytest
import torch
from conftest import PLACES
from divergence_helpers import CASES
from multi_teacher_helpers import both, make, soft_labels

import fastkd

F = fastkd.functional
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]


def padded(place, at, dtype=torch.float32, rows=6, classes=40):
    """A student of 47 columns and teachers of 40 and 64; behind the 40 classes stands NaN."""
    student, teachers, target = make(rows, 64, 2, dtype, device=at(place))
    widths = (47, classes, 64)
    logits = [z.detach()[:, :w].clone() for z, w in zip((student, *teachers), widths, strict=True)]
    for z in logits:
        z[:, classes:] = math.nan
    return logits[0].requires_grad_(), logits[1:], target % classes


def gradient_of(loss, *inputs):
    return loss.detach(), *torch.autograd.grad(loss, inputs)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward", "jsd", "both"])
def test_a_padded_vocabulary_is_the_sliced_one(name, dtype, place, at):
    student, teachers, target = padded(place, at, dtype)
    for options in (dict(), dict(ce_weight=0.3, label_smoothing=0.1, target=target), dict(reduction="sum")):
        options = dict(CASES[name], **options)
        loss, gradient = gradient_of(F.multi_teacher_kd(student, teachers, vocab_size=40, **options), student)
        cut = student.detach()[:, :40].clone().requires_grad_()
        expected, slope = gradient_of(F.multi_teacher_kd(cut, [t[:, :40] for t in teachers], **options), cut)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradient[:, :40], slope)
        assert gradient.shape == student.shape and float(gradient[:, 40:].abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_padding_of_soft_labels_statistics_and_rows_that_do_not_count(place, at):
    student, teachers, target = padded(place, at)
    soft, target[1] = soft_labels(6, 40, student.device), -100
    cut = student.detach()[:, :40].clone().requires_grad_()
    for options in (dict(target=soft, ce_weight=0.5), dict(target=target, ce_weight=0.5, return_stats=True)):
        ours = F.multi_teacher_kd(student, teachers, vocab_size=40, **options)
        expected = F.multi_teacher_kd(cut, [t[:, :40] for t in teachers], **options)
        if "return_stats" in options:
            (ours, stats), (expected, same) = ours, expected
            torch.testing.assert_close(stats.kl, same.kl)
            torch.testing.assert_close(stats.student, same.student, equal_nan=True)
            torch.testing.assert_close(stats.teachers, same.teachers, equal_nan=True)
        (ours, gradient), (expected, slope) = gradient_of(ours, student), gradient_of(expected, cut)
        torch.testing.assert_close(ours, expected)
        torch.testing.assert_close(gradient[:, :40], slope)
        assert float(gradient[:, 40:].abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_the_classes_of_maps_may_be_padded(place, at):
    device = at(place)
    student = torch.randn(2, 9, 3, 4, generator=torch.Generator().manual_seed(0)).to(device).requires_grad_()
    teacher, target = student.detach().flip(0)[:, :8], torch.arange(24, device=device).reshape(2, 3, 4) % 7
    options = dict(class_dim=1, ce_weight=0.3)
    loss, gradient = gradient_of(F.multi_teacher_kd(student, [teacher], target, vocab_size=7, **options), student)
    cut = student.detach()[:, :7].clone().requires_grad_()
    expected, slope = gradient_of(F.multi_teacher_kd(cut, [teacher[:, :7]], target, **options), cut)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :7], slope)


def test_a_label_behind_the_vocabulary_is_told():
    student, teachers, target = make(4, 9, 1)
    with pytest.raises(ValueError, match=r"target must be class indices in \[0, 7\).*got index 8"):
        F.multi_teacher_kd(student, teachers, torch.full_like(target, 8), ce_weight=1.0, vocab_size=7)


def softcapped(z, softcap, scale):
    z = z * scale
    return z if softcap is None else softcap * torch.tanh(z / softcap)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["forward", "jsd"])
def test_softcap_and_logit_scale_are_the_eager_models(name, dtype, place, at):
    student, teachers, target = make(5, 50, 2, dtype, scale=9.0, device=at(place))
    caps = dict(softcap=20.0, logit_scale=0.7, teacher_softcap=[None, 30.0], teacher_logit_scale=[1.3, 1.0])
    options = dict(CASES[name], ce_weight=0.4, temperature=2.0)
    z = student.detach().double().requires_grad_()
    eager = [softcapped(teachers[0].double(), None, 1.3), softcapped(teachers[1].double(), 30.0, 1.0)]
    expected, slope = gradient_of(F.multi_teacher_kd(softcapped(z, 20.0, 0.7), eager, target, **options), z)
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **caps, **options).backend == "native"
    loss, gradient = gradient_of(F.multi_teacher_kd(student, teachers, target, **caps, **options), student)
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 1e-2)
    torch.testing.assert_close(loss.double(), expected, rtol=min(tolerance, 1e-5), atol=0)
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * float(slope.abs().max()))


@pytest.mark.parametrize("place", PLACES)
def test_small_logits_keep_their_digits_under_a_softcap(place, at):
    student, teachers, _ = make(5, 50, 1, scale=1e-3, device=at(place))
    z = student.detach().double().requires_grad_()
    options = dict(softcap=30.0, teacher_softcap=30.0, temperature=1.0)
    _, slope = gradient_of(F.multi_teacher_kd(z, [teachers[0].double()], **options), z)
    _, gradient = gradient_of(F.multi_teacher_kd(student, teachers, **options), student)
    assert float((gradient.double() - slope).norm() / slope.norm()) < 2e-4


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("softcap", [None, 15.0])
def test_masked_classes_stay_masked_and_ignored_rows_unread(softcap, place, at):
    student, teachers, target = make(5, 30, 2, device=at(place))
    target[3] = -100
    options = dict(softcap=softcap, logit_scale=0.5, teacher_softcap=softcap, ce_weight=0.3)
    for z in (student.data, *teachers):
        z[:, 20:], z[3] = -math.inf, math.nan
    loss, gradient = gradient_of(F.multi_teacher_kd(student, teachers, target % 20, **options), student)
    target = torch.where(target < 0, target, target % 20)
    loss, gradient = gradient_of(F.multi_teacher_kd(student, teachers, target, **options), student)
    cut = student.detach()[:, :20].clone().requires_grad_()
    expected, slope = gradient_of(F.multi_teacher_kd(cut, [t[:, :20] for t in teachers], target, **options), cut)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradient[:, :20], slope)
    assert float(gradient[:, 20:].abs().max()) == 0 and float(gradient[3].abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize(
    "name, combine", [*((name, "losses") for name in CASES), ("jsd", "probs"), ("reverse", "logits")]
)
def test_equal_networks_under_a_softcap_are_exactly_0_apart(name, combine, place, at):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        student, _, _ = make(2, 2300, 1, dtype, scale=9.0, device=at(place))
        options = dict(CASES[name], softcap=13.0, logit_scale=0.7, teacher_softcap=13.0, teacher_logit_scale=0.7)
        teachers = [student.detach().clone()] * 2
        loss = F.multi_teacher_kd(student, teachers, temperature=2.3, combine=combine, reduction="none", **options)
        assert float(loss.detach().abs().max()) == 0
        assert float(torch.autograd.grad(loss.sum(), student)[0].abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_softcaps_of_long_rows_with_labels(name, combine, place, at):
    """Also where a weight is 0, a row ignored, labels are smoothed; one of the networks has no softcap."""
    student, teachers, target = make(4, 8300, 3, scale=9.0, device=at(place))
    target[2] = -100
    student.data[2, 3] = math.nan
    weights = torch.tensor([[0.5], [0.0], [0.5]], device=student.device).expand(3, 4)
    teachers[1][0, 5] = math.nan
    options = dict(CASES[name], combine=combine, weights=weights, ce_weight=0.4, label_smoothing=0.1, temperature=2.0)
    options |= dict(softcap=20.0, teacher_softcap=[None, 8.0, 15.0], teacher_logit_scale=[0.5, 1.0, 2.0])
    results = []
    for loss in both(lambda: F.multi_teacher_kd(student, teachers, target, **options)):
        results.append((loss.detach(), *torch.autograd.grad(loss, student)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


def test_a_teacher_that_is_left_out_takes_its_softcap_along():
    student, teachers, _ = make(4, 9, 2)
    three = [teachers[0], torch.full_like(teachers[0], math.nan), teachers[1]]
    ours = F.multi_teacher_kd(student, three, weights=[0.5, 0.0, 0.5], teacher_softcap=[5.0, None, 9.0])
    expected = F.multi_teacher_kd(student, teachers, teacher_softcap=[5.0, 9.0])
    assert float(ours) == float(expected)


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_statistics_and_a_second_derivative_are_of_capped_logits(place, at):
    student, teachers, _ = make(4, 9, 2, torch.float64, scale=4.0, device=at(place))
    caps = dict(softcap=5.0, teacher_logit_scale=0.5)
    _, stats = F.multi_teacher_kd(student, teachers, return_stats=True, **caps)
    eager = [t * 0.5 for t in teachers]
    _, expected = F.multi_teacher_kd(softcapped(student, 5.0, 1.0), eager, return_stats=True)
    torch.testing.assert_close(stats.kl, expected.kl)
    torch.testing.assert_close(stats.student.entropy, expected.student.entropy)
    torch.testing.assert_close(stats.teachers.entropy, expected.teachers.entropy)
    assert torch.autograd.gradgradcheck(lambda s: F.multi_teacher_kd(s, teachers, vocab_size=7, **caps), (student,))


WRONG = [
    (dict(vocab_size=7), ValueError, r"vocab_size must be at most the 6 classes of teachers\[0\], got 7"),
    (dict(vocab_size=1), ValueError, "vocab_size must be an integer of at least 2, got 1"),
    (dict(vocab_size=4.0), TypeError, "vocab_size must be an integer of at least 2, got float"),
    (dict(softcap=0), ValueError, "softcap must be a number > 0 or None, got 0"),
    (dict(softcap="30"), TypeError, "softcap must be a number > 0 or None, got str"),
    (dict(logit_scale=-1.0), ValueError, "logit_scale must be a number > 0, got -1"),
    (dict(logit_scale=None), TypeError, "logit_scale must be a number > 0, got NoneType"),
    (
        dict(teacher_softcap=[1.0, 2.0, 3.0]),
        ValueError,
        "teacher_softcap must be one value or 2, one per teacher, got 3",
    ),
    (dict(teacher_softcap=[1.0, -2.0]), ValueError, r"teacher_softcap\[1\] must be a number > 0 or None, got -2"),
    (dict(teacher_logit_scale=[1.0, None]), TypeError, r"teacher_logit_scale\[1\] must be a number > 0, got NoneType"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_a_wrong_vocabulary_or_softcap_is_told(options, error, message):
    logits = torch.zeros(4, 6)
    with pytest.raises(error, match=message):
        F.multi_teacher_kd(logits, [logits, logits], **options)
