"""Looking at a network that learns, and at numbers on a device, without disturbing either."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._core.modes import data_parallel, eval_mode
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


def read_later(values: Tensor) -> Callable[[], list[Any]]:
    """Starts to copy a tensor to the host without waiting for it; what is returned waits, and gives its numbers."""
    if values.device.type != "cuda":
        return values.tolist
    host = torch.empty(values.shape, dtype=values.dtype, device="cpu", pin_memory=True)
    host.copy_(values, non_blocking=True)
    copied = torch.cuda.current_stream(values.device).record_event()

    def read() -> list[Any]:
        copied.synchronize()
        return host.tolist()

    return read
