"""What this machine can build with: torch, a C++20 compiler, CMake, nvcc. Each is tried, not only looked for."""

from __future__ import annotations

import functools
import glob
import importlib.util
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

OLDEST_TORCH = (2, 11)
OLDEST_CMAKE = (3, 24)
OLDEST_GPU = 80
LAUNCHERS = ("ccache", "sccache")  # in front of the compiler in CXX="ccache g++"; CMake finds ccache by itself
ALL_ARCHITECTURES = ["80-real", "90-real", "90-virtual"]  # newer GPUs compile the PTX of 9.0

# Inline namespaces, std::bit_cast and template lambdas: what the sources need of C++20 (GCC 11, Clang 14).
CXX_PROBE = """
#include <bit>
#include <cstdint>
int main() {
  auto bits = [&]<class T>(T x) { return std::bit_cast<std::uint32_t>(x); };
  return static_cast<int>(bits(0.f));
}
"""
CUDA_PROBE = "template <class T> __global__ void probe(T* p) { *p = T(1); }\ntemplate __global__ void probe(float*);\n"


class Found(NamedTuple):
    """A tool's path, or the reason why there is none."""

    path: str | None
    reason: str = ""


class ConfigurationError(Exception):
    """A wrong setting or a tool that was demanded and is missing: one sentence."""


def flag(name: str) -> bool:
    return os.environ.get(name, "0") not in ("", "0")


def with_cuda() -> str:
    """FASTKD_WITH_CUDA: "auto", "1" or "0"."""
    value = os.environ.get("FASTKD_WITH_CUDA", "auto").lower() or "auto"
    if value not in ("auto", "1", "0"):
        raise ConfigurationError(f"FASTKD_WITH_CUDA: expected auto, 1 or 0, got {value!r}")
    return value


def jobs() -> int:
    """MAX_JOBS, or one job per processor that this process may use."""
    value = os.environ.get("MAX_JOBS", "")
    if not value:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not value.isdigit() or int(value) == 0:
        raise ConfigurationError(f"MAX_JOBS: expected a positive number, got {value!r}")
    return int(value)


def torch_folder() -> Path | None:
    """The folder of a torch that is new enough: of this interpreter, or, in an isolated build, of the one behind it.

    pip hides the environment that it installs into from the build, by PYTHONPATH and a sitecustomize module. The same
    interpreter without them sees it, with whatever .pth files and system or user site-packages it has.
    """
    spec = importlib.util.find_spec("torch")
    origin = _outside_torch() if spec is None or spec.origin is None else spec.origin
    folder = Path(origin).parent if origin else None
    return folder if folder and torch_version(folder) >= OLDEST_TORCH else None


@functools.cache
def _outside_torch() -> str:
    hidden = ("PYTHONPATH", "PYTHONNOUSERSITE")
    environment = {name: value for name, value in os.environ.items() if name not in hidden}
    code = "import importlib.util as u; s = u.find_spec('torch'); print(s.origin if s and s.origin else '')"
    done = subprocess.run([sys.executable, "-c", code], env=environment, cwd="/", capture_output=True, text=True)
    return done.stdout.strip() if done.returncode == 0 else ""


def torch_version(folder: Path) -> tuple[int, int]:
    file = folder / "version.py"
    found = re.search(r"__version__\s*=\s*'(\d+)\.(\d+)", file.read_text()) if file.is_file() else None
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _run(command: list[str]) -> tuple[bool, str]:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        return False, str(error)
    return done.returncode == 0, done.stdout + done.stderr


