"""Recording what a GPU does, as CUDA graphs: all that `fastkd.graphs` needs a GPU for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

Run = Callable[[], list[Tensor | None]]


class Recording(Protocol):
    """What a run did. `replay` does it again on the current stream, and writes into the same `results`."""

    results: list[Tensor | None]

    def replay(self) -> None:
        """Runs again what was recorded."""


class Recorder(Protocol):
    """What records; a test may put another one in the place of `CudaRecorder`."""

    device: torch.device

    def pool(self) -> Any:
        """Memory for recordings of which one may overwrite what another one computed in between."""

    def warm_up(self, run: Callable[[], object]) -> None:
        """Run it a few times before it is recorded; RuntimeError where it waits for the device."""

    def record(self, run: Run, pool: Any) -> Recording:
        """Record a run. It has not computed anything yet: `results` hold nothing before the first replay."""

    def join(self) -> None:
        """Let the current stream wait for a backward pass through what was recorded, made without a recording."""


class CudaRecorder:
    """Records by torch.cuda.graph on a stream of its own.

    Autograd runs a backward pass on the stream of the forward pass: warm-ups and all recordings share the stream.
    """

    def __init__(self, device: torch.device):
        index = torch.cuda.current_device() if device.index is None else device.index
        self.device = torch.device("cuda", index)
        self._stream = torch.cuda.Stream(self.device)
        self._failed: list[torch.cuda.CUDAGraph] = []

    def pool(self) -> Any:
        """Memory that several recordings share."""
        return torch.cuda.graph_pool_handle()

    def warm_up(self, run: Callable[[], object], times: int = 3) -> None:
        """Runs `run` `times` times on the recorder's stream; RuntimeError where it waits for the device."""
        torch.cuda.synchronize(self.device)
        try:
            with torch.cuda.stream(self._stream):
                for _ in range(times - 1):  # cuDNN, cuBLAS and the allocator set themselves up
                    run()
                # What waits for the device would break the capture, whose remains are hard to clear away.
                with _waiting_is_an_error():
                    run()
        finally:
            torch.cuda.synchronize(self.device)

    def record(self, run: Run, pool: Any) -> Recording:
        """Records `run` into memory of `pool`."""
        graph = torch.cuda.CUDAGraph()
        try:
            # Where a capture fails, torch.cuda.graph leaves its stream as the current one; the outer block does not.
            with torch.cuda.stream(self._stream):  # noqa: SIM117
                # thread_local: the thread that pins the batches' memory may go on.
                with torch.cuda.graph(graph, pool=pool, stream=self._stream, capture_error_mode="thread_local"):
                    results = run()
        except BaseException:
            self._clear_away(graph, pool)
            raise
        return _Graph(graph, results)

    def join(self) -> None:
        """The current stream waits for what was recorded or warmed up."""
        torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _clear_away(self, graph: torch.cuda.CUDAGraph, pool: Any) -> None:
        """After a capture that failed: CUDA's own end raises before PyTorch ends what its allocator does for it."""
        self._failed.append(graph)  # to which the allocator may still point
        with contextlib.suppress(RuntimeError, AttributeError):
            torch._C._cuda_endAllocateToPool(self.device.index, pool)  # raises where it was ended
            torch._C._cuda_releasePool(self.device.index, pool)
        with contextlib.suppress(RuntimeError):
            torch.cuda.synchronize(self.device)


class _Graph:
    def __init__(self, graph: torch.cuda.CUDAGraph, results: list[Tensor | None]):
        self._graph, self.results = graph, results

    def replay(self) -> None:
        self._graph.replay()


@contextlib.contextmanager
def _waiting_is_an_error() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)
