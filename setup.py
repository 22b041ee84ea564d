"""Drives CMakeLists.txt, which says how the native libraries are built; pyproject.toml says everything else.

FASTKD_WITH_CUDA=auto|1|0, TORCH_CUDA_ARCH_LIST, MAX_JOBS, CXX, CUDACXX and CUDA_HOME are honoured. Without a C++
compiler the package is installed in plain Python; FASTKD_REQUIRE_NATIVE=1 makes that an error. FASTKD_SANITIZE=1
builds the CPU library for `make test-asan`, which alone can load it.
"""

from __future__ import annotations

import filecmp
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, SetupError

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT / "tools"))

import toolchain  # noqa: E402

CPU, CUDA = "libfastkd_cpu.so", "libfastkd_cuda.so"
LEFT_OUT = "left_out.json"  # as in fastkd/_library.py


def warn(message: str) -> None:
    print(f"\nfastkd: WARNING: {message}\n", file=sys.stderr, flush=True)


class BuildNative(build_ext):
    """Configures, builds and installs libfastkd_cpu.so and libfastkd_cuda.so into the package's folder."""

    def run(self) -> None:
        try:
            reason = toolchain.missing()
            if not reason:
                self._build(toolchain.torch_folder())
        except toolchain.ConfigurationError as error:
            raise SetupError(str(error)) from None
        if reason and toolchain.flag("FASTKD_REQUIRE_NATIVE"):
            raise SetupError(f"FASTKD_REQUIRE_NATIVE=1, but the native libraries cannot be built: {reason}")
        if reason:
            self._place(None, {CPU: reason, CUDA: reason})
            warn(f"{reason}: installing without native libraries; everything works, in plain PyTorch, slower")

    def _in_tree(self) -> bool:
        return bool(self.inplace or self.editable_mode)

    def _package(self) -> Path:
        return (ROOT if self._in_tree() else Path(self.build_lib)) / "fastkd"

    def _build(self, torch: Path | None) -> None:
        if torch is None:
            raise SetupError('torch 2.11 or newer is needed to build: pip install "torch>=2.11"')
        folder = ROOT / "build" / "native" if self._in_tree() else Path(self.build_temp) / "native"
        cmake = toolchain.cmake().path
        options = self._options(torch)
        self._configure(cmake, folder, options)
        self._call([cmake, "--build", str(folder), "--parallel", str(toolchain.jobs())])
        staged = folder / "install"
        shutil.rmtree(staged, ignore_errors=True)
        self._call([cmake, "--install", str(folder), "--prefix", str(staged)])
        asked = options["FASTKD_WITH_CUDA"] == "ON"
        reason = "the torch that was there has no CUDA" if asked else toolchain.without_cuda()
        self._place(staged, {} if (staged / CUDA).is_file() else {CUDA: reason})

    def _options(self, torch: Path) -> dict[str, str]:
        options = {
            "CMAKE_CXX_COMPILER": toolchain.cxx().path,
            "FASTKD_TORCH_INCLUDE": str(torch / "include"),
            "FASTKD_TORCH_LIB": str(torch / "lib"),
            "FASTKD_WITH_CUDA": "OFF",
            "FASTKD_JOBS": str(toolchain.jobs()),
        }
        if toolchain.flag("FASTKD_SANITIZE"):
            if self._package() == ROOT / "fastkd":
                raise SetupError("FASTKD_SANITIZE=1: name a folder of its own with --build-lib, got the package's")
            return options | {"FASTKD_SANITIZE": "ON"}
        if toolchain.with_cuda() == "0":  # nothing is tried
            return options
        reason, nvcc, wanted = toolchain.without_cuda(), toolchain.nvcc(), toolchain.wanted_architectures()
        if not reason:
            cuda = {"FASTKD_WITH_CUDA": "ON", "CMAKE_CUDA_COMPILER": nvcc.path}
            known = toolchain.known_architectures(nvcc.path, wanted)
            return options | cuda | {"CMAKE_CUDA_ARCHITECTURES": ";".join(known)}
        if toolchain.with_cuda() == "1":
            raise SetupError(f"FASTKD_WITH_CUDA=1, but {reason}")
        if nvcc.path:
            warn("nvcc is here but no GPU is: CUDA kernels were left out; FASTKD_WITH_CUDA=1 builds them for all GPUs")
        elif wanted:
            warn(f"{reason}: building the CPU kernels only (FASTKD_WITH_CUDA=0 silences this)")
        return options

    def _configure(self, cmake: str, folder: Path, options: dict[str, str]) -> None:
        """CMake's cache keeps tools that may be gone by now (an isolated build's), so other options start afresh."""
        ninja = toolchain.ninja().path
        if ninja:
            options = options | {"CMAKE_MAKE_PROGRAM": ninja}
        stamp, content = folder / "options.json", json.dumps([cmake, str(ROOT), options], indent=1)
        if stamp.is_file() and stamp.read_text() != content:
            shutil.rmtree(folder)
        folder.mkdir(parents=True, exist_ok=True)
        defines = [f"-D{name}={value}" for name, value in options.items()]
        generator = ["-G", "Ninja"] if ninja else ["-G", "Unix Makefiles"]
        self._call([cmake, "-S", str(ROOT), "-B", str(folder), *generator, *defines])
        stamp.write_text(content)

    def _call(self, command: list[str]) -> None:
        print("fastkd:", " ".join(command), flush=True)
        status = subprocess.run(command).returncode
        if status != 0:
            raise CompileError(f"{Path(command[0]).name} {command[1]} failed with status {status}; its output says why")

    def _place(self, staged: Path | None, left_out: dict[str, str]) -> None:
        """Replaces each library as a whole, since a running process may have it mapped, and removes stale ones.

        `left_out` says why a library is not there; the package reads it.
        """
        package = self._package()
        package.mkdir(parents=True, exist_ok=True)
        (package / LEFT_OUT).write_text(json.dumps(left_out, indent=1) + "\n")
        built = sorted(staged.glob("*.so")) if staged else []
        for old in package.glob("libfastkd_*.so"):
            if old.name not in {library.name for library in built}:
                old.unlink()
        for library in built:
            target = package / library.name
            if not (target.is_file() and filecmp.cmp(library, target, shallow=False)):
                temporary = target.with_suffix(f".{os.getpid()}.tmp")
                shutil.copy2(library, temporary)
                temporary.replace(target)

    def get_outputs(self) -> list[str]:
        return sorted(str(path) for path in [*self._package().glob("libfastkd_*.so"), self._package() / LEFT_OUT])

    def get_output_mapping(self) -> dict[str, str]:
        return {}


class Wheel(bdist_wheel):
    """The libraries know neither CPython nor a torch version: any Python 3; without them, any platform too."""

    def finalize_options(self) -> None:
        super().finalize_options()
        self.root_is_pure = bool(toolchain.missing())

    def get_tag(self) -> tuple[str, str, str]:
        return "py3", "none", super().get_tag()[2]


setup(
    ext_modules=[Extension("fastkd._native", [])],
    cmdclass={"build_ext": BuildNative, "bdist_wheel": Wheel},
)
