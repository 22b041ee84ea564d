"""The programs of the CUDA toolkit: the kernels' machine code as text, of a built library or of a compiled source."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = ["-std=c++20", "-O3", "--expt-relaxed-constexpr", "-lineinfo"]  # as in CMakeLists.txt


class Missing(Exception):
    """One sentence: which tool is not there."""


class Code(NamedTuple):
    """A cubin: nvdisasm's listing, and cuobjdump's registers and shared memory."""

    operation: str
    listing: str
    usage: str


def find(tool: str) -> str | None:
    """A program on PATH, beside nvcc, or from its package on the Python path."""
    nvcc = shutil.which("nvcc")
    folders = [str(Path(nvcc).resolve().parent)] if nvcc else []
    folders += [f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"]
    folders += sorted((str(p / "bin") for p in Path("/usr/local").glob("cuda-*")), reverse=True)
    folders += [str(path) for entry in sys.path for path in Path(entry).glob("nvidia/*/bin")]
    return shutil.which(tool) or shutil.which(tool, path=os.pathsep.join(folders))


def require(tool: str) -> str:
    path = find(tool)
    if path is None:
        raise Missing(f"{tool} is not there: install the CUDA toolkit, or nvidia-cuda-{tool} from PyPI")
    return path


def output(*command: object) -> str:
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{Path(str(command[0])).name} failed: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def compiler() -> str:
    """ "CUDA 13.0, V13.0.88"."""
    said = re.search(r"release ([\d.]+), (V[\d.]+)", output(require("nvcc"), "--version"))
    return f"CUDA {said[1]}, {said[2]}" if said else "unknown"


def sources() -> list[Path]:
    return sorted(CSRC.glob("*/*.cu"))


def from_source(source: Path, architecture: str, folder: Path) -> Code:
    """One .cu alone, compiled with the flags of the build."""
    cubin = folder / f"{source.parent.name}-{source.stem}.cubin"
    output(require("nvcc"), *FLAGS, "-I", source.parents[1], f"-arch={architecture}", "-cubin", "-o", cubin, source)
    return from_cubin(source.parent.name, cubin)


OBJECTS = Path(__file__).resolve().parents[2] / "build" / "native" / "CMakeFiles" / "fastkd_cuda.dir"


def from_objects(architecture: str, folder: Path) -> list[Code]:
    """The code of that architecture of the library that was built last, from its object files."""
    found = []
    for path in sorted(OBJECTS.glob("csrc/*/*.cu.o")):
        own = folder / f"{path.parent.name}-{path.stem}"
        own.mkdir()
        found += from_library(path, architecture, own)
    return found


def from_library(library: Path, architecture: str, folder: Path) -> list[Code]:
    """Every cubin of that architecture in a built library, or an object file."""
    subprocess.run(
        [require("cuobjdump"), "-xelf", "all", str(library)], cwd=folder, capture_output=True, text=True, check=True
    )
    cubins = sorted(folder.glob(f"*.{architecture}.cubin"))
    if not cubins:
        raise Missing(
            f"{library} has no code for {architecture}: build it with that architecture, or leave out --library"
        )
    names = output(require("cuobjdump"), "-lelf", library).count(f".{architecture}.cubin")
    if names > len(cubins):
        raise Missing(f"{library} has {names} files of one name, of which cuobjdump keeps one: leave out --library")
    return [from_cubin("", cubin) for cubin in cubins]


def from_cubin(operation: str, cubin: Path) -> Code:
    listing = output(require("nvdisasm"), "-c", "-gi", cubin)
    return Code(operation, listing, output(require("cuobjdump"), "-res-usage", cubin))


def demangled(names: list[str]) -> list[str]:
    """By c++filt, which comes with every C++ compiler."""
    filt = require("c++filt")
    done = subprocess.run([filt], input="\n".join(names), capture_output=True, text=True, check=True)
    return done.stdout.splitlines()
