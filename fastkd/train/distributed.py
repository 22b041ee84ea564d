"""Runs of several processes, as torchrun starts them: who this process is, and what all of them do together.

Every process takes the same batches, each its own part of them, in DistributedDataParallel over each learning network.
The first process alone reads and writes files and prints.
"""

from __future__ import annotations

import datetime
import os
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.distributed_c10d import PrefixStore
from torch.distributed.rendezvous import rendezvous
from torch.nn.parallel import DistributedDataParallel

from fastkd._core.locks import Busy, lock
from fastkd._core.messages import UserError
from fastkd.methods import Method

POLL = 1.0  # seconds between two tries to take a folder that another run holds


class RemoteError(UserError):
    """An error of the first process, which prints it."""


class LostProcess(UserError):
    """Another process of the run is gone, or does not answer."""

    def __init__(self, reason: str, seconds: float):
        super().__init__(
            f"another process of this run has ended or did not answer within {seconds:g} s (--timeout): {reason}; "
            "what was saved is whole, --resume goes on from it",
            status=1,
        )


@dataclass(frozen=True)
class World:
    """The processes of a run. Every one of them must make the calls that communicate, in the same order.

    Attributes:
        rank: of this process, 0 .. size - 1.
        size: how many there are; with 1 nothing communicates.
        group: the torch.distributed group of all; None where there is one process.
    """

    rank: int = 0
    size: int = 1
    group: Any = None

    @property
    def first(self) -> bool:
        """Whether this process reads, writes and prints."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Over the processes, in place, on the tensor's device."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
        return values

    def any(self, flag: bool) -> bool:
        """Whether it holds in one process at least. On the host."""
        return -self.minimum(-int(flag)) > 0

    def minimum(self, value: int) -> int:
        """The smallest of the processes' numbers. On the host."""
        if self.size == 1:
            return value
        found = torch.tensor(value)
        dist.all_reduce(found, dist.ReduceOp.MIN, group=self.group)
        return int(found)

    def broadcast(self, function: Callable[[], Any]) -> Any:
        """What `function` returns in the first process, in all of them; it must be possible to pickle it.

        An error that it raises there is raised there, and in the others as `RemoteError`.
        """
        if self.size == 1:
            return function()
        box: list[Any] = [None, None]
        error = None
        if self.first:
            try:
                box[0] = function()
            except Exception as caught:
                error, box[1] = caught, (str(caught), getattr(caught, "status", 2))
        dist.broadcast_object_list(box, 0, group=self.group)
        if error is not None:
            raise error
        if box[1] is not None:
            raise RemoteError(*box[1])
        return box[0]

    def gather(self, value: Any) -> list[Any]:
        """Each process's value, in the first process; [] in the others."""
        if self.size == 1:
            return [value]
        found = [None] * self.size if self.first else None
        dist.gather_object(value, found, 0, group=self.group)
        return found or []

    @torch.no_grad()
    def share_buffers(self, module: nn.Module) -> None:
        """Give all processes the first one's buffers: statistics of batch normalisation, which each has of its own."""
        if self.size > 1:
            for buffer in module.buffers():
                dist.broadcast(buffer, 0, group=self.group)

    def wrap(self, method: Method, network: nn.Module, device: torch.device) -> nn.Module:
        """A learning network of `method` in DistributedDataParallel."""
        if self.size == 1:
            return network
        return DistributedDataParallel(
            network,
            device_ids=[device.index] if device.type == "cuda" else None,
            find_unused_parameters=method.leaves_unused,
        )

    @contextmanager
    def locked(self, folder: Path, wait: Callable[[], None] | None = None) -> Iterator[None]:
        """`lock`, held by the first process for all."""
        if self.size == 1:
            with lock(folder, wait):
                yield
            return
        with ExitStack() as stack:

            def take() -> bool:
                try:
                    stack.enter_context(lock(folder))
                except Busy:
                    if wait is None:
                        raise
                    return False
                return True

            # Not one long wait: the others would think that the first process is gone.
            waiting = False
            while not self.broadcast(take):
                if wait is not None and not waiting and self.first:
                    wait()
                waiting = True
                time.sleep(POLL)
            yield


ALONE = World()


def own_seed(seed: int, rank: int) -> int:
    """The seed of a process's global generators, from which dropout draws: the run's own in the first process."""
    return (seed + 0x9E3779B1 * rank) % 2**32


def world() -> World:
    """The processes of the default group; one where there is none."""
    if not (dist.is_available() and dist.is_initialized()):
        return ALONE
    size = dist.get_world_size()
    return World(dist.get_rank(), size, dist.group.WORLD) if size > 1 else ALONE


def launched() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def reports_errors() -> bool:
    """Whether this process prints what all find out alike before they meet: a wrong option."""
    return launched() == 1 or world().size > 1 or os.environ.get("RANK", "0") == "0"


@contextmanager
def joined(device: torch.device, seconds: float) -> Iterator[World]:
    """Meet the processes that torchrun has started; a group that is there already is taken as it is.

    GPUs talk by NCCL, the host by gloo. A collective that takes longer than `seconds` fails, and so does one with a
    process that has ended: LostProcess.
    """
    if launched() == 1 or (dist.is_available() and dist.is_initialized()):
        yield world()
        return
    if not dist.is_available():
        raise UserError("this PyTorch has no torch.distributed: start one process, without torchrun")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    try:
        _meet("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo", datetime.timedelta(seconds=seconds))
        yield world()
    except Exception as error:
        if not _lost(error):
            raise
        raise LostProcess(" ".join(str(error).split())[:160], seconds) from error
    dist.destroy_process_group()  # after an error it might wait for those that are gone


def _meet(backend: str, timeout: datetime.timedelta) -> None:
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    store.set_timeout(timeout)
    # After a restart torchrun may give the store of the attempt before, with the addresses of processes that are gone.
    store = PrefixStore(f"fastkd/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


@contextmanager
def deterministic(wanted: bool) -> Iterator[None]:
    """Within the block, the same bits from the same seed on a GPU; an operation that cannot raises."""
    if not wanted:
        yield
        return
    # Read when cuBLAS starts.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    memory: Any = torch.utils.deterministic
    filled, benchmark = memory.fill_uninitialized_memory, torch.backends.cudnn.benchmark
    torch.use_deterministic_algorithms(True)
    memory.fill_uninitialized_memory = False  # a help for debugging, which costs time
    torch.backends.cudnn.benchmark = False
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        memory.fill_uninitialized_memory = filled
        torch.backends.cudnn.benchmark = benchmark


_SIGNS = ("gloo", "nccl", "connection", "timed out", "timeout", "broken pipe", "socket", "peer")


def _lost(error: Exception) -> bool:
    if isinstance(error, dist.DistError):
        return True
    return type(error) is RuntimeError and any(sign in str(error).lower() for sign in _SIGNS)
