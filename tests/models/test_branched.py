"""Peers on a shared stem: what is shared, what is not, and that each peer stays an ordinary network."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.models import Branched, Outputs, branched

FAMILIES = {
    "plain2": {"width": 0.25},
    "plain8": {"width": 0.125},
    "resnet8": {},
    "resnet20": {"block": "bottleneck", "width": 0.25},
    "resnet8x4": {"width": 0.25},
    "wrn16_1": {"dropout": 0.3},
    "vgg8": {"width": 0.125},
    "vgg11": {"width": 0.125, "norm": "group"},
}


def make(name: str, branches: int = 3, **options) -> Branched:
    torch.manual_seed(0)
    return branched(name, 7, branches, **({"image_size": 8, "channels": 1} | FAMILIES.get(name, {}) | options))


def images(rows: int = 4, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", FAMILIES)
def test_the_stem_is_one_and_the_branches_are_not(name):
    network = make(name)
    stems = [{id(p) for layer in peer.stem_layers() for p in peer.get_submodule(layer).parameters()}
             for peer in network.peers]  # fmt: skip
    alone = models.create(name, 7, 8, 1, **FAMILIES[name])
    in_stem = sum(p.numel() for layer in alone.stem_layers() for p in alone.get_submodule(layer).parameters())
    assert stems[0] == stems[1] == stems[2] and in_stem > 0
    branches = [{n: p for n, p in peer.named_parameters() if id(p) not in stems[0]} for peer in network.peers]
    assert len({id(p) for branch in branches for p in branch.values()}) == 3 * len(branches[0])
    weights = [n for n, p in branches[0].items() if p.dim() > 1]  # norms and some biases start as constants
    assert len(weights) >= 2
    for n in weights:
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert not torch.equal(branches[i][n], branches[j][n])
    expected = models.parameters_count(alone) * 3 - 2 * in_stem
    assert models.parameters_count(network) == expected == sum(p.numel() for p in network.parameters())


@pytest.mark.parametrize("name", FAMILIES)
def test_the_named_stem_layers_are_those_that_run(name):
    network = models.create(name, 7, 8, 1, **FAMILIES[name])
    stem = {n for n, _ in network.named_parameters() if any(n.startswith(f"{s}.") for s in network.stem_layers())}
    sum(m.square().sum() for m in network.forward_stem(images())).backward()
    assert {n for n, p in network.named_parameters() if p.grad is not None} == stem


@pytest.mark.parametrize("name", FAMILIES)
def test_a_peer_is_an_ordinary_network(name):
    network = make(name).eval()
    views = [images(seed=i) for i in range(3)]
    outputs = network(views)
    assert isinstance(outputs, tuple) and all(type(o) is Outputs for o in outputs)
    for i, (output, view) in enumerate(zip(outputs, views, strict=True)):
        peer = network.peer(i)
        assert torch.equal(peer(view), output.logits) and output.logits.shape == (4, 7)
        assert output.features.shape == (4, peer.features_width)
        other = models.create(name, 7, 8, 1, **FAMILIES[name]).eval()
        other.load_state_dict(peer.state_dict())
        assert torch.equal(other(view), output.logits)
    for single, alone in zip(network(images()), network([images()] * 3), strict=True):
        assert torch.equal(single.logits, alone.logits)


def test_one_tensor_runs_the_stem_once():
    network, calls = make("resnet8"), []
    network.peer(1).conv1.register_forward_hook(lambda *_: calls.append(1))
    network(images())
    assert len(calls) == 1
    network([images()] * 3)
    assert len(calls) == 4


def test_each_view_reaches_its_own_branch_and_the_stem_learns_from_all():
    network = make("resnet8")
    network([images(seed=i) for i in range(3)])[1].logits.sum().backward()
    got = {n for n, p in network.named_parameters() if p.grad is not None}
    stem = {f"peers.0.{n}" for n, _ in network.peer(0).named_parameters() if not n.startswith(("layer3", "fc"))}
    assert got == stem | {n for n, _ in network.named_parameters() if n.startswith("peers.1.")}


def test_copies_moves_and_state_dicts_keep_the_stem_shared(tmp_path):
    network = make("resnet8")
    torch.save(network.state_dict(), tmp_path / "network.pt")
    loaded = make("resnet8", branches=3)
    nn.init.zeros_(loaded.peer(2).conv1.weight)
    loaded.load_state_dict(torch.load(tmp_path / "network.pt", weights_only=True))
    for other in (copy.deepcopy(network), loaded, copy.deepcopy(network).double().float()):
        assert other.peer(2).layer2 is other.peer(0).layer2 and other.peer(2).layer3 is not other.peer(0).layer3
        assert other.peer(0).conv1.weight is not network.peer(0).conv1.weight
        other.eval(), network.eval()
        for one, two in zip(other(images()), network(images()), strict=True):
            assert torch.equal(one.logits, two.logits)
    once = sum(t.numel() * t.element_size() for t in {t.data_ptr(): t for t in network.state_dict().values()}.values())
    assert (tmp_path / "network.pt").stat().st_size < once + 60_000  # 3 x 90 entries of the zip file


def test_fresh_is_another_one_of_the_same_shape():
    network = make("wrn16_1", branches=2)
    other = network.fresh()
    assert [p.shape for p in network.parameters()] == [p.shape for p in other.parameters()]
    assert not torch.equal(network.peer(0).conv1.weight, other.peer(0).conv1.weight)
    assert other.peer(0).conv1 is other.peer(1).conv1
    assert copy.deepcopy(network).fresh().state_dict().keys() == network.state_dict().keys()
    with pytest.raises(ValueError, match=r"^Branched: fresh\(\) needs a network made by branched"):
        Branched([models.create("plain2", 7), models.create("plain2", 7)]).fresh()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_compiles(backend):
    torch.compiler.reset()
    network = make("plain2").eval()
    compiled = partial(torch.compile, backend=backend, fullgraph=True)(network)
    views = [images(seed=i) for i in range(3)]
    for one, two in zip(compiled(views), network(views), strict=True):
        assert type(one) is Outputs
        torch.testing.assert_close(one.logits, two.logits)


class Mine(models.Network):
    """A network of one's own."""

    features_width = 3

    def __init__(self):
        super().__init__()
        self.body, self.fc = nn.Linear(4, 3), nn.Linear(3, 2)

    def stem_layers(self):
        return ("body",)

    def forward_stem(self, x):
        return (self.body(x),)

    def forward_branch(self, stem):
        return Outputs(self.fc(stem[-1]), stem[-1], None)


