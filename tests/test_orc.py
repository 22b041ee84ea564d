"""ORC against the paper's three updates, typed again in plain PyTorch in float64, with optimiser steps between them."""

import copy
import datetime
import random
import runpy
from functools import partial
from pathlib import Path

import pytest
import torch
from methods_helpers import CLASSES, batch, bn_net, images, mlp, plain_ce, plain_kd, same, snapshot, train
from torch import nn

from fastkd.methods import CE, ORC
from fastkd.methods._observe import data_parallel
from fastkd.models import Outputs

T, BETA = 3.0, 0.3
BY = ("ce", "accuracy", "top5")


def bn_mlp(seed: int, hidden: int = 6, classes: int = CLASSES) -> nn.Module:
    """float64 with batch statistics, so that train and eval mode differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, classes)
        ).double()


def orc(make=mlp, students: int = 3, **options) -> ORC:
    """A method whose networks differ in width."""
    group = [make(20 + i, hidden=4 + 2 * i) for i in range(students)]
    return ORC(make(10, hidden=12), group, **{"temperature": T, "beta": BETA, "seed": 3} | options)


def optimizer_of(method: ORC, lr: float = 0.3) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameter_groups(lr), momentum=0.9, weight_decay=0.01)


def next_share(method: ORC) -> float:
    """The l of the method's next iteration, drawn again from a copy of its random state."""
    generator = torch.Generator()
    generator.set_state(method.get_extra_state()["random"])
    return random.Random(int(torch.randint(2**63 - 1, (), generator=generator))).betavariate(method.alpha, method.alpha)


def networks_of(method: ORC) -> list[nn.Module]:
    return [method.pivot, *method.students]


def eval_logits(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).eval()(x)


# --- the paper, typed again -------------------------------------------------------------------------------------------


def plain_ranking(students, x, y, by):
    """Best first, with the per-sample cross-entropies K x [B] and errors K x [B]."""
    ces, wrongs, keys = [], [], []
    for student in students:
        z = eval_logits(student, x)
        ces.append([-torch.log_softmax(row, 0)[label].item() for row, label in zip(z, y, strict=True)])
        wrongs.append((z.argmax(1) != y).tolist())
        better = (z > z[torch.arange(len(y)), y][:, None]).sum(1)
        mean = {"ce": sum(ces[-1]) / len(y), "accuracy": sum(wrongs[-1]) / len(y)}
        keys.append(mean | {"top5": (better >= 5).double().mean().item()})
    return sorted(range(len(students)), key=lambda i: keys[i][by]), ces, wrongs


def plain_feedback(ces, wrongs, errors_only):
    rows = range(len(ces[0]))
    allowed = [[b for b in rows if wrong[b]] for wrong in wrongs] if errors_only else [list(rows)] * len(ces)
    if not any(allowed):
        allowed = [list(rows)] * len(ces)
    means = torch.tensor([sum(ce) / len(ce) for ce in ces], dtype=torch.float64)
    shares = torch.softmax(means, 0) * torch.tensor([float(bool(some)) for some in allowed])
    quotas = shares / shares.sum() * len(ces[0])
    counts = quotas.floor()
    while counts.sum() < len(ces[0]):  # largest remainder
        counts[(quotas - counts).argmax()] += 1
    picked = []
    for ce, some, count in zip(ces, allowed, counts.tolist(), strict=True):
        hardest = sorted(some, key=lambda b: -ce[b])  # noqa: B023
        picked += [hardest[n % len(hardest)] for n in range(int(count))]
    return torch.tensor(picked)


def plain_taught(learners, teachers, x, y):
    targets = [eval_logits(teacher, x) for teacher in teachers]
    total = 0
    for learner in learners:
        z = learner(x)
        total = total + (1 - BETA) * plain_ce(z, y) + BETA * sum(plain_kd(z, t, T) for t in targets)
    return total


def plain_phases(pivot, students, x, y, l, promote=1, rank_by="ce", intensive="pivot", errors_only=False):  # noqa: E741
    """(loss, networks that it trains) of each phase."""
    order, ces, wrongs = plain_ranking(students, x, y, rank_by)
    tts, rest = [students[i] for i in order[:promote]], [students[i] for i in order[promote:]]
    feedback = plain_feedback(ces, wrongs, errors_only)
    mixed = l * x + (1 - l) * x[feedback]
    group = [pivot] if intensive == "pivot" else [pivot, *tts]
    logits = [n(mixed) for n in group]
    yield sum(l * plain_ce(z, y) + (1 - l) * plain_ce(z, y[feedback]) for z in logits), group
    yield plain_taught(tts, [pivot], x, y), tts
    yield plain_taught(rest, [pivot, *tts], x, y), rest


