"""Wide residual networks WRN-d-k. Source: Zagoruyko and Komodakis, arXiv 1605.07146."""

import torch.nn.functional as F
from torch import Tensor, nn

from fastkd.models.base import Network, Norm, NormName, Outputs, global_pool, init_kaiming, make_norm


class PreActBlock(nn.Module):
    """Normalisation and ReLU before each of two 3x3 convolutions; a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int, norm: Norm, dropout: float):
        super().__init__()
        self.bn1 = norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn2 = norm(outputs)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        same = stride == 1 and inputs == outputs
        self.shortcut = None if same else nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[B, c, H, W] -> [B, planes, H / stride, W / stride]."""
        active = F.relu(self.bn1(x))
        out = self.conv2(self.dropout(F.relu(self.bn2(self.conv1(active)))))
        result: Tensor = out + (x if self.shortcut is None else self.shortcut(active))
        return result


class WideResNet(Network):
    """WRN-`depth`-`widening`: (depth - 4) / 6 blocks in each of three stages of 16k, 32k, 64k channels.

    The last of `maps` is taken after the final normalisation and ReLU, since that is what is pooled;
    the two before are raw sums of residuals. `dropout` is a probability, 0 as in most papers on distillation.
    """

    layer1: nn.Sequential
    layer2: nn.Sequential
    layer3: nn.Sequential

    def __init__(
        self,
        depth: int,
        widening: int,
        num_classes: int,
        image_size: int = 32,
        channels: int = 3,
        *,
        norm: NormName = "batch",
        dropout: float = 0.0,
    ):
        super().__init__()
        if depth < 10 or (depth - 4) % 6 or widening < 1:
            raise ValueError(
                f"create: wrn<d>_<k> needs d = 6n + 4 and k >= 1, got wrn{depth}_{widening}; "
                f"use wrn{max(10, 6 * round((depth - 4) / 6) + 4)}_{max(1, widening)}"
            )
        make, inputs = make_norm(norm), 16
        self.conv1 = nn.Conv2d(channels, inputs, 3, padding=1, bias=False)
        for stage in (1, 2, 3):
            outputs, blocks = 8 * 2**stage * widening, []
            for i in range((depth - 4) // 6):
                blocks.append(PreActBlock(inputs, outputs, 2 if stage > 1 and i == 0 else 1, make, dropout))
                inputs = outputs
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
        self.bn1 = make(inputs)
        self.features_width = inputs
        self.fc = nn.Linear(inputs, num_classes)
        init_kaiming(self)
        nn.init.zeros_(self.fc.bias)

    def stem_layers(self) -> tuple[str, ...]:
        """The first convolution and two of three stages."""
        return "conv1", "layer1", "layer2"

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the maps of the first two stages."""
        first = self.layer1(self.conv1(x))  # [B, 16k, H, W]
        return first, self.layer2(first)  # [B, 32k, H/2, W/2]

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """The stem's maps -> logits [B, classes], features [B, 64k], maps of all three stages."""
        last = F.relu(self.bn1(self.layer3(stem[-1])))  # [B, 64k, H/4, W/4]
        features, logits = self.forward_head(last)
        return Outputs(logits, features, (*stem, last))

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = global_pool(last)
        return features, self.fc(features)
