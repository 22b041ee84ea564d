"""Finds and loads the native libraries beside this file, or in FASTKD_LIBRARY_DIR. Importing never fails without them,
and says nothing: each operation that runs without its kernels says so, with the reason that stands here.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("FASTKD_LIBRARY_DIR") or Path(__file__).parent).resolve()

LEFT_OUT = "left_out.json"  # library > why it was not built; setup.py writes it beside the libraries
# Without --no-cache-dir pip would take the wheel without kernels that it built before.
AGAIN = "pip install --no-cache-dir --force-reinstall --no-deps ."
ADVICE = {
    "libfastkd_cpu.so": f"for the kernels get a C++20 compiler, then `{AGAIN}` in the sources of fastkd",
    "libfastkd_cuda.so": f"for the kernels `FASTKD_WITH_CUDA=1 {AGAIN}` in the sources of fastkd, which needs nvcc",
}


@dataclass(frozen=True)
class Library:
    """One native library: loaded, or the reason why not."""

    loaded: bool
    reason: str = ""
    cpu_level: int = 0  # libfastkd_cpu.so: 1, 3, 4 for x86-64, x86-64-v3, x86-64-v4; 0 for the CUDA library
    architectures: tuple[str, ...] = ()  # libfastkd_cuda.so: what it has code for, "90-real" or, as PTX, "90-virtual"

    def has_code_for(self, capability: tuple[int, int]) -> bool:
        """Whether a GPU of this compute capability can run the CUDA library."""
        return any(_runs_on(architecture, capability) for architecture in self.architectures)


def _runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its major version from its minor version on; PTX on all that is newer; 90a on 9.0 alone."""
    number, kind = architecture.split("-")
    code = divmod(int(number.rstrip("af")), 10)
    if number.endswith("a"):
        return code == capability
    if kind == "virtual":
        return code <= capability
    return code[0] == capability[0] and code[1] <= capability[1]


def _load(name: str) -> Library:
    path = FOLDER / name
    if not path.is_file():
        return Library(False, f"{_why_missing(name)}; {ADVICE[name]}")
    try:
        torch.ops.load_library(path)
    except OSError as error:  # another torch than the one it was built for, a missing CUDA runtime, ...
        return Library(False, f"{name} does not load with torch {torch.__version__}: {error}")
    return Library(True)


def _why_missing(name: str) -> str:
    try:
        reason = json.loads((FOLDER / LEFT_OUT).read_text()).get(name)
    except (OSError, ValueError, AttributeError):
        reason = None
    if reason:
        return f"{name} was not built: {reason}"
    where = "which FASTKD_LIBRARY_DIR names" if os.environ.get("FASTKD_LIBRARY_DIR") else "where no build put it"
    return f"{name} is not in {FOLDER}, {where}"


def _cpu_level() -> int:
    function = ctypes.CDLL(str(FOLDER / "libfastkd_cpu.so")).fastkd_cpu_level
    function.restype = ctypes.c_int
    return int(function())


def _cuda_architectures() -> tuple[str, ...]:
    function = ctypes.CDLL(str(FOLDER / "libfastkd_cuda.so")).fastkd_cuda_architectures
    function.restype = ctypes.c_char_p
    return tuple(function().decode().split(","))


def _load_cpu() -> Library:
    library = _load("libfastkd_cpu.so")
    if not library.loaded:
        return library
    return Library(True, cpu_level=_cpu_level())


def _load_cuda(cpu: Library) -> Library:
    if not cpu.loaded:
        return Library(False, "the CPU library, which declares the operations, is missing")
    if torch.version.cuda is None:
        return Library(False, f"torch {torch.__version__} has no CUDA")
    library = _load("libfastkd_cuda.so")
    if not library.loaded:
        return library
    try:
        return Library(True, architectures=_cuda_architectures())
    except AttributeError:
        return Library(False, "libfastkd_cuda.so is of an older version than this package: build it again")


CPU = _load_cpu()
CUDA = _load_cuda(CPU)
