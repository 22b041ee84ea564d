"""ORC against the paper's three updates, typed again in plain PyTorch in float64, with optimiser steps between them."""

import copy

import pytest
import torch
from learning_helpers import assert_example_runs, assert_learnt, digits, fit
from methods_helpers import batch, bn_net, images, mlp, plain_ce, same, snapshot, train
from orc_helpers import BETA, bn_mlp, networks_of, next_share, optimizer_of, orc, plain_phases, plain_ranking
from torch import nn

from fastkd.methods import CE, ORC


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
        names = [n for n in ("intensive", "private", "group") if n in options.get("teach", n)]
        for phase, name in zip(method.phases(x, y), names, strict=True):
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
    {}, {"promote": 2}, {"intensive": "group"}, {"errors_only": False}, {"rank_by": "accuracy"},
    {"rank_by": "top5", "promote": 2, "intensive": "group", "errors_only": False},
    {"rank_by": "fixed"}, {"rank_by": "fixed", "promote": 2}, {"combine": "mean"},
    {"mix": "feedback"}, {"mix": "batch"},
    {"teach": ["group"]}, {"teach": ["group", "intensive"], "mix": "batch"}, {"teach": ["private"]},
], ids=str)  # fmt: skip
def test_losses_and_gradients_are_the_papers(make, options):
    """The three phases in sequence, four iterations, each loss after the steps before it."""
    compare_to_plain(make, **options)


def test_roles_change():
    assert len(compare_to_plain(bn_mlp, iterations=8, lr=1.0)) > 1


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
        method.zero_grad(set_to_none=True)
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


@pytest.mark.parametrize("intensive", ["pivot", "group"])
def test_digits_are_learnt(intensive):
    """A pivot by cross-entropy, then three students beside it, on 300 handwritten digits."""
    (x, y), (x_test, y_test) = digits()

    def network(hidden, seed):
        return mlp(seed, 64, 10, hidden).float()

    pivot = fit(CE(network(64, 1)), x, y, epochs=10)
    before = snapshot(pivot)
    method = ORC(pivot, [network(12, 3), network(24, 4), network(32, 5)], intensive=intensive)
    assert_learnt(fit(method, x, y, epochs=15), x_test, y_test, network(12, 3), margin=0.5)
    assert not same(snapshot(pivot), before)  # it goes on learning
    assert int(method.promotions.sum()) == 15 * 6 and (method.promotions > 0).sum() > 1


def test_the_example_runs(capsys):
    assert_example_runs("orc", "promot", capsys)
