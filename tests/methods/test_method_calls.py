"""How a loop may call any method: by step, by forward; with gradients where none may be; with NumPy's numbers."""

import inspect
import warnings
from numbers import Real

import numpy as np
import pytest
import torch
from methods_helpers import Roles, guides_of, mlp, same, snapshot
from methods_helpers import batch as rows
from orc_helpers import orc
from test_all_methods import CASES, EVERY, batch, iterate, method_of, optimizer_of

from fastkd import methods

SEVERAL = ("ORC", "DKEL", "PCL", "MeanTeacher")  # of several phases, or with something after the step


@pytest.mark.parametrize("chunks", [1, 3])
@EVERY
def test_step_is_the_loop(case, chunks):
    by_hand, by_step = method_of(case), method_of(case)
    optimizers, expected = [optimizer_of(by_hand), optimizer_of(by_step)], {}
    for seed in range(2):
        inputs, target = batch(case, seed=seed)
        losses = iterate(by_hand, optimizers[0], inputs, target, chunks)
        parts = by_step.step(optimizers[1], inputs, target, chunks=chunks)
        expected = sum(losses)
        torch.testing.assert_close(sum(parts.values()), expected, rtol=1e-5, atol=1e-5, check_dtype=False)
        assert not any(part.requires_grad or part.dim() for part in parts.values())
    assert same(snapshot(by_step), snapshot(by_hand)) and by_step.iterations == 2


def test_step_goes_back_by_the_function_that_it_is_given():
    method, losses = orc(), []
    optimizer = optimizer_of(method)
    method.step(optimizer, *rows(), backward=lambda loss: (losses.append(loss.detach()), loss.backward()))
    assert len(losses) == 3  # one for each phase


def test_step_says_the_order_of_its_arguments():
    method = orc()
    with pytest.raises(TypeError, match=r"optimizer must be .* is optimizer, inputs, target\), got Tensor"):
        method.step(rows()[0], optimizer_of(method), rows()[1])
    assert method.iterations == 0


def test_a_step_that_the_optimiser_left_out_moves_no_average():
    class Skips(torch.optim.SGD):
        step_was_skipped = True  # as accelerate's, after a scaler found an infinity

        def step(self):
            pass

    method = method_of("DKEL")
    before = snapshot(method.teacher.peers)
    method.step(Skips(method.parameters(), 0.1), *batch("DKEL"))
    weights = {name: value for name, value in before.items() if "running" not in name and "batches" not in name}
    assert method.steps == 0 and all(torch.equal(method.teacher.peers.state_dict()[n], v) for n, v in weights.items())


@EVERY
def test_forward_is_the_loss_of_a_method_of_one_phase(case):
    method, twin = method_of(case), method_of(case)
    inputs, target = batch(case)
    if case in SEVERAL:
        with pytest.raises(ValueError, match=rf"^{case}: forward must be .* of one phase .*: call step\("):
            method(inputs, target)
        assert method.iterations == 0
        return
    (phase,) = twin.phases(inputs, target)
    assert torch.equal(method(inputs, target), phase.loss) and method.iterations == 1
    assert torch.equal(method.get_extra_state(), twin.get_extra_state())
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error")
        method.eval()
        losses = [method(inputs, target) for _ in range(4)]
    assert all(torch.equal(loss, losses[0]) for loss in losses)  # the same choices
    assert method.iterations == 1 and torch.equal(method.get_extra_state(), twin.get_extra_state())


def test_forward_of_a_method_that_does_not_say_that_it_has_phases():
    method = Roles(mlp(1), guides_of(2))
    with pytest.raises(ValueError, match=r"^Roles: forward must be"):
        method(*rows())
    assert method.iterations == 0 and method.order == []


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("make", [orc, lambda: Roles(mlp(1), guides_of(3))], ids=["ORC", "Roles"])
def test_gradients_of_networks_that_a_phase_does_not_train_are_refused(make, chunks):
    """Zeros, as zero_grad(set_to_none=False) leaves them, move a network by momentum and weight decay."""
    method = make()
    optimizer = torch.optim.AdamW(method.parameter_groups(0.01))
    phases = method.phases(*rows(), chunks=chunks)
    for loss in next(phases).losses:
        loss.backward()
    optimizer.step()
    pivot = snapshot(method.pivot)
    phase = next(phases)
    optimizer.zero_grad(set_to_none=False)
    with pytest.raises(RuntimeError, match=r"^\w+: pivot must have no gradient where .*phase.*set_to_none=True"):
        next(phase.losses).backward()
    assert same(snapshot(method.pivot), pivot)
    phases.close()


def test_a_part_of_a_network_may_be_trained_alone():
    class Head(methods.CE):
        def iteration(self, batch, generator):
            yield methods.Phase([self.student[2]], self._terms, batch)

    method = Head(mlp(1))
    method.student[0].requires_grad_(False)
    method.step(torch.optim.SGD(method.parameter_groups(0.1)), *rows(), chunks=3)
    assert method.student[2].weight.grad is not None


NUMBERS = {
    "KD": lambda **o: methods.KD(mlp(1), mlp(2), **o),
    "AVER": lambda **o: methods.AVER(mlp(1), [mlp(2)], **o),
    "TAKD": lambda **o: methods.TAKD(mlp(1), [mlp(2)], **o),
    "DGKD": lambda **o: methods.DGKD(mlp(1), [mlp(2), mlp(3)], **o),
    "BAN": lambda **o: methods.BAN(mlp(1), mlp(2), **o),
    "DML": lambda **o: methods.DML([mlp(1), mlp(2)], **o),
    "KDCL": lambda **o: methods.KDCL([mlp(1), mlp(2)], **o),
    "RKD": lambda **o: methods.RKD(mlp(1), mlp(2), **o),
    "CTSLMKT": lambda **o: methods.CTSLMKT([mlp(1), mlp(2)], [mlp(3), mlp(4)], **o),
    "ORC": lambda **o: methods.ORC(mlp(1), [mlp(2), mlp(3)], **o),
    "FEED": lambda **o: methods.FEED(mlp(1), [mlp(2)], channels=(2, [3]), **o),
    "FT": lambda **o: methods.FT(mlp(1), mlp(2), channels=(2, [3]), **o),
    "DKEL": lambda **o: methods.DKEL(CASES["DKEL"].learner(0), **o),
    "PCL": lambda **o: methods.PCL(CASES["PCL"].learner(0), **o),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", NUMBERS)
def test_numbers_of_numpy(name):
    """float32 overflows beside the largest float, and is no value of JSON; neither may show."""
    defaults = {p.name: p.default for p in inspect.signature(getattr(methods, name)).parameters.values()}
    numbers = {n: d for n, d in defaults.items() if isinstance(d, Real) and not isinstance(d, bool)}
    assert numbers
    as_numpy = {n: np.int64(d) if isinstance(d, int) else np.float32(d) for n, d in numbers.items()}
    method = NUMBERS[name](**as_numpy)
    method.start_epoch(np.int64(1), np.int64(3))
    found = {n: getattr(method, n) for n in numbers if hasattr(method, n)}
    assert all(type(value) in (int, float, list) for value in found.values()), found
    method.load_state_dict(method.state_dict())
