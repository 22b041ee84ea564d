"""Features and maps of the networks of a method, also of wrapped ones."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from group_helpers import group_of_one
from methods_helpers import batch, mlp, same, snapshot
from torch import nn

from fastkd.methods import Method, Phase
from fastkd.methods._features import outputs_of
from fastkd.methods.base import cross_entropy
from fastkd.models import Outputs, create, with_features


class Net(nn.Module):
    """A network of one's own, float64: its plain call gives logits, as that of `create`'s networks does."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.body = mlp(seed, classes=6)
        self.head = mlp(seed + 1, inputs=6)
        self.calls = 0

    def forward_features(self, inputs):
        self.calls += 1
        features = self.body(inputs)
        return Outputs(self.head(features), features)

    def forward(self, inputs):
        return self.forward_features(inputs).logits


class Gives(nn.Module):
    """Returns what it was made with."""

    def __init__(self, output):
        super().__init__()
        self.output = output

    def forward(self, inputs):
        return self.output


class Embedded(Method):
    """Trains its networks by cross-entropy and a penalty on the embedding."""

    gives_outputs = True

    def __init__(self, networks, teacher):
        super().__init__(learners={"networks": networks}, frozen={"teacher": teacher})

    def iteration(self, batch, generator):
        def terms(inputs, target):
            run = partial(outputs_of, method_name="Embedded", argument="teacher")
            taught = self.teach(self.teacher, inputs, run)
            assert not taught.features.requires_grad and not self.teacher.training
            outputs = [outputs_of(n, inputs, "Embedded", f"networks[{i}]") for i, n in enumerate(learners)]
            ce = sum(cross_entropy(o.logits, target) for o in outputs)
            return ce + sum((o.features - taught.features).square().mean() for o in outputs), {"ce": ce.detach()}

        learners = [self.learner(f"networks.{i}") for i in range(len(self.networks))]
        yield Phase(learners, terms, batch)

    def deployable(self):
        return self.networks[0]


class Wrapper(nn.Module):
    def __init__(self, module):
        super().__init__()
        self.module, self.calls = module, 0

    def forward(self, inputs):
        self.calls += 1
        return self.module(inputs)


def embedded():
    return Embedded([Net(1), Net(3)], Net(5))


def step(method):
    (phase,) = method.phases(*batch())
    method.zero_grad(set_to_none=True)
    phase.loss.backward()
    return phase.loss.detach(), [p.grad.clone() for p in method.networks.parameters()]