def _first_line(output: str) -> str:
    """The line of a compiler's output that says what is wrong."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["no output"]
    return next((line for line in lines if "error" in line.lower() or "fatal" in line.lower()), lines[0])


def is_x86_64() -> bool:
    return platform.machine().lower() in ("x86_64", "amd64")


@functools.cache
def cxx() -> Found:
    """A compiler for the sources: $CXX, or c++, g++, clang++."""
    if not sys.platform.startswith("linux"):
        return Found(None, "the native libraries are built on Linux only")
    asked = os.environ.get("CXX")
    names = [asked] if asked else ["c++", "g++", "clang++"]
    reason = "no C++ compiler was found"
    for name in names:
        path = shutil.which(next((word for word in shlex.split(name) if Path(word).name not in LAUNCHERS), name))
        if path is None:
            continue
        works, output = _compiles_cxx(path)
        if works:
            return Found(path)
        reason = f"{path} does not compile C++20 for this processor ({_first_line(output)})"
    return Found(None, reason)


def _compiles_cxx(path: str) -> tuple[bool, str]:
    levels = ["-march=x86-64-v4"] if is_x86_64() else []
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "probe.cpp")
        source.write_text(CXX_PROBE)
        return _run([path, "-std=c++20", "-fPIC", *levels, str(source), "-o", str(source.with_suffix(""))])


def _candidates(name: str) -> list[str]:
    """Where pip and the system put a program: the running environment first."""
    folders = [sysconfig.get_path("scripts"), *os.environ.get("PATH", os.defpath).split(os.pathsep)]
    paths = (shutil.which(name, path=folder) for folder in folders if folder)
    return list(dict.fromkeys(path for path in paths if path))


@functools.cache
def cmake() -> Found:
    reason = "no CMake was found"
    for path in _candidates("cmake"):
        works, output = _run([path, "--version"])
        version = re.search(r"version (\d+)\.(\d+)", output)
        if works and version and (int(version[1]), int(version[2])) >= OLDEST_CMAKE:
            return Found(path)
        reason = f"{path} is not CMake 3.24 or newer"
    return Found(None, reason)


@functools.cache
def ninja() -> Found:
    for path in _candidates("ninja"):
        if _run([path, "--version"])[0]:
            return Found(path)
    return Found(None, "no ninja was found")


def architectures(text: str | None = None) -> list[str]:
    """TORCH_CUDA_ARCH_LIST ("8.0;9.0+PTX", "9.0a") in CMake's words (80-real, 90-real, 90-virtual, 90a-real)."""
    text = os.environ.get("TORCH_CUDA_ARCH_LIST", "") if text is None else text
    items = text.replace(";", " ").replace(",", " ").split()
    if not items:
        return list(ALL_ARCHITECTURES)
    result = []
    for item in items:
        match = re.fullmatch(r"(\d+)\.(\d)(a?)(\+PTX)?", item)
        if match is None:
            raise ConfigurationError(
                f"TORCH_CUDA_ARCH_LIST: expected compute capabilities such as '8.0;9.0+PTX' or '9.0a', got {item!r}"
            )
        number = f"{match[1]}{match[2]}"
        if int(number) >= OLDEST_GPU:  # older GPUs use the reference: there is nothing to compile for them
            result += [f"{number}{match[3]}-real"] + [f"{number}{match[3]}-virtual"] * bool(match[4])
    if not result:
        raise ConfigurationError(f"TORCH_CUDA_ARCH_LIST: expected 8.0 or newer somewhere in it, got {text!r}")
    return list(dict.fromkeys(result))


@functools.cache
def gpus() -> list[str]:
    """The architectures of this machine's GPUs that the kernels serve, in CMake's words."""
    program = shutil.which("nvidia-smi")
    works, output = _run([program, "--query-gpu=compute_cap", "--format=csv,noheader"]) if program else (False, "")
    found = re.findall(r"^\s*(\d+)\.(\d)\s*$", output, re.MULTILINE) if works else []
    numbers = sorted({int(major + minor) for major, minor in found})
    return [f"{number}-real" for number in numbers if number >= OLDEST_GPU]


