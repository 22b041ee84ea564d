"""Which backend an operation uses, why, and how to choose: native kernels or the reference in plain PyTorch.

"auto", the default, takes the kernels where they can take a call and says once where they cannot (FallbackWarning).
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastkd import _library

BACKENDS = ("auto", "native", "reference")
OLDEST_GPU = (8, 0)
FAST_FLOAT64 = {(8, 0), (9, 0), (10, 0)}  # matrix units for float64; most others have a 64th of float32's rate
WhyReference = Callable[[dict[str, Any]], str | None]


def _validated(name: str, source: str) -> str:
    if name not in BACKENDS:
        raise ValueError(f"{source} must be 'auto', 'native' or 'reference', got {name!r}")
    return name


_chosen = _validated(os.environ.get("FASTKD_BACKEND", "auto"), "FASTKD_BACKEND")
_warns = os.environ.get("FASTKD_WARN", "1") != "0"
_warned: set[tuple[str, str]] = set()  # operation, reason
_operations: dict[Callable[..., Any], tuple[str, WhyReference]] = {}
_fakes: list[Callable[[str], None]] = []


class Machine(NamedTuple):
    """What calls are told of the machine that they run on. It is as it is, but for tests, which `pretend`.

    cpu_namespace: the operations in torch.ops that take CPU tensors. cpu_kind: whose kernels these are, "cuda" where
    they are the host build of the CUDA kernels. stream_always: CUDA kernels treat every row as one that does not fit on
    chip. fast_float64: whether GPUs have matrix units for float64, None as they are. values_readable: False as on a
    device that must not be waited for. check_everywhere: values are checked also where reading them waits for a GPU.
    """

    cpu_namespace: str = "fastkd"
    cpu_kind: str = "cpu"
    stream_always: bool = False
    fast_float64: bool | None = None
    values_readable: bool = True
    check_everywhere: bool = os.environ.get("FASTKD_CHECKS", "0") == "1"


machine = Machine()


@contextlib.contextmanager
def pretend(**changes: Any) -> Iterator[None]:
    """For tests: runs the body with another `Machine`. Bodies that change different fields may end in any order."""
    global machine
    before = {name: getattr(machine, name) for name in changes}
    machine = machine._replace(**changes)
    try:
        yield
    finally:
        machine = machine._replace(**before)


class FallbackWarning(UserWarning):
    """An operation runs in plain PyTorch instead of a native kernel: told once per operation and reason.

    FASTKD_WARN=0 in the environment, or use_backend("reference"), silences it; use_backend("native") makes it an error.
    """


class Explanation(NamedTuple):
    """`backend`: "native" or "reference"; `reason`: why not native, or which native kernels."""

    operation: str
    backend: str
    reason: str

    def __str__(self) -> str:
        return f"{self.operation}: {self.backend} ({self.reason})"


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Runs the body with one backend; FASTKD_BACKEND sets the default.

    "auto": native kernels, and plain PyTorch with a FallbackWarning where they cannot take a call. "native": a
    RuntimeError there, at the call; the backward of a backward, which has no kernels, still goes through PyTorch.
    "reference": plain PyTorch, without a word.

    >>> with fastkd.use_backend("reference"):
    ...     fastkd.backend_info()["backend"]
    'reference'
    """
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
    return why_not_gpu(_library.CUDA, _capability(index))


def why_not_gpu(library: _library.Library, capability: tuple[int, int]) -> str | None:
    """Why `library` has no kernels for a GPU of this compute capability; None where it has."""
    name = f"{capability[0]}.{capability[1]}"
    if capability < OLDEST_GPU:
        return f"the GPU has compute capability {name}, the kernels need 8.0 or newer"
    if not library.has_code_for(capability):
        built = ", ".join(library.architectures)
        return f"the library has code for {built}, the GPU has compute capability {name}: build it here again"
    return None


def note_fallback(operation: str, reason: str, like: Tensor | None = None) -> None:
    """Says that this call goes to the reference: an error under "native", a warning under "auto", each reason once.

    `like`, an input: nothing is said of a fake or a meta tensor, with which nobody waits for the result.
    """
    if _chosen == "native":
        raise RuntimeError(f"{operation}: the native backend was chosen, and this call needs plain PyTorch: {reason}")
    if _chosen == "reference" or torch.compiler.is_compiling():  # before the set, on which a trace would depend
        return
    if not _warns or (operation, reason) in _warned or _is_fake(like):
        return
    text = f"{operation} runs in plain PyTorch, slower than its kernels: {reason}. {_SILENCE}"
    warnings.warn(text, FallbackWarning, stacklevel=users_level())
    _warned.add((operation, reason))  # after the warning: where warnings are errors, every call raises


