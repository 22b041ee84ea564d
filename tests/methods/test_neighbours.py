"""DKD, DIST, ONE, OKDDip, AE-KD, mean teacher, weights of AVER, standardised logits: typed again in float64."""

import math
from functools import partial

import numpy as np
import pytest
import torch
from methods_helpers import CLASSES, batch, gradients, guides_of, mlp, plain_ce, plain_gradients, plain_kd, run
from torch import nn

from fastkd.methods import AEKD, AVER, DGKD, DIST, DKD, KD, ONE, ORC, MeanTeacher, OKDDip
from fastkd.methods._standardize import standardized
from fastkd.methods.ae_kd import agreeing_weights, on_capped_simplex
from fastkd.models import Branched, Network, Outputs

X, Y = batch()


def assert_is(method, student, formula, x=X, y=Y, chunks=1):
    """Loss and gradients of one iteration are those of formula(student)."""
    loss = run(method, x, y, chunks)
    value, grads = plain_gradients(student, formula)
    assert abs(loss - value) < 1e-10
    for grad, expected in zip(gradients(student), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)


# --- DKD --------------------------------------------------------------------------------------------------------------


def plain_dkd(z, t, y, alpha, beta, temperature):
    """As the authors' code has it: both parts from softmax and masks."""
    label = nn.functional.one_hot(y, z.shape[1]).bool()
    q, p = (torch.softmax(x / temperature, 1) for x in (z, t))
    two = [torch.stack([x[label], x[~label].view(len(y), -1).sum(1)], 1) for x in (q, p)]
    target = (two[1] * (two[1].log() - two[0].log())).sum(1).mean()
    rest = [torch.log_softmax(x[~label].view(len(y), -1) / temperature, 1) for x in (z, t)]
    others = (rest[1].exp() * (rest[1] - rest[0])).sum(1).mean()
    return temperature**2 * (alpha * target + beta * others)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("epoch", [0, 3, 50])
def test_dkd_is_its_papers_loss(epoch, chunks):
    student, teacher = mlp(1), mlp(2)
    method = DKD(student, teacher, alpha=1.5, beta=6.0, temperature=3.0, warmup=8, ce_weight=0.7)
    method.start_epoch(epoch, 100)
    r = min((epoch + 1) / 8, 1)
    assert_is(
        method,
        student,
        lambda s: 0.7 * plain_ce(s(X), Y) + r * plain_dkd(s(X), teacher(X), Y, 1.5, 6.0, 3.0),
        chunks=chunks,
    )


def test_dkd_row_by_row_is_kd():
    """alpha = 1 and beta = 1 - p_y of the teacher: the paper's equation 7."""
    student, teacher = mlp(1), mlp(2)
    total = 0
    for x, y in zip(X, Y, strict=True):
        p = torch.softmax(teacher(x) / 4, 0)[y].item()
        method = DKD(student, teacher, beta=1 - p, warmup=0, ce_weight=0.0)
        total += run(method, x[None], y[None]) / len(Y)
    with torch.no_grad():
        assert abs(total - plain_kd(student(X), teacher(X), 4.0)) < 1e-10


def test_dkd_where_the_teacher_is_sure():
    """p_y of 1 - 1e-20: the other classes keep their digits, where 1 - p_y has none left."""
    y = torch.tensor([0, 1])
    t = torch.tensor([[60.0, 1.0, 2.0, -3.0], [0.5, 70.0, 3.0, 2.0]], dtype=torch.float64)
    z = torch.tensor([[30.0, 2.0, 1.0, 0.0], [0.0, 40.0, 1.0, 2.0]], dtype=torch.float64)
    identity = [nn.Linear(4, 4, bias=False).double() for _ in range(2)]
    for network, logits in zip(identity, (z, t), strict=True):
        nn.init.zeros_(network.weight)
        with torch.no_grad():
            network.weight[:, :2] = logits.T
    inputs = torch.eye(4, dtype=torch.float64)[:2]
    loss = run(DKD(*identity, temperature=1.0, warmup=0, ce_weight=0.0, alpha=0.0, beta=1.0), inputs, y)
    rest = [torch.stack([x[0, 1:], x[1, [0, 2, 3]]]).log_softmax(1) for x in (z, t)]
    assert abs(loss - (rest[1].exp() * (rest[1] - rest[0])).sum(1).mean()) < 1e-12
    assert identity[0].weight.grad.isfinite().all()


