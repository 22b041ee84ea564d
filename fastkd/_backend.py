"""Which backend an operation uses, why, and how to choose: native kernels or the reference in plain PyTorch."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _library

BACKENDS = ("native", "reference")
OLDEST_GPU = (8, 0)


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be 'native' or 'reference', got {name!r}")
    return name


_chosen = _validated(os.environ.get("FASTKD_BACKEND", "native"), "FASTKD_BACKEND")
_operations: dict[Callable, tuple[str, Callable]] = {}
_fakes: list[Callable] = []
# The operations of the library; the tests put the host build of the CUDA kernels in their place.
_cpu_namespace, _cpu_kind = "fastkd", "cpu"


class Explanation(NamedTuple):
    """`backend`: "native" or "reference"; `reason`: why not native, or which native kernels."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the body with "native" kernels (where they can) or with the "reference"; FASTKD_BACKEND sets the default."""
    global _chosen
    before, _chosen = _chosen, _validated(name, "use_backend: name")
    try:
        yield
    finally:
        _chosen = before


def why_not_native(tensor: Tensor) -> str | None:
    """Why native kernels cannot take tensors like this one, whatever the operation; None where they can."""
    if _chosen == "reference":
        return "the reference backend was chosen (FASTKD_BACKEND or use_backend)"
    kind = tensor.device.type
    if kind == "cpu":
        return None if _library.CPU.loaded else _library.CPU.reason
    if kind == "cuda":
        return _why_not_cuda(tensor.device.index or 0)
    return f"there are no native kernels for device type {kind!r}"


@functools.lru_cache
def _why_not_cuda(index: int) -> str | None:
    if not _library.CUDA.loaded:
        return _library.CUDA.reason
    if torch.version.hip is not None:
        return "there are no native kernels for ROCm"
    capability = torch.cuda.get_device_capability(index)
    if capability < OLDEST_GPU:
        return f"the GPU has compute capability {capability[0]}.{capability[1]}, the kernels need 8.0 or newer"
    return None


def note_fallback(operation: str, reason: str) -> None:
    """Called where an operation goes to the reference."""


def device_kind(tensor: Tensor) -> str:
    """ "cpu" or "cuda": whose kernels take this tensor."""
    return _cpu_kind if tensor.device.type == "cpu" else "cuda"


def native_ops(tensor: Tensor):
    return getattr(torch.ops, _cpu_namespace if tensor.device.type == "cpu" else "fastkd")


def register(function: Callable, operation: str, why_reference: Callable, register_fakes: Callable) -> None:
    """Makes an operation known: to explain, to backend_info, and its fake kernels to torch.

    `why_reference(arguments by name)` says why a call goes to the reference, or None. `register_fakes(namespace)`
    registers fake kernels for the raw operations in torch.ops.<namespace>.
    """
    _operations[function] = operation, why_reference
    _fakes.append(register_fakes)
    if _library.CPU.loaded:
        register_fakes("fastkd")


def register_all_fakes(namespace: str) -> None:
    """Fake kernels for a second build of the operations: the tests' CUDA kernels on the host."""
    for register_fakes in _fakes:
        register_fakes(namespace)


def explain(function: Callable, *args, **kwargs) -> Explanation:
    """Which backend `function(*args, **kwargs)` would use, and why; runs the call's checks, not its kernels.

    `function` is one of fastkd.functional. Raises what the call itself would raise for wrong arguments.
    """
    if function not in _operations:
        known = ", ".join(name for name, _ in _operations.values())
        raise ValueError(f"explain: function must be one of fastkd.functional ({known}), got {function!r}")
    operation, why_reference = _operations[function]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    reason = why_reference(bound.arguments)
    if reason is not None:
        return Explanation(operation, "reference", reason)
    learner = bound.args[0]
    while not isinstance(learner, Tensor):  # several learners
        learner = learner[0]
    return Explanation(operation, "native", _kernels(device_kind(learner)))


def _kernels(kind: str) -> str:
    if kind == "cuda":
        return "CUDA kernels"
    names = {1: "x86-64", 3: "x86-64-v3 (AVX2)", 4: "x86-64-v4 (AVX-512)"}
    return f"CPU kernels, {names.get(_library.CPU.cpu_level, 'generic')}"


def backend_info() -> dict[str, str]:
    """The chosen backend, the native kernels of each device or why there are none, and what each operation uses."""
    cpu = _kernels("cpu") if _library.CPU.loaded else _library.CPU.reason
    if torch.cuda.is_available():
        cuda = _why_not_cuda(0) or "CUDA kernels"
    else:
        cuda = "CUDA kernels built, no GPU here" if _library.CUDA.loaded else _library.CUDA.reason
    info = {"backend": _chosen, "cpu": cpu, "cuda": cuda}
    for operation, _ in _operations.values():
        native = _chosen == "native"
        on_cpu = "native" if native and _library.CPU.loaded else "reference"
        on_cuda = "native" if native and _library.CUDA.loaded else "reference"
        info[operation] = f"cpu: {on_cpu}, cuda: {on_cuda}"
    return info