def compare_to_plain(make, iterations=4, lr=0.3, **options):
    method = orc(make, **options)
    twin = copy.deepcopy(networks_of(method))
    optimizer = optimizer_of(method, lr)
    groups = [{"params": nn.ModuleList(twin[1:]).parameters(), "lr": lr}]
    groups.append({"params": twin[0].parameters(), "lr": 0.1 * lr})
    twin_optimizer = torch.optim.SGD(groups, momentum=0.9, weight_decay=0.01)
    promoted = set()
    for step in range(iterations):
        x, y = batch(rows=12, seed=step)
        plain = plain_phases(twin[0], twin[1:], x, y, next_share(method), **options)
        for phase, name in zip(method.phases(x, y), ("intensive", "private", "group"), strict=True):
            optimizer.zero_grad(set_to_none=True)
            twin_optimizer.zero_grad(set_to_none=True)
            loss, trained = next(plain)
            loss.backward()
            phase.loss.backward()
            assert phase.name == name and abs(phase.loss - loss) < 1e-10
            for network, other in zip(networks_of(method), twin, strict=True):
                taught = any(other is n for n in trained)
                assert any(network is n for n in phase.networks) == taught
                for p, q in zip(network.parameters(), other.parameters(), strict=True):
                    assert (p.grad is None) == (q.grad is None) == (not taught)
                    if taught:
                        torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-8)
            if name == "private":
                promoted |= {i for i, s in enumerate(twin[1:]) if any(s is n for n in trained)}
            optimizer.step()
            twin_optimizer.step()
    for network, other in zip(networks_of(method), twin, strict=True):
        for key, value in network.state_dict().items():
            torch.testing.assert_close(value, other.state_dict()[key], rtol=0, atol=1e-8)
    return promoted


@pytest.mark.parametrize("make", [mlp, bn_mlp])
@pytest.mark.parametrize("options", [
    {}, {"promote": 2}, {"intensive": "group"}, {"errors_only": True}, {"rank_by": "accuracy"},
    {"rank_by": "top5", "promote": 2, "intensive": "group", "errors_only": True},
], ids=str)  # fmt: skip
def test_losses_and_gradients_are_the_papers(make, options):
    """The three phases in sequence, four iterations, each loss after the steps before it."""
    compare_to_plain(make, **options)


def test_roles_change():
    assert len(compare_to_plain(bn_mlp, iterations=8, lr=1.0)) > 1


# --- what each phase takes and leaves ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"promote": 2}, {"intensive": "group", "promote": 2}], ids=str)
def test_a_phase_moves_only_its_own_networks(options):
    """Neither weights nor buffers of the others, from before its forward passes to after the step."""
    method = ORC(bn_net(1), [bn_net(2), bn_net(3), bn_net(4), bn_net(5)], **options)
    method.train()
    optimizer = optimizer_of(method, 0.1)
    train(method, *images(), steps=2, optimizer=optimizer)  # momentum is there
    states, sizes = [snapshot(n) for n in networks_of(method)], []
    for phase in method.phases(*images(seed=1)):
        optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        optimizer.step()
        for network, before in zip(networks_of(method), states, strict=True):
            after = snapshot(network)
            if any(network is n for n in phase.networks):
                assert not any(torch.equal(after[key], before[key]) for key in before)
                assert after["1.num_batches_tracked"] == before["1.num_batches_tracked"] + 1
                assert all(p.grad is not None for p in network.parameters())
            else:
                assert same(after, before) and all(p.grad is None for p in network.parameters())
        states = [snapshot(n) for n in networks_of(method)]
        sizes.append(len(phase.networks))
    k = method.promote
    assert sizes == [1 + k * (method.intensive == "group"), k, 4 - k]


def test_the_evaluation_leaves_no_trace():
    method = ORC(bn_net(1), [bn_net(2), bn_net(3), bn_net(4)])
    method.train()
    method.students[1][1].eval()  # a module of its own mode, as in fine-tuning
    modes, states = [m.training for m in method.modules()], [snapshot(s) for s in method.students]
    seen = []
    for student in method.students:
        student.register_forward_hook(
            lambda m, args, out: seen.append((any(c.training for c in m.modules()), torch.is_grad_enabled()))
        )
    phases = method.phases(*images())
    next(phases)  # the evaluation, and the pivot's forward pass
    assert seen == [(False, False)] * 3 and torch.is_grad_enabled()
    assert [m.training for m in method.modules()] == modes
    assert all(same(snapshot(s), before) for s, before in zip(method.students, states, strict=True))
    phases.close()


