"""What a step asks of the machine, counted and not timed: operators or kernels, and the bytes these are handed."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.measure import Step


def launches(step: Step, device: str) -> int:
    """On a GPU: kernels, copies and fills of one step. On the CPU: operators that no other called, views among them."""
    step.clear()
    on_gpu = torch.device(device).type == "cuda"
    activities = [ProfilerActivity.CPU, ProfilerActivity.CUDA] if on_gpu else [ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        step()
        if on_gpu:
            torch.cuda.synchronize(device)
    if on_gpu:
        return sum(event.device_type == DeviceType.CUDA for event in profile.events())
    return sum(_is_operator(event) and not _is_operator(event.cpu_parent) for event in profile.events())


def _is_operator(event) -> bool:
    """ "aten::add", "fastkd::multi_teacher_forward"; "autograd::" is the engine's bookkeeping."""
    return event is not None and "::" in event.name and not event.name.startswith(("autograd::", "torch::"))


class _Traffic(TorchDispatchMode):
    """Adds up the bytes of the tensors that operators read and write; a view moves nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        written = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        storages = {t.untyped_storage()._cdata for t in read}
        if not written or any(t.untyped_storage()._cdata not in storages for t in written) or _in_place(function):
            self.bytes += sum(map(_bytes, read + written))
        return result


def _in_place(function) -> bool:
    return function._schema.is_mutable


def _bytes(tensor: Tensor) -> int:
    """Of the elements that exist: a dimension that was broadcast counts once."""
    elements = 1
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        elements *= 1 if stride == 0 and size else size
    return elements * tensor.element_size()


def traffic_bytes(step: Step) -> int:
    """Bytes of one step if each operator reads its arguments once and writes its results once, and no cache helps.

    Not for compiled functions: what Inductor fuses is no operator any more.
    """
    step.clear()
    with _Traffic() as traffic:
        step()
    return traffic.bytes
