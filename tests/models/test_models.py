"""Networks: shapes, published sizes, gradients, features of any network."""

import copy

import pytest
import torch
from torch import nn

from fastkd import models
from fastkd.models.base import make_norm
from fastkd.models.resnet import CifarResNet, ZeroPadShortcut

TORCHVISIONS = [n for n in models.names() if n in ("resnet18", "resnet34", "resnet50") or n[0] in "msd"]
HEAVY = {"wrn28_10", "resnet50", "densenet121", "resnet34"}  # the smallest and the largest image only
LIGHT = ["plain2", "plain7", "resnet8", "wrn16_1", "vgg8", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet40_12"]


def images(n: int, size: int = 8, channels: int = 3) -> torch.Tensor:
    return torch.randn(n, channels, size, size, generator=torch.Generator().manual_seed(0))


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


# The size chooses the stem and what shrinks; the channels are those of its first convolution, whatever the size.
SIZES = [
    (name, size, channels)
    for name in models.names()
    for size, channels in ([(8, 1), (64, 3)] if name in HEAVY else [(8, 1), (16, 3), (32, 1), (64, 3)])
]


@pytest.mark.parametrize("name, size, channels", SIZES)
def test_every_network_maps_images_to_logits(name, size, channels):
    model = models.create(name, 7, size, channels).eval()
    with torch.no_grad():
        logits = model(images(2, size, channels))
    assert logits.shape == (2, 7) and logits.isfinite().all()


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "shufflenet_v2_x0_5", "densenet121", "vgg8"])
def test_imagenet_size(name):
    model = models.create(name, 5, 224).eval()
    with torch.no_grad():
        assert model(images(1, 224)).shape == (1, 5)


def test_torchvision_networks_keep_their_own_stem_on_large_images():
    import torchvision

    for name in ("resnet18", "mobilenet_v2", "shufflenet_v2_x1_0", "densenet121"):
        ours = models.create(name, 1000, 224).state_dict()
        theirs = getattr(torchvision.models, name)().state_dict()
        assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}, name


@pytest.mark.parametrize("name, layers", [("resnet18", "layer{}"), ("densenet121", "features.denseblock{}")])
def test_staged_networks_compute_what_torchvision_computes(name, layers):
    import torchvision
    from torchvision.models.feature_extraction import create_feature_extractor

    ours, theirs = models.create(name, 9, 64, small_stem=False), getattr(torchvision.models, name)(num_classes=9)
    theirs.load_state_dict(ours.state_dict())
    x, nodes = images(2, 64), [layers.format(stage) for stage in (1, 2, 3)]
    with torch.no_grad():
        logits, features, maps = ours.eval().forward_features(x)
        assert torch.equal(logits, theirs.eval()(x))
        taken = create_feature_extractor(theirs, [*nodes, "flatten"])(x)
    assert torch.equal(features, taken["flatten"]) and len(maps) == 4
    assert all(torch.equal(map_, taken[node]) for map_, node in zip(maps, nodes))  # noqa: B905


@pytest.mark.parametrize(
    "name, stride",
    [("resnet18", 8), ("mobilenet_v2", 8), ("shufflenet_v2_x0_5", 8), ("densenet121", 8), ("densenet40_12", 4)],
)
def test_small_stem_shrinks_less(name, stride):
    outputs = models.with_features(models.create(name, 5, 32).eval())(images(1, 32))
    assert outputs.maps[-1].shape[-1] == 32 // stride
    wide = models.with_features(models.create(name, 5, 64, small_stem=False).eval())(images(1, 64))
    assert wide.maps[-1].shape[-1] == 64 // (4 * stride)


def test_a_vgg_with_a_classifier_of_three_layers():
    model = models.create("vgg8", 7, 16, width=0.125, head="mlp").eval()
    assert [type(layer).__name__ for layer in model.hidden] == ["Dropout", "Linear", "ReLU"] * 2
    first, second = model.hidden[1].weight, model.hidden[4].weight
    assert not torch.equal(first, second) and first.shape == (64, 64)
    outputs = model.forward_features(images(2, 16))
    assert torch.equal(model.fc(outputs.features), outputs.logits) and (outputs.features >= 0).all()
    with pytest.raises(ValueError, match=r'create: head must be "linear" or "mlp", got .big.'):
        models.create("vgg8", 7, 16, head="big")


PUBLISHED = [  # name, classes, options, parameters
    ("resnet20", 10, {"shortcut": "zero-pad"}, 269_722),  # He et al., table 6: 0.27 M
    ("resnet32", 10, {"shortcut": "zero-pad"}, 464_154),  # 0.46 M
    ("resnet44", 10, {"shortcut": "zero-pad"}, 658_586),  # 0.66 M
    ("resnet56", 10, {"shortcut": "zero-pad"}, 853_018),  # 0.85 M
    ("resnet110", 10, {"shortcut": "zero-pad"}, 1_727_962),  # 1.7 M
    ("resnet20", 100, {}, 278_324),  # Tian et al.'s code from here: 0.28 M
    ("resnet32", 100, {}, 472_756),
    ("resnet8x4", 100, {}, 1_233_540),
    ("resnet32x4", 100, {}, 7_433_860),
    ("wrn16_2", 100, {}, 703_284),
    ("wrn40_1", 100, {}, 569_780),
    ("wrn40_2", 100, {}, 2_255_156),
    ("vgg8", 100, {}, 3_965_028),
    ("vgg13", 100, {}, 9_462_180),
    ("wrn28_10", 10, {}, 36_479_194),  # Zagoruyko and Komodakis, table 5: 36.5 M
    ("wrn16_4", 10, {}, 2_748_890),  # 2.7 M
]


