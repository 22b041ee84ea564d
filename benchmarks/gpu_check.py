"""`make gpu-check OUT=folder`: what a machine with a GPU is needed for, in three parts that keep their minutes.

correctness: the library, every operation once, the tests marked `gpu`, memory checked. times: the benchmarks, the
largest case of each operation first. bytes: DRAM traffic, races, training steps. Each step writes as it goes, has its
own limit, and a failed one does not stop the next. OUT gets a folder for each part with log.txt, summary.json and a
file per step; the last lines and the exit status say what failed.

The libraries may be carried in (--libraries), built elsewhere for this GPU's architecture: TORCH_CUDA_ARCH_LIST=9.0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shutil
import sys
from pathlib import Path

from benchmarks import gpu_steps
from benchmarks.gpu_steps import ROOT, Step

PARTS = {"correctness": 8.0, "times": 10.0, "bytes": 6.0}  # minutes
SPARE = 20.0  # seconds that a step with a deadline needs after it


def tests(out: Path, stand_in: bool) -> list[str]:
    """Those marked gpu, by several processes where pytest-xdist is."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu and not slow", "-p", "no:cacheprovider"]
    command += [f"--junitxml={out / 'tests.xml'}"]
    if importlib.util.find_spec("xdist"):
        command += ["-n", "1" if stand_in else "8", "--dist", "worksteal"]
    return [*command, "tests/ops/test_mutual_alone.py" if stand_in else "tests"]


def correctness(out: Path, seconds: float, device: str) -> list[Step]:
    stand_in = device == "cpu"
    calls = [sys.executable, "-m", "benchmarks.gpu_calls", "--device", device]
    build = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]  # for the GPU that is here
    library = ROOT / "fastkd" / ("libfastkd_cpu.so" if stand_in else "libfastkd_cuda.so")
    memcheck, missing = sanitizer("memcheck", stand_in)
    return [
        Step("build", build, seconds / 2, skip="built before" if library.exists() else ""),
        Step("machine", [*calls, "--machine"], 60),
        Step("calls", calls, 90),
        Step("tests", tests(out, stand_in), 0.6 * seconds),
        Step("memcheck", [*memcheck, *calls], 120, skip=missing, environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}),
    ]


def times(out: Path, seconds: float, device: str) -> list[Step]:
    command = [*benchmark(out, device), "--brief", "--deadline", str(max(1.0, seconds - 4 * SPARE))]
    return [Step("bench", [*command, "--tiny"] if device == "cpu" else command, seconds)]


def bytes_(out: Path, seconds: float, device: str) -> list[Step]:
    stand_in = device == "cpu"
    calls = [sys.executable, "-m", "benchmarks.gpu_calls", "--device", device]
    racecheck, missing = sanitizer("racecheck", stand_in)
    ncu, without = profiler(stand_in)
    steps = [*benchmark(out, device), "--steps", "--deadline", str(max(1.0, 0.4 * seconds - SPARE))]
    steps += ["--quick", "-k", "resnet20 feed"] if stand_in else ["--brief"]
    return [
        Step("bytes", [*ncu, *calls, "--profiled"], 0.3 * seconds, needed=False, skip=without),
        Step("racecheck", [*racecheck, *calls], 120, skip=missing),
        Step("steps", steps, 0.4 * seconds, needed=False),
    ]


MAKE = {"correctness": correctness, "times": times, "bytes": bytes_}


def benchmark(out: Path, device: str) -> list[str]:
    """Beside the times stands what the tests said in the part before, or that they were not run."""
    results, said = str(out.parent / "results"), str(out.parent / "tests.json")
    return [sys.executable, "-m", "benchmarks", "--device", device, "--results", results, "--untested", said]


def sanitizer(tool: str, stand_in: bool) -> tuple[list[str], str]:
    """What stands before a command, and why it is left out. Only our kernels: PyTorch's take minutes."""
    program = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    if stand_in or program is None:
        return [], "" if stand_in else "compute-sanitizer is not there"
    return [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        "--target-processes",
        "all",
        "--kernel-name",
        "kns=fastkd",
    ], ""


def profiler(stand_in: bool) -> tuple[list[str], str]:
    program = shutil.which("ncu") or _beside_nvcc("ncu")
    if stand_in or program is None:
        return [], "" if stand_in else "ncu is not there"
    counters = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    return [program, "--clock-control", "none", "--metrics", counters, "--csv", "--profile-from-start", "off"], ""


def _beside_nvcc(tool: str) -> str | None:
    """CUDA's own tools are often in its bin folder alone."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    return next((str(folder / tool) for folder in folders if (folder / tool).exists()), None)


def carry_in(folder: Path) -> None:
    """Libraries that were built elsewhere, to where the package looks for them."""
    found = sorted(folder.glob("libfastkd_*.so"))
    if not found:
        raise SystemExit(f"--libraries: expected libfastkd_*.so in it, got {folder}")
    for library in found:
        shutil.copy2(library, ROOT / "fastkd" / library.name)


def note_tests(out: Path) -> None:
    """tests.json: what the tests of each operation said, for the times; that they were not run where they were not."""
    from benchmarks import guard, registry

    patterns = {name: operation.tests for name, operation in registry.OPERATIONS.items()}
    found = out / "correctness" / "tests.xml"
    said = guard.read(found, patterns) if found.is_file() else dict.fromkeys(patterns, "not run")
    out.mkdir(parents=True, exist_ok=True)
    (out / "tests.json").write_text(json.dumps(said, indent=1) + "\n")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("out", type=Path, help="folder for a folder of each part, and results/")
    add("--part", default="all", choices=[*PARTS, "all"], help="one of the three, or all, one after another")
    minutes = ", ".join(f"{name} {minutes:.0f}" for name, minutes in PARTS.items())
    add("--limit", type=float, help=f"minutes of a part (default: {minutes})")
    add("--libraries", type=Path, help="folder of libfastkd_*.so built elsewhere, which are taken instead of building")
    add("--stand-in", action="store_true", help="on the CPU in place of a GPU: whether every step goes through")
    add("--dry-run", action="store_true", help="say the steps and their limits, run nothing")
    add("--only", default="", help="comma-separated names of steps")
    return parse


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    out, wrong = options.out.resolve(), []
    if options.libraries and not options.dry_run:
        carry_in(options.libraries)
    for part in PARTS if options.part == "all" else [options.part]:
        seconds = 60 * (options.limit or PARTS[part])
        steps = MAKE[part](out / part, seconds, "cpu" if options.stand_in else "cuda")
        steps = [step for step in steps if not options.only or step.name in options.only.split(",")]
        if options.dry_run:
            print("\n".join(map(gpu_steps.planned, steps)))
            continue
        if part != "correctness":
            note_tests(out)
        print(f"{part}: at most {seconds / 60:.0f} minutes", flush=True)
        environment = {"FASTKD_GPU_STAND_IN": "1"} if options.stand_in else {}
        outcomes = gpu_steps.run(steps, out / part, seconds, environment=environment)
        wrong += gpu_steps.failed(steps, outcomes)
    if not options.dry_run:
        print(f"FAILED: {', '.join(wrong)}; see {out}" if wrong else f"all needed steps passed; see {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
