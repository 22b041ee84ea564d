"""DGKD and its special cases against the formulas of the papers, typed again in plain PyTorch in float64."""

import copy
from functools import partial

import pytest
import torch
from learning_helpers import assert_example_runs, assert_learnt, digits, fit
from methods_helpers import (
    CLASSES,
    batch,
    bn_net,
    gradients,
    guides_of,
    images,
    mlp,
    plain_ce,
    plain_gradients,
    plain_kd,
    plain_kldiv_mean,
    run,
    same,
    snapshot,
    train,
)
from torch import nn

from fastkd.methods import AVER, CE, DGKD, KD, TAKD
from fastkd.models import Outputs

T, LAM = 3.0, 0.7
DROPS = [{}, {"drop": "bernoulli", "survival": 0.4}, {"drop": "fixed", "drop_num": 2}]


class Watched(nn.Module):
    """Counts its calls."""

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network, self.calls = network, 0

    def forward(self, inputs):
        self.calls += 1
        return self.network(inputs)


def paper_loss(z, y, kept, lam, total):
    """(n+1)(1-lam) CE + lam sum KD_T; CE is not rescaled when guides are dropped."""
    return total * (1 - lam) * plain_ce(z, y) + lam * sum(plain_kd(z, g, T) for g in kept)


def code_loss(z, y, kept, lam, total):
    return (1 - lam) * plain_ce(z, y) + lam * T**2 * sum(plain_kldiv_mean(z, g, T) for g in kept)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("drop", DROPS, ids=["none", "bernoulli", "fixed"])
@pytest.mark.parametrize("scale, formula", [("paper", paper_loss), ("code", code_loss)])
def test_loss_and_gradients_are_the_papers(scale, formula, drop, chunks):
    x, y = batch()
    student, guides = mlp(1), [Watched(g) for g in guides_of()]
    method = DGKD(student, guides, temperature=T, lam=LAM, scale=scale, seed=3, **drop)
    seen = set()
    for _ in range(6):
        before = [g.calls for g in guides]
        loss = run(method, x, y, chunks)
        kept = [g for g, calls in zip(guides, before, strict=True) if g.calls > calls]  # a dropped guide is not run
        assert [g.calls - c for g, c in zip(guides, before, strict=True)] == [
            chunks if g in kept else 0 for g in guides
        ]
        seen.add(len(kept))
        targets = [g.network(x).detach() for g in kept]
        value, grads = plain_gradients(student, lambda s: formula(s(x), y, targets, LAM, len(guides)))  # noqa: B023
        assert abs(loss - value) < 1e-10
        for grad, expected in zip(gradients(student), grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)
    if drop.get("drop") != "bernoulli":
        assert seen == {4 - drop.get("drop_num", 0)}
    else:
        assert len(seen) > 1


def test_lam_follows_the_scale():
    """The code has no cross-entropy (lam 1); the text's loss has one, so that 1 is not its default."""
    assert DGKD(mlp(1), [mlp(2)], scale="code").lam == 1.0
    x, y = batch()
    student, guides = mlp(1), guides_of()
    loss = run(DGKD(student, guides, temperature=T), x, y)
    with torch.no_grad():
        assert abs(loss - paper_loss(student(x), y, [g(x) for g in guides], 0.5, 4)) < 1e-10
    assert run(DGKD(student, guides, temperature=T, lam=0.25), x, y) != loss


@pytest.mark.parametrize("lam", [0.0, 1.0])
def test_ends_of_lam(lam):
    x, y = batch()
    student, guides = mlp(1), guides_of()
    loss = run(DGKD(student, guides, temperature=T, lam=lam), x, y)
    value, grads = plain_gradients(student, lambda s: paper_loss(s(x), y, [g(x) for g in guides], lam, 4))
    assert abs(loss - value) < 1e-10
    for grad, expected in zip(gradients(student), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("chunks", [1, 3])
def test_no_labels_are_needed_without_cross_entropy(chunks):
    x, y = batch()
    student = mlp(1)
    with_labels = run(DGKD(student, guides_of(), lam=1.0), x, y, chunks)
    expected = gradients(student)
    without = run(DGKD(student, guides_of(), lam=1.0), x, None, chunks)
    assert abs(with_labels - without) < 1e-12
    for grad, other in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)


