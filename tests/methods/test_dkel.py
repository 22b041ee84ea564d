"""DKEL and PCL against the formulas of the papers, typed again in plain PyTorch in float64."""

import math
from functools import partial

import pytest
import torch
from dkel_helpers import LATE, assert_is, bn_student, dkel, plain_loss, plain_pcl, rows_of_views, run, tiny, w_of
from methods_helpers import plain_ce, train

from fastkd.methods import DKEL, PCL


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("branches", [2, 3, 4])
@pytest.mark.parametrize("epoch", [0, 3, 9, 10, 80, LATE])
@pytest.mark.parametrize("ramped", [False, True])
def test_loss_and_gradients_are_the_papers(ramped, epoch, branches, chunks):
    views, y = rows_of_views(views=branches)
    c = 50.0  # so that early weights are seen
    method = dkel(tiny(1, branches), epoch=epoch, c=c, ensemble_ramp=ramped)
    lam = math.exp(-0.5 * epoch) if epoch < 10 else 0
    assert (lam > 0.01) == (epoch < 10)
    formula = partial(plain_loss, views=views, y=y, w=w_of(epoch, c), lam=lam, c=None if ramped else c)
    assert_is(method, formula, views, y, chunks)


@pytest.mark.parametrize("epoch", [0, 40, LATE])
def test_pcl_is_its_papers_loss(epoch):
    views, y = rows_of_views()
    method = PCL(tiny(1), teacher=tiny(2))
    method.start_epoch(epoch, 300)
    assert_is(method, partial(plain_pcl, views=views, y=y, w=w_of(epoch, 1.0)), views, y)


def test_late_dkel_with_c_1_is_pcl():
    views, y = rows_of_views()
    first, second = PCL(tiny(1), seed=4), DKEL(tiny(1), c=1.0, init=None, seed=4)
    for method in (first, second):
        method.start_epoch(LATE, 300)
    for _ in range(3):  # the same mean teacher as well
        assert run(first, views, y) == run(second, views, y)
        for p, q in zip(first.parameters(), second.parameters(), strict=True):
            assert (p.grad is None and q.grad is None) or torch.equal(p.grad, q.grad)
        train(first, views, y, 1), train(second, views, y, 1)
    second.start_epoch(3, 300), first.start_epoch(3, 300)
    assert run(first, views, y) != run(second, views, y)  # while the ensemble decays they differ


