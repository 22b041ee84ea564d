"""multi_teacher_kd: labels that are probabilities, the terms apart, one network alone, schedules."""

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES
from multi_teacher_helpers import both, build_options, loss_and_grad, make, soft_labels

import fastkd
from fastkd.ops import multi_teacher as op
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES, assert_grad_close

F = fastkd.functional


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft_dtype", DTYPES)
def test_soft_targets_are_torchs(soft_dtype, smoothing, place, at):
    student, teachers, _ = make(5, 40, 2, torch.float64, device=at(place))
    soft = soft_labels(5, 40, student.device, soft_dtype)
    expected = torch_functional.cross_entropy(student, soft.double(), label_smoothing=smoothing)
    (grad,) = torch.autograd.grad(expected, student)
    options = dict(ce_weight=1.0, kd_weight=0.0, label_smoothing=smoothing)
    for loss, mine in both(lambda: loss_and_grad(student, teachers, soft, **options)):
        torch.testing.assert_close(loss, expected.detach())
        torch.testing.assert_close(mine, 0.5 * grad)


def test_soft_targets_of_masked_classes_and_that_learn():
    student, teachers, target = make(3, 10, 1, torch.float64)
    with torch.no_grad():
        student[:, 9] = teachers[0][:, 9] = -math.inf
    hard = target.clamp(max=8)
    soft = torch_functional.one_hot(hard, 10).double()
    for actual in both(lambda: loss_and_grad(student, teachers, soft, ce_weight=0.5)):
        torch.testing.assert_close(actual, loss_and_grad(student, teachers, hard, ce_weight=0.5))
    soft.requires_grad_()
    loss = F.multi_teacher_kd(student, teachers, soft, ce_weight=0.5)
    torch.testing.assert_close(
        torch.autograd.grad(loss, soft)[0][:, :9], -0.5 / 3 * torch.log_softmax(student, -1)[:, :9].detach()
    )


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("labels", ["hard", "soft", None])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("combine", COMBINE)
def test_terms(combine, reduction, labels, place, at):
    student, teachers, target, options = build_options(at(place), torch.float32, labels=labels, mask=True)
    options |= dict(reduction=reduction, combine=combine)
    for ce_weight in (0.0, 0.7) if labels else (0.0,):
        weights = dict(kd_weight=0.3, ce_weight=ce_weight)
        for loss, terms in both(
            lambda: F.multi_teacher_kd(student, teachers, target, return_terms=True, **options, **weights)  # noqa: B023
        ):
            assert type(terms).__name__ == "LossTerms" and not terms.kd.requires_grad and not terms.ce.requires_grad
            assert terms.kd.shape == terms.ce.shape == loss.shape and terms.kd.dtype == loss.dtype
            plain = F.multi_teacher_kd(student, teachers, target, **options, **weights)
            assert torch.equal(loss, plain) or place != "cpu" or fastkd.backend_info()["backend"] == "reference"
            torch.testing.assert_close(loss, plain)
            torch.testing.assert_close(0.3 * terms.kd + ce_weight * terms.ce, loss.detach())
            torch.testing.assert_close(
                *[torch.autograd.grad(x.sum(), student, retain_graph=True)[0] for x in (loss, plain)]
            )
            if labels:
                only = dict(kd_weight=0.0, ce_weight=1.0)
                torch.testing.assert_close(
                    terms.ce, F.multi_teacher_kd(student, teachers, target, **options, **only).detach()
                )
            else:
                assert float(terms.ce.abs().sum()) == 0
    with torch.no_grad():
        loss, terms = F.multi_teacher_kd(student, teachers, target, return_terms=True, **options)
        torch.testing.assert_close(loss, terms.kd)


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_terms_beside_statistics_and_of_many_teachers(place, at):
    student, teachers, target = make(4, 20, 18, device=at(place))
    for k in (2, 18):
        loss, terms, stats = F.multi_teacher_kd(
            student, teachers[:k], target, ce_weight=0.5, return_terms=True, return_stats=True
        )
        torch.testing.assert_close(loss.detach(), terms.kd + 0.5 * terms.ce)
        torch.testing.assert_close(terms.ce, stats.student.ce.mean())
        torch.testing.assert_close(terms.kd, 16 * stats.kl.mean())