def counts(iterations: int, **options) -> tuple[list[int], list[int]]:
    """How often each of 4 guides was run, and how many were run in each iteration."""
    guides = [Watched(g) for g in guides_of()]
    method = DGKD(mlp(1), guides, lam=1.0, seed=5, **options)
    x, _ = batch(rows=1)
    sizes = []
    for _ in range(iterations):
        before = sum(g.calls for g in guides)
        list(method.phases(x))
        sizes.append(sum(g.calls for g in guides) - before)
    return [g.calls for g in guides], sizes


def test_fixed_drop_takes_each_guide_alike():
    calls, sizes = counts(600, drop="fixed", drop_num=1)
    assert set(sizes) == {3}
    assert all(abs(c / 600 - 0.75) < 0.08 for c in calls)  # 4.5 standard deviations


def test_bernoulli_drop_keeps_each_guide_with_its_probability():
    calls, sizes = counts(600, drop="bernoulli", survival=0.75)
    # P(no guide survives) = 0.25^4; then one of four is kept.
    expected = 0.75 + 0.25**4 / 4
    assert all(abs(c / 600 - expected) < 0.08 for c in calls)
    assert set(sizes) >= {2, 3, 4}


def test_one_guide_is_kept_where_none_survives():
    calls, sizes = counts(400, drop="bernoulli", survival=0.0)
    assert set(sizes) == {1}
    assert all(abs(c / 400 - 0.25) < 0.1 for c in calls)


def test_choices_follow_the_seed():
    def kept(seed):
        guides = [Watched(g) for g in guides_of()]
        method = DGKD(mlp(1), guides, lam=1.0, drop="bernoulli", survival=0.5, seed=seed)
        x, _ = batch()
        rows = []
        for _ in range(8):
            list(method.phases(x))
            rows.append([g.calls for g in guides])
        return rows

    torch.manual_seed(0)
    first = kept(1)
    torch.manual_seed(99)  # the global generator has no part in it
    assert kept(1) == first != kept(2)


