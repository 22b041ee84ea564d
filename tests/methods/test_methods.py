"""The protocol between a method and a loop, held by toy methods of the kinds that the papers need."""

import contextlib
import copy
import warnings
from functools import partial

import pytest
import torch
from group_helpers import assert_states_close, group_of_one
from methods_helpers import (
    MeanTeacher,
    Roles,
    Translated,
    Twice,
    batch,
    bn_net,
    images,
    mlp,
    plain_ce,
    run,
    same,
    snapshot,
    train,
)
from torch import nn

from fastkd.methods import CE, DGKD, Method


def roles(seed=0):
    return Roles(mlp(1), [mlp(2), mlp(3), mlp(4)], seed=seed)


def test_a_phase_has_its_loss_parts_and_networks():
    x, y = batch()
    student = mlp(1)
    (phase,) = CE(student).phases(x, y)
    assert phase.networks == (student,) and phase.chunks == 1
    assert phase.loss.shape == () and phase.loss.requires_grad
    assert abs(phase.loss - plain_ce(student(x), y)) < 1e-12
    assert list(phase.losses) == [phase.loss]
    assert phase.parts.keys() == {"ce"} and not phase.parts["ce"].requires_grad and phase.parts["ce"].dim() == 0


def test_a_phase_moves_only_its_own_networks():
    method, (x, y) = roles(), batch()
    optimizer = torch.optim.SGD(method.parameter_groups(0.1), momentum=0.9, weight_decay=0.1)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.1, 0.01])
    train(method, x, y, steps=2, optimizer=optimizer)  # momentum is there
    trained = []
    for phase in method.phases(x, y):
        others = [n for n in (method.pivot, *method.students) if not any(n is m for m in phase.networks)]
        before = [snapshot(n) for n in others]
        optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        assert all(p.grad is None for n in others for p in n.parameters())
        assert all(p.grad is not None for n in phase.networks for p in n.parameters())
        optimizer.step()
        assert all(same(snapshot(n), state) for n, state in zip(others, before, strict=True))
        trained.append(len(phase.networks))
    assert trained == [1, 1, 2]


@pytest.mark.parametrize("taken", [0, 1, 2, 3])
def test_an_iteration_left_half_way_leaves_no_trace(taken):
    x, y = batch()
    method, untouched = roles(), roles()
    train(method, x, y, steps=1)
    train(untouched, x, y, steps=1)
    before = snapshot(method)
    phases = method.phases(x, y)
    for _ in range(taken):
        phase = next(phases)
        method.zero_grad(set_to_none=True)
        phase.loss.backward()
    phases.close()
    assert same(snapshot(method), before)
    for _ in range(6):
        assert len(list(method.phases(x, y))) == len(list(untouched.phases(x, y))) == 3
    assert method.order == untouched.order and method.iterations == 7
    assert len(set(method.order)) > 1


def test_an_error_in_the_loop_leaves_no_trace():
    x, y = batch()
    method = roles()
    before = snapshot(method)
    with pytest.raises(KeyboardInterrupt):
        for _ in method.phases(x, y):
            raise KeyboardInterrupt
    assert same(snapshot(method), before)


def test_iterations_that_are_never_finished_are_told():
    x, y = batch()
    method = DGKD(mlp(1), [mlp(2), mlp(3)], drop="bernoulli")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        next(method.phases(x, y))  # one is an interruption
        list(method.phases(x, y))
        next(method.phases(x, y))
        next(method.phases(x, y))
    with pytest.warns(RuntimeWarning, match="DGKD: two iterations in a row .* loop over method.phases"):
        next(method.phases(x, y))


def test_code_after_the_yield_follows_the_step():
    (x, y), (x2, _) = batch(), batch(seed=1)
    method = MeanTeacher([mlp(1), mlp(2)])
    start = [p.clone() for p in method.means.parameters()]
    train(method, (x, x2), y, steps=1)
    for mean, first, value in zip(method.means.parameters(), start, method.peers.parameters(), strict=True):
        assert not torch.equal(value, first)
        torch.testing.assert_close(mean, 0.75 * first + 0.25 * value.detach(), rtol=0, atol=1e-12)
    before = snapshot(method.means)
    for phase in method.phases((x, x2), y):
        phase.skipped = True  # as a loop does whose GradScaler took no step
    assert same(snapshot(method.means), before)


def test_a_schedule_knows_its_epoch():
    x, y = batch()
    method = MeanTeacher([mlp(1), mlp(2)])
    losses = []
    for epoch in range(4):
        method.start_epoch(epoch, 4)
        losses.append(run(method, (x, x), y))
    assert [loss / losses[3] for loss in losses] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    other = MeanTeacher([mlp(1), mlp(2)])
    other.load_state_dict(method.state_dict())
    assert (other.epoch, other.epochs) == (3, 4)
    with pytest.raises(ValueError, match=r"^MeanTeacher: epoch must be an integer in \[0, 3\], got 4$"):
        method.start_epoch(4, 4)


def test_what_only_training_needs_is_not_deployed():
    x, y = batch()
    method = Translated(mlp(1), mlp(2))
    frozen, transform = snapshot(method.teacher), snapshot(method.transform)
    trained = {id(p) for group in method.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for n in (method.student, method.transform) for p in n.parameters()}
    train(method, x, y, steps=3)
    assert same(snapshot(method.teacher), frozen) and not same(snapshot(method.transform), transform)
    assert method.deployable() is method.student
    assert snapshot(method.deployable()).keys() == snapshot(mlp(1)).keys()