def test_modes_are_restored_after_an_error():
    def fail(module, args):
        raise RuntimeError("no memory")

    method = orc(bn_mlp)
    method.train()
    method.students[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        next(method.phases(*batch()))
    assert all(m.training for m in method.modules())


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_an_iteration_left_half_way_leaves_no_trace(taken, chunks):
    x, y = batch()
    method = orc()
    train(method, x, y, steps=2)
    before, modes = snapshot(method), [m.training for m in method.modules()]
    phases = method.phases(x, y, chunks=chunks)
    for _ in range(taken):
        for loss in next(phases).losses:
            loss.backward()
    phases.close()
    assert same(snapshot(method), before) and int(method.promotions.sum()) == 2
    assert [m.training for m in method.modules()] == modes


@pytest.mark.parametrize("promote", [1, 2])
def test_promotions_are_counted(promote):
    method, (x, y) = orc(promote=promote), batch()
    assert method.promotions.dtype == torch.int64 and method.promotions.tolist() == [0, 0, 0]
    expected = torch.zeros(3, dtype=torch.int64)
    for _ in range(3):
        for i in plain_ranking(method.students, x, y, "ce")[0][:promote]:
            expected[i] += 1
        train(method, x, y, steps=1)
    assert torch.equal(method.promotions, expected)


@pytest.mark.parametrize("intensive", ["pivot", "group"])
def test_without_weight_on_the_teachers_it_is_cross_entropy(intensive):
    x, y = batch()
    method = orc(bn_mlp, beta=0.0, promote=2, intensive=intensive, students=4)
    optimizer = optimizer_of(method)
    for phase in method.phases(x, y):
        twins = [copy.deepcopy(n) for n in phase.networks]  # in train mode batch statistics are the batch's
        optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        if phase.name != "intensive":
            total = sum(plain_ce(twin(x), y) for twin in twins)
            total.backward()
            assert abs(phase.loss - total) < 1e-12
            for network, twin in zip(phase.networks, twins, strict=True):
                for p, q in zip(network.parameters(), twin.parameters(), strict=True):
                    torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)
        optimizer.step()


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(chunks):
    names = []
    for phase in orc(promote=2, students=4).phases(*batch(), chunks=chunks):
        total = sum(loss.detach() for loss in phase.losses)
        assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
        assert abs(sum(phase.parts.values()) - total) < 1e-12
        names.append(list(phase.parts))
        if phase.name == "group":
            x, y = batch()
            expected = (1 - BETA) * sum(plain_ce(n(x), y) for n in phase.networks)
            assert abs(phase.parts["group_ce"] - expected) < 1e-12
    assert names == [["intensive"], ["private_ce", "private_kd"], ["group_ce", "group_kd"]]


# --- feedback and mix-up ----------------------------------------------------------------------------------------------


class Mixed(ORC):
    """Keeps what intensive teaching is given."""

    def _mix(self, batch, feedback, share):
        self.feedback, self.share = feedback, share
        self.mixed = super()._mix(batch, feedback, share)
        return self.mixed


def mixed(students, x, y, **options) -> Mixed:
    method = Mixed(mlp(1), students, **options)
    next(method.phases(x, y))
    return method


def test_beta_of_the_mix_up():
    x, y = batch(rows=2)
    for alpha in (0.3, 1.0, 4.0):
        method, shares = Mixed(mlp(1), [mlp(2), mlp(3)], alpha=alpha, seed=1), []
        for _ in range(200):
            list(method.phases(x, y))
            shares.append(method.share)
        shares = torch.tensor(shares, dtype=torch.float64)
        assert shares.min() >= 0 and shares.max() <= 1
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 4.5 * (variance / 200) ** 0.5
        assert abs(shares.var() / variance - 1) < 0.4


def test_the_mix_up_follows_the_seed():
    x, y = batch()
    torch.manual_seed(0)
    first = mixed([mlp(2), mlp(3)], x, y, seed=1).share
    torch.manual_seed(99)  # the global generators have no part in it
    random.seed(5)
    assert mixed([mlp(2), mlp(3)], x, y, seed=1).share == first != mixed([mlp(2), mlp(3)], x, y, seed=2).share