_SILENCE = 'Told once; FASTKD_WARN=0 or fastkd.use_backend("reference") silences it.'
_LIBRARY_FOLDERS = tuple(f"{Path(file).resolve().parent}{os.sep}" for file in (__file__, torch.__file__))


@contextlib.contextmanager
def telling_anew() -> Iterator[None]:
    """For tests: runs the body as if no fallback had been told so far, whatever FASTKD_WARN says."""
    global _warned, _warns
    before = _warned, _warns
    _warned, _warns = set(), True
    try:
        yield
    finally:
        _warned, _warns = before


def _is_fake(tensor: Tensor | None) -> bool:
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
        return True
    return tensor is not None and (tensor.is_meta or isinstance(tensor, FakeTensor))


def users_level() -> int:
    """The stacklevel, for a warning by the caller, of the innermost line outside of fastkd and torch."""
    frame, level = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(_LIBRARY_FOLDERS):
        frame, level = frame.f_back, level + 1
    return level


def device_kind(tensor: Tensor) -> str:
    """ "cpu" or "cuda": whose kernels take this tensor."""
    return machine.cpu_kind if tensor.device.type == "cpu" else "cuda"


def has_fast_float64(tensor: Tensor) -> bool:
    """Whether this tensor's GPU multiplies matrices in float64 about as fast as in float32 without its tensor cores."""
    if machine.fast_float64 is not None:
        return machine.fast_float64
    return tensor.device.type == "cuda" and _capability(tensor.device.index or 0) in FAST_FLOAT64


@functools.lru_cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def native_ops(tensor: Tensor) -> Any:
    """The namespace of the raw operations whose kernels take this tensor."""
    return getattr(torch.ops, machine.cpu_namespace if tensor.device.type == "cpu" else "fastkd")


def register(
    function: Callable[..., Any],
    operation: str,
    why_reference: WhyReference,
    register_fakes: Callable[[str], None],
) -> None:
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


def explain(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Explanation:
    """Which backend `function(*args, **kwargs)` would use, and why; runs the call's checks, not its kernels.

    `function` is one of fastkd.functional. Raises what the call itself would raise for wrong arguments; where "native"
    was chosen and cannot take the call, the explanation says so, and only the call raises.

    >>> with fastkd.use_backend("reference"):
    ...     fastkd.explain(fastkd.functional.multi_teacher_kd, torch.zeros(2, 3), [torch.zeros(2, 3)]).backend
    'reference'
    """
    if function not in _operations:
        known = ", ".join(name for name, _ in _operations.values())
        got = getattr(function, "__name__", type(function).__name__)
        raise ValueError(f"explain: function must be one of fastkd.functional ({known}), got {got}")
    operation, why_reference = _operations[function]
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    reason = why_reference(bound.arguments)
    if reason is not None:
        if _chosen == "native":
            reason += "; the call raises, since the native backend was chosen"
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
    """The chosen backend, the native kernels of each device or why there are none, and what each operation uses.

    >>> sorted(fastkd.backend_info())[:3]
    ['backend', 'cpu', 'cross_entropy']
    """
    cpu = _kernels("cpu") if _library.CPU.loaded else _library.CPU.reason
    cuda = _why_not_cuda(0) if torch.cuda.is_available() else _library.CUDA.reason
    if not cuda:
        built = f"CUDA kernels for {', '.join(_library.CUDA.architectures)}"
        cuda = built if torch.cuda.is_available() else f"{built}; no GPU here"
    info = {"backend": _chosen, "cpu": cpu, "cuda": cuda}
    kernels = {"cpu": _library.CPU.loaded, "cuda": _library.CUDA.loaded}
    uses = ", ".join(f"{kind}: {_used(loaded)}" for kind, loaded in kernels.items())
    return info | {operation: uses for operation, _ in _operations.values()}


def _used(has_kernels: bool) -> str:
    if _chosen != "reference" and has_kernels:
        return "native"
    return "an error (no kernels)" if _chosen == "native" else "reference"
