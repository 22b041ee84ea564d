"""Networks in eval mode for a while, and what wraps them."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel


def data_parallel(network: Any) -> DistributedDataParallel | None:
    """The DistributedDataParallel around a network, which torch.compile may be around."""
    network = getattr(network, "_orig_mod", network)
    return network if isinstance(network, DistributedDataParallel) else None


@contextlib.contextmanager
def eval_mode(*networks: Any) -> Iterator[None]:
    """Eval mode within the block; then every module is in the mode that it had."""
    modules = [m for network in networks if isinstance(network, nn.Module) for m in network.modules()]
    modes = [m.training for m in modules]
    try:
        # Not eval(): what a network's own train() does beside setting modes could not be undone.
        for module in modules:
            module.training = False
        yield
    finally:
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode
