"""What every network shares: `Outputs`, the base class `Network`, normalisation layers, counting."""

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._core.typed import like
from fastkd._outputs import find_logits

Norm = Callable[[int], nn.Module]
NormName = Literal["batch", "group"]


class Outputs(NamedTuple):
    """What a network returns beside plain logits.

    logits    [B, C]
    features  [B, D], the input of the last linear layer (the pooled embedding), or None
    maps      feature maps [B, c, h, w] in the order in which the network computes them, the last
              one last, or None

    A NamedTuple is a tuple, so it passes through torch.compile and DistributedDataParallel as it is.

    >>> output = fastkd.models.create("resnet8", 10).forward_features(torch.zeros(2, 3, 32, 32))
    >>> output.logits.shape, output.features.shape, [tuple(each.shape) for each in output.maps]
    (torch.Size([2, 10]), torch.Size([2, 64]), [(2, 16, 32, 32), (2, 32, 16, 16), (2, 64, 8, 8)])
    """

    logits: Tensor
    features: Tensor | None = None
    maps: tuple[Tensor, ...] | None = None


def logits_of(output: object) -> Tensor:
    """The logits [..., C] of what a network returned: a Tensor, an `Outputs`, any object or dict with `logits`.

    Raises TypeError for anything else.

    >>> fastkd.models.logits_of({"logits": torch.tensor([1.0, 2.0])})
    tensor([1., 2.])
    """
    logits = find_logits(output)
    if logits is not None:
        return logits
    raise TypeError(
        f"logits_of: output must be a Tensor or have a Tensor in `.logits`, got {type(output).__name__}; "
        "let the network return its logits or fastkd.models.Outputs"
    )


def call_network(network: Callable[..., Any], inputs: Any) -> Any:
    """What a network returns for a batch: a dict goes in as keywords, anything else as the one argument.

    >>> inputs = {"ids": torch.tensor([3, 4]), "mask": torch.tensor([1, 0])}
    >>> fastkd.models.call_network(lambda ids, mask: ids * mask, inputs)
    tensor([3, 0])
    """
    return network(**inputs) if isinstance(inputs, Mapping) else network(inputs)


def parameters_count(model: nn.Module, trainable: bool = False) -> int:
    """Number of scalars in the parameters of `model` (each shared parameter once), or in the trainable ones only.

    >>> fastkd.models.parameters_count(torch.nn.Linear(4, 3))
    15
    """
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


class Network(nn.Module):
    """A network that runs in steps, so that its parts can be shared or watched.

    forward_stem(x)          image [B, channels, H, W] -> maps of all stages but the last
    forward_branch(stem)     those maps -> Outputs, with the last stage and the classifier
    forward_head(map)        the last map alone -> features, logits
    forward_features(x)      both: image -> Outputs(logits, features, maps)
    forward(x)               image -> logits [B, num_classes]

    Several peers on a shared stem (ONE, PCL, DKEL) are one network's `forward_stem` and several
    networks' `forward_branch`: `branched` makes them. `stem_layers()` names the modules that `forward_stem`
    runs. `features_width` is D, the width of `Outputs.features`.

    >>> network = fastkd.models.create("resnet8", 10)
    >>> network.stem_layers(), network.features_width
    (('conv1', 'bn1', 'layer1', 'layer2'), 64)
    """

    features_width: int

    def stem_layers(self) -> tuple[str, ...]:
        """The names of the submodules that `forward_stem` runs."""
        raise NotImplementedError

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the feature maps of the stem, the last one last."""
        raise NotImplementedError

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """What `forward_stem` returned -> logits, features and maps."""
        raise NotImplementedError

    def forward_head(self, last: Tensor) -> tuple[Tensor, Tensor]:
        """The last map [B, c, h, w] -> features [B, D] and logits [B, classes], as `forward_branch` ends."""
        raise NotImplementedError

    def forward_features(self, x: Tensor) -> Outputs:
        """Images [B, C, H, W] -> logits [B, classes], features [B, D] and maps."""
        return self.forward_branch(self.forward_stem(x))

    def forward(self, x: Tensor) -> Tensor:
        """Images [B, C, H, W] -> logits [B, classes]."""
        return self.forward_features(x).logits

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""


class Staged(Network):
    """A network of `stages`, a ModuleList of which the last is the branch; subclasses have the head."""

    stages: nn.ModuleList

    def stem_layers(self) -> tuple[str, ...]:
        """All stages but the last."""
        return tuple(f"stages.{i}" for i in range(len(self.stages) - 1))

    def forward_stem(self, x: Tensor) -> tuple[Tensor, ...]:
        """Images [B, C, H, W] -> the maps of all stages but the last."""
        maps = []
        for stage in self.stages[:-1]:
            x = stage(x)
            maps.append(x)
        return tuple(maps)

    def forward_branch(self, stem: tuple[Tensor, ...]) -> Outputs:
        """The stem's maps -> logits [B, classes], features [B, D], maps of all stages."""
        last = self.stages[-1](stem[-1])
        features, logits = self.forward_head(last)
        return Outputs(logits, features, (*stem, last))


class _GroupNorm(nn.GroupNorm):
    """Where it is compiled it works on contiguous maps.

    PyTorch tells a compiler that group normalisation's results are contiguous, but on a CPU they stay channels-last: a
    network that returns its last map, and a view of it as features, then fails at the view.
    """

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # the name that callers may use
        return super().forward(input.contiguous() if torch.compiler.is_compiling() else input)


def make_norm(norm: NormName) -> Norm:
    """The function channels -> normalisation layer for `norm` = "batch" or "group".

    Group normalisation (Wu and He, arXiv 1803.08494) has no buffers and does not look at the other
    samples of the batch. Groups hold 8 channels or more, since maps of small images have few
    pixels, and there are at most 32.
    """
    if norm == "batch":
        return nn.BatchNorm2d
    if norm == "group":
        return lambda channels: _GroupNorm(math.gcd(channels, max(1, min(32, channels // 8))), channels)
    raise ValueError(f'create: norm must be "batch" or "group", got {norm!r}')


def scaled(channels: int, width: float) -> int:
    """`channels` times the width multiplier, at least 1."""
    if not (isinstance(width, int | float) and 0 < width < math.inf):
        raise ValueError(f"create: width must be a positive number, got {width!r}; 1.0 is the published width")
    return max(1, round(channels * width))


def init_kaiming(model: nn.Module) -> None:
    """Convolutions by He's normal initialisation over the fan-out (arXiv 1502.01852), their biases 0."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def global_pool(x: Tensor) -> Tensor:
    """[B, c, h, w] -> [B, c], the mean over the pixels."""
    return torch.flatten(nn.functional.adaptive_avg_pool2d(x, 1), 1)