def test_networks_of_ones_own():
    network = Branched([Mine(), Mine()])
    assert len(list(network.parameters())) == 6 and network.peer(1).body is network.peer(0).body
    assert network(torch.randn(5, 4))[1].logits.shape == (5, 2)


@pytest.mark.parametrize("name, stem, features", [
    ("resnet18", "layer3.0.conv1.weight", 512), ("densenet40_12", "features.transition2.conv.weight", 132),
])  # fmt: skip
def test_networks_of_torchvision_are_cut_before_their_last_stage(name, stem, features):
    """PCL's tiny ResNets and DenseNet-40-12: one stem, branches apart, and each peer torchvision's own function."""
    torch.manual_seed(0)
    network = branched(name, 5, 2, image_size=16).eval()
    first, second = network.peers
    own = {n for n, p in first.named_parameters() if p is not second.get_parameter(n)}
    assert stem not in own and "fc.bias" in own | {n.replace("classifier", "fc") for n in own}
    assert all(n.split(".")[0] in ("layer4", "fc", "classifier") or "denseblock3" in n or "norm5" in n for n in own)
    x = torch.randn(2, 3, 16, 16)
    outputs = network(x)
    assert [o.features.shape[1] for o in outputs] == [features] * 2 and not torch.equal(*[o.logits for o in outputs])
    assert torch.equal(network.peer(1)(x), outputs[1].logits)


SAME = models.create("plain2", 7)


@pytest.mark.parametrize("call, error, message", [
    (lambda: branched("mobilenet_v2", 10), ValueError, "branched: name must be a network with a stem .*, got 'mob.*'"),
    (lambda: branched("shufflenet_v2_x0_5", 10), ValueError, "branched: name .*, got 'shufflenet_v2_x0_5'"),
    (lambda: branched("resnet8", 10, 1), ValueError, "branched: branches must be an integer of at least 2, got 1"),
    (lambda: branched("resnet8", 10, True), ValueError, "branched: branches .*, got True"),
    (lambda: branched("resnet9", 10), ValueError, "create: no network is called 'resnet9'"),
    (lambda: branched("resnet8", 10, growth=3), TypeError, "create: resnet8 has no option 'growth'"),
    (lambda: Branched([SAME]), ValueError, "Branched: networks must be at least two, got 1"),
    (lambda: Branched([SAME, nn.Linear(2, 2)]), TypeError, r"Branched: networks\[1\] must be .*, got Linear"),
    (lambda: Branched([SAME] * 3), ValueError, r"Branched: networks\[1\] must be .* of its own, .*networks\[0\]"),
    (lambda: Branched([SAME, models.create("plain2", 8)]), ValueError, r"Branched: networks\[1\] must have the shapes"),
    (lambda: make("plain2")([images()] * 2), ValueError, "Branched: views must be one tensor or 3 .*, got 2"),
])  # fmt: skip
def test_wrong_set_ups(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()
