"""`prepared`: a frozen copy that gives the same outputs; networks have statistics as training leaves them."""

import copy

import pytest
import torch
from torch import nn

from fastkd.models import branched, create, prepared, with_features

NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


def used(network: nn.Module, seed: int = 0) -> nn.Module:
    """In train mode, with running statistics and weights of batch normalisation as training leaves them."""
    generator = torch.Generator().manual_seed(seed)
    for module in network.modules():
        if isinstance(module, NORMS):
            for value, low, high in ((module.running_mean, -1, 1), (module.running_var, 0.5, 2)):
                if value is not None:
                    value.uniform_(low, high, generator=generator)
            nn.init.uniform_(module.weight, 0.5, 1.5, generator=generator)
            nn.init.uniform_(module.bias, -0.5, 0.5, generator=generator)
    return network.train()


def images(rows: int = 2, channels: int = 3, size: int = 16, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(rows, channels, size, size, generator=torch.Generator().manual_seed(1)).to(dtype)


def norms(network: nn.Module) -> int:
    return sum(isinstance(module, NORMS) for module in network.modules())


def outputs(network, x):
    """All that it gives, as a list of tensors; the logits first."""
    with torch.no_grad():
        found = [network(x)]
        if hasattr(network, "forward_features"):
            found += [network.forward_features(x)]
    return [t for each in found for t in torch.utils._pytree.tree_leaves(each) if isinstance(t, torch.Tensor)]


def assert_same(fast, network, x):
    expected = outputs(copy.deepcopy(network).eval(), x)
    found = outputs(fast, x)
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    "name, folded, left",
    [
        ("resnet8", 9, 0),
        ("wrn16_1", 6, 7),  # before a convolution it cannot be folded
        ("vgg8", 5, 0),
        ("plain4", 4, 0),
        ("resnet18", 20, 0),
        ("mobilenet_v2", 52, 0),
        ("shufflenet_v2_x0_5", 56, 0),
        ("densenet40_12", 19, 21),
    ],
)
def test_the_same_outputs_with_fewer_layers(name, folded, left):
    torch.manual_seed(0)
    network = used(create(name, 5, image_size=16, channels=3)).double()
    before = copy.deepcopy(network.state_dict())
    fast = prepared(network)
    assert (fast.folded, norms(fast), fast.left_out) == (folded, left, ())
    assert_same(fast, network, images())
    assert network.training and all(p.requires_grad for p in network.parameters())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())
    assert not any(p.requires_grad for p in fast.parameters())
    assert not any(m.training for m in fast.train().modules())


def test_in_float32_as_near_as_the_network_itself():
    torch.manual_seed(0)
    network = used(create("resnet20", 5, image_size=16))
    x = images(dtype=torch.float32)
    with torch.no_grad():
        exact = copy.deepcopy(network).double().eval()(x.double())
        assert (prepared(network)(x) - exact).abs().max() < 1e-6 * exact.abs().max()


def test_branched_networks_and_their_peers():
    torch.manual_seed(0)
    network = used(branched("resnet8", 5, 2, image_size=16)).double()
    fast = prepared(network)
    assert (norms(fast), fast.left_out) == (0, ()) and fast.folded == 9 + 3  # the stem's once
    assert fast.network.peer(0).conv1 is fast.network.peer(1).conv1
    assert_same(fast, network, images())
    assert_same(prepared(network.peer(1)), network.peer(1), images())


def test_layers_that_are_watched_stay_what_they_are():
    """A convolution whose own output is a feature map is not folded."""
    torch.manual_seed(0)
    network = used(create("resnet8", 5, image_size=16)).double()
    for layers, folded in ((["conv1", "layer1", "layer3"], 8), (["bn1", "layer3"], 9), (None, 9)):
        watching = with_features(network, layers)
        fast = prepared(watching)
        assert (fast.folded, fast.left_out) == (folded, ())
        assert_same(fast, watching, images())
    blocks = with_features(used(create("mobilenet_v2", 5, image_size=16)).double())
    assert prepared(blocks).folded == 52
    assert_same(prepared(blocks), blocks, images())