# --- DIST -------------------------------------------------------------------------------------------------------------


def test_dist_is_one_minus_numpys_correlations():
    student, teacher = mlp(1), mlp(2)
    loss = run(DIST(student, teacher, beta=0.5, gamma=2.0, temperature=3.0), X, Y)
    with torch.no_grad():
        q, p = (torch.softmax(network(X) / 3, 1).numpy() for network in (student, teacher))
        ce = plain_ce(student(X), Y)
    rows = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q, p, strict=True)])
    columns = np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(q.T, p.T, strict=True)])
    assert abs(loss - (ce + 2 * 9 * (0.5 * (1 - rows) + 2 * (1 - columns)))) < 1e-10


def test_dist_has_its_formulas_gradient_and_leaves_rows_out():
    def rho(a, b):
        a, b = a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True)
        return (nn.functional.normalize(a) * nn.functional.normalize(b)).sum(1)

    student, teacher = mlp(1), mlp(2)
    y = Y.clone()
    y[[1, 4]] = -100
    kept = y != -100

    def formula(s):
        q, p = (torch.softmax(n(X[kept]) / 4, 1) for n in (s, teacher))
        return plain_ce(s(X[kept]), y[kept]) + 32 * (2 - rho(q, p).mean() - rho(q.T, p.T).mean())

    assert_is(DIST(student, teacher), student, formula, y=y)


# --- weights of AVER, standardisation ---------------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("weights", ["confidence", "entropy"])
def test_teachers_are_weighted_row_by_row(weights, chunks):
    student, teachers = mlp(1), guides_of(3)

    def formula(s):
        logits = [t(X) for t in teachers]
        if weights == "confidence":
            ce = torch.stack([-torch.log_softmax(t, 1)[torch.arange(len(Y)), Y] for t in logits])
            w = (1 - ce.softmax(0)) / 2
        else:
            h = torch.stack([-(torch.softmax(t, 1) * torch.log_softmax(t, 1)).sum(1) for t in logits])
            w = 1 - h / h.sum(0)
        rows = [torch.stack([plain_kd(s(X[b : b + 1]), t[b : b + 1], 4.0) for b in range(len(Y))]) for t in logits]
        return plain_ce(s(X), Y) + sum((w[k] * rows[k]).mean() for k in range(3)) / 3

    assert_is(AVER(student, teachers, weights=weights), student, formula, chunks=chunks)


@pytest.mark.parametrize("weights", ["confidence", "entropy"])
def test_teachers_that_are_as_sure_as_each_other_are_averaged(weights):
    """Equal confidences: AVER's mean, divided by K ("entropy": times (K - 1) / K)."""
    student, teacher = mlp(1), mlp(2)
    twins = [teacher, mlp(2), mlp(2)]
    loss = run(AVER(student, twins, weights=weights), X, Y)
    with torch.no_grad():
        kd = plain_kd(student(X), teacher(X), 4.0)
        share = 1 / 3 if weights == "confidence" else 2 / 3
        assert abs(loss - (plain_ce(student(X), Y) + share * kd)) < 1e-10


def plain_standardized(z):
    return (z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7)


@pytest.mark.parametrize("make", [
    lambda s, t: KD(s, t[0], standardize=True, temperature=2.0, ce_weight=0.1, kd_weight=9.0),
    lambda s, t: DGKD(s, t, standardize=True, temperature=2.0, lam=0.5),
    lambda s, t: AVER(s, t, standardize=True, temperature=2.0),
])  # fmt: skip
def test_standardised_logits_are_distilled_and_raw_ones_classify(make):
    student, teachers = mlp(1), guides_of(2)
    method = make(student, teachers)
    weight, ce_weight = method.weights(CLASSES)

    def formula(s):
        z = plain_standardized(s(X))
        kd = sum(plain_kd(z, plain_standardized(g(X)), 2.0) for g in method.guides)
        return ce_weight * plain_ce(s(X), Y) + weight * kd

    assert_is(method, student, formula)


