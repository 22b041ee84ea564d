"""Where a run computes, and how its batches come there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fastkd.methods._batch import IGNORE_INDEX
from fastkd.train.config import UserError


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N as a device that is there; UserError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
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


def batches_on(batches, device: torch.device, classes: int | None = None) -> Iterator[tuple[Any, torch.Tensor]]:
    """The (inputs, target) of a loader, on the device; UserError for a label that is none of so many classes."""
    for inputs, target in batches:
        if classes is not None:
            _check_labels(target, classes)
        yield to_device(inputs, device), to_device(target, device)


def _check_labels(target: torch.Tensor, classes: int) -> None:
    # Before they are on a GPU, where a wrong one shows as a NaN, or ends the process.
    wrong = target[((target < 0) & (target != IGNORE_INDEX)) | (target >= classes)]
    if len(wrong):
        raise UserError(
            f"the data hold the label {int(wrong[0])}, but there are {classes} classes (0 to {classes - 1}): correct "
            "the labels or num_classes"
        )


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a list of them (several views of the images)."""
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    return batch.to(device, non_blocking=True)