def test_a_vision_transformer():
    vit = pytest.importorskip("torchvision.models").VisionTransformer(16, 8, 1, 2, 16, 16, num_classes=5).double()
    fast = prepared(vit)
    assert (fast.folded, fast.left_out) == (0, ())
    assert_same(fast, vit, images())


class Conv(nn.Module):
    """x -> norm(conv(x)), and whatever `forward` makes of it."""

    def __init__(self, forward, norm=None):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(2, 2, 3, padding=1), norm or nn.BatchNorm2d(2)
        self.how = forward

    def forward(self, x):
        return self.how(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(m.conv(x))),  # runs twice
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),
        lambda m, x: (lambda y: m.norm(y) + y)(m.conv(x)),  # read by something else
        lambda m, x: m.norm(m.conv(x)) * m.conv.weight.mean(),
        lambda m, x: m.norm(m.conv(m.norm(x))),
        lambda m, x: m.norm(x),
    ],
)
def test_what_is_read_elsewhere_is_not_folded(forward):
    network = used(Conv(forward)).double()
    fast = prepared(network)
    assert (fast.folded, fast.left_out) == (0, ())
    assert_same(fast, network, images(channels=2))


def test_normalisation_by_the_batch_and_hooked_layers_stay():
    usual = lambda m, x: m.norm(m.conv(x))  # noqa: E731
    by_batch = used(Conv(usual, nn.BatchNorm2d(2, track_running_stats=False))).double()
    hooked, seen = used(Conv(usual)).double(), []
    hooked.conv.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for network in (by_batch, hooked):
        assert prepared(network).folded == 0
        assert_same(prepared(network), network, images(channels=2))
    assert len(seen) == 2
    torch.testing.assert_close(seen[0], seen[1])
    assert prepared(used(Conv(usual)).double()).folded == 1


def test_a_network_that_cannot_be_traced_goes_on_and_says_why():
    network = used(Conv(lambda m, x: m.norm(m.conv(x)) if x.sum() > 0 else m.conv(x))).double()
    fast = prepared(network)
    (reason,) = fast.left_out
    assert "\n" not in reason and reason.startswith("batch normalisation is not folded: torch.fx cannot trace Conv (")
    for x in (images(channels=2).abs(), -images(channels=2).abs()):
        assert_same(fast, network, x)
    assert prepared(network, fold=False).left_out == ()


def test_options():
    torch.manual_seed(0)
    network = used(create("resnet8", 5, image_size=16)).double()
    plain = prepared(network, fold=False, channels_last=False)
    assert (plain.folded, norms(plain)) == (0, 9) and torch.equal(
        *(outputs(n, images())[0] for n in (plain, network.eval()))
    )
    weight = prepared(network).network.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last) and not weight.is_contiguous()
    half = prepared(network, dtype=torch.bfloat16)
    assert {t.dtype for t in outputs(half, images())} == {torch.bfloat16}
    calls = []
    torch.compiler.reset()
    compiled = prepared(network, compile=True)
    compiled.network.compile(backend=lambda graph, example: calls.append(graph) or graph.forward)
    torch.testing.assert_close(compiled(images()), outputs(network, images())[0])
    assert len(calls) == 1
    dropped = prepared(nn.Sequential(nn.Linear(3, 64), nn.Dropout(0.5)))
    x = torch.ones(2, 3)
    assert torch.equal(dropped(x), dropped(x)) and not hasattr(dropped, "forward_features")


def test_wrong_arguments_are_one_sentence():
    for arguments, message in (
        ((lambda x: x,), "prepared: network must be an nn.Module, got function"),
        ((nn.Linear(1, 1), "yes"), "prepared: fold must be True or False, got str"),
    ):
        with pytest.raises(TypeError, match=message):
            prepared(arguments[0], **{"fold": arguments[1]} if len(arguments) > 1 else {})
    with pytest.raises(
        ValueError, match=r"prepared: dtype must be a floating-point torch.dtype, or None, got torch.int8"
    ):
        prepared(nn.Linear(1, 1), dtype=torch.int8)
    stuck = nn.Linear(2, 2)
    stuck.extra = stuck.weight * 2  # not a leaf: deepcopy refuses it
    with pytest.raises(TypeError, match=r"network must be a network that copy.deepcopy copies, got Linear \("):
        prepared(stuck)
