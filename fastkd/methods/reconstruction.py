"""How much of a network's last feature map an auto-encoder can restore: the measure that FEED's paper reports.

    measure = Reconstruction(network, example=images[:1])
    train(measure)                                   # as any method; SGD, learning rate 0.1 (C)
    measure.error(test_images).relative.mean()

FEED (arXiv 1909.10754) measures it for networks with and without its teaching (P); the protocol here is ours (C).
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._core.checks import check_integer
from fastkd._core.labels import mean_over_counted
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_network
from fastkd.methods._fresh import beside, weights_from
from fastkd.methods._map_channels import map_channels
from fastkd.methods.base import Batch, Method, Phase, Terms
from fastkd.methods.feed import last_map


class ReconstructionError(NamedTuple):
    """The errors of each sample, float32 (float64 for float64 maps)."""

    absolute: Tensor  # [B], the mean over the map's elements of |x - x^|
    relative: Tensor  # [B], that divided by the mean of |x|: it compares maps of different scale


class Reconstruction(Method):
    """An auto-encoder that learns to restore the last feature map of a frozen network.

        mean over samples and elements of |x - D(E(x))|

    With c channels, E is three 3x3 convolutions c > c > c/2 > c/2, and D their transposed ones c/2 > c/2 > c > c, each
    with a LeakyReLU(0.1) after it: for 64 channels, 64 > 64 > 32 > 32 and back (C). It is no distillation: the network
    stays as it is. A lower error says that the map holds less that is hard to restore.

    >>> from fastkd.methods.reconstruction import Reconstruction
    >>> method = Reconstruction(fastkd.models.create("plain2", 10, image_size=8))
    >>> method.error(torch.zeros(4, 3, 8, 8)).relative.shape
    torch.Size([4])

    Args:
        network: gives feature maps, as FEED's; frozen in place.
        seed: of the auto-encoder's initialisation.
        channels: of the last map; None: read off a forward pass, as FEED does.
        example: inputs for that pass, as in FEED.

    Labels are not needed; rows whose target is -100 count nowhere. Chunks are exact.

    Errors: ValueError or TypeError in one sentence, before training, or at the first batch where `channels` were given
    and are not the map's.
    """

    network: nn.Module
    autoencoder: nn.Module

    def __init__(self, network: nn.Module, *, seed: int = 0, channels: int | None = None, example: Any = None):
        name = self._name()
        check_network(name, "network", network)
        seed = check_integer(name, "seed", seed)
        if channels is None:
            channels = map_channels(network, example, name, "network")
        channels = check_integer(name, "channels", channels, 1)
        with weights_from(seed):
            autoencoder = _autoencoder(channels)
        super().__init__(learners={"autoencoder": beside(network, autoencoder)}, frozen={"network": network}, seed=seed)
        self.channels = channels

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the auto-encoder's step."""
        yield Phase([self.learner("autoencoder")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The auto-encoder: maps [B, c, h, w] -> maps."""
        return self.autoencoder

    @torch.no_grad()
    def error(self, inputs: Any) -> ReconstructionError:
        """The error of each sample, with the auto-encoder as it is now."""
        x = self._map(inputs)
        absolute = _distance(self.autoencoder(x), x)
        size = _distance(x, torch.zeros_like(x))
        return ReconstructionError(absolute, absolute / size)

    def _terms(self, inputs: Any, target: Any) -> Terms:
        x = self._map(inputs)
        rows = _distance(self.learner("autoencoder")(x), x)  # [B]
        loss = rows.mean() if target is None else mean_over_counted(rows, target)
        return loss, {"reconstruction": loss.detach()}

    def _map(self, inputs: Any) -> Tensor:
        x: Tensor = self.teach(self.network, inputs, partial(last_map, method_name=self._name(), argument="network"))
        if x.shape[1] != self.channels:
            expected = f"that of the last feature map, {x.shape[1]}"
            raise wrong_value(self._name(), "channels", expected, self.channels)
        return x


def _distance(x: Tensor, other: Tensor) -> Tensor:
    dtype = torch.promote_types(torch.promote_types(x.dtype, other.dtype), torch.float32)
    return (x.to(dtype) - other.to(dtype)).abs().mean((1, 2, 3))  # [B]


def _autoencoder(channels: int) -> nn.Sequential:
    half = max(1, channels // 2)
    widths, layers = (channels, channels, half, half), []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
    back = widths[::-1]
    for inputs, outputs in pairwise(back):
        layers += [nn.ConvTranspose2d(inputs, outputs, 3, padding=1), nn.LeakyReLU(0.1)]
    return nn.Sequential(*layers)