def wanted_architectures() -> list[str]:
    """What CUDA kernels are built for: with FASTKD_WITH_CUDA=1 all, or what TORCH_CUDA_ARCH_LIST says; with auto this
    machine's GPUs, so nothing where there is none.
    """
    if with_cuda() == "0":
        return []
    if with_cuda() == "1" or os.environ.get("TORCH_CUDA_ARCH_LIST"):
        return architectures()
    return gpus()


def known_architectures(nvcc: str, asked: list[str]) -> list[str]:
    """Those of the default list that this nvcc knows; what was asked for by name stays: its absence is an error."""
    if os.environ.get("TORCH_CUDA_ARCH_LIST") or asked != ALL_ARCHITECTURES:
        return asked
    works, output = _run([nvcc, "--list-gpu-code"])
    known = re.findall(r"sm_(\d+)", output) if works else []
    return [name for name in asked if name.split("-")[0] in known] or asked


def gencode(architecture: str) -> list[str]:
    number, kind = architecture.split("-")
    return ["-gencode", f"arch=compute_{number},code={'sm' if kind == 'real' else 'compute'}_{number}"]


def nvcc_candidates() -> list[str]:
    """What CUDACXX, CUDA_HOME or CUDA_PATH names, and nothing else; or PATH, then the usual folders, newest first."""
    if os.environ.get("CUDACXX"):
        return [os.environ["CUDACXX"]]
    for name in ("CUDA_HOME", "CUDA_PATH"):
        if os.environ.get(name):
            return [f"{os.environ[name]}/bin/nvcc"]
    homes = sorted(glob.glob("/usr/local/cuda-*"), key=lambda p: [int(n) for n in re.findall(r"\d+", p)], reverse=True)
    paths = [shutil.which("nvcc"), *[f"{home}/bin/nvcc" for home in ["/usr/local/cuda", *homes]]]
    return list(dict.fromkeys(path for path in paths if path and os.access(path, os.X_OK)))


def _real_nvcc(path: str) -> str:
    """The compiler behind a wrapper script, which CMake would take the toolkit's folder from."""
    _, output = _run([path, "--dryrun", "-c", "-x", "cu", os.devnull, "-o", os.devnull])
    match = re.search(r"^#\$ TOP=(.+)$", output, re.MULTILINE)
    real = Path(match[1].strip(), "bin", "nvcc").resolve() if match else Path(path)
    return str(real) if os.access(real, os.X_OK) else path


@functools.cache
def nvcc() -> Found:
    """An nvcc that compiles for all architectures wanted (where none are: for all that there are)."""
    wanted = wanted_architectures() or architectures()
    reason = "no nvcc was found (CUDACXX, CUDA_HOME, PATH, /usr/local/cuda)"
    for candidate in nvcc_candidates():
        path = _real_nvcc(candidate)
        flags = [part for architecture in known_architectures(path, wanted) for part in gencode(architecture)]
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder, "probe.cu")
            source.write_text(CUDA_PROBE)
            host = ["-ccbin", os.environ["CUDAHOSTCXX"]] if os.environ.get("CUDAHOSTCXX") else []
            works, output = _run([path, "-std=c++20", *host, *flags, "-c", str(source), "-o", f"{source}.o"])
        if works:
            return Found(path)
        reason = f"{candidate} does not compile CUDA C++20 for {' '.join(wanted)} ({_first_line(output)})"
    return Found(None, reason)


def without_cuda() -> str:
    """Why CUDA kernels are left out here, or ""."""
    if with_cuda() == "0":
        return "FASTKD_WITH_CUDA=0 left it out"
    if flag("FASTKD_SANITIZE"):
        return "FASTKD_SANITIZE=1 builds the CPU library alone"
    if nvcc().path is None:
        return nvcc().reason
    return "" if wanted_architectures() else "no GPU was there, and FASTKD_WITH_CUDA=1 was not set"


def missing() -> str:
    """Why the native libraries cannot be built here, or "". (torch is not looked at: pip brings it.)"""
    return cxx().reason or cmake().reason
