"""Networks by name: `create` and `names`."""

import inspect
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from fastkd._core.messages import guess
from fastkd.models import classics, torchvision_nets
from fastkd.models.plain import LAYOUTS, PlainCNN
from fastkd.models.resnet import CifarResNet
from fastkd.models.vgg import CONVOLUTIONS, VGG
from fastkd.models.wrn import WideResNet

SMALLEST_IMAGE = 8

_WRN = re.compile(r"(?:wrn|wide_?resnet)[-_]?(\d+)[-_x](\d+)", re.IGNORECASE)
_LISTED_WRN = ("wrn16_1", "wrn16_2", "wrn16_4", "wrn28_2", "wrn28_4", "wrn28_10", "wrn40_1", "wrn40_2", "wrn20_8")


def _builders() -> dict[str, Callable[..., nn.Module]]:
    table: dict[str, Callable[..., nn.Module]] = {f"plain{depth}": partial(PlainCNN, depth) for depth in LAYOUTS}
    for depth in (8, 14, 20, 26, 32, 44, 56, 110):
        table[f"resnet{depth}"] = partial(CifarResNet, depth)
    for depth in (8, 32):
        table[f"resnet{depth}x4"] = partial(CifarResNet, depth, widths=(32, 64, 128, 256))
    for depth in (18, 34, 50):
        table[f"resnet{depth}"] = partial(torchvision_nets.resnet, depth)
    table |= {name: build for name in _LISTED_WRN if (build := _wide(name)) is not None}
    for depth in CONVOLUTIONS:
        table[f"vgg{depth}"] = partial(VGG, depth)
    table["mobilenet_v2"] = torchvision_nets.mobilenet_v2
    for size in ("x0_5", "x1_0", "x1_5", "x2_0"):
        table[f"shufflenet_v2_{size}"] = partial(torchvision_nets.shufflenet_v2, size)
    table |= {"alexnet": classics.alexnet, "squeezenet": classics.squeezenet, "shufflenet_v1": classics.shufflenet_v1}
    table["densenet40_12"] = partial(torchvision_nets.densenet, 12, (6, 6, 6), 24)
    table["densenet121"] = partial(torchvision_nets.densenet, 32, (6, 12, 24, 16), 64)
    return table


def _wide(name: str) -> Callable[..., nn.Module] | None:
    match = _WRN.fullmatch(name)
    if match is None:
        return None
    depth, widening = map(int, match.groups())
    if depth == 20:
        return partial(CifarResNet, 20, block="bottleneck", inner=widening)
    return partial(WideResNet, depth, widening)


def _key(name: str) -> str:
    key = re.sub(r"[-_. ]", "", name.lower())
    return re.sub(r"^plane", "plain", re.sub(r"(vgg\d+)bn$", r"\1", key))


_BUILDERS = _builders()
_BY_KEY = {_key(name): name for name in _BUILDERS}


def names() -> list[str]:
    """The names that `create` knows. It takes any other wrn<d>_<k> with d = 6n + 4 as well.

    >>> {"resnet20", "wrn16_2", "vgg8"} <= set(fastkd.models.names())
    True
    """
    return list(_BUILDERS)


def _builder(name: str) -> Callable[..., nn.Module]:
    if not isinstance(name, str):
        raise TypeError(f"create: name must be a string such as {names()[0]!r}, got {type(name).__name__}")
    wide = _wide(name)
    if wide is not None:
        return wide
    key = _key(name)
    if key in _BY_KEY:
        return _BUILDERS[_BY_KEY[key]]
    near = guess(key, _BY_KEY, most=3, show=_BY_KEY.__getitem__)
    raise ValueError(f"create: no network is called {name!r}; {near}known are {', '.join(names())}")


def _check_integer(argument: str, value: int, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"create: {argument} must be an integer of at least {least}, got {value!r}")


def create(name: str, num_classes: int, image_size: int = 32, channels: int = 3, **options: Any) -> nn.Module:
    """A freshly initialised network that maps [B, channels, image_size, image_size] to logits [B, num_classes].

    name: one of `names()`, in any case, with or without `-` and `_`:

    - plain2 ... plain10 (also plane2 ...): options norm, width
    - resnet8 ... resnet110, resnet8x4, resnet32x4: norm, shortcut, block, width
    - wrn<d>_<k>, d = 6n + 4: norm, dropout. wrn20_8 is not of this depth: it is the bottleneck ResNet with inner
      convolutions 8 times as wide that PCL and DKEL call so; their ResNet-110 is `resnet110` with block="bottleneck"
    - vgg8, vgg11, vgg13, vgg16, vgg19: norm, width, head ("linear", or the "mlp" of PCL's and DKEL's VGG-16)
    - alexnet, squeezenet: norm, width; shufflenet_v1: norm
    - torchvision's resnet18/34/50, mobilenet_v2 (norm, small_stem; mobilenet_v2 also width),
      shufflenet_v2_x0_5 ..., densenet121, densenet40_12 (DenseNet-BC: the 6, 6, 6 layers of PCL and DKEL): small_stem

    `norm="group"` makes a network without buffers, whose output for a sample depends on no other
    sample. Weights come from PyTorch's global generator: call torch.manual_seed before for the same ones again.
    In training mode batch normalisation needs a batch of 2 or more where maps shrink to one pixel.

    Raises ValueError for an unknown name (with the nearest ones), an image_size below 8, or an option's bad value;
    TypeError for an option that the network does not have.

    >>> fastkd.models.parameters_count(fastkd.models.create("ResNet-20", 10, shortcut="zero-pad"))
    269722
    """
    build = _builder(name)
    _check_integer("num_classes", num_classes, 1)
    _check_integer("image_size", image_size, SMALLEST_IMAGE)
    _check_integer("channels", channels, 1)
    parameters = inspect.signature(build).parameters.values()
    known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
    for option in options:
        if option not in known:
            raise TypeError(f"create: {name} has no option {option!r}; it has {', '.join(known)}")
    return build(num_classes=num_classes, image_size=image_size, channels=channels, **options)