class Nested(nn.Module):
    """Takes {"parts": [x[:, :2], (x[:, 2:], rows)]}; keeps the rows that it saw."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows = network, []

    def forward(self, inputs):
        left, (right, rows) = inputs["parts"]
        self.rows.append(rows)
        return self.network(torch.cat([left, right], 1))


@pytest.mark.parametrize("chunks", [1, 3])
def test_inputs_may_be_nested(chunks):
    (x, y), rows = batch(), torch.arange(10)
    plain = orc()
    nested = orc(lambda seed, hidden: Nested(mlp(seed, hidden=hidden)))
    for one, other in zip(
        plain.phases(x, y, chunks=chunks),
        nested.phases({"parts": [x[:, :2], (x[:, 2:], rows)]}, y, chunks=chunks),
        strict=True,
    ):
        for loss, same_loss in zip(one.losses, other.losses, strict=True):
            assert abs(loss - same_loss) < 1e-13
    assert torch.equal(torch.cat(nested.pivot.rows[:chunks]), rows)  # integers are not mixed


@pytest.mark.parametrize("chunks", [1, 4])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch(rows=12)
    y[[0, 1, 2, 7, 11]] = -100  # with 4 chunks, the first one has no row that counts
    rows = y != -100
    x[~rows] *= 50  # they would be the hardest
    whole, alone = orc(Watched), orc(Watched)
    share = next_share(whole)
    for phase, other in zip(whole.phases(x, y, chunks=chunks), alone.phases(x[rows], y[rows]), strict=True):
        whole.zero_grad()
        alone.zero_grad()
        total = 0
        for loss in phase.losses:
            loss.backward()
            total += loss.detach()
        if phase.name == "intensive":
            x_mixed = torch.cat(whole.pivot.inputs)
            feedback = ((x_mixed - share * x) / (1 - share))[rows]
            distance = torch.cdist(feedback, x[rows])
            assert distance.amin(1).max() < 1e-9
            z = whole.pivot.network(x_mixed)[rows]
            expected = share * plain_ce(z, y[rows]) + (1 - share) * plain_ce(z, y[rows][distance.argmin(1)])
            assert abs(total - expected) < 1e-10
            continue
        other.loss.backward()
        assert abs(total - other.loss) < 1e-12
        for p, q in zip(whole.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None or not p.grad.any()) == (q.grad is None or not q.grad.any())
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


class Watched(nn.Module):
    """Keeps its inputs."""

    def __init__(self, seed, hidden=6):
        super().__init__()
        self.network, self.inputs = mlp(seed, hidden=hidden), []

    def forward(self, inputs):
        self.inputs.append(inputs)
        return self.network(inputs)


@pytest.mark.parametrize("errors_only", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_batch_of_ignored_rows_is_zero(chunks, errors_only):
    x, y = batch()
    method = orc(errors_only=errors_only)
    for phase in method.phases(x, torch.full_like(y, -100), chunks=chunks):
        for loss in phase.losses:
            loss.backward()
            assert loss == 0
    assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


class Table(nn.Module):
    """Logits by heart, whatever the weights; x[:, 0] is the row's number."""

    def __init__(self, logits):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def forward(self, x):
        return self.logits[x[:, 0].long() % len(self.logits)] + 0 * self.weight


def table(ces, classes=3):
    """A network of these cross-entropies with label 0 and `classes` classes."""
    return Table([[-ce] + [torch.tensor((1 - 2.718281828459045**-ce) / (classes - 1)).log().item()] * (classes - 1)
                  for ce in ces])  # fmt: skip


def rows_of_table(n):
    return torch.arange(n, dtype=torch.float64)[:, None], torch.zeros(n, dtype=torch.int64)


def feedback_of(*ces, **options):
    x, y = rows_of_table(len(ces[0]))
    method = Mixed(table([1.0] * len(y)), [table(ce) for ce in ces], **options)
    next(method.phases(x, y))
    return method.feedback.tolist()


# With 3 classes, a sample is right where its cross-entropy is below log 3 = 1.0986.
def test_feedback_is_the_hardest_by_softmax_shares():
    # Mean CEs 1 and 1 + log 3: shares 1/4 and 3/4.
    assert feedback_of([0.5, 1.5, 0.7, 1.3], [2.4, 1.6986, 2.2, 2.0959]) == [1, 0, 2, 3]


