"""multi_teacher_kd: against float64 and against the formula typed again, in every place its kernels run."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES
from multi_teacher_helpers import check, in_float64, loss_and_grad, make

import fastkd
from fastkd.ops import _formulas
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES, Case, assert_grad_close, difficult_logits, over

F = fastkd.functional
KERNEL_PLACES = [p for p in PLACES if p != "cuda"] + ["cuda"]


def typed_again(student, teachers, target, weights, temperatures, combine, ce_weight, smoothing, scale_by_t2):
    """Row losses as the papers' codes write them: torch.nn.functional, row by row weights, no masks."""
    logs = [torch_functional.log_softmax(student / t, -1) for t in temperatures]
    square = [t * t if scale_by_t2 else 1.0 for t in temperatures]
    if combine == "losses":
        total = 0
        for t, w, log_q, temperature, s in zip(teachers, weights, logs, temperatures, square, strict=True):
            p = torch_functional.softmax(t / temperature, -1)
            total = total + w * s * torch_functional.kl_div(log_q, p, reduction="none").sum(-1)
    else:
        temperature = temperatures[0]
        if combine == "probs":
            p = sum(
                w[..., None] * torch_functional.softmax(t / temperature, -1)
                for w, t in zip(weights, teachers, strict=True)
            )
        else:
            p = torch_functional.softmax(
                sum(w[..., None] * t for w, t in zip(weights, teachers, strict=True)) / temperature, -1
            )
        total = square[0] * torch_functional.kl_div(logs[0], p, reduction="none").sum(-1)
    ce = torch_functional.cross_entropy(student, target, reduction="none", label_smoothing=smoothing)
    return total + ce_weight * ce


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case("one teacher", dict(k=1)),
    Case("two classes, one row", dict(rows=1, classes=2)),
    Case("31 classes", dict(classes=31)),
    Case("32 classes", dict(classes=32)),
    Case("33 classes, 7 rows", dict(classes=33, rows=7)),
    Case("100 classes, labels", dict(classes=100, labels=True, ce_weight=0.7)),
    Case("256 classes", dict(classes=256, k=2)),
    Case("260 classes, a block per row", dict(classes=260, k=2, rows=3)),
    Case("1000 classes, labels", dict(classes=1000, k=4, rows=3, labels=True, ce_weight=1.0)),
    Case("smoothing", dict(classes=10, labels=True, ce_weight=0.5, label_smoothing=0.1)),
    Case("smoothing 1", dict(classes=10, labels=True, ce_weight=0.5, label_smoothing=1.0)),
    Case("labels mark ignored rows", dict(labels=True, ignored=(0, 3))),
    Case("ignored rows, labels", dict(labels=True, ignored=(0, 3), ce_weight=0.3, reduction="sum")),
    Case("none", dict(labels=True, ignored=(2,), ce_weight=0.3, reduction="none")),
    Case("T = 1", dict(temperature=1.0, labels=True, ce_weight=1.0)),
    Case("T = 2.5", dict(temperature=2.5, labels=True, ce_weight=1.0)),
    Case("T = 5", dict(temperature=5.0, labels=True, ce_weight=1.0)),
    Case("T = 20, no T^2", dict(temperature=20.0, scale_by_t2=False)),
    Case("a temperature per teacher", dict(temperature=[1.0, 2.0, 4.5], labels=True, ce_weight=0.4)),
    Case("host weights", dict(weights=[0.1, 0.0, 2.0])),
    Case("negative weight", dict(weights=[-0.5, 1.0, 2.0], ce_weight=0.2, labels=True)),
    Case("weights per row", dict(weights="rows", labels=True, ce_weight=0.5)),
    Case("weights per row, temperatures", dict(weights="rows", temperature=[1.0, 2.0, 4.5], reduction="none")),
    Case("probs", dict(combine="probs")),
    Case("probs, weights, labels", dict(combine="probs", weights=[0.2, 0.9, 0.4], labels=True, ce_weight=0.5)),
    Case("probs, 300 classes", dict(combine="probs", classes=300, rows=3)),
    Case("probs per row", dict(combine="probs", weights="rows", reduction="none", temperature=2.0)),
    Case("logits", dict(combine="logits")),
    Case("logits, weights, labels", dict(combine="logits", weights=[0.2, -0.9, 0.4], labels=True, ce_weight=0.5)),
    Case("logits, weights all 0", dict(combine="logits", weights=[0.0, 0.0, 0.0], classes=37)),
    Case("logits per row, 300 classes", dict(combine="logits", weights="rows", classes=300, rows=3)),
]