class Wrapper(nn.Module):
    def __init__(self, module, log, name):
        super().__init__()
        self.module, self.log, self.name = module, log, name

    def forward(self, inputs):
        self.log.append(self.name)
        return self.module(inputs)


def test_map_learners_wraps_and_composes():
    x, y = batch()
    method, log = roles(), []
    names, first = list(method.state_dict()), method.students[0]
    assert method.map_learners(partial(Wrapper, log=log, name="inner")) is method
    method.map_learners(partial(Wrapper, log=log, name="outer"))
    phases = list(method.phases(x, y))
    assert log == ["outer", "inner"] * 4
    assert phases[0].networks == (method.learner("pivot"),) and isinstance(phases[0].networks[0], Wrapper)
    assert list(method.state_dict()) == names
    assert method.deployable() is first
    method.eval()
    assert not any(m.training for m in method.learner("students.1").modules())
    train(method, x, y, steps=1)
    twin = copy.deepcopy(method)
    assert twin.learner("pivot").module.module is twin.pivot is not method.pivot
    with pytest.raises(TypeError, match=r"^Roles: wrap must be a function .*, got NoneType$"):
        method.map_learners(lambda network: None)
    assert isinstance(method.learner("pivot"), Wrapper)


def test_under_distributed_data_parallel(tmp_path):
    """One process; the roles need no find_unused_parameters, since each network is wrapped by itself."""
    x, y = batch()
    plain, wrapped = roles(), roles()
    with group_of_one(tmp_path):
        wrapped.map_learners(nn.parallel.DistributedDataParallel)
        train(plain, x, y, steps=3)
        train(wrapped, x, y, steps=3)
        train(plain, x, y, steps=1, chunks=2)
        train(wrapped, x, y, steps=1, chunks=2)
    assert_states_close(wrapped, plain, rtol=0, atol=1e-12)


def in_loop(method, x, y):
    """The phases, each made under autocast, with the loop's steps between them."""
    phases = method.phases(x, y)
    while True:
        with torch.autocast("cpu", torch.bfloat16):
            phase = next(phases, None)
        if phase is None:
            return
        yield phase


def first_only(method, x, y):
    """The only phase; the iterator is left there."""
    with torch.autocast("cpu", torch.bfloat16):
        phase = next(method.phases(x, y))
    yield phase


@pytest.mark.filterwarnings("ignore:CE. two iterations:RuntimeWarning")
@pytest.mark.parametrize("make, loop", [(CE, in_loop), (Twice, in_loop), (CE, first_only)])
def test_an_autocast_around_the_loop_sees_the_new_weights(make, loop):
    """Autocast caches its low-precision weights; a phase after a step must not use those from before it."""
    x, y = images()
    results = []
    for outer in (False, True):
        method, losses = make(bn_net(1).eval()), []
        optimizer = torch.optim.SGD(method.parameter_groups(0.5))
        with torch.autocast("cpu", torch.bfloat16) if outer else contextlib.nullcontext():
            for _ in range(3):
                for phase in loop(method, x, y):
                    optimizer.zero_grad(set_to_none=True)
                    phase.loss.backward()
                    optimizer.step()
                    losses.append(phase.loss.item())
        results.append(losses)
    assert results[0] == results[1] and len(set(results[0])) == len(results[0]) >= 3


def test_state_is_the_methods_own(tmp_path):
    method = roles(seed=5)
    train(method, *batch(), steps=2)
    torch.save(method.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    assert all(isinstance(value, torch.Tensor) for value in state.values())
    other = roles(seed=6)
    other.load_state_dict(state)
    assert same(snapshot(other), snapshot(method)) and other.iterations == 2
    train(method, *batch(), steps=5)
    train(other, *batch(), steps=5)
    assert method.order[2:] == other.order
    assert same(snapshot(other), snapshot(method))
    method.load_state_dict(state)  # back in time: the loaded state was not changed by what came after
    assert method.iterations == 2


def test_a_method_can_be_copied_and_moved():
    x, y = batch()
    method = DGKD(mlp(1), [mlp(2), mlp(3)], lam=0.5, drop="bernoulli", survival=0.5)
    train(method, x, y, steps=2)
    twin = copy.deepcopy(method)
    train(method, x, y, steps=4)
    train(twin, x, y, steps=4)
    assert same(snapshot(method), snapshot(twin))
    single = method.float()
    assert run(single, x.float(), y).isfinite() and single.student[0].weight.dtype == torch.float32


def test_learners_must_be_apart():
    body = mlp(1)
    with pytest.raises(ValueError, match=r"^Roles: students\.1 must be a network of its own, .* with students\.0"):
        Roles(mlp(2), [body, nn.Sequential(body, nn.Identity())])
    with pytest.raises(ValueError, match=r"^Roles: students\.1 must be a network of its own"):
        Roles(mlp(2), [body] * 3)
    with pytest.raises(ValueError, match=r"^Roles: students must be a sequence of at least one network"):
        Roles(mlp(2), [])


def test_a_frozen_network_may_share_with_a_frozen_one():
    """Two heads on one backbone are two teachers."""
    body = nn.Linear(5, 6).double()
    heads = [nn.Sequential(body, nn.Linear(6, 7).double()) for _ in range(2)]
    assert run(DGKD(mlp(1), heads), *batch()).isfinite()


def test_a_method_without_its_parts_says_so():
    class Empty(Method):
        pass

    method = Empty(learners={"student": mlp(1)})
    with pytest.raises(NotImplementedError, match=r"^Empty must define iteration"):
        list(method.phases(*batch()))
    with pytest.raises(NotImplementedError, match=r"^Empty must define deployable"):
        method.deployable()