def test_errors_only():
    # Equal means. The first network errs on 1 and 3, the second on 0 alone.
    ces = [0.4, 1.5, 0.6, 1.5], [2.5, 0.5, 0.5, 0.5]
    assert feedback_of(*ces) == [1, 3, 0, 1]
    assert feedback_of(*ces, errors_only=True) == [1, 3, 0, 0]
    # No error: its share goes to the network with errors, however much better that is on average.
    assert feedback_of([1.0, 1.0, 1.0, 0.9], [0.1, 0.1, 1.2, 0.1], errors_only=True) == [2, 2, 2, 2]
    # No error at all: the highest.
    assert feedback_of([0.4, 0.2, 0.1, 0.1], [0.1, 0.1, 0.3, 0.3], errors_only=True) == [0, 1, 2, 3]


def test_a_network_that_gave_nan_has_no_share_and_is_not_promoted():
    broken = [float("nan")] * 4
    assert feedback_of(broken, [0.1, 0.4, 0.3, 0.2]) == [1, 2, 3, 0]
    assert feedback_of(broken, [0.1, 1.4, 0.3, 0.2], errors_only=True) == [1, 1, 1, 1]
    assert sorted(feedback_of(broken, broken)) == [0, 0, 1, 1]
    x, y = rows_of_table(4)
    method = ORC(table([1.0] * 4), [table(broken), table([3.0] * 4), table([2.0] * 4)], promote=1)
    list(method.phases(x, y))
    assert method.promotions.tolist() == [0, 0, 1]


# --- chunks, state, precision, compilation ----------------------------------------------------------------------------


@pytest.mark.parametrize("chunks", [2, 3, 12])
@pytest.mark.parametrize("options", [{}, {"promote": 2, "intensive": "group", "errors_only": True}], ids=str)
def test_chunks_have_the_gradient_of_the_whole_batch(options, chunks):
    whole, parts = orc(**options), orc(**options)
    steps = [optimizer_of(whole), optimizer_of(parts)]
    for step in range(3):
        x, y = batch(rows=12, seed=step)
        for one, other in zip(whole.phases(x, y), parts.phases(x, y, chunks=chunks), strict=True):
            for optimizer in steps:
                optimizer.zero_grad(set_to_none=True)
            one.loss.backward()
            total = 0
            for loss in other.losses:
                loss.backward()
                total += loss.detach()
            assert other.chunks == chunks and abs(total - one.loss) < 1e-12
            for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-12)
            for optimizer in steps:
                optimizer.step()
    assert torch.equal(whole.promotions, parts.promotions)


@pytest.mark.parametrize("options", [{}, {"promote": 2, "intensive": "group"}], ids=str)
def test_resumes_to_the_same_bits(options, tmp_path):
    x, y = images()

    def fresh(first, seed):
        method = ORC(bn_net(first), [bn_net(first + 1), bn_net(first + 2), bn_net(first + 3)], seed=seed, **options)
        return method.train()

    torch.manual_seed(0)
    whole = fresh(1, 7)
    optimizer = train(whole, x, y, steps=4)
    state = {"method": whole.state_dict(), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state()}
    torch.save(state, tmp_path / "run.pt")
    train(whole, x, y, steps=5, optimizer=optimizer)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = fresh(30, 123)
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["torch"])  # of dropout
    train(second, x, y, steps=5, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict())
    assert second.iterations == 9 and int(second.promotions.sum()) == 9 * second.promote


def test_a_copy_goes_on_alike():
    x, y = batch()
    method = orc(promote=2)
    train(method, x, y, steps=2)
    twin = copy.deepcopy(method)
    train(method, x, y, steps=3)
    train(twin, x, y, steps=3)
    assert same(snapshot(method), snapshot(twin)) and method.deployable() is method.students[0]


@pytest.mark.parametrize("intensive", ["pivot", "group"])
def test_low_precision_autocast_is_close(intensive):
    """Under one autocast around the iteration: the evaluation without grad must not cost a phase its gradients."""
    x, y = images(rows=32)
    exact, low = (ORC(bn_net(1), [bn_net(2), bn_net(3)], intensive=intensive).eval() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = zip(low.phases(x, y), exact.phases(x, y), strict=True)
        for phase, _ in pairs:
            low.zero_grad(set_to_none=True)
            phase.loss.backward()
            assert phase.loss.dtype == torch.float32
            assert all(p.grad is not None and p.grad.isfinite().all() for n in phase.networks for p in n.parameters())
    losses = [[], []]
    for autocast, into in zip((True, False), losses, strict=True):
        method = low if autocast else exact
        phases = method.phases(x, y)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                into.append(next(phases).loss)
        phases.close()
    for one, other in zip(*losses, strict=True):
        assert 0 < abs(one - other) < 0.02 * other


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    plain, compiled = orc(bn_mlp, promote=2), orc(bn_mlp, promote=2)
    compiled.map_learners(partial(torch.compile, backend=backend))
    for method in (plain, compiled):
        method.train()
        train(method, *batch(), steps=2)
    first, second = plain.state_dict(), compiled.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-10)
    assert all(m.training for m in compiled.modules())


