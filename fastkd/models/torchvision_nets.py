"""Networks of torchvision, with any number of input channels and a first layer fit for small images.

ImageNet's networks shrink an image 4 times before their first block. At `image_size` <= 64 (or with
`small_stem=True`) they get what papers on CIFAR give them: a 3x3 first convolution of stride 1 and no
max-pooling; MobileNetV2's second stage also keeps its size. All then shrink the image 8 times,
DenseNet-40-12 4 times. ResNets and DenseNets are `Network`s of torchvision's layers under torchvision's names, so that
state dicts fit both.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from fastkd._core.extras import require
from fastkd.models.base import Network, Norm, NormName, Outputs, global_pool, make_norm

SMALL = 64  # largest image_size that gets the small stem

# For `with_features` without layer names: ends of stages, then the input of the classifier.
MOBILENET_LAYERS = ("features.3", "features.6", "features.13", "features.18", "flatten")
SHUFFLENET_LAYERS = ("stage2", "stage3", "stage4", "conv5", "mean")


def _models() -> Any:
    return require("torchvision.models", "this network")


def _norm_layer(norm: NormName) -> Norm | None:
    return None if norm == "batch" else make_norm(norm)


def _first_conv(old: nn.Conv2d, channels: int, small: bool) -> nn.Conv2d:
    if not small:
        if channels == old.in_channels:
            return old
        shape: tuple[Any, Any, Any] = (old.kernel_size, old.stride, old.padding)
    else:
        shape = (3, 1, 1)
    conv = nn.Conv2d(channels, old.out_channels, *shape, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


def _is_small(small_stem: bool | None, image_size: int) -> bool:
    return image_size <= SMALL if small_stem is None else small_stem


class StagedResNet(Network):
    """A torchvision ResNet whose last stage, of four, is the branch."""

    conv1: nn.Module
    bn1: nn.Module
    relu: nn.Module
    maxpool: nn.Module
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module
    layer4: nn.Module
    avgpool: nn.Module
    fc: nn.Linear

    def __init__(self, model: nn.Module):
        super().__init__()
        for name, child in model.named_children():
            self.add_module(name, child)
        self.features_width = self.fc.in_features

    def stem_layers(self) -> tuple[str, ...]:
        """The layers before the branch."""
        return ("conv1", "bn1", "relu", "maxpool", "layer1", "layer2", "layer3")

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of all stages but the last."""
        maps = [self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(x)))))]
        for stage in (self.layer2, self.layer3):
            maps.append(stage(maps[-1]))
        return tuple(maps)

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """The last stage and the classifier."""
        last = self.layer4(stem[-1])  # [B, 512 or 2048, h, w]
        features, logits = self.forward_head(last)
        return Outputs(logits, features, (*stem, last))

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = torch.flatten(self.avgpool(last), 1)
        return features, self.fc(features)


class StagedDenseNet(Network):
    """A torchvision DenseNet whose last dense block is the branch; the transition before it belongs to the stem."""

    features: nn.Sequential
    classifier: nn.Linear

    def __init__(self, model: Any):
        super().__init__()
        self.features, self.classifier = model.features, model.classifier
        self.features_width = self.classifier.in_features
        names = [name for name, _ in self.features.named_children()]
        blocks = [name for name in names if name.startswith("denseblock")]
        self._last, self._stem = blocks[-1], names[: names.index(blocks[-1])]

    def stem_layers(self) -> tuple[str, ...]:
        """The layers before the branch."""
        return tuple(f"features.{name}" for name in self._stem)

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """The maps of all blocks but the last, and what the last transition makes of them."""
        maps = []
        for name in self._stem:
            x = self.features.get_submodule(name)(x)
            if name.startswith("denseblock"):
                maps.append(x)
        return (*maps, x)

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """The last stage and the classifier."""
        last = self.features.get_submodule("norm5")(self.features.get_submodule(self._last)(stem[-1]))
        last = nn.functional.relu(last, inplace=True)  # [B, D, h, w]
        features, logits = self.forward_head(last)
        return Outputs(logits, features, (*stem[:-1], last))

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = global_pool(last)
        return features, self.classifier(features)


def resnet(
    depth: int,
    num_classes: int,
    image_size: int,
    channels: int,
    *,
    norm: NormName = "batch",
    small_stem: bool | None = None,
) -> nn.Module:
    """ResNet-18/34/50, arXiv 1512.03385."""
    build = getattr(_models(), f"resnet{depth}")
    model: Any = build(num_classes=num_classes, norm_layer=_norm_layer(norm))
    small = _is_small(small_stem, image_size)
    model.conv1 = _first_conv(model.conv1, channels, small)
    if small:
        model.maxpool = nn.Identity()
    return StagedResNet(model)


def mobilenet_v2(
    num_classes: int,
    image_size: int,
    channels: int,
    *,
    width: float = 1.0,
    norm: NormName = "batch",
    small_stem: bool | None = None,
) -> nn.Module:
    """MobileNetV2, arXiv 1801.04381."""
    small = _is_small(small_stem, image_size)
    setting = [  # expansion, channels, repeats, stride: torchvision's, but for the second stride
        [1, 16, 1, 1],
        [6, 24, 2, 1 if small else 2],
        [6, 32, 3, 2],
        [6, 64, 4, 2],
        [6, 96, 3, 1],
        [6, 160, 3, 2],
        [6, 320, 1, 1],
    ]
    model: Any = _models().MobileNetV2(
        num_classes=num_classes, width_mult=width, inverted_residual_setting=setting, norm_layer=_norm_layer(norm)
    )
    model.features[0][0] = _first_conv(model.features[0][0], channels, small)
    model.feature_layers = MOBILENET_LAYERS
    return cast(nn.Module, model)


def shufflenet_v2(
    size: str, num_classes: int, image_size: int, channels: int, *, small_stem: bool | None = None
) -> nn.Module:
    """ShuffleNetV2 of width "x0_5", "x1_0", "x1_5" or "x2_0", arXiv 1807.11164."""
    model: Any = getattr(_models(), f"shufflenet_v2_{size}")(num_classes=num_classes)
    small = _is_small(small_stem, image_size)
    model.conv1[0] = _first_conv(model.conv1[0], channels, small)
    if small:
        model.maxpool = nn.Identity()
    model.feature_layers = SHUFFLENET_LAYERS
    return cast(nn.Module, model)


def densenet(
    growth: int,
    blocks: tuple[int, ...],
    stem: int,
    num_classes: int,
    image_size: int,
    channels: int,
    *,
    small_stem: bool | None = None,
) -> nn.Module:
    """DenseNet-BC, arXiv 1608.06993: `blocks` layers of `growth` channels a block, `stem` channels at first."""
    model: Any = _models().DenseNet(growth, blocks, stem, num_classes=num_classes)
    small = _is_small(small_stem, image_size)
    model.features.conv0 = _first_conv(model.features.conv0, channels, small)
    if small:
        model.features.pool0 = nn.Identity()
    return StagedDenseNet(model)
