"""VGG 8-19 with normalisation and a small classifier, in the form that papers on distillation use for small images.

Sources: Simonyan and Zisserman, arXiv 1409.1556 (11-19); Tian et al., arXiv 1910.10699 (VGG-8, small classifier).
"""

from typing import Literal, get_args

from torch import Tensor, nn

from fastkd.models.base import NormName, Staged, global_pool, init_kaiming, make_norm, scaled

Head = Literal["linear", "mlp"]
CHANNELS = (64, 128, 256, 512, 512)
CONVOLUTIONS = {  # in each of the five stages
    8: (1, 1, 1, 1, 1),
    11: (1, 1, 2, 2, 2),
    13: (2, 2, 2, 2, 2),
    16: (2, 2, 3, 3, 3),
    19: (2, 2, 4, 4, 4),
}


class VGG(Staged):
    """Five stages of convolution, normalisation, ReLU; a global average pooling; one linear layer.

    A 2x2 max-pooling stands between two stages only while the map is larger than 4x4, so that the last
    stage sees 4x4 pixels for images of 8 to 64 pixels. As in the field's code, convolutions have a bias.

    head  "linear", one linear layer, or "mlp": dropout, linear, ReLU twice before it, as in the code of PCL and DKEL;
          the features are then the input of the last linear layer
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
        head: Head = "linear",
    ):
        super().__init__()
        make, size = make_norm(norm), image_size
        stages: list[nn.Module] = []
        for outputs, count in zip(CHANNELS, CONVOLUTIONS[depth], strict=True):
            outputs = scaled(outputs, width)
            layers: list[nn.Module] = []
            if stages and size > 4:
                layers.append(nn.MaxPool2d(2))
                size //= 2
            for _ in range(count):
                layers += [nn.Conv2d(channels, outputs, 3, padding=1), make(outputs), nn.ReLU(inplace=True)]
                channels = outputs
            stages.append(nn.Sequential(*layers))
        self.stages = nn.ModuleList(stages)
        self.features_width = channels
        if head not in get_args(Head):
            raise ValueError(f'create: head must be "linear" or "mlp", got {head!r}')
        self.hidden = nn.Sequential()
        for _ in range(2 if head == "mlp" else 0):
            self.hidden.extend([nn.Dropout(), nn.Linear(channels, channels), nn.ReLU(inplace=True)])
        self.fc = nn.Linear(channels, num_classes)
        init_kaiming(self)
        nn.init.normal_(self.fc.weight, std=0.01)
        nn.init.zeros_(self.fc.bias)

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map -> features, logits."""
        features = self.hidden(global_pool(last))
        return features, self.fc(features)