@pytest.mark.parametrize("name, classes, options, parameters", PUBLISHED)
def test_parameters_are_the_published_ones(name, classes, options, parameters):
    assert models.parameters_count(models.create(name, classes, **options)) == parameters


@pytest.mark.parametrize("depth", [8, 14, 20, 26, 32, 44, 56, 110])
def test_depth_of_cifar_resnets(depth):
    model = models.create(f"resnet{depth}", 10, shortcut="zero-pad")
    weights = [m for m in model.modules() if isinstance(m, nn.Conv2d | nn.Linear)]
    assert len(weights) == depth
    assert [m.out_channels for m in weights[:-1]].count(64) == (depth - 2) // 3
    modules = models.create(f"resnet{depth}", 10).modules()
    projections = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (1, 1) for m in modules)
    assert projections == 2


@pytest.mark.parametrize(
    "name", ["wrn16_2", "wrn28_10", "wrn40_1", "vgg11", "vgg16", "vgg19", *(f"plain{d}" for d in range(2, 11))]
)
def test_depth_of_other_networks(name):
    model = models.create(name, 10)
    convolutions = sum(isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3) for m in model.modules())
    linear = sum(isinstance(m, nn.Linear) for m in model.modules())
    if name.startswith("wrn"):  # the name's depth, 6n + 4, counts the three 1x1 projections too
        assert convolutions == int(name[3:].split("_")[0]) - 3
    elif name.startswith("vgg"):
        assert convolutions + 3 == int(name[3:])  # the original's three linear layers are one here
    else:
        assert (convolutions, linear) == (int(name[5:]), 2 if int(name[5:]) >= 7 else 1)


def test_plain_layouts():
    def widths(depth):
        return [m.out_channels for m in models.create(f"plain{depth}", 10).modules() if isinstance(m, nn.Conv2d)]

    assert widths(2) == [32, 32]
    assert widths(6) == [32, 32, 64, 64, 128, 128]
    assert widths(10) == [32, 32, 64, 64, 128, 128, 256, 256, 256, 256]
    assert models.create("plain6", 10).fc.in_features == 128 * 8 * 8
    assert models.create("plain8", 10).hidden.in_features == 256 * 2 * 2
    assert models.create("plain10", 10).hidden.out_features == 512
    assert models.create("plain10", 10, image_size=8).hidden.in_features == 256 * 2 * 2


def test_zero_pad_shortcut_takes_every_second_pixel_and_pads_both_sides():
    x = images(2, 6, 4)
    y = ZeroPadShortcut(4, 8, 2)(x)
    assert y.shape == (2, 8, 3, 3)
    assert torch.equal(y[:, 2:6], x[:, :, ::2, ::2]) and not y[:, :2].any() and not y[:, 6:].any()


def test_wrn20_8_and_bottleneck_resnet110():
    wide = models.create("wrn20_8", 10)
    assert isinstance(wide, CifarResNet) and wide.layer3[0].conv2.out_channels == 64 * 8 and wide.features_width == 256
    deep = models.create("resnet110", 10, block="bottleneck")
    assert [len(s) for s in (deep.layer1, deep.layer2, deep.layer3)] == [12, 12, 12]


@pytest.mark.parametrize("norm", ["batch", "group"])
@pytest.mark.parametrize(
    "name", ["plain2", "plain3", "plain10", "resnet8", "resnet14", "wrn16_1", "wrn20_8", "vgg8", "vgg11"]
)
def test_gradient_reaches_every_parameter(name, norm):
    model = models.create(name, 5, 8, 1, norm=norm).train()
    nn.functional.cross_entropy(model(images(6, 8, 1)), torch.arange(6) % 5).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key
        assert parameter.grad.abs().max() > 0, key


@pytest.mark.parametrize("name", [n for n in TORCHVISIONS if n not in HEAVY])
def test_gradient_reaches_every_parameter_of_torchvisions(name):
    model = models.create(name, 5, 16).train()
    nn.functional.cross_entropy(model(images(4, 16)), torch.arange(4)).backward()
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), key