def build(device, dtype, rows=5, classes=50, k=3, labels=False, ignored=(), weights=None, **options):
    student, teachers, target = make(rows, classes, k, dtype, device=device)
    target[list(ignored)] = -100
    if isinstance(weights, str):
        g = torch.Generator().manual_seed(1)
        weights = torch.rand(k, rows, generator=g, dtype=torch.float64).to(device, _formulas.accumulate_dtype(dtype))
    return student, teachers, target if labels else None, dict(options, weights=weights)


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    student, teachers, target, options = build(at(place), dtype, **case.arguments)
    check(student, teachers, target, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_teachers_of_a_half_precision_student(place, dtype, at):
    student, teachers, target = make(5, 100, 3, dtype, torch.float32, device=at(place))
    check(student, teachers, target, ce_weight=0.5)


def test_reference_is_the_formula_typed_again():
    options = itertools.product(COMBINE, (0.0, 0.1), (True, False), ([4.0] * 3, [1.0, 2.0, 4.5]))
    for combine, smoothing, scale_by_t2, temperatures in options:
        if combine != "losses" and temperatures[0] != temperatures[1]:
            continue
        student, teachers, target = make(7, 19, 3, torch.float64)
        weights = torch.rand(3, 7, dtype=torch.float64)
        expected = typed_again(student, teachers, target, weights, temperatures, combine, 0.6, smoothing, scale_by_t2)
        with fastkd.use_backend("reference"):
            actual = F.multi_teacher_kd(
                student, teachers, target, weights=weights, combine=combine, ce_weight=0.6, label_smoothing=smoothing,
                temperature=temperatures if combine == "losses" else temperatures[0], scale_by_t2=scale_by_t2,
                reduction="none",
            )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        gradients = [torch.autograd.grad(x.mean(), student)[0] for x in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


# --- numbers that random normal logits do not show --------------------------------------------------------------------

DIFFICULT = [name for name, _ in difficult_logits((1, 3))]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("name", DIFFICULT)
def test_difficult_logits(name, combine, place, at):
    device = at(place)
    pick = lambda seed: dict(difficult_logits((6, 70), seed=seed))[name].to(device)  # noqa: E731
    student, teachers = pick(0).requires_grad_(), [pick(1), pick(2)]
    target = torch.tensor([1, 4, 7, 10, 1, 2], device=device)
    check(student, teachers, target, combine=combine, ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_networks_have_no_divergence(scale, dtype, place, at):
    student, _, _ = make(
        5, 300, 1, dtype, scale=scale if dtype != torch.float16 else min(scale, 1000), device=at(place)
    )
    teacher = student.detach().clone()
    loss, grad = loss_and_grad(student, [teacher, teacher], reduction="none")
    assert bool((loss >= 0).all()) and float(loss.max()) <= 4 * torch.finfo(loss.dtype).eps * 16
    assert float(grad.abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_near_networks_keep_their_small_divergence_non_negative(place, at):
    student, _, _ = make(64, 100, 1, device=at(place))
    teacher = student.detach() * (1 + 1e-6)
    loss = F.multi_teacher_kd(student, teacher, reduction="none")
    assert bool((loss >= 0).all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
def test_masked_classes(combine, place, at):
    student, teachers, _ = make(4, 40, 2, device=at(place))
    with torch.no_grad():
        for z in (student, *teachers):
            z[:, 5:9] = -math.inf  # masked everywhere: counts 0
        for z in teachers:
            z[1, 11] = -math.inf  # masked in the teachers only: finite
        student[2, 12] = -math.inf  # masked in the student only: infinite
        student[3, 12] = -math.inf
        for z in teachers:
            z[3, 12] = -500.0  # also where the teacher's probability underflows
    loss, grad = loss_and_grad(student, teachers, combine=combine, reduction="none")
    assert bool(loss[:2].isfinite().all()) and loss[2:].tolist() == [math.inf, math.inf]
    assert bool(grad.isfinite().all()) and float(grad[:2, 5:9].abs().max()) == 0
    check(student, teachers, combine=combine, reduction="none")


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_of_zero_removes_an_infinite_divergence(place, at):
    student, teachers, _ = make(2, 10, 2, device=at(place))
    with torch.no_grad():
        student[0, 3] = -math.inf
        teachers[1][0, 3] = -math.inf
    loss = F.multi_teacher_kd(student, teachers, weights=[0.0, 1.0], reduction="none")
    assert bool(loss.isfinite().all())
    check(student, teachers, weights=[0.0, 1.0], reduction="none")


@pytest.mark.parametrize("place", PLACES)
def test_smoothing_over_a_masked_class_is_infinite_as_in_torch(place, at):
    student, teachers, target = make(2, 10, 1, device=at(place))
    with torch.no_grad():
        student[0, 3] = teachers[0][0, 3] = -math.inf
    target[0] = 1
    loss = F.multi_teacher_kd(student, teachers, target, ce_weight=1.0, label_smoothing=0.1, reduction="none")
    assert loss[0] == math.inf and bool(loss[1].isfinite())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_infinity_reach_the_loss_of_their_row_alone(value, where, place, at):
    student, teachers, _ = make(3, 40, 2, device=at(place))
    with torch.no_grad():
        (student if where == "student" else teachers[1])[1, 7] = value
    loss, grad = loss_and_grad(student, teachers, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [100, 1000])
def test_float16_with_a_loss_scale_is_as_good_as_eager(classes, place, at):
    """(q - p) / B in float16 underflows; the loss scale of mixed-precision training must still save it."""
    device, scale = at(place), 65536.0
    student, teachers, target = make(64 if place == "cpu" else 4, classes, 2, torch.float16, scale=4.0, device=device)
    batch = 256  # of which these rows are a part
    options = dict(ce_weight=1.0, reduction="sum")
    (grad,) = torch.autograd.grad(F.multi_teacher_kd(student, teachers, target, **options) * (scale / batch), student)
    with fastkd.use_backend("reference"):
        (eager,) = torch.autograd.grad(
            F.multi_teacher_kd(student, teachers, target, **options) * (scale / batch), student
        )
    exact = in_float64(student, teachers, target, **options)[1] / 0.5 * (scale / batch)  # loss_and_grad's first weight
    assert int((grad == 0).sum()) <= int((eager == 0).sum())
    assert_grad_close(grad, exact, eager)
    small = exact.abs() < exact.abs().median()
    relative = lambda g: float(((g.double() - exact)[small] / exact[small]).abs().mean())  # noqa: E731
    assert relative(grad) <= 2 * relative(eager) + 1e-3
