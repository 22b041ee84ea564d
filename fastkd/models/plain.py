"""Plain CNNs of 2 to 10 convolutions, the networks of TAKD and DGKD.

Sources: Mirzadeh et al., arXiv 1902.03393 (even sizes), Son et al., arXiv 2009.08825 and its code (odd sizes).
"""

import torch
from torch import Tensor, nn

from fastkd.models.base import NormName, Staged, make_norm, scaled

# Numbers are 3x3 convolutions with so many channels, M is a 2x2 max-pooling; behind the bar the hidden linear layer.
LAYOUTS = {
    2: "32 M 32 M",
    3: "32 32 M 64 M",
    4: "32 32 M 64 64 M",
    5: "32 32 M 64 64 M 128",
    6: "32 32 M 64 64 M 128 128",
    7: "32 32 M 64 64 M 128 128 M 256 M | 64",
    8: "32 32 M 64 64 M 128 128 M 256 256 M | 64",
    9: "32 32 M 64 64 M 128 128 M 256 256 256 M | 512",
    10: "32 32 M 64 64 M 128 128 M 256 256 256 256 M | 512",
}


class PlainCNN(Staged):
    """`depth` (2-10) times convolution, normalisation, ReLU, with poolings between, then one or two linear layers.

    These are the layouts of the CIFAR-100 experiments; the released code has narrower ones of the
    even sizes for CIFAR-10, for 2 and 4 exactly `width=0.5`. As there, convolutions have a bias in front of the
    normalisation, and layers keep PyTorch's initialisation.

    The last map is flattened, not pooled, so that the network works for one image size only. A pooling that would leave
    less than 2x2 pixels is skipped: at 32x32 none is, at 8x8 the third and fourth are.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int,
        image_size: int = 32,
        channels: int = 3,
        *,
        norm: NormName = "batch",
        width: float = 1.0,
    ):
        super().__init__()
        convolutions, _, hidden = LAYOUTS[depth].partition("|")
        make, size = make_norm(norm), image_size
        stages: list[list[nn.Module]] = [[]]
        for item in convolutions.split():
            if item == "M":
                if size >= 4:
                    stages[-1].append(nn.MaxPool2d(2))
                    size //= 2
                stages.append([])
                continue
            out = scaled(int(item), width)
            stages[-1] += [nn.Conv2d(channels, out, 3, padding=1), make(out), nn.ReLU(inplace=True)]
            channels = out
        self.stages = nn.ModuleList(nn.Sequential(*stage) for stage in stages if stage)
        self.image_size = image_size
        self.features_width = channels * size * size
        self.hidden = None
        if hidden:
            self.hidden = nn.Linear(self.features_width, scaled(int(hidden), width))
            self.features_width = self.hidden.out_features
        self.fc = nn.Linear(self.features_width, num_classes)

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the maps of all stages but the last."""
        _check_size(x, self.image_size)
        return super().forward_stem(x)

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = torch.flatten(last, 1)  # [B, c*h*w]
        if self.hidden is not None:
            features = torch.relu(self.hidden(features))
        return features, self.fc(features)


@torch.fx.wrap
def _check_size(x: Tensor, size: int) -> None:
    if x.shape[-2:] != (size, size):
        raise ValueError(
            f"plain CNN: made for images of {size}x{size}, got {x.shape[-2]}x{x.shape[-1]}; "
            "create it with this image_size or resize the images"
        )