@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_compiled_and_data_parallel(order, tmp_path):
    def wrap(network):
        parallel = nn.parallel.DistributedDataParallel
        if order == "compiled inside":
            return parallel(torch.compile(network, backend="eager"))
        return torch.compile(parallel(network), backend="eager")

    torch.compiler.reset()
    plain, wrapped = orc(bn_mlp, students=2), orc(bn_mlp, students=2)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        wrapped.map_learners(wrap)  # one process: no process group is needed
        assert all(
            type(data_parallel(wrapped.learner(name))) is nn.parallel.DistributedDataParallel
            for name in ("pivot", "students.0", "students.1")
        )
        for method in (plain, wrapped):
            train(method.train(), *batch(), steps=1)
    finally:
        torch.distributed.destroy_process_group()
    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True)
    )


class WithOutputs(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return Outputs(self.network(inputs), features=inputs)


def test_networks_may_return_outputs():
    plain, others = orc(), orc(lambda seed, hidden: WithOutputs(mlp(seed, hidden=hidden)))
    for one, other in zip(plain.phases(*batch()), others.phases(*batch()), strict=True):
        assert one.loss == other.loss


@pytest.mark.parametrize("errors_only", [False, True])
def test_nothing_is_read_before_private_teaching(errors_only):
    """On the meta device, where no value can be read, all goes well until the host must know who is promoted."""
    method = orc(errors_only=errors_only).to("meta")
    phases = method.phases(torch.empty(8, 5, device="meta", dtype=torch.float64),
                           torch.empty(8, device="meta", dtype=torch.int64))  # fmt: skip
    phase = next(phases)
    phase.loss.backward()
    with pytest.raises(NotImplementedError, match="meta"):
        next(phases)


def test_on_a_gpu_it_is_the_same_without_waiting():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    method, host = orc(bn_mlp, promote=2, errors_only=True).cuda().train(), orc(bn_mlp, promote=2, errors_only=True)
    host.train()
    steps = [optimizer_of(method), optimizer_of(host)]
    for step in range(3):
        x, y = batch(seed=step)
        others = host.phases(x, y)
        phases = method.phases(x.cuda(), y.cuda())
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            try:
                phase = next(phases)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            other = next(others)
            assert abs(phase.loss.cpu() - other.loss) < 1e-9
            for one, optimizer in zip((phase, other), steps, strict=True):
                optimizer.zero_grad(set_to_none=True)
                one.loss.backward()
                optimizer.step()
        assert next(phases, None) is next(others, None) is None
    assert torch.equal(method.promotions.cpu(), host.promotions)


# --- several processes ------------------------------------------------------------------------------------------------


def worker(rank, store, failures):
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(seconds=60)
    )
    try:
        promote_by_the_global_batch(rank)
        train_as_one_process(rank)
        leave_buffers_alone(rank)
        refuse_local_rankings()
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    finally:
        torch.distributed.destroy_process_group()


def gathered(value):
    values = [torch.empty_like(value) for _ in range(2)]
    torch.distributed.all_gather(values, value.contiguous())
    return values


# Mean cross-entropies of the first, second and third network on the rows of rank 0, then on those of rank 1.
BY_RANK = ([1.0] * 6 + [3.0] * 2, [3.0] * 6 + [0.1] * 2, [2.0] * 6 + [0.5] * 2)


def promote_by_the_global_batch(rank):
    """Six rows on rank 0, two on rank 1, which would promote another network and take other proportions."""
    x, y = rows_of_table(8)
    mine = slice(0, 6) if rank == 0 else slice(6, 8)
    group = torch.distributed.group.WORLD
    method = Mixed(table([1.0] * 8), [table(ces) for ces in BY_RANK], process_group=group)
    list(method.phases(x[mine], y[mine]))
    local = Mixed(table([1.0] * 8), [table(ces) for ces in BY_RANK])
    list(local.phases(x[mine], y[mine]))
    assert method.promotions.tolist() == [1, 0, 0]
    assert local.promotions.tolist() == ([1, 0, 0] if rank == 0 else [0, 1, 0])
    # Global means 1.5, 2.275, 1.625: shares 0.231, 0.505, 0.264; rank 1's own would be 0.85, 0.05, 0.07.
    assert method.feedback.tolist() == ([0, 0, 1, 2, 0, 1] if rank == 0 else [0, 0])
    x_mixed = method.mixed.inputs
    assert x_mixed.shape == (6 if rank == 0 else 2, 1) and ((x_mixed >= x[mine].min()) & (x_mixed < 8)).all()
    assert method.share == gathered(torch.tensor(method.share, dtype=torch.float64))[1 - rank]


