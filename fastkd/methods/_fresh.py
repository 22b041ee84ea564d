"""Modules that a method makes itself: their initial weights, and where they live."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TypeVar

import torch
from torch import nn

Made = TypeVar("Made", bound=nn.Module)


@contextlib.contextmanager
def weights_from(seed: int) -> Iterator[None]:
    """Modules made inside, on the host, take their weights from a stream of their own; the global generator goes on.

    Not from `seed` itself: a student made after torch.manual_seed(seed) has its weights from there.
    """
    generator = torch.Generator().manual_seed(seed)
    own = int(torch.randint(2**62, (), generator=generator, device="cpu"))
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(own)
        yield


def beside(network: nn.Module, module: Made) -> Made:
    """The module on the network's device and in its dtype."""
    first = next((p for p in network.parameters() if p.is_floating_point()), None)
    return module if first is None else module.to(first.device, first.dtype)
