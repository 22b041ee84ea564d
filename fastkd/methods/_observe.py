"""Looking at a network that learns, and at numbers on a device, without disturbing either."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from fastkd.models import call_network


@torch.no_grad()
def observe(network: nn.Module, wrapped: Any, inputs: Any) -> Any:
    """The output of a learning network in eval mode, without a graph; its modules' modes and buffers stay as they were.

    `wrapped` is the network as it is run: compiled, or itself.
    """
    parallel = data_parallel(wrapped)
    with eval_mode(network, wrapped):
        # DistributedDataParallel's own forward broadcasts buffers, in eval mode too.
        return call_network(parallel.module if parallel is not None else wrapped, inputs)


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


def read_later(values: Tensor) -> Callable[[], list]:
    """Starts to copy a tensor to the host without waiting for it; what is returned waits, and gives its numbers."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def read() -> list:
        copied.synchronize()
        return host.tolist()

    return read