def test_ignored_rows_and_options():
    views, y = rows_of_views()
    y[[0, 1, 2, 6]] = -100  # with 4 chunks, the first one (2 rows) has no row that counts
    kept = y != -100
    part = [v[kept] for v in views]
    for chunks in (1, 4):
        method = dkel(epoch=5, c=20.0, temperature=2.0)
        formula = partial(plain_loss, views=part, y=y[kept], w=w_of(5, 20.0), lam=math.exp(-2.5), t=2.0, c=20.0)
        assert_is(method, formula, views, y, chunks)
    double = run(dkel(epoch=0, c=0.0, ce_weight=2.0), views, y)
    assert abs(double - 2 * run(dkel(epoch=0, c=0.0), views, y)) < 1e-12


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("c", [0.0, 0.7])
def test_parts_are_the_terms_of_the_loss(c, chunks):
    views, y = rows_of_views()
    method = dkel(epoch=LATE, c=c)
    (phase,) = method.phases(views, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    assert phase.parts.keys() == {"ce", "ensemble_ce", "kd"}
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(sum(phase.parts.values()) - total) < 1e-10
    assert abs(phase.parts["ce"] - sum(plain_ce(o.logits, y) for o in method.student(views))) < 1e-10
    assert (phase.parts["kd"].abs() > 0.1) == (c > 0)


def test_no_gradient_goes_into_a_target():
    """Through the distillation alone: the classifier and the teacher get none."""
    views, y = rows_of_views()
    method = dkel(epoch=5, c=50.0, ce_weight=0.0)
    run(method, views, y)
    assert all(not p.grad.any() for p in method.classifier.parameters())
    assert all(p.grad is None for p in method.teacher.parameters())
    assert all(p.grad.any() for p in method.student.parameters())


def test_schedules_of_the_intended_variant():
    method = DKEL(bn_student())
    for epoch in range(101):
        assert method.distillation_weight(epoch, 300) == pytest.approx(w_of(epoch), rel=1e-12)
        lam = math.exp(-0.5 * epoch)
        assert method.ensemble_weight(epoch) == (lam if lam > 0.01 else 0)
    assert method.distillation_weight(80, 300) == method.distillation_weight(299, 300) == 0.1
    # The same fraction of a shorter run; of=None: the same epochs.
    for epoch in range(31):
        assert method.distillation_weight(epoch, 30) == pytest.approx(w_of(epoch, ramp=8), rel=1e-12)
    assert DKEL(bn_student(), of=None).distillation_weight(20, 30) == pytest.approx(w_of(20), rel=1e-12)
    assert DKEL(bn_student(), ramp=0).distillation_weight(0, 300) == 0.1
    assert {method.momentum_at(g) for g in (0, 1, 5, 10_000)} == {0.999}


def test_the_decaying_ensemble_acts_from_the_first_epoch():
    """A strong teacher in early training: its weight is largest in epoch 0, falls, and dominates what is ramped up."""
    method = DKEL(bn_student())
    together, one_by_one = zip(*[method.teachers_weights(epoch, 300) for epoch in range(300)], strict=True)
    assert together[0] == 0.1 and list(together) == sorted(together, reverse=True)
    assert together[:10] == pytest.approx([0.1 * math.exp(-0.5 * epoch) for epoch in range(10)])
    assert set(together[10:]) == {0.0} and one_by_one[0] == 0.0 and one_by_one[299] == 0.1
    assert sum(together) > 2 * sum(one_by_one[:10])
    product = DKEL(bn_student(), ensemble_ramp=True).teachers_weights
    assert max(product(epoch, 300)[0] for epoch in range(300)) == pytest.approx(0.1 * math.exp(-5))  # inert
    for epoch in range(12):
        assert DKEL(bn_student(), variant="released").teachers_weights(epoch, 300)[0] < 7e-4


@pytest.mark.parametrize("make", [DKEL, PCL])
def test_the_averages_momentum_follows_the_length_of_the_run(make):
    late = 10**6  # PCL's average has warmed up
    method = make(bn_student())
    for steps, epochs, momentum in (
        (390, 300, 0.999), (390, 600, 0.999), (39, 60, 0.95), (79, 60, 1 - 117 / 4740), (117, 1, 0.5), (1, 3, 0.5),
    ):  # fmt: skip
        method.start_epoch(0, epochs, steps)
        assert method.momentum_at(late) == pytest.approx(momentum, abs=1e-12)
        fixed = make(bn_student(), momentum=0.9)
        fixed.start_epoch(0, epochs, steps)
        assert fixed.momentum_at(late) == 0.9
    method.start_epoch(0, 60)
    assert method.momentum_at(late) == 0.999  # nobody told the steps
    released = make(bn_student(), variant="released")
    released.start_epoch(0, 60, 39)
    assert released.momentum_at(late) == 0.999


def test_the_length_of_the_run_is_in_the_state():
    first, second = DKEL(bn_student()), DKEL(bn_student())
    first.start_epoch(2, 60, 39)
    second.load_state_dict(first.state_dict())
    assert second.run_steps == 2340 and second.momentum_at(5) == first.momentum_at(5) == 0.95


def test_schedules_of_the_released_variant():
    method = DKEL(bn_student(), variant="released")
    for epochs in (100, 300):
        assert method.distillation_weight(0, epochs) == pytest.approx(0.1 * math.exp(-5))
        for epoch in range(1, 81):  # fault 1: no distillation
            assert method.distillation_weight(epoch, epochs) < 1e-170
            # fault 2: the decaying ensemble never acts, but for a trace in the first epoch
            assert method.distillation_weight(epoch, epochs) * method.ensemble_weight(epoch) < 1e-170
        assert method.ensemble_weight(9) > 0 == method.ensemble_weight(10)
        for epoch in range(81, 101):
            assert method.distillation_weight(epoch, epochs) == 0.1
    assert [method.momentum_at(g) for g in (0, 1, 3, 1e6)] == [0, 0.5, 0.75, 0.999]  # fault 3


def test_pcl_has_its_own_schedules():
    method = PCL(bn_student())
    for epoch in range(101):
        assert method.distillation_weight(epoch, 300) == pytest.approx(w_of(epoch, 1.0), rel=1e-12)
        assert method.ensemble_weight(epoch) == 0
    assert [method.momentum_at(g) for g in (0, 1, 1e6)] == [0, 0.5, 0.999]
    for extreme in (0.0, 1e-300):
        assert DKEL(bn_student(), c=extreme, variant="released").distillation_weight(7, 300) == 0
