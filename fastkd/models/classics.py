"""AlexNet, SqueezeNet 1.1 and ShuffleNetV1, in forms that also fit small images: networks of CTSL-MKT's comparisons.

Sources: Krizhevsky et al. 2012 in its later one-column form (arXiv 1404.5997), arXiv 1602.07360, arXiv 1707.01083. As
in papers on CIFAR, all have normalisation, end in a global pooling and one linear layer, and shrink small images less:
at `image_size` <= 64 the first convolution keeps their size. What they give up for it is our choice.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.base import Network, Norm, NormName, Staged, global_pool, init_kaiming, make_norm, scaled

SMALL = 64  # largest image_size that is treated as small
LEAST = 4  # pixels; a smaller map is not halved


class Classic(Staged):
    """Stages of layers, the last of them the branch; a global average pooling; dropout; one linear layer."""

    def __init__(self, stages: Sequence[nn.Module], channels: int, num_classes: int, dropout: float = 0.0):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.dropout = nn.Dropout(dropout)
        self.features_width = channels
        self.fc = nn.Linear(channels, num_classes)
        init_kaiming(self)

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = self.dropout(global_pool(last))
        return features, self.fc(features)


def _convolution(inputs: int, outputs: int, kernel: int, make: Norm, stride: int = 1, groups: int = 1) -> nn.Sequential:
    """With normalisation, without ReLU; keeps the size but for the stride."""
    layer = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(layer, make(outputs))


class _Pooled:
    """Max-pooling between stages, while maps are large enough."""

    def __init__(self, size: int):
        self.size = size

    def halved(self) -> list[nn.Module]:
        if self.size <= LEAST:
            return []
        self.size //= 2
        return [nn.MaxPool2d(2)]


def alexnet(
    num_classes: int, image_size: int, channels: int, *, norm: NormName = "batch", width: float = 1.0
) -> Network:
    """Convolutions of 64, 192, 384, 256 and 256 channels; the first 3x3, for large images 11x11 of stride 4."""
    make, small = make_norm(norm), image_size <= SMALL
    widths = [scaled(each, width) for each in (64, 192, 384, 256, 256)]
    pools = _Pooled(image_size if small else image_size // 4)
    first = _convolution(channels, widths[0], 3 if small else 11, make, 1 if small else 4)
    stages = [[first, nn.ReLU(inplace=True)]]
    stages.append([*pools.halved(), _convolution(widths[0], widths[1], 5, make), nn.ReLU(inplace=True)])
    stages.append(pools.halved())
    for inputs, outputs in pairwise(widths[1:]):
        stages[-1] += [_convolution(inputs, outputs, 3, make), nn.ReLU(inplace=True)]
    return Classic([nn.Sequential(*stage) for stage in stages], widths[-1], num_classes, dropout=0.5)


class Fire(nn.Module):
    """A 1x1 convolution to `squeeze` channels, and 1x1 and 3x3 ones to `expand` each, side by side."""

    def __init__(self, inputs: int, squeeze: int, expand: int, make: Norm):
        super().__init__()
        self.squeeze = _convolution(inputs, squeeze, 1, make)
        self.one, self.three = _convolution(squeeze, expand, 1, make), _convolution(squeeze, expand, 3, make)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, 2 * expand, h, w]."""
        x = F.relu(self.squeeze(x))
        return F.relu(torch.cat([self.one(x), self.three(x)], 1))


FIRES = (((16, 64), (16, 64)), ((32, 128), (32, 128)), ((48, 192), (48, 192), (64, 256), (64, 256)))


def squeezenet(
    num_classes: int, image_size: int, channels: int, *, norm: NormName = "batch", width: float = 1.0
) -> Network:
    """SqueezeNet 1.1: a convolution of 64 channels and eight Fire modules in three stages."""
    make, small, inputs = make_norm(norm), image_size <= SMALL, scaled(64, width)
    pools = _Pooled(image_size if small else image_size // 2)
    stages = [[_convolution(channels, inputs, 3, make, 1 if small else 2), nn.ReLU(inplace=True)]]
    for fires in FIRES:
        stages.append(pools.halved())
        for squeeze, expand in fires:
            stages[-1].append(Fire(inputs, scaled(squeeze, width), scaled(expand, width), make))
            inputs = 2 * scaled(expand, width)
    return Classic([nn.Sequential(*stage) for stage in stages], inputs, num_classes, dropout=0.5)


def shuffled(x: Tensor, groups: int) -> Tensor:
    """The channels of a map [B, c, h, w] in another order: those of one group are spread over all groups."""
    batch, channels, *size = x.shape
    return x.view(batch, groups, channels // groups, *size).transpose(1, 2).reshape(batch, channels, *size)


class ShuffleUnit(nn.Module):
    """A residual unit of grouped 1x1 convolutions with their channels shuffled and a 3x3 depthwise one between them.

    With stride 2 the shortcut is pooled and stands beside the result instead of being added. first: the unit after the
    first convolution, whose few channels are not grouped.
    """

    def __init__(self, inputs: int, outputs: int, groups: int, stride: int, make: Norm, first: bool):
        super().__init__()
        inner, self.groups, self.stride = outputs // 4, groups, stride
        own = outputs - inputs if stride == 2 else outputs
        self.reduce = _convolution(inputs, inner, 1, make, groups=1 if first else groups)
        self.spatial = _convolution(inner, inner, 3, make, stride, groups=inner)
        self.expand = _convolution(inner, own, 1, make, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        """[B, inputs, h, w] -> [B, outputs, h / stride, w / stride]."""
        y = shuffled(F.relu(self.reduce(x)), self.groups)
        y = self.expand(self.spatial(y))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([F.avg_pool2d(x, 3, 2, 1), y], 1))


def shufflenet_v1(num_classes: int, image_size: int, channels: int, *, norm: NormName = "batch") -> Network:
    """ShuffleNetV1 1x of 3 groups: 24 channels, then 4, 8 and 4 units of 240, 480 and 960."""
    make, small, inputs = make_norm(norm), image_size <= SMALL, 24
    first = [_convolution(channels, inputs, 3, make, 1 if small else 2), nn.ReLU(inplace=True)]
    stages = [nn.Sequential(*first, *([] if small else [nn.MaxPool2d(3, 2, 1)]))]
    for outputs, count in ((240, 4), (480, 8), (960, 4)):
        units = []
        for i in range(count):
            units.append(ShuffleUnit(inputs, outputs, 3, 2 if i == 0 else 1, make, first=inputs == 24))
            inputs = outputs
        stages.append(nn.Sequential(*units))
    return Classic(stages, inputs, num_classes)
