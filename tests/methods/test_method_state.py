"""A method's extra state: one tensor that every store of tensors takes, and the dict that earlier versions saved."""

import copy

import pytest
import torch
from methods_helpers import Roles, batch, guides_of, mlp, same, snapshot, train
from orc_helpers import orc
from test_all_methods import EVERY, method_of, optimizer_of
from test_all_methods import batch as batch_of

from fastkd.methods import DGKD
from fastkd.methods._state import unpack


def old_state(method):
    """As versions before 0.1 kept it."""
    extra, random = unpack("", method.get_extra_state())
    return {"random": random, **extra}


@EVERY
def test_a_state_dict_holds_tensors_alone_and_older_ones_load(case):
    method = method_of(case)
    method.start_epoch(3, 7)
    before = method.get_extra_state()
    method.step(optimizer_of(method), *batch_of(case))
    state = method.state_dict()
    assert all(isinstance(value, torch.Tensor) and value.is_contiguous() for value in state.values())
    extra = state["_extra_state"]
    assert extra.dtype == torch.uint8 and extra.device.type == "cpu" and extra.shape == before.shape
    averaged = {n: v.lerp(v, 0.5) if v.is_floating_point() else v for n, v in state.items()}  # an average of weights
    for saved in (state, averaged, {**state, "_extra_state": old_state(method)}):
        other = method_of(case, seed=1)
        other.load_state_dict(saved)
        assert torch.equal(other.get_extra_state(), extra) and (other.iterations, other.epoch) == (1, 3)


def test_the_size_does_not_change_with_the_counters():
    """Loops that go through two state dicts element by element need equal shapes."""
    method, later = orc(), orc()
    later.iterations, later.epochs = 10**12, 10**6
    for mine, other in zip(method.state_dict().values(), later.state_dict().values(), strict=True):
        mine.copy_(0.9 * mine + 0.1 * other)


def test_random_choices_go_on_from_an_older_state():
    x, y = batch()
    method, other = Roles(mlp(1), guides_of(3), seed=4), Roles(mlp(1), guides_of(3), seed=9)
    train(method, x, y, steps=3)
    other.load_state_dict({**method.state_dict(), "_extra_state": old_state(method)})
    for one in (method, other):
        train(one, x, y, steps=6)
    assert other.order == method.order[3:] and same(snapshot(other), snapshot(method))


@pytest.mark.parametrize("wrong", [
    lambda state: state.float(), lambda state: state // 2, lambda state: state[:9], lambda state: None,
])  # fmt: skip
def test_what_is_no_state_is_one_sentence(wrong):
    method = DGKD(mlp(1), guides_of(2))
    state = copy.deepcopy(method.state_dict())
    state["_extra_state"] = wrong(state["_extra_state"])
    with pytest.raises(ValueError, match=r"^DGKD: _extra_state must be the uint8 tensor .* got .*leave it out"):
        method.load_state_dict(state)