def train_as_one_process(rank):
    """With a pivot that stands still, two ranks of one half each do what one process does with the whole batch."""
    options = {"pivot_lr": 0.0, "promote": 2, "students": 4}
    whole, parts = orc(**options), orc(**options, process_group=torch.distributed.group.WORLD)
    parts.map_learners(nn.parallel.DistributedDataParallel)
    steps = [optimizer_of(m) for m in (whole, parts)]
    for step in range(4):
        x, y = batch(rows=12, seed=step)
        mine = slice(6 * rank, 6 * rank + 6)
        train(whole, x, y, steps=1, optimizer=steps[0])
        train(parts, x[mine], y[mine], steps=1, optimizer=steps[1], chunks=1 + step % 2)
    assert torch.equal(whole.promotions, parts.promotions)
    first, second = whole.students.state_dict(), parts.students.state_dict()
    for key, value in first.items():
        torch.testing.assert_close(second[key], value, rtol=0, atol=1e-10)
    moving = orc(process_group=torch.distributed.group.WORLD).map_learners(nn.parallel.DistributedDataParallel)
    train(moving, x[mine], y[mine], steps=3)
    for parameter in moving.parameters():
        assert torch.equal(*gathered(parameter.detach()))


def leave_buffers_alone(rank):
    """Statistics that differ between the ranks are not broadcast by an evaluation."""
    method = orc(bn_mlp, process_group=torch.distributed.group.WORLD)
    method.map_learners(nn.parallel.DistributedDataParallel)
    method.train()
    for student in method.students:
        student[1].running_mean += rank
    before = [snapshot(s) for s in method.students]
    phases = method.phases(*batch(seed=rank))
    next(phases)
    assert all(same(snapshot(s), state) for s, state in zip(method.students, before, strict=True))
    phases.close()


def refuse_local_rankings():
    try:
        orc().map_learners(nn.parallel.DistributedDataParallel)
    except ValueError as error:
        assert str(error).startswith("ORC: process_group must be given where networks"), error
    else:
        raise AssertionError("DistributedDataParallel without a process group was taken")


