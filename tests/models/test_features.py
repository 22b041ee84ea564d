"""Features: what networks return beside logits, and `with_features` for any network."""

import copy
import pickle

import pytest
import torch
from group_helpers import group_of_one
from torch import nn

from fastkd import models

HEAVY = {"wrn28_10", "resnet50", "densenet121", "resnet34"}
OURS = [n for n in models.names() if n not in ("resnet18", "resnet34", "resnet50") and n[0] in "prwv"]


def images(n: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [8, 32])
@pytest.mark.parametrize("name", [n for n in OURS if n not in HEAVY])
def test_native_features(name, size):
    model = models.create(name, 5, size).eval()
    out = model.forward_features(images(2, size))
    assert isinstance(out, models.Outputs)
    assert out.features.shape == (2, model.features_width)
    assert torch.equal(out.logits, model(images(2, size))) and torch.equal(out.logits, model.fc(out.features))
    assert len(out.maps) >= 2 and all(m.ndim == 4 and m.shape[0] == 2 for m in out.maps)
    assert all(a.shape[-1] >= b.shape[-1] for a, b in zip(out.maps, out.maps[1:], strict=False))
    if not name.startswith("plain"):
        torch.testing.assert_close(out.maps[-1].mean((2, 3)), out.features)


@pytest.mark.parametrize(
    "name, shapes",
    [
        ("resnet20", [(16, 32), (32, 16), (64, 8)]),
        ("wrn16_2", [(32, 32), (64, 16), (128, 8)]),
        ("vgg8", [(64, 32), (128, 16), (256, 8), (512, 4), (512, 4)]),
        ("plain6", [(32, 16), (64, 8), (128, 8)]),
        ("plain10", [(32, 16), (64, 8), (128, 4), (256, 2)]),
    ],
)
def test_shapes_of_the_maps_are_the_published_ones(name, shapes):
    maps = models.create(name, 5, 32).eval().forward_features(images(1, 32)).maps
    assert [(m.shape[1], m.shape[2]) for m in maps] == shapes


def test_branches_on_a_shared_stem():
    first, second = models.create("resnet8", 5, 8), models.create("resnet8", 5, 8)
    stem = first.forward_stem(images(4))
    (first.forward_branch(stem).logits.sum() + second.forward_branch(stem).logits.sum()).backward()
    assert first.conv1.weight.grad is not None and second.conv1.weight.grad is None
    assert second.layer3[0].conv1.weight.grad is not None


@pytest.mark.parametrize("name", [n for n in models.names() if n not in HEAVY])
def test_with_features_without_names(name):
    model = models.create(name, 5, 16).eval()
    outputs = models.with_features(model)(images(2, 16))
    torch.testing.assert_close(outputs.logits, model(images(2, 16)))
    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    torch.testing.assert_close(last(outputs.features), outputs.logits)
    assert outputs.maps[-1].ndim == 4


CASES = [("resnet8", None), ("resnet8", ["layer2", "layer3"]), ("resnet18", ["layer2", "layer4", "flatten"])]


@pytest.mark.parametrize("name, layers", CASES)
def test_with_features_shares_everything_with_the_network(name, layers):
    model = models.create(name, 5, 8)
    watched = models.with_features(model, layers)
    assert list(watched.state_dict()) == list(model.state_dict())
    assert all(a is b for a, b in zip(watched.parameters(), model.parameters(), strict=True))
    buffers = {k: v.clone() for k, v in model.named_buffers()}
    watched.train()(images(4)).logits.sum().backward()
    assert model.conv1.weight.grad is not None
    assert any(not torch.equal(buffers[k], v) for k, v in model.named_buffers())
    watched.double()
    assert model(images(2).double()).dtype == torch.float64


@pytest.mark.parametrize("name, layers", CASES)
def test_with_features_follows_modes_and_agrees(name, layers):
    model = models.create(name, 5, 8).eval()
    model.layer1.train()
    watched = models.with_features(model, layers)
    assert not model.training and model.layer1.training and not model.layer3.training
    for mode in (True, False):
        watched.train(mode)
        assert {m.training for m in model.modules()} == {mode}
        torch.testing.assert_close(watched(images(4)).logits, model(images(4)))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
@pytest.mark.parametrize("name, layers", CASES)
def test_with_features_is_copied_with_its_mode(name, layers, copied):
    watched = models.with_features(models.create(name, 5, 8), layers).eval()
    other = copied(watched)
    assert not {id(t) for t in other.state_dict(keep_vars=True).values()} & {
        id(t) for t in watched.state_dict(keep_vars=True).values()
    }
    assert not any(m.training for m in other.modules())
    x = images(2)
    assert torch.equal(other(x).features, watched(x).features)
    with torch.no_grad():
        other.conv1.weight.zero_()
    assert not torch.equal(other(x).features, watched(x).features)