@pytest.mark.parametrize("place", PLACES)
def test_statistics_of_a_mask_alone_and_of_teachers_without_weight(place, at):
    student, teachers, _ = make(4, 20, 2, device=at(place))
    mask = torch.tensor([True, False, True, True], device=student.device)
    loss, stats = F.multi_teacher_kd(student, teachers, mask=mask, weights=[0.0, 1.0], return_stats=True)
    torch.testing.assert_close(loss, F.multi_teacher_kd(student[mask], [teachers[1][mask]]))
    assert stats.student.label_rank.tolist() == [[-1] * 4] and stats.student.ce.isnan().all()
    for k, t in enumerate(teachers):
        alone = F.multi_teacher_kd(student[mask], [t[mask]], scale_by_t2=False)
        torch.testing.assert_close(stats.kl[k], alone.detach())
    nothing, stats = F.multi_teacher_kd(student, teachers, kd_weight=0.0, return_stats=True)
    assert float(nothing) == 0 and bool((stats.kl > 0).all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cross_entropy_of_one_network(dtype, place, at):
    student, _, target = make(6, 100, 1, dtype, device=at(place))
    target[2] = -100
    for options in (dict(), dict(label_smoothing=0.1), dict(reduction="none"), dict(reduction="sum")):
        loss = op.cross_entropy_one(student, target, **options)
        expected = torch_functional.cross_entropy(student.double(), target, **options)
        torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
        grads = [torch.autograd.grad(x.sum(), student)[0] for x in (loss, expected)]
        assert_grad_close(grads[0], grads[1].double(), grads[1], floor=4 * torch.finfo(dtype).eps)
    mask = torch.arange(6, device=student.device) > 2
    expected = torch_functional.cross_entropy(student[mask].double(), target[mask], reduction="sum") / 7
    loss = op.cross_entropy_one(student, target, mask=mask, num_items=7)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    with pytest.raises(ValueError, match=r"^cross_entropy: target must be class indices"):
        op.cross_entropy_one(student, target + 200)
    with pytest.raises(TypeError, match=r"^cross_entropy: target must be class indices or probabilities, got None"):
        op.cross_entropy_one(student, None)


# --- schedules --------------------------------------------------------------------------------------------------------


def test_schedules_are_one_compiled_graph():
    student, teachers, target = make(4, 9, 2)

    def step(s, *values):
        t, kd, ce, items = values
        return F.multi_teacher_kd(s * 1.5, teachers, target, temperature=t, kd_weight=kd, ce_weight=ce, num_items=items)

    graphs = []
    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=lambda graph, _: graphs.append(graph) or graph)
    for i in range(12):
        values = [1.0 + i / 2, 0.1 * i, 0.7 + i, 3.0 + i]
        actual, expected = (
            compiled(student, *[torch.tensor(v, dtype=torch.float64) for v in values]),
            step(student, *values),
        )
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(x, student)[0] for x in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-8)
    assert len(graphs) == 1
    with pytest.raises(RuntimeError, match="temperature must be a finite number > 0, got -1"):
        compiled(student, *[torch.tensor(v, dtype=torch.float64) for v in (-1.0, 1.0, 1.0, 1.0)])


def test_compiled_by_aot_autograd_with_every_option():
    student, teachers, _ = make(4, 9, 2)
    soft, mask = soft_labels(4, 9), torch.tensor([True, False, True, True])

    def step(s, t):
        loss, terms = F.multi_teacher_kd(
            s * 1.5, teachers, soft, temperature=[t, t * 2], ce_weight=0.5, mask=mask, return_terms=True,
            reduction="none",
        )  # fmt: skip
        return loss, terms.kd, terms.ce

    torch._dynamo.reset()
    t = torch.tensor(2.0)
    actual, expected = torch.compile(step, fullgraph=True, backend="aot_eager")(student, t), step(student, t)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(*[torch.autograd.grad(x[0].sum(), student)[0] for x in (actual, expected)])


@pytest.mark.parametrize("place", PLACES)
def test_numbers_as_tensors(place, at):
    student, teachers, target = make(4, 9, 2, device=at(place))
    numbers = dict(temperature=2.5, kd_weight=0.3, ce_weight=0.7, num_items=3)
    expected = loss_and_grad(student, teachers, target, **numbers)
    tensors = {name: torch.tensor(value) for name, value in numbers.items()}
    actual = loss_and_grad(student, teachers, target, **tensors)
    torch.testing.assert_close(actual, expected)
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **tensors).backend == "native"
    learned = {name: torch.tensor(float(v), dtype=torch.float64, requires_grad=True) for name, v in numbers.items()}
    double = [z.detach().double() for z in (student, *teachers)]
    assert torch.autograd.gradcheck(
        lambda *v: F.multi_teacher_kd(double[0], double[1:], target, **dict(zip(numbers, v, strict=True))),
        tuple(learned.values()),
    )
