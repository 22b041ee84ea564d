"""`make test-asan`: the operations' CPU tests under the address and undefined-behaviour sanitizers, at every CPU level.

Run as a program this builds the CPU library for the sanitizers in build/asan and starts pytest with itself as a plugin.
A finding ends the run with the sanitizer's report and the test that was running. GCC only. Leaks are not looked for:
CPython's own would drown ours.
"""

from __future__ import annotations

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "build" / "asan"
LEVELS = (1, 3, 4)
JOBS = 2  # levels at a time
# What runs the CPU kernels, but for calls under torch.compile and in several processes: minutes, and the same kernels.
TESTS = "cpu or threads or random or more_rows"
# Instrumented loops are not vectorised: a sum has one chain of roundings, not one per lane.
ROUNDINGS = 16


def pytest_configure(config) -> None:
    import fastkd

    library = fastkd._library.FOLDER / "libfastkd_cpu.so"
    assert fastkd._library.CPU.loaded and b"__asan_init" in library.read_bytes(), f"{library} has no sanitizers"
    for name in ("assert_as_accurate", "assert_grad_close"):
        setattr(fastkd.testing, name, _more_roundings(getattr(fastkd.testing, name)))


def _more_roundings(check):
    """The check of special values as it is; that of accuracy is the ordinary tests'."""
    import torch

    def checked(actual, exact, baseline, *, factor=2.0, floor=None, name="result"):
        if floor is None:
            finite = exact[exact.isfinite()].abs()
            largest = float(finite.max()) if check.__name__ == "assert_as_accurate" and finite.numel() else 1.0
            floor = 2 * torch.finfo(actual.dtype).eps * largest
        check(actual, exact, baseline, factor=factor * ROUNDINGS, floor=floor * ROUNDINGS, name=name)

    return checked


def build() -> None:
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-temp={FOLDER}", f"--build-lib={FOLDER}"]
    environment = os.environ | {"FASTKD_SANITIZE": "1", "FASTKD_REQUIRE_NATIVE": "1"}
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def runtime() -> str:
    """What must be loaded before all else: libasan, and libstdc++, whose functions libasan looks for at its start."""
    sys.path.insert(0, str(ROOT / "tools"))
    import toolchain

    paths = []
    for name in ("libasan.so", "libstdc++.so.6"):
        command = [toolchain.cxx().path, f"-print-file-name={name}"]
        paths.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
        if not os.path.isabs(paths[-1]):
            sys.exit(f"{toolchain.cxx().path} has no {name}: the sanitizers' tests need g++ with its libasan (CXX=g++)")
    return " ".join(paths)


def settings(level: int) -> dict[str, str]:
    return os.environ | {
        "LD_PRELOAD": runtime(),
        "ASAN_OPTIONS": "detect_leaks=0:abort_on_error=1",
        "UBSAN_OPTIONS": "print_stacktrace=1:abort_on_error=1",
        "FASTKD_LIBRARY_DIR": str(FOLDER / "fastkd"),
        "FASTKD_CPU_LEVEL": str(level),
        "OMP_NUM_THREADS": "1",  # the tests of threads ask for more by themselves
        "OMP_WAIT_POLICY": "PASSIVE",
        "PYTHONPATH": str(ROOT / "tests"),
    }


def main() -> int:
    build()
    names = sorted(path.name for path in (ROOT / "csrc").iterdir() if path.name != "core")
    files = sorted(str(path.relative_to(ROOT)) for name in names for path in ROOT.glob(f"tests/ops/test_{name}*.py"))
    # A finding must reach the terminal: no capture of file descriptors.
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "asan", "-p", "no:cacheprovider", "--capture=sys"]
    command += ["-m", "not slow", "-k", TESTS, *files, *sys.argv[1:]]
    with ThreadPoolExecutor(JOBS) as pool:
        for status, said in pool.map(lambda level: at_level(level, command), LEVELS):
            print(said, flush=True)
            if status != 0:
                pool.shutdown(cancel_futures=True)
                return status
    return 0


def at_level(level: int, command: list[str]) -> tuple[int, str]:
    """pytest's status at this CPU level, and all that it and a sanitizer said."""
    environment = settings(level)
    code = "import fastkd; print(fastkd._library.CPU.cpu_level)"
    here = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, stdout=subprocess.PIPE, check=True)
    if int(here.stdout) != level:
        return 0, f"CPU level {level}: this processor has not got it"
    whole = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    done = subprocess.run(command, cwd=ROOT, env=environment, **whole)
    return done.returncode, f"CPU level {level}:\n{done.stdout}"


if __name__ == "__main__":
    sys.exit(main())