def test_features_without_a_flat_layer_are_the_last_maps_mean():
    out = models.with_features(models.create("resnet18", 5, 8).eval(), ["layer1", "layer3"])(images(2))
    assert [m.shape for m in out.maps] == [(2, 64, 8, 8), (2, 256, 2, 2)]
    torch.testing.assert_close(out.features, out.maps[-1].mean((2, 3)))


@pytest.mark.parametrize("layer", ["bn1", "layer1.0.bn2"])
def test_a_layer_before_an_in_place_operation_keeps_its_value(layer):
    model = models.create("resnet18", 5, 8).eval()  # torchvision: relu in place, `out += identity`
    seen = []
    module = model.get_submodule(layer)
    handle = module.register_forward_hook(lambda _, __, value: seen.append(value.clone()))
    model(images(2))
    handle.remove()
    assert torch.equal(models.with_features(model, [layer])(images(2)).maps[0], seen[0])


def test_features_of_a_users_own_network():
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(144, 6), nn.ReLU(), nn.Linear(6, 3))
    out = models.with_features(model, ["1", "4"])(images(2, 8, 1))
    assert out.maps[0].shape == (2, 4, 6, 6) and out.features.shape == (2, 6) and out.logits.shape == (2, 3)
    only_flat = models.with_features(model, ["4"])(images(2, 8, 1))
    assert only_flat.maps is None and only_flat.features.shape == (2, 6)


class Scaled(nn.Module):
    """State of the root itself, and another graph in each mode."""

    def __init__(self):
        super().__init__()
        self.register_buffer("scale", torch.full((1,), 2.0))
        self.fc = nn.Linear(64, 5)

    def forward(self, x):
        x = nn.functional.dropout(x.flatten(1), 0.5, self.training)
        return self.fc(x * self.scale)


def test_root_state_and_both_graphs_follow_the_network():
    model = Scaled().eval()
    watched = models.with_features(model, ["mul"]).double()
    x = images(2, 8, 1).double()
    assert torch.equal(watched(x).features, 2 * x.flatten(1))
    model.scale = torch.ones(1, dtype=torch.float64)
    assert torch.equal(watched(x).features, x.flatten(1))
    dropped = watched.train()(x).features
    assert 20 < (dropped == 0).sum() < 108 and model.training
    assert torch.equal(watched.eval()(x).features, x.flatten(1))


class Branching(nn.Module):
    def forward(self, x):
        return x if x.sum() > 0 else -x


@pytest.mark.parametrize(
    "make, error, words",
    [
        (lambda: models.with_features(models.create("resnet8", 5), ["layer4"]), ValueError, ["layer4", "layer3"]),
        (lambda: models.with_features(nn.Sequential(nn.Flatten())), ValueError, ["layer_names", "Sequential"]),
        (lambda: models.with_features(nn.Sequential(nn.Flatten()), "0"), TypeError, ["list", "'0'"]),
        (lambda: models.with_features(nn.Sequential(nn.Flatten()), []), ValueError, ["empty"]),
        (lambda: models.with_features("resnet8"), TypeError, ["nn.Module", "str"]),
        (lambda: models.with_features(Branching(), ["x"]), ValueError, ["Branching", "cannot trace", "no layer 'x'"]),
        (
            lambda: models.with_features(nn.Sequential(nn.Flatten(2), nn.Flatten()), ["0"])(images(1)),
            ValueError,
            ["[1, 3, 64]"],
        ),
    ],
)
def test_with_features_errors(make, error, words):
    with pytest.raises(error) as caught:
        make()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name, layers", [("plain2", None), ("plain2", ["stages.0", "fc"]), *CASES])
def test_outputs_pass_through_compile(name, layers):
    watched = models.with_features(models.create(name, 5, 8), layers).eval()
    compiled = torch.compile(watched, backend="eager", fullgraph=True)
    out, expected = compiled(images(2)), watched(images(2))
    assert isinstance(out, models.Outputs)
    torch.testing.assert_close(out.features, expected.features)
    torch.testing.assert_close(out.maps[-1], expected.maps[-1])


def test_outputs_pass_through_data_parallel(tmp_path):
    with group_of_one(tmp_path):
        for layers in (None, ["layer3"]):
            model = models.create("resnet8", 5, 8)
            parallel = nn.parallel.DistributedDataParallel(models.with_features(model, layers))
            out = parallel(images(4))
            assert isinstance(out, models.Outputs)
            (out.logits.sum() + out.features.sum()).backward()
            assert model.conv1.weight.grad is not None
