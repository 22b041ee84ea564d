"""Where and as what the networks of a run compute, and how its batches come there."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from fastkd._core.labels import IGNORE_INDEX, counted
from fastkd._core.messages import UserError, note
from fastkd.graphs import Graphs
from fastkd.graphs.recorder import CudaRecorder, Recorder
from fastkd.methods import Method
from fastkd.train.batch_norm import synchronise, synchronises
from fastkd.train.distributed import ALONE, World, launched
from fastkd.train.settings import Settings


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N as a device that is there; UserError otherwise.

    Of several processes each takes the GPU of its number on its machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and launched() > 1:
        if device.index is not None:
            raise UserError(f"--device {name} is one GPU for {launched()} processes: use --device cuda, one GPU each")
        device, found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.cuda.device_count()
        if device.index >= found:
            raise UserError(f"there is no GPU for process {device.index} of this machine ({found} GPUs): start fewer")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there ({torch.cuda.device_count()} GPUs): use --device cpu or auto")
    return device


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """PyTorch's number of threads on the CPU within the block; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches_on(
    batches: Iterable[Any], device: torch.device, classes: int | None = None
) -> Iterator[tuple[Any, torch.Tensor]]:
    """The (inputs, target) of a loader, on the device; UserError for a label that is none of so many classes."""
    for batch in batches:
        yield batch_on(batch, device, classes)


def batch_on(
    batch: tuple[Any, torch.Tensor], device: torch.device, classes: int | None = None
) -> tuple[Any, torch.Tensor]:
    """Inputs and labels on `device`; UserError where a label is none of 0 .. classes - 1."""
    inputs, target = batch
    if classes is not None:
        _check_labels(target, classes)
    return to_device(inputs, device), to_device(target, device)


def rows_of(target: torch.Tensor, world: World) -> int:
    """How many images count. Asked before they go to a GPU."""
    return len(target) if world.size == 1 else int(counted(target).sum())


def prepare(method: Method, settings: Settings, device: torch.device, world: World = ALONE) -> None:
    """Its networks on the device and as they are to be run: in parallel, compiled, from CUDA graphs."""
    method.to(device)
    if keeps_channels_last(settings, device):
        method.to(memory_format=torch.channels_last)
    if prepares_teachers(settings, device):
        method.prepare_teachers(note=_note_once)
    if synchronises(settings, world):
        synchronise(method)
    if world.size > 1:
        method.map_learners(lambda network: world.wrap(method, network, device))
    if settings.compile:  # around DistributedDataParallel, whose exchange then overlaps with the backward pass
        method.map_learners(torch.compile)
    if settings.cuda_graph and (recorder := recorder_for(device)) is not None:
        Graphs(device, note, recorder).wrap(method)


def keeps_channels_last(settings: Settings, device: torch.device) -> bool:
    """Whether feature maps are kept in channels-last order: as asked, else on a CPU."""
    return device.type == "cpu" if settings.channels_last is None else settings.channels_last


def prepares_teachers(settings: Settings, device: torch.device) -> bool:
    """Whether frozen networks run through `fastkd.models.prepared`: as asked, else where that was measured faster.

    CUDA graphs record the networks themselves.
    """
    if settings.prepare_teachers is None:
        return device.type == "cpu" and settings.amp == "none" and not settings.cuda_graph
    return settings.prepare_teachers


def recorder_for(device: torch.device) -> Recorder | None:
    """What records CUDA graphs on the device; None where there are none."""
    return CudaRecorder(device) if device.type == "cuda" else None


def check_cuda_graph(settings: Settings, device: torch.device, world: World = ALONE) -> None:
    """UserError for --cuda-graph in several processes; on a CPU a note."""
    if not settings.cuda_graph:
        return
    if world.size > 1:
        raise UserError(f"--cuda-graph is for one process, got {world.size}: leave it out")
    if recorder_for(device) is None:
        _note_once(f"--cuda-graph needs a GPU: on the {device.type} the run goes on without it")


@functools.cache
def _note_once(text: str) -> None:
    """A comparison has many runs."""
    note(text)


def _check_labels(target: torch.Tensor, classes: int) -> None:
    # Before they are on a GPU, where a wrong one shows as a NaN, or ends the process.
    wrong = target[((target < 0) & (target != IGNORE_INDEX)) | (target >= classes)]
    if len(wrong):
        raise UserError(
            f"the data hold the label {int(wrong[0])}, but there are {classes} classes (0 to {classes - 1}): correct "
            "the labels or num_classes"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a list (several views of the images) or dict of them."""
    if isinstance(batch, Mapping):
        return {name: to_device(item, device) for name, item in batch.items()}
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    return batch.to(device, non_blocking=True)