@pytest.mark.parametrize("drop", DROPS, ids=["none", "bernoulli", "fixed"])
def test_choices_are_made_on_the_host(drop):
    x, y = batch()
    expected = run(DGKD(mlp(1), guides_of(), **drop), x, y)
    student, guides = mlp(1), guides_of()
    with torch.device("meta"):  # a default device on which no value can be read
        (phase,) = DGKD(student, guides, **drop).phases(x, y)
    assert phase.loss == expected


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(chunks):
    x, y = batch()
    student, guides = mlp(1), guides_of()
    (phase,) = DGKD(student, guides, temperature=T, lam=LAM).phases(x, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    assert phase.parts.keys() == {"ce", "kd"}
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(phase.parts["ce"] - 4 * 0.3 * plain_ce(student(x), y)) < 1e-10
    assert abs(phase.parts["ce"] + phase.parts["kd"] - total) < 1e-10


@pytest.mark.parametrize("chunks", [1, 4])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch()
    y[[0, 1, 2, 6]] = -100  # with 4 chunks, the first one (2 rows) has no row that counts
    rows = y != -100
    student = mlp(1)
    loss = run(DGKD(student, guides_of(), temperature=T, lam=LAM), x, y, chunks)
    got = gradients(student)
    alone = run(DGKD(student, guides_of(), temperature=T, lam=LAM), x[rows], y[rows])
    assert abs(loss - alone) < 1e-12
    for grad, expected in zip(got, gradients(student), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("make", [lambda: CE(mlp(1)), lambda: DGKD(mlp(1), guides_of(), lam=LAM)])
def test_a_batch_of_ignored_rows_is_zero(make, chunks):
    x, y = batch()
    method = make()
    assert run(method, x, torch.full_like(y, -100), chunks) == 0
    assert all(not grad.any() for grad in gradients(method.student))


@pytest.mark.parametrize("make", [
    lambda guide: KD(mlp(1), guide), lambda guide: DGKD(mlp(1), [guide], drop="bernoulli"),
])  # fmt: skip
def test_guides_run_without_a_graph(make):
    x, y = batch()
    guide, modes = mlp(2), []
    guide.register_forward_hook(
        lambda module, args, output: modes.append((torch.is_grad_enabled(), output.requires_grad))
    )
    run(make(guide), x.requires_grad_(), y)
    assert modes == [(False, False)] and torch.is_grad_enabled()


def test_token_logits_are_rows():
    x, y = batch(rows=12)
    student = mlp(1)
    flat = run(DGKD(student, guides_of(), lam=LAM), x, y)
    expected = gradients(student)
    tokens = run(DGKD(student, guides_of(), lam=LAM), x.reshape(3, 4, -1), y.reshape(3, 4), 2)
    assert abs(flat - tokens) < 1e-12
    for grad, other in zip(gradients(student), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)


class WithOutputs(nn.Module):
    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return Outputs(self.network(inputs), features=inputs)


def test_networks_may_return_outputs():
    x, y = batch()
    plain = run(DGKD(mlp(1), guides_of(), lam=LAM), x, y)
    assert run(DGKD(WithOutputs(mlp(1)), [WithOutputs(g) for g in guides_of()], lam=LAM), x, y) == plain


@pytest.mark.parametrize("make", [
    lambda: DGKD(bn_net(1), [bn_net(2), bn_net(3)], lam=0.5, drop="bernoulli", survival=0.6),
    lambda: KD(bn_net(1), bn_net(2)),
    lambda: TAKD(bn_net(1), [bn_net(2), bn_net(3)]),
    lambda: AVER(bn_net(1), [bn_net(2), bn_net(3)]),
])  # fmt: skip
def test_guides_are_frozen(make):
    method = make()
    x, y = images()
    guides, student = snapshot(method.guides), snapshot(method.student)
    method.train()
    optimizer = train(method, x, y, steps=2)
    method.guides[0].train()  # as an evaluation elsewhere would do
    train(method, x, y, steps=2, optimizer=optimizer)
    assert same(snapshot(method.guides), guides)
    method.train()
    assert not any(m.training for m in method.guides.modules()) and method.student.training
    assert all(p.grad is None and not p.requires_grad for p in method.guides.parameters())
    changed = snapshot(method.student)
    assert not any(torch.equal(changed[key], student[key]) for key in student)


def test_low_precision_autocast_is_close():
    x, y = images(rows=32)
    exact, low = (DGKD(bn_net(1).eval(), [bn_net(2), bn_net(3)], lam=0.5) for _ in range(2))
    loss = run(exact, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = low.phases(x, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32
    assert 0 < abs(phase.loss - loss) < 0.02 * loss
    for grad, expected in zip(gradients(low.student), gradients(exact.student), strict=True):
        assert nn.functional.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.99


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    x, y = batch()
    plain, compiled = (DGKD(mlp(1), guides_of(2), lam=LAM, temperature=T) for _ in range(2))
    compiled.map_learners(partial(torch.compile, backend=backend))
    assert abs(run(plain, x, y) - run(compiled, x, y)) < 1e-12
    for grad, expected in zip(gradients(compiled.student), gradients(plain.student), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.parametrize("drop", DROPS, ids=["none", "bernoulli", "fixed"])
def test_resumes_to_the_same_bits(drop, tmp_path):
    def fresh():
        return DGKD(mlp(1), guides_of(), lam=LAM, seed=7, **drop)

    x, y = batch()
    whole = fresh()
    train(whole, x, y, steps=9)
    first = fresh()
    optimizer = train(first, x, y, steps=4)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = DGKD(mlp(8), guides_of(), lam=LAM, seed=123, **drop)
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, x, y, steps=5, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict())
    assert second.iterations == 9


def test_other_classes_are_found_at_the_first_batch():
    method = DGKD(mlp(1), [mlp(2), mlp(3, classes=9)])
    with pytest.raises(ValueError, match=rf"^DGKD: guides\[1\] must be .*\[10, {CLASSES}\], got .*\[10, 9\]$"):
        next(method.phases(*batch()))


def test_the_frozen_teacher_is_the_callers_own_network():
    teacher = bn_net(2).train()
    method = KD(bn_net(1), teacher)
    assert method.guides[0] is teacher and not teacher.training
    assert copy.deepcopy(method).state_dict().keys() == method.state_dict().keys()
    assert method.deployable() is method.student


def test_digits_are_learnt():
    """A teacher and an assistant by cross-entropy, then a student by DGKD, on 300 handwritten digits."""
    (x, y), (x_test, y_test) = digits()

    def network(hidden, seed):
        return mlp(seed, 64, 10, hidden).float()

    teacher = fit(CE(network(64, 1)), x, y, epochs=25)
    assistant = fit(DGKD(network(32, 2), [teacher], lam=0.5, temperature=4.0), x, y, epochs=25)
    student = DGKD(network(12, 3), [teacher, assistant], lam=0.5, temperature=4.0, drop="bernoulli")
    assert_learnt(fit(student, x, y, epochs=25), x_test, y_test, network(12, 3), nn.Linear(64, 10))


def test_the_example_runs(capsys):
    assert_example_runs("dgkd", "student", capsys)