def assert_same_step(method, expected, tolerance):
    loss, grads = step(method)
    torch.testing.assert_close(loss, expected[0], rtol=0, atol=tolerance)
    for grad, other in zip(grads, expected[1], strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("need", ["features", "maps"])
@pytest.mark.parametrize("wrap", [lambda n: n, with_features], ids=["forward_features", "with_features"])
def test_outputs_of_a_network(need, wrap):
    torch.manual_seed(0)
    network = create("resnet8", 7, image_size=8, channels=1).eval()
    x = torch.randn(3, 1, 8, 8)
    outputs, expected = outputs_of(wrap(network), x, "M", "student", need), network.forward_features(x)
    assert torch.equal(outputs.logits, network(x)) and torch.equal(outputs.features, expected.features)
    assert outputs.features.shape == (3, network.features_width)
    assert all(torch.equal(a, b) for a, b in zip(outputs.maps, expected.maps, strict=True))


def test_other_objects_with_the_same_names_are_outputs():
    x = torch.randn(3, 4)
    outputs = outputs_of(Gives(SimpleNamespace(logits=x, features=x[:, :2])), x, "M", "student")
    assert isinstance(outputs, Outputs) and outputs.maps is None and outputs.features.shape == (3, 2)


Z = torch.zeros(3, 4)
BAD = {
    "logits only": (Z, "features", TypeError, r"its pooled embedding \(.*with_features.*got Tensor instead"),
    "logits only, maps": (Z, "maps", TypeError, r"its feature maps \(.*with_features.*got Tensor instead"),
    "a tuple": ((Z, Z), "features", TypeError, "got tuple instead"),
    "no features": (Outputs(Z), "features", ValueError, "got Outputs whose features are None"),
    "no maps": (Outputs(Z, Z), "maps", ValueError, "with_features.* got Outputs whose maps are None"),
    "no map": (Outputs(Z, Z, ()), "maps", ValueError, "got Outputs without a map"),
    "not pooled": (Outputs(Z, Z[..., None, None]), "features", ValueError, r"\[B, D\], got shape \[3, 4, 1, 1\]"),
    "flat map": (Outputs(Z, Z, (Z,)), "maps", ValueError, r"\[B, c, h, w\], got shape \[3, 4\]"),
    "list features": (Outputs(Z, [1.0]), "features", ValueError, "got list"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_network_without_them_is_one_sentence(case):
    output, need, error, message = BAD[case]
    with pytest.raises(error, match=rf"^M: peers\[1\] must be a network .*{message}") as caught:
        outputs_of(Gives(output), Z, "M", "peers[1]", need)
    assert "\n" not in str(caught.value)


def test_a_forward_features_that_returns_a_tensor_is_refused():
    network = mlp(1)
    network.forward_features = network.forward  # as in timm
    with pytest.raises(TypeError, match=r"^M: student must be .*with_features.*, got Tensor instead of Outputs$"):
        outputs_of(network, batch()[0], "M", "student")


def test_wrapped_networks_are_called():
    plain, method = embedded(), embedded()
    names, expected = list(method.state_dict()), step(plain)
    method.map_learners(Wrapper).map_learners(Wrapper)
    assert_same_step(method, expected, 0)
    outer = method.learner("networks.1")
    assert outer.calls == outer.module.calls == method.networks[1].calls == 1
    assert list(method.state_dict()) == names and method.deployable() is method.networks[0]
    assert method.deployable()(batch()[0]).shape == (10, 7)
    method.eval()
    assert not any(m.training for m in outer.modules())
    method.train()
    assert all(m.training for m in outer.modules()) and not method.teacher.training
    twin = copy.deepcopy(method)
    assert twin.learner("networks.0").module.module.network is twin.networks[0] is not method.networks[0]
    assert same(snapshot(twin), snapshot(method))


def test_a_phase_names_the_networks_themselves():
    method = embedded()
    (phase,) = method.phases(*batch())
    assert phase.networks == tuple(method.networks)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_are_compiled(backend):
    torch.compiler.reset()
    expected, method, graphs = step(embedded()), embedded(), []
    if backend == "eager":
        backend = lambda graph, example: graphs.append(graph) or graph.forward  # noqa: E731
    method.map_learners(partial(torch.compile, backend=backend))
    assert_same_step(method, expected, 1e-12)
    assert callable(backend) == (len(graphs) > 0)


def test_data_parallel_sees_the_call(tmp_path):
    with group_of_one(tmp_path):
        expected, method, calls = step(embedded()), embedded(), []
        method.map_learners(nn.parallel.DistributedDataParallel)
        for i in range(2):  # a hook that runs only where DDP's own backward does
            method.learner(f"networks.{i}").register_comm_hook(calls, twice)
        _loss, grads = step(method)
        assert len(calls) == 2
        for grad, other in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(grad, 2 * other, rtol=0, atol=1e-12)


def twice(calls, bucket):
    calls.append(bucket.index())
    future = torch.futures.Future()
    future.set_result(bucket.buffer() * 2)
    return future


def test_a_network_of_a_method_that_needs_logits_is_wrapped_as_it_is():
    class Plain(Embedded):
        gives_outputs = False

    method = Plain([Net(1)], Net(5)).map_learners(Wrapper)
    assert method.learner("networks.0").module is method.networks[0]
    with pytest.raises(TypeError, match="with_features"):
        next(method.phases(*batch()))
