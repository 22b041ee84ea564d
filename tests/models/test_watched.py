"""with_features on networks that torch.fx cannot trace: their modules are watched by hooks."""

import copy
import pickle
from types import SimpleNamespace

import pytest
import torch
from methods_helpers import CLASSES, batch, run, same, snapshot
from torch import nn

from fastkd.methods import RKD
from fastkd.models import Outputs, with_features


class Branches(nn.Module):
    """A small transformer whose forward looks at values, takes keywords, works in place and returns an object."""

    def __init__(self, seed=0):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.embed, self.norm = nn.Linear(5, 6), nn.BatchNorm1d(6)
            self.block, self.act = nn.Linear(6, 6), nn.ReLU(inplace=True)
            self.spare, self.dropout, self.head = nn.Linear(2, 2), nn.Dropout(0.5), nn.Linear(6, CLASSES)
        self.double()

    def forward(self, x, *, scale=None):
        if x.sum() > 1e9:  # no tracing
            return None
        h = self.norm(self.embed(x if scale is None else x * scale))
        h = self.act(self.block(h))
        h = self.act(self.block(h) + h)
        return SimpleNamespace(logits=self.head(self.dropout(h)))


def by_hand(network, x):
    h = network.norm(network.embed(x))
    h = network.block(h).relu()
    last = network.block(h)
    return network.head((last + h).relu()), last


def test_outputs_of_a_network_that_cannot_be_traced():
    x, _ = batch()
    network = Branches().eval()
    watched = with_features(network, ["norm", "block"])
    logits, last = by_hand(network, x)
    for outputs in (watched(x), watched(x / 2, scale=torch.full((10, 1), 2.0, dtype=torch.float64))):
        assert isinstance(outputs, Outputs) and outputs.maps is None
        assert torch.equal(outputs.logits, logits) and torch.equal(outputs.features, last)  # the second run
    assert not any(module._forward_hooks for module in network.modules())
    assert list(watched.state_dict()) == list(network.state_dict())


def test_its_gradients_and_modes_are_the_networks():
    x, _y = batch()
    network = Branches()
    watched = with_features(network, ["block"])
    torch.manual_seed(3)
    outputs = watched.train()(x)
    (outputs.features.sum() + outputs.logits.sum()).backward()
    assert network.norm.num_batches_tracked == 1 and network.embed.weight.grad is not None
    watched.eval()
    assert not network.training and not network.dropout.training and torch.equal(watched(x).logits, watched(x).logits)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_watches_its_own_network(clone):
    x, _ = batch()
    watched = with_features(Branches(), ["block"]).eval()
    twin = clone(watched)
    assert twin.source is not watched.source and same(snapshot(twin), snapshot(watched))
    with torch.no_grad():
        twin.source.block.bias += 1
    assert not torch.equal(twin(x).features, watched(x).features)


@pytest.mark.parametrize("layers, message", [
    (["blok"], "runs no layer 'blok'; did you mean block"),
    (["add_1"], "runs no layer 'add_1'; "),
    (["spare"], "did not run layer 'spare'"),
])  # fmt: skip
def test_layers_that_are_not_there(layers, message):
    with pytest.raises(ValueError, match=f"^with_features: Branches.* {message}"):
        with_features(Branches(), layers)(batch()[0])


def test_a_block_that_returns_a_tuple_is_its_first_tensor():
    class Pair(nn.Module):
        def forward(self, x):
            return (x * 2, None) if x.sum() < 1e9 else None

    class Net(nn.Module):
        def __init__(self, returned):
            super().__init__()
            self.pair, self.returned = Pair(), returned

        def forward(self, x):
            return self.pair(x)[0] if x.sum() < 1e9 else None

    x, _ = batch()
    assert torch.equal(with_features(Net(None), ["pair"])(x).features, 2 * x)
    network = Net(None)
    network.pair.forward = lambda x: {"a": x, 0: x}
    with pytest.raises(ValueError, match=r"^with_features: layer 'pair' must give a tensor, got dict"):
        with_features(network, ["pair"])(x)


@pytest.mark.parametrize("compiled", [False, True])
def test_it_learns_by_relations(compiled):
    x, y = batch()
    method = RKD(with_features(Branches(1), ["block"]), with_features(Branches(2), ["block"]))
    torch.manual_seed(0)
    expected = run(method, x, y)
    gradient = method.student.source.embed.weight.grad.clone()
    if compiled:
        torch.compiler.reset()
        method.map_learners(lambda network: torch.compile(network, backend="eager"))
    torch.manual_seed(0)
    torch.testing.assert_close(run(method, x, y), expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(method.student.source.embed.weight.grad, gradient, rtol=0, atol=1e-12)
