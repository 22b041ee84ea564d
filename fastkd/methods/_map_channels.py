"""How many channels the last feature map of a network has, for what is built on it before the first batch is there."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._core.messages import wrong_value
from fastkd.methods._calls import call_network
from fastkd.methods._features import full_output, outputs_of

IMAGE_SIZE = 32  # pixels of the image that is tried where the network does not tell its own


def map_channels(network: nn.Module, example: Any, method_name: str, argument: str) -> int:
    """The channels of the last map, from one forward pass in eval mode without a graph: nothing changes in the network.

    Args:
        network: as for `outputs_of`, which raises where it gives no maps.
        example: inputs as the network takes them, or None for `black_image(network)`.
        method_name, argument: who asks and which network this is, for the errors.

    Raises ValueError in one sentence where the network does not take the example, or where none can be guessed.
    """
    inputs = black_image(network) if example is None else example
    if inputs is None:
        raise _no_maps(method_name, argument, "one without a Conv2d that tells which images it takes")
    try:
        with _evaluating(network):
            output = call_network(partial(full_output, network), inputs)
    except Exception as error:  # whatever a network raises for inputs that it was not made for
        what = f"inputs of shape {list(inputs.shape)}" if isinstance(inputs, Tensor) else "the example"
        reason = (str(error) or "no message").splitlines()[0]
        raise _no_maps(method_name, argument, f"{type(error).__name__} for {what}: {reason}") from error
    maps = outputs_of(lambda _: output, None, method_name, argument, "maps").maps
    assert maps is not None
    return maps[-1].shape[1]


def black_image(network: nn.Module) -> Tensor | None:
    """[1, c, s, s] for a first convolution of c channels, in its dtype and on its device; None where there is none.

    s is the network's `image_size`, or 32.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv2d) and not nn.parameter.is_lazy(module.weight):
            size = getattr(getattr(network, "source", network), "image_size", IMAGE_SIZE)
            return module.weight.new_zeros(1, module.in_channels, size, size)
    return None


@contextlib.contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Eval mode, no graph; afterwards every module in its own mode again."""
    modes = {module: module.training for module in network.modules()}
    try:
        network.eval()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():  # parents first
            if module.training != mode:
                module.train(mode)  # not only the flag: a network of with_features changes its graph
            module.training = mode


def _no_maps(method_name: str, argument: str, got: str) -> ValueError:
    expected = (
        "a network that gives its feature maps (fastkd.models.with_features makes one of any network; example= where "
        "it needs other inputs)"
    )
    return wrong_value(method_name, argument, expected, got)