def test_orc_standardises_what_its_teachers_say():
    losses = {}
    for standardize in (False, True):
        method = ORC(mlp(1), [mlp(2), mlp(3)], standardize=standardize, teach=["group"], rank_by="fixed", beta=1.0)
        (phase,) = method.phases(X, Y)
        losses[standardize] = phase.loss.item()
    with torch.no_grad():
        z = plain_standardized(mlp(2)(X))
        expected = sum(plain_kd(z, plain_standardized(n(X)), 4.0) for n in (mlp(1), mlp(3)))
    assert losses[True] == pytest.approx(expected.item(), abs=1e-10) != losses[False]


def test_a_row_of_equal_logits_is_standardised_to_zero_with_a_finite_gradient():
    z = torch.tensor([[2.0, 2.0, 2.0], [1.0, 2.0, 3.0]], requires_grad=True)
    standard = standardized(z)
    assert standard.tolist() == [[0, 0, 0], pytest.approx([-1, 0, 1])]
    standard.square().sum().backward()
    assert z.grad.isfinite().all()
    assert standardized(torch.tensor([[60000.0, -60000.0]], dtype=torch.float16)).isfinite().all()


# --- AE-KD ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cap", [None, 0.5])
def test_ae_kd_takes_the_shortest_vector_between_the_gradients(cap):
    """Against a search of the simplex, point by point."""
    student, teachers = mlp(1), [mlp(2), mlp(3), mlp(4)]
    with torch.no_grad():
        z, t = student(X), [teacher(X) for teacher in teachers]
    slopes = torch.stack([(4 * (torch.softmax(z / 4, 1) - torch.softmax(one / 4, 1))).mean(0) for one in t])
    a = agreeing_weights(z, t, Y, 4.0, cap or 1.0, 400)
    assert a.sum() == pytest.approx(1) and a.min() >= 0 and a.max() <= (cap or 1.0) + 1e-9
    steps = 200
    grid = [(i, j, steps - i - j) for i in range(steps + 1) for j in range(steps + 1 - i)]
    points = torch.tensor([p for p in grid if max(p) <= (cap or 1.0) * steps], dtype=torch.float64) / steps
    best = (points @ slopes).norm(dim=1).min()
    assert (a @ slopes).norm() <= best * (1 + 1e-6)
    method = AEKD(student, teachers, cap=cap, steps=400)
    assert_is(
        method,
        student,
        lambda s: 0.1 * plain_ce(s(X), Y) + 0.9 * sum(w * plain_kd(s(X), t(X), 4.0) for w, t in zip(a, teachers)),  # noqa: B905
    )


def test_the_nearest_point_of_a_capped_simplex():
    near = on_capped_simplex(torch.tensor([2.0, 0.1, -1.0], dtype=torch.float64), 1.0)
    torch.testing.assert_close(near, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)
    near = on_capped_simplex(torch.tensor([2.0, 0.1, -1.0], dtype=torch.float64), 0.6)
    torch.testing.assert_close(near, torch.tensor([0.6, 0.4, 0.0], dtype=torch.float64), rtol=0, atol=1e-9)


def by_bisection(point, cap):
    low, high = point.min() - cap, point.max()
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if (point - middle).clamp(0, cap).sum() > 1 else (low, middle)
    return (point - low).clamp(0, cap)


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e3])
@pytest.mark.parametrize("k", [1, 2, 3, 7])
def test_any_point_is_brought_onto_the_capped_simplex(k, size):
    g = torch.Generator().manual_seed(k)
    for cap in (1 / k, (1 + 1 / k) / 2, 1.0):
        for point in (torch.randn(k, generator=g, dtype=torch.float64) * size, torch.arange(k).double() // 2 * size):
            near = on_capped_simplex(point, cap)
            torch.testing.assert_close(near, by_bisection(point, cap), rtol=0, atol=1e-12 * max(1.0, size))
            assert near.sum() == pytest.approx(1, abs=1e-12) and near.min() >= 0 and near.max() <= cap + 1e-12


def test_rows_without_a_label_have_no_part_in_the_weights():
    z, t = mlp(1)(X), [mlp(2)(X), mlp(3)(X)]
    y = Y.clone()
    y[:4] = -100
    first, second = (agreeing_weights(*rows, 4.0, 1.0, 50) for rows in ((z, t, y), (z[4:], [s[4:] for s in t], y[4:])))
    torch.testing.assert_close(first, second)


# --- ONE, OKDDip ------------------------------------------------------------------------------------------------------


class Tiny(Network):
    """float64, without batch statistics, with maps [B, c, 1, 1]."""

    features_width = 8

    def __init__(self):
        super().__init__()
        self.body, self.last, self.fc = nn.Conv2d(5, 6, 1), nn.Linear(6, 8), nn.Linear(8, CLASSES)
        self.image_size = 1

    def stem_layers(self):
        return ("body",)

    def forward_stem(self, x):
        return (torch.tanh(self.body(x)),)

    def forward_branch(self, stem):
        features = torch.tanh(self.last(stem[-1].mean((2, 3))))
        return Outputs(3 * self.fc(features), features, (*stem, features[..., None, None]))


def tiny(branches=3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Branched([Tiny() for _ in range(branches)]).double()


IMAGES = X[..., None, None]


def assert_branches(method, formula, epoch):
    method.start_epoch(epoch, 300)
    learners = nn.ModuleList([method.student, method.helper])
    assert_is(method, learners, formula, x=IMAGES)


@pytest.mark.parametrize("epoch", [0, 40, 200])
def test_one_is_its_papers_loss(epoch):
    r = math.exp(-5 * (1 - epoch / 80) ** 2) if epoch < 80 else 1.0

    def formula(learners):
        student, gate = learners
        outputs = student(IMAGES)
        z = [o.logits for o in outputs]
        g = torch.softmax(gate(outputs[0].maps[0].mean((2, 3))), 1)
        z_e = sum(g[:, i : i + 1] * z[i] for i in range(3))
        kd = sum(plain_kd(one, z_e.detach(), 3.0) for one in z)
        return plain_ce(z_e, Y) + sum(plain_ce(one, Y) for one in z) + r * kd

    assert_branches(ONE(tiny(), seed=3), formula, epoch)


@pytest.mark.parametrize("epoch", [0, 200])
@pytest.mark.parametrize("branches", [3, 4])
def test_okddip_is_its_papers_loss(branches, epoch):
    r = math.exp(-5) if epoch == 0 else 1.0

    def formula(learners):
        student, maps = learners
        leader, *peers = student(IMAGES)
        z = [o.logits for o in peers]
        ask, answer = zip(*[maps(o.features).chunk(2, 1) for o in peers], strict=True)
        loss = plain_ce(leader.logits, Y) + r * plain_kd(leader.logits, (sum(z) / len(z)).detach(), 3.0)
        for a in range(len(z)):
            share = torch.stack([(ask[a] * answer[b]).sum(1) for b in range(len(z))], 1).softmax(1)
            target = sum(share[:, b : b + 1] * z[b] for b in range(len(z)))  # with its gradient
            loss = loss + plain_ce(z[a], Y) + r * plain_kd(z[a], target, 3.0)
        return loss

    assert_branches(OKDDip(tiny(branches), width=4), formula, epoch)


def test_branches_are_deployed_as_ordinary_networks():
    for method in (ONE(tiny()), OKDDip(tiny())):
        assert method.deployable() is method.student.peer(0)
        assert method.deployable()(IMAGES).shape == (len(X), CLASSES)


# --- mean teacher -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("consistency", ["mse", "kl"])
def test_mean_teacher_is_its_papers_loss_and_follows_the_student(consistency):
    student = mlp(1)
    method = MeanTeacher(student, consistency=consistency, weight=3.0, momentum=0.9)
    with torch.no_grad():
        for p in method.teacher.parameters():
            p.add_(0.3)
    y, other = Y.clone(), X + 0.1
    y[5:] = -100  # without labels: consistency alone

    def formula(s):
        z, t = s(X), method.teacher(other).detach()
        agreement = plain_kd(z, t, 1.0) if consistency == "kl" else (z.softmax(1) - t.softmax(1)).square().mean()
        return plain_ce(z[:5], y[:5]) + 3.0 * math.exp(-5 * 0.6**2) * agreement

    method.start_epoch(2, 100)
    value, grads = plain_gradients(student, formula)
    before = [p.clone() for p in method.teacher.parameters()]
    optimizer = torch.optim.SGD(method.parameter_groups(0.1))
    method.steps = 100
    for phase in method.phases((X, other), y):
        assert abs(phase.loss - value) < 1e-10
        phase.loss.backward()
        for p, grad in zip(student.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad, rtol=0, atol=1e-8)
        optimizer.step()
    for mean, old, new in zip(method.teacher.parameters(), before, student.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.9 * old + 0.1 * new)
    assert method.deployable() is method.teacher and method.steps == 101


def test_mean_teachers_schedules():
    method = MeanTeacher(mlp(1))
    assert [method.consistency_weight(e) for e in (0, 5, 90)] == [pytest.approx(100 * math.exp(-5)), 100, 100]
    assert [method.momentum_at(g) for g in (0, 1, 10**6)] == [0, 0.5, 0.999]
    method.start_epoch(0, 60, 39)
    assert method.momentum_at(10**6) == 0.95


BAD = {
    "warmup": (lambda: DKD(mlp(1), mlp(2), warmup=-1), "DKD: warmup must be a number >= 0, got -1"),
    "soft": (lambda: run(DKD(mlp(1), mlp(2)), X, torch.ones(10, 7)), "DKD: target must be class indices .*probab"),
    "none": (lambda: run(DKD(mlp(1), mlp(2)), X), "DKD: target must be class indices .*NoneType"),
    "dist": (lambda: DIST(mlp(1), mlp(2), beta=0, gamma=0, ce_weight=0), "DIST: ce_weight must be > 0 where"),
    "cap": (lambda: AEKD(mlp(1), guides_of(4), cap=0.1), r"AEKD: cap must be a number in \[1 / K, 1\] = \[0.25, 1\]"),
    "one": (lambda: AVER(mlp(1), [mlp(2)], weights="entropy"), "AVER: teachers must be at least two networks where"),
    "weights": (lambda: AVER(mlp(1), guides_of(), weights="best"), "AVER: weights must be one of 'equal', .*'best'"),
    "unlabelled": (lambda: run(AVER(mlp(1), guides_of(), weights="confidence"), X), "AVER: target must be class"),
    "no branches": (lambda: ONE(mlp(1)), "ONE: student must be branches on a shared stem, .*got Sequential"),
    "two": (lambda: OKDDip(tiny(2)), "OKDDip: student must be of at least 3 branches: .*got 2"),
    "views": (lambda: list(ONE(tiny()).phases((IMAGES,) * 3, Y)), "ONE: inputs must be one image for all .*tuple"),
    "two views": (lambda: list(MeanTeacher(mlp(1)).phases(X, Y)), "MeanTeacher: inputs must be two views .*Tensor"),
    "consistency": (
        lambda: MeanTeacher(mlp(1), consistency="l1"),
        "MeanTeacher: consistency must be one of 'mse', 'kl'",
    ),
    "standardize": (lambda: KD(mlp(1), mlp(2), standardize=1), "KD: standardize must be True or False, got int"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_set_up_is_one_sentence(case):
    make, message = BAD[case]
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make()


def test_a_temperature_and_a_seed_of_branches_are_checked():
    for method in (ONE, OKDDip):
        for options in ({"temperature": 0}, {"ramp": -1}, {"of": 0.5}, {"seed": 0.5}):
            with pytest.raises((ValueError, TypeError), match=f"^{method.__name__}: {next(iter(options))} must be"):
                partial(method, tiny())(**options)