def test_two_processes(tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    failures = context.SimpleQueue()
    processes = [context.Process(target=worker, args=(rank, tmp_path / "store", failures)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    for process in processes:
        if process.is_alive():
            process.kill()
    assert failures.empty(), failures.get()
    assert [process.exitcode for process in processes] == [0, 0]


# --- wrong set-ups ----------------------------------------------------------------------------------------------------

TWO = [mlp(2), mlp(3)]


@pytest.mark.parametrize("make, message", [
    (lambda: ORC(mlp(1), [mlp(2)]), "students must be a sequence of at least two networks, got one"),
    (lambda: ORC(mlp(1), []), "students must be a sequence of at least one network, got an empty one"),
    (lambda: ORC(mlp(1), mlp(2)), "students must be a sequence of networks .*, got one Sequential: put it in a list"),
    (lambda: ORC(mlp, TWO), "pivot must be a network .*, got function"),
    (lambda: ORC(mlp(1), TWO, promote=2), r"promote must be an integer in \[1, 1\], got 2"),
    (lambda: ORC(mlp(1), TWO, promote=0), r"promote must be an integer in \[1, 1\], got 0"),
    (lambda: ORC(mlp(1), TWO, promote=1.0), "promote must be an integer, got float"),
    (lambda: ORC(TWO[1], TWO), r"students\.1 must be a network of its own, got .* with pivot"),
    (lambda: ORC(mlp(1), [TWO[0]] * 2), r"students\.1 must be a network of its own, got .* with students\.0"),
    (lambda: ORC(mlp(1).requires_grad_(False), TWO), "pivot must be a network with a parameter that requires grad"),
    (lambda: ORC(mlp(1), TWO, rank_by="loss"), "rank_by must be one of 'ce', 'accuracy', 'top5', got 'loss'"),
    (lambda: ORC(mlp(1), TWO, intensive="all"), "intensive must be one of 'pivot', 'group', got 'all'"),
    (lambda: ORC(mlp(1), TWO, errors_only=1), "errors_only must be True or False, got int"),
    (lambda: ORC(mlp(1), TWO, temperature=0), "temperature must be a finite number > 0, got 0"),
    (lambda: ORC(mlp(1), TWO, beta=1.5), r"beta must be a number in \[0, 1\], got 1.5"),
    (lambda: ORC(mlp(1), TWO, alpha=0), "alpha must be a finite number > 0, got 0"),
    (lambda: ORC(mlp(1), TWO, alpha=float("inf")), "alpha must be a finite number > 0, got inf"),
    (lambda: ORC(mlp(1), TWO, pivot_lr=-0.1), "pivot_lr must be a finite number >= 0, got -0.1"),
    (lambda: ORC(mlp(1), TWO, process_group="gloo"), "process_group must be None or .*ProcessGroup.*, got str"),
    (lambda: ORC(mlp(1), TWO, seed=0.5), "seed must be an integer, got float"),
])  # fmt: skip
def test_wrong_set_ups_are_refused_before_training(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^ORC: {message}"):
        make()


X, Y = batch()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("pivot, students, inputs, target, message", [
    (mlp(1, classes=9), TWO, X, Y, r"pivot must be a network whose logits have shape \[\d+, 7\].*shape \[\d+, 9\]"),
    (mlp(1), [mlp(2), mlp(3, classes=9)], X, Y, r"students\[1\] must be a network whose logits .* 7\].* 9\]$"),
    (mlp(1), [nn.Sequential(mlp(4), nn.Unflatten(1, (7, 1))), mlp(3)], X, Y, r"students\[0\] must be .*, 7, 1\]$"),
    (mlp(1), TWO, X, None, r"target must be class indices \[B\], got NoneType$"),
    (nn.Embedding(9, 7), [nn.Embedding(9, 7) for _ in range(2)], Y, Y, "inputs must be a floating-point .*int64$"),
])  # fmt: skip
def test_what_only_a_batch_shows_is_refused_at_the_first(pivot, students, inputs, target, message, chunks):
    method = ORC(pivot, students)
    before = snapshot(method)
    with pytest.raises((ValueError, TypeError), match=f"^ORC: {message}"):
        next(next(method.phases(inputs, target, chunks=chunks)).losses)
    assert same(snapshot(method), before)


def test_a_tensor_without_the_batchs_rows_is_refused():
    method = orc(lambda seed, hidden: Scaled(mlp(seed, hidden=hidden)))
    with pytest.raises(ValueError, match=r"^ORC: inputs must be tensors of 10 rows as target, got shape \[\]$"):
        next(method.phases((X, torch.ones((), dtype=torch.float64)), Y))


class Scaled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return self.network(inputs[0] * inputs[1])


# --- it learns --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("intensive", ["pivot", "group"])
def test_digits_are_learnt(intensive):
    """A pivot by cross-entropy, then three students beside it, on 300 handwritten digits."""
    digits = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(digits.data, dtype=torch.float32) / 16, torch.tensor(digits.target)
    (x, y), (x_test, y_test) = (x[:300], y[:300]), (x[300:], y[300:])

    def network(hidden, seed):
        return mlp(seed, 64, 10, hidden).float()

    def accuracy(model):
        model.eval()
        with torch.no_grad():
            return (model(x_test).argmax(1) == y_test).double().mean().item()

    def fit(method, epochs=15):
        optimizer = torch.optim.SGD(method.parameter_groups(0.1), momentum=0.9)
        order = torch.Generator().manual_seed(0)
        for epoch in range(epochs):
            method.start_epoch(epoch, epochs)
            method.train()
            for rows in torch.randperm(len(x), generator=order).split(50):
                for phase in method.phases(x[rows], y[rows]):
                    optimizer.zero_grad(set_to_none=True)
                    phase.loss.backward()
                    optimizer.step()
        return method.deployable()

    pivot, students = fit(CE(network(64, 1)), 10), [network(12, 3), network(24, 4), network(32, 5)]
    before, untrained = snapshot(pivot), accuracy(students[0])
    constant = (y_test == y_test.mode().values).double().mean().item()
    method = ORC(pivot, students, intensive=intensive)
    assert accuracy(fit(method)) > max(untrained, constant) + 0.5
    assert not same(snapshot(pivot), before)  # it goes on learning
    assert int(method.promotions.sum()) == 15 * 6 and (method.promotions > 0).sum() > 1


def test_the_example_runs(capsys):
    example = Path(__file__).parents[1] / "examples" / "orc.py"
    assert len(example.read_text().splitlines()) < 60
    result = runpy.run_path(str(example), run_name="__main__")
    assert result["accuracy"] > 0.5
    assert "promot" in capsys.readouterr().out