def test_group_norm_groups():
    sizes = {c: g.num_groups for c, g in ((c, make_norm("group")(c)) for c in (4, 16, 24, 64, 512))}
    assert sizes == {4: 1, 16: 2, 24: 3, 64: 8, 512: 32}


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_maps_and_a_view_of_the_last_pass_through_compile_in_channels_last(norm):
    """On a CPU runs keep channels-last; the plain networks' features are the last map, flattened."""
    torch.compiler.reset()
    model = models.create("plain2", 5, 8, width=0.25, norm=norm).to(memory_format=torch.channels_last)
    x = images(4, 8)
    compiled = torch.compile(copy.deepcopy(model).forward_features, backend="aot_eager", fullgraph=True)(x)
    plain = model.forward_features(x)
    torch.testing.assert_close(compiled.maps, plain.maps)
    torch.testing.assert_close(compiled.features, plain.features)
    compiled.logits.sum().backward()


@pytest.mark.parametrize("name", ["plain4", "resnet14", "wrn16_2", "vgg11", "resnet18", "mobilenet_v2"])
def test_group_norm_has_no_buffers_and_sees_each_sample_alone(name):
    model = models.create(name, 5, 16, norm="group").train()
    if name == "mobilenet_v2":
        model.classifier[0].p = 0.0
    assert not list(model.buffers())
    assert not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    x = images(4, 16)
    torch.testing.assert_close(model(x)[:1], model(x[:1]), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("name", LIGHT)
def test_eval_mode_is_deterministic_and_leaves_buffers(name):
    model = models.create(name, 5, 8).eval()
    before = copy.deepcopy(model.state_dict())
    x = images(4)
    with torch.no_grad():
        assert torch.equal(model(x), model(x))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.parametrize("name", LIGHT)
def test_state_dict_round_trip_and_distinct_instances(name, tmp_path):
    first, second = models.create(name, 5, 8).eval(), models.create(name, 5, 8).eval()
    x = images(2)
    assert not {id(p) for p in first.parameters()} & {id(p) for p in second.parameters()}
    assert not torch.equal(first(x), second(x))
    torch.save(first.state_dict(), tmp_path / "w.pt")
    second.load_state_dict(torch.load(tmp_path / "w.pt", weights_only=True))
    assert torch.equal(first(x), second(x))


def test_same_seed_same_network():
    def weights():
        torch.manual_seed(3)
        return models.create("resnet8", 5).state_dict()

    first, second = weights(), weights()
    assert all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("name, half", [("plain4", 16), ("resnet8", 8), ("vgg8", 32)])
def test_width_multiplier(name, half):
    first = next(m for m in models.create(name, 5, width=0.5).modules() if isinstance(m, nn.Conv2d))
    assert first.out_channels == half


@pytest.mark.parametrize("alias", ["plane6", "Plain6", "PLAIN-6", "plain_6"])
def test_plain_aliases(alias):
    assert models.parameters_count(models.create(alias, 10)) == models.parameters_count(models.create("plain6", 10))


def test_other_spellings():
    assert isinstance(models.create("ResNet-20", 10), CifarResNet)
    assert models.create("WRN-16-2", 10).features_width == 128
    assert models.create("wrn22_1", 10).features_width == 64
    assert models.create("vgg8_bn", 10).features_width == 512
    assert type(models.create("mobilenetv2", 10)).__name__ == "MobileNetV2"


@pytest.mark.parametrize(
    "call, error, words",
    [
        (lambda: models.create("resnet21", 10), ValueError, ["resnet21", "did you mean", "resnet20"]),
        (lambda: models.create("zzz", 10), ValueError, ["zzz", "known are", "plain2"]),
        (lambda: models.create(8, 10), TypeError, ["name", "int"]),
        (lambda: models.create("wrn17_2", 10), ValueError, ["6n + 4", "wrn16_2"]),
        (lambda: models.create("plain2", 10, 4), ValueError, ["image_size", "at least 8", "4"]),
        (lambda: models.create("plain2", 0), ValueError, ["num_classes", "0"]),
        (lambda: models.create("plain2", 10, channels=0), ValueError, ["channels", "0"]),
        (lambda: models.create("plain2", 10, norm="layer"), ValueError, ["norm", "layer"]),
        (lambda: models.create("plain2", 10, width=-1), ValueError, ["width", "-1"]),
        (lambda: models.create("resnet8", 10, shortcut="none"), ValueError, ["shortcut", "zero-pad", "none"]),
        (lambda: models.create("resnet8", 10, block="bottleneck"), ValueError, ["9n + 2", "8"]),
        (lambda: models.create("densenet121", 10, norm="group"), TypeError, ["densenet121", "norm", "small_stem"]),
        (lambda: models.create("plain2", 10)(images(1, 16)), ValueError, ["32x32", "16x16"]),
        (lambda: models.logits_of("x"), TypeError, ["logits_of", "str"]),
    ],
)
def test_wrong_calls_say_what_to_do(call, error, words):
    with pytest.raises(error) as caught:
        call()
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def test_logits_of():
    logits = torch.ones(2, 3)
    assert models.logits_of(logits) is logits
    assert models.logits_of(models.Outputs(logits)) is logits
    assert models.Outputs(logits).features is None and models.Outputs(logits).maps is None


def test_parameters_count_counts_shared_ones_once():
    layer = nn.Linear(3, 2)
    assert models.parameters_count(nn.Sequential(layer, layer)) == 8
    layer.bias.requires_grad_(False)
    assert models.parameters_count(layer, trainable=True) == 6
