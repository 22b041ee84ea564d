"""Modules that learn beside a student and are thrown away after training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
import torch.nn.functional as torch_functional
from torch import Tensor, nn

from fastkd._core.typed import like

Form = Literal["auto", "loop", "grouped"]
FORMS = get_args(Form)
SLOPE = 0.1  # of the LeakyReLU
MOST_GROUPED = 16  # channels per teacher up to which form="auto" groups


class FeatureTransforms(nn.Module):
    """K non-linear transforms of one feature map, one per teacher: [B, c_S, H, W] -> K x [B, c_k, H, W].

    Each is `layers` = three 3x3 convolutions, c_S -> c_k -> c_k -> c_k, with LeakyReLU(0.1) after every one: the
    transforms NTL_n of Park and Kwak, "Feature-level Ensemble Knowledge Distillation" (FEED, arXiv 1909.10754). Their
    outputs go into `fastkd.functional.feature_ensemble` with the teachers' last feature maps.

    Two forms compute the same numbers from the same parameters, so that a checkpoint of one loads into the other:

        loop       one transform after the other
        grouped    all at once: a first convolution with the outputs of all, then grouped convolutions; needs equal c_k

    >>> transforms = fastkd.nn.FeatureTransforms(8, [4, 6])
    >>> [tuple(each.shape) for each in transforms(torch.zeros(2, 8, 5, 5))]
    [(2, 4, 5, 5), (2, 6, 5, 5)]

    Args:
        in_channels: c_S, channels of the student's map.
        out_channels: c_1 .. c_K, channels of the teachers' maps.
        norm: a function of the channels that makes a normalisation layer, put before each LeakyReLU
            (`torch.nn.BatchNorm2d`, say); none by default. The convolutions have a bias only without it.
        form: "loop", "grouped", or "auto", which takes `chosen_form`.
        layers: number of convolutions, at least 1.
        negative_slope: of the LeakyReLU, in [0, 1]: 1 makes the transforms linear.

    Raises ValueError where the channels or layers are not positive, where there is no teacher, for another slope, or
    where form="grouped" meets several widths.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: Sequence[int],
        *,
        norm: Callable[[int], nn.Module] | None = None,
        form: Form = "auto",
        layers: int = 3,
        negative_slope: float = SLOPE,
    ) -> None:
        super().__init__()
        widths = _check(in_channels, out_channels, form, layers, negative_slope)
        self.in_channels, self.out_channels, self.form = in_channels, widths, form
        self.normalised, self.layers, self.negative_slope = norm is not None, layers, negative_slope
        self.transforms = nn.ModuleList(
            _transform(in_channels, width, norm, layers, negative_slope) for width in widths
        )

    def forward(self, map: Tensor) -> list[Tensor]:  # noqa: A002  # public
        """The map [B, c_S, H, W] of the student -> K maps [B, c_k, H, W], one per teacher."""
        form = chosen_form(map, self.out_channels, self.normalised) if self.form == "auto" else self.form
        if form == "grouped":
            return self._grouped(map)
        return [transform(map) for transform in self.transforms]

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""

    def _grouped(self, x: Tensor) -> list[Tensor]:
        count, first = len(self.transforms), x
        for layers in zip(*self.transforms, strict=True):  # the same layer of every transform
            if isinstance(layers[0], nn.Conv2d):
                groups = 1 if x is first else count
                weight = torch.cat([layer.weight for layer in layers])
                bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
                x = torch_functional.conv2d(x, weight, bias, padding=1, groups=groups)
            elif isinstance(layers[0], nn.LeakyReLU):
                x = torch_functional.leaky_relu(x, self.negative_slope)
            else:  # a normalisation of each transform's own channels
                parts = x.chunk(count, 1)
                x = torch.cat([layer(part) for layer, part in zip(layers, parts, strict=True)], 1)
        return list(x.chunk(count, 1))

    def extra_repr(self) -> str:
        """The hyper-parameters, for `repr`."""
        names = ("in_channels", "out_channels", "form", "layers", "negative_slope")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)


def chosen_form(map: Tensor, out_channels: Sequence[int], normalised: bool = False) -> Form:  # noqa: A002  # public
    """The form that form="auto" takes: "grouped" on the CPU for several equal, narrow transforms, else "loop".

    Measured forward and backward on one core (AMD EPYC, AVX-512), loop time over grouped time, [32, 64, 8, 8] to five
    teachers, contiguous / channels_last: 16 channels 1.4 / 1.4, 32 channels 1.0 / 0.6, 64 channels 1.3 / 0.9;
    [16, 64, 16, 16] to 8 channels 2.2 / 1.5; [4, 512, 7, 7] to three of 256 channels 0.9 / 0.4. Narrow convolutions
    alone fill no vector register; wide ones gain nothing from company, and grouped ones are slow in channels_last.
    A normalisation layer would cut the outputs apart and join them again between the convolutions.

    >>> [fastkd.nn.chosen_form(torch.zeros(1, 8, 5, 5), channels) for channels in ([8, 8], [8, 4])]
    ['grouped', 'loop']
    """
    alike = len(out_channels) > 1 and len(set(out_channels)) == 1
    narrow = alike and out_channels[0] <= MOST_GROUPED
    return "grouped" if narrow and not normalised and map.device.type == "cpu" else "loop"


def _transform(
    in_channels: int,
    out_channels: int,
    norm: Callable[[int], nn.Module] | None,
    count: int,
    negative_slope: float,
) -> nn.Sequential:
    layers: list[nn.Module] = []
    for k in range(count):
        channels = in_channels if k == 0 else out_channels
        layers.append(nn.Conv2d(channels, out_channels, 3, padding=1, bias=norm is None))
        if norm is not None:
            layers.append(norm(out_channels))
        layers.append(nn.LeakyReLU(negative_slope))
    return nn.Sequential(*layers)


def _check(
    in_channels: object, out_channels: object, form: object, layers: object, negative_slope: object
) -> tuple[int, ...]:
    if not isinstance(out_channels, Sequence) or len(out_channels) == 0:
        raise ValueError(f"FeatureTransforms: out_channels must be a channel count per teacher, got {out_channels!r}")
    counts = (("in_channels", in_channels), *(("out_channels", c) for c in out_channels), ("layers", layers))
    for name, value in counts:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"FeatureTransforms: {name} must be whole numbers of at least 1, got {value!r}")
    if isinstance(negative_slope, bool) or not isinstance(negative_slope, Real) or not 0 <= float(negative_slope) <= 1:
        raise ValueError(f"FeatureTransforms: negative_slope must be a number in [0, 1], got {negative_slope!r}")
    if form not in FORMS:
        raise ValueError(f"FeatureTransforms: form must be one of {', '.join(map(repr, FORMS))}, got {form!r}")
    if form == "grouped" and len(set(out_channels)) > 1:
        expected = "one width for all teachers where form='grouped'"
        raise ValueError(f"FeatureTransforms: out_channels must be {expected}, got {list(out_channels)}")
    return tuple(out_channels)
