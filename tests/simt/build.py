"""Builds and imports `fastkd_simt`: the operations' CUDA kernels compiled by g++ to run on the host.

Sources are compiled again only when they, a header, a flag or the compiler changed; the objects and the library lie in
`build/simt/`. `python tests/simt/build.py` builds alone.

FASTKD_SIMT_FMA=1 lets the compiler fuse a product and a sum of the kernels into one rounding, as nvcc does, into
`build/simt_fma/`: what is exact must be so with and without.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FUSED = os.environ.get("FASTKD_SIMT_FMA") == "1"
OUT = ROOT / "build" / ("simt_fma" if FUSED else "simt")
NAME = "fastkd_simt"
HOST = ROOT / "tests" / "simt"
JOBS = 2

COMMON = [
    "-std=c++20", "-O2", "-g1", "-fPIC", "-fvisibility=hidden",
    "-Wall", "-Wextra", "-Wno-unknown-pragmas", "-DFASTKD_BACKEND_SIMT", f"-I{ROOT / 'csrc'}", f"-I{HOST.parent}",
]  # fmt: skip
# Not to link the thread sanitizer, but to have every load and store reported to race.cpp.
KERNEL = ["-fsanitize=thread", "-x", "c++", *(["-mfma", "-ffp-contract=fast"] if FUSED else [])]


def compiler() -> str | None:
    return shutil.which(os.environ.get("CXX", "g++"))


def _torch_flags() -> list[str]:
    import torch

    include = Path(torch.__file__).parent / "include"
    return ["-isystem", str(include), "-DTORCH_TARGET_VERSION=0x020a000000000000"]


def _python_flags() -> list[str]:
    import pybind11

    return ["-isystem", pybind11.get_include(), "-isystem", sysconfig.get_path("include")]


def sources() -> list[tuple[Path, list[str]]]:
    """Every source with the flags that it needs beside the common ones."""
    found = [(path, []) for path in sorted(HOST.glob("*.cpp")) if path.name not in ("module.cpp", "standalone.cpp")]
    found += [(HOST / "module.cpp", _python_flags()), (HOST / "selftest.cu", KERNEL)]
    found += [(path, KERNEL) for path in sorted(ROOT.glob("csrc/*/*.cu"))]
    found += [(path, _torch_flags()) for path in sorted(ROOT.glob("csrc/*/op.cpp"))]
    return found


def _common_digest() -> bytes:
    """Of what every object depends on: compiler, torch, headers."""
    import torch

    version = subprocess.run([compiler(), "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(version + torch.__version__.encode())
    for folder in (ROOT / "csrc", HOST):
        for header in sorted(p for p in folder.rglob("*") if p.suffix in (".h", ".cuh")):
            digest.update(str(header.relative_to(ROOT)).encode() + header.read_bytes())
    return digest.digest()


def _object_of(path: Path, flags: list[str], common: bytes) -> Path:
    digest = hashlib.sha256(common + path.read_bytes() + repr(COMMON + flags).encode()).hexdigest()[:16]
    stem = "-".join(path.relative_to(ROOT).with_suffix("").parts)
    return OUT / f"{stem}-{path.suffix[1:]}-{digest}.o"


def _run(command: list[str], target: Path) -> None:
    """Runs a compiler whose `-o` goes to a temporary name, so that an interrupted build leaves no half file."""
    partial = target.with_name(target.name + ".partial")
    done = subprocess.run([*command, "-o", str(partial)], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{target.name} was not built:\n{' '.join(command)}\n{done.stderr}")
    partial.replace(target)


def build() -> Path:
    """The library's path, built where it is not up to date; one process at a time."""
    OUT.mkdir(parents=True, exist_ok=True)
    with (OUT / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        common = _common_digest()
        objects = {_object_of(path, flags, common): (path, flags) for path, flags in sources()}
        missing = [(target, *objects[target]) for target in objects if not target.exists()]
        with ThreadPoolExecutor(JOBS) as pool:
            jobs = [
                pool.submit(_run, [compiler(), *COMMON, *flags, "-c", str(path)], target)
                for target, path, flags in missing
            ]
            for job in jobs:
                job.result()
        digest = hashlib.sha256("".join(o.name for o in objects).encode()).hexdigest()[:16]
        library = OUT / f"{NAME}-{digest}.so"
        if not library.exists():
            _run([compiler(), "-shared", *map(str, objects), *_link_flags()], library)
        for old in {*OUT.glob("*.o"), *OUT.glob("*.so")} - {*objects, library}:
            old.unlink()
    return library


def _link_flags() -> list[str]:
    import torch

    return [f"-L{Path(torch.__file__).parent / 'lib'}", "-ltorch_cpu"]


@functools.cache
def load() -> ModuleType:
    """The module, built if need be. Its operations are `torch.ops.fastkd_simt.*`."""
    import torch  # noqa: F401  (the library needs libtorch_cpu.so in the process)

    spec = importlib.util.spec_from_file_location(NAME, build())
    module = importlib.util.module_from_spec(spec)
    sys.modules[NAME] = module
    spec.loader.exec_module(module)
    return module


if __name__ == "__main__":
    print(build())
