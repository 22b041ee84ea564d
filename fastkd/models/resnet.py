"""Residual networks for small images: ResNet 8-110 and their bottleneck relatives.

Source: He et al., arXiv 1512.03385, section 4.2. Layers bear torchvision's names.
"""

from collections.abc import Callable
from functools import partial
from typing import Literal, get_args

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.base import Network, Norm, NormName, Outputs, global_pool, init_kaiming, make_norm, scaled

Shortcut = Literal["projection", "zero-pad"]
Block = Literal["basic", "bottleneck"]


def _conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, kernel, stride, padding=kernel // 2, bias=False)


class ZeroPadShortcut(nn.Module):
    """He et al.'s option A: every stride-th pixel, and zeros for the new channels, on both sides."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        before = (outputs - inputs) // 2
        self.stride, self.padding = stride, (0, 0, 0, 0, before, outputs - inputs - before)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, planes, H / stride, W / stride]."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], self.padding)


def _shortcut(inputs: int, outputs: int, stride: int, kind: Shortcut, norm: Norm) -> nn.Module | None:
    if stride == 1 and inputs == outputs:
        return None
    if kind == "zero-pad":
        return ZeroPadShortcut(inputs, outputs, stride)
    return nn.Sequential(_conv(inputs, outputs, 1, stride), norm(outputs))


class BasicBlock(nn.Module):
    """Two 3x3 convolutions."""

    expansion = 1

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: Shortcut, norm: Norm):
        super().__init__()
        self.conv1 = _conv(inputs, planes, 3, stride)
        self.bn1 = norm(planes)
        self.conv2 = _conv(planes, planes, 3)
        self.bn2 = norm(planes)
        self.downsample = _shortcut(inputs, planes, stride, shortcut, norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, planes, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        result: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return result


class Bottleneck(nn.Module):
    """1x1, 3x3, 1x1 convolutions; the inner ones `inner` times as wide as usual."""

    expansion = 4

    def __init__(self, inputs: int, planes: int, stride: int, shortcut: Shortcut, norm: Norm, inner: int = 1):
        super().__init__()
        self.conv1 = _conv(inputs, planes * inner, 1)
        self.bn1 = norm(planes * inner)
        self.conv2 = _conv(planes * inner, planes * inner, 3, stride)
        self.bn2 = norm(planes * inner)
        self.conv3 = _conv(planes * inner, planes * self.expansion, 1)
        self.bn3 = norm(planes * self.expansion)
        self.downsample = _shortcut(inputs, planes * self.expansion, stride, shortcut, norm)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, 4 planes, H / stride, W / stride]."""
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.relu(self.bn2(self.conv2(out)))
        out = self.bn3(self.conv3(out))
        result: Tensor = self.relu(out + (x if self.downsample is None else self.downsample(x)))
        return result


class CifarResNet(Network):
    """ResNet of depth 6n+2 (basic blocks) or 9n+2 (`block="bottleneck"`): three stages of 16, 32, 64 planes.

    shortcut  "projection": 1x1 convolution and normalisation where the shape changes, as in the code of DGKD and of
              most of the field; "zero-pad": He et al.'s, without parameters (0.27 M for ResNet-20)
    widths    channels of the stem and of the three stages, each times `width`
    inner     bottleneck only: how many times wider the inner convolutions are

    The image shrinks twice by two and is pooled at the end, so that any size will do.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int,
        num_classes: int,
        image_size: int = 32,
        channels: int = 3,
        *,
        norm: NormName = "batch",
        shortcut: Shortcut = "projection",
        block: Block = "basic",
        width: float = 1.0,
        widths: tuple[int, int, int, int] = (16, 16, 32, 64),
        inner: int = 1,
    ):
        super().__init__()
        if shortcut not in get_args(Shortcut):
            raise ValueError(f'create: shortcut must be "projection" or "zero-pad", got {shortcut!r}')
        kinds: dict[str, tuple[Callable[..., nn.Module], int]]
        kinds = {"basic": (BasicBlock, 6), "bottleneck": (partial(Bottleneck, inner=inner), 9)}
        if block not in kinds:
            raise ValueError(f'create: block must be "basic" or "bottleneck", got {block!r}')
        make, per_block = kinds[block]
        if depth < per_block + 2 or (depth - 2) % per_block:
            raise ValueError(f"create: a {block} ResNet has depth {per_block}n + 2, got {depth}; choose such a depth")
        count, expansion = (depth - 2) // per_block, 1 if block == "basic" else Bottleneck.expansion
        stem, *planes = (scaled(w, width) for w in widths)
        layer_norm = make_norm(norm)
        self.conv1 = _conv(channels, stem, 3)
        self.bn1 = layer_norm(stem)
        inputs = stem
        for stage, p in enumerate(planes, start=1):
            blocks = []
            for i in range(count):
                stride = 2 if stage > 1 and i == 0 else 1
                blocks.append(make(inputs, p, stride, shortcut, layer_norm))
                inputs = p * expansion
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.features_width = inputs
        self.fc = nn.Linear(inputs, num_classes)
        init_kaiming(self)

    def stem_layers(self) -> tuple[str, ...]:
        """All but the third stage and the linear layer."""
        return "conv1", "bn1", "layer1", "layer2"

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the maps of the first two stages."""
        first = self.layer1(F.relu(self.bn1(self.conv1(x))))  # [B, 16, H, W]
        return first, self.layer2(first)  # [B, 32, H/2, W/2]

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """The stem's maps -> logits [B, classes], features [B, D], maps of all three stages."""
        last = self.layer3(stem[-1])  # [B, 64, H/4, W/4]
        features, logits = self.forward_head(last)
        return Outputs(logits, features, (*stem, last))

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = global_pool(last)
        return features, self.fc(features)
