"""Finds and loads the native libraries beside this file, or in FASTKD_LIBRARY_DIR. Importing never fails without them:
it warns once.
"""

from __future__ import annotations

import ctypes
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch

FOLDER = Path(os.environ.get("FASTKD_LIBRARY_DIR") or Path(__file__).parent).resolve()


@dataclass(frozen=True)
class Library:
    """One native library: loaded, or the reason why not."""

    loaded: bool
    reason: str = ""
    cpu_level: int = 0  # libfastkd_cpu.so: 1, 3, 4 for x86-64, x86-64-v3, x86-64-v4; 0 for the CUDA library


def _load(name: str) -> Library:
    path = FOLDER / name
    if not path.is_file():
        return Library(False, f"{name} was not built (no C++ compiler or CMake at installation)")
    try:
        torch.ops.load_library(path)
    except OSError as error:  # another torch than the one it was built for, a missing CUDA runtime, ...
        return Library(False, f"{name} does not load with torch {torch.__version__}: {error}")
    return Library(True)


def _cpu_level() -> int:
    function = ctypes.CDLL(str(FOLDER / "libfastkd_cpu.so")).fastkd_cpu_level
    function.restype = ctypes.c_int
    return function()


def _load_cpu() -> Library:
    library = _load("libfastkd_cpu.so")
    if not library.loaded:
        warnings.warn(
            f"fastkd runs in plain PyTorch, slower: {library.reason}; `pip install --force-reinstall --no-deps` "
            "fastkd with a C++20 compiler to get the kernels.",
            RuntimeWarning,
            stacklevel=3,
        )
        return library
    return Library(True, cpu_level=_cpu_level())


def _load_cuda(cpu: Library) -> Library:
    if not cpu.loaded:
        return Library(False, "the CPU library, which declares the operations, is missing")
    if torch.version.cuda is None:
        return Library(False, f"torch {torch.__version__} has no CUDA")
    return _load("libfastkd_cuda.so")


CPU = _load_cpu()
CUDA = _load_cuda(CPU)
