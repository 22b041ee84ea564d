"""`make gpu-check OUT=folder`: what a machine with a GPU is needed for, in one command of under 8 minutes.

It builds the CUDA kernels where they are missing and runs all CUDA tests, the benchmarks and compute-sanitizer. Each
step has its own limit and a failed one does not stop the next. OUT gets log.txt, a file per step, results/ and
summary.json; the last lines and the exit status say what failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
TOTAL = 460  # seconds for all steps
LEAST = 5  # seconds, under which a step is not begun


class Step(NamedTuple):
    """One command. `needed`: its failure is the run's. `skip`: why it is left out, or ""."""

    name: str
    command: Sequence[str]
    seconds: int
    needed: bool = True
    skip: str = ""


class Outcome(NamedTuple):
    name: str
    status: str  # passed | failed | timed out | skipped
    seconds: float
    detail: str = ""


def steps(out: Path) -> list[Step]:
    """By what it would cost to be without: build, tests, times, then the sanitizers."""
    python = sys.executable
    bench = [python, "-m", "benchmarks", "--device", "cuda", "--brief", "--results", str(out / "results")]
    sanitizer = shutil.which("compute-sanitizer") or _beside_nvcc("compute-sanitizer")
    missing = "" if sanitizer else "compute-sanitizer is not there"
    calls = [python, "-m", "benchmarks.gpu_calls"]
    tests = [python, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-k", "cuda", "tests"]
    built = (ROOT / "fastkd" / "libfastkd_cuda.so").exists()
    check = [str(sanitizer), "--error-exitcode", "9", "--target-processes", "all"]
    hardware = shutil.which("ncu") or _beside_nvcc("ncu")
    counters = "dram__bytes_read.sum,dram__bytes_write.sum,gpu__time_duration.sum"
    ncu = [str(hardware), "--clock-control", "none", "--metrics", counters, "--csv", "--profile-from-start", "off"]
    return [
        Step("machine", [python, "-m", "benchmarks.gpu_calls", "--machine"], 40),
        Step("build", [python, "setup.py", "-q", "build_ext", "--inplace"], 200, skip="built before" if built else ""),
        Step("tests", tests, 130),
        Step("bench", [*bench, "--deadline", "110"], 170),
        Step("steps", [*bench, "--steps", "--deadline", "40"], 90, needed=False),
        Step("memcheck", [*check, "--tool", "memcheck", *calls], 60, skip=missing),
        Step("racecheck", [*check, "--tool", "racecheck", *calls], 60, skip=missing),
        Step("bytes", [*ncu, *calls, "--profiled"], 60, needed=False, skip="" if hardware else "ncu is not there"),
    ]


def _beside_nvcc(tool: str) -> str | None:
    """CUDA's own tools are often in its bin folder alone."""
    nvcc = shutil.which("nvcc")
    folders = [Path(nvcc).resolve().parent] if nvcc else []
    folders += [Path(os.environ.get("CUDA_HOME", "/usr/local/cuda")) / "bin"]
    return next((str(folder / tool) for folder in folders if (folder / tool).exists()), None)


def run(steps: Sequence[Step], out: Path, total: float = TOTAL, say: Callable[[str], object] = print) -> list[Outcome]:
    """Runs the steps one after another, each within its limit and what is left of `total` seconds."""
    out.mkdir(parents=True, exist_ok=True)
    end, outcomes = time.monotonic() + total, []
    for step in steps:
        left = end - time.monotonic()
        if step.skip:
            outcome = Outcome(step.name, "skipped", 0.0, step.skip)
        elif left < min(LEAST, total / 2):
            outcome = Outcome(step.name, "skipped", 0.0, "no time was left")
        else:
            outcome = _run(step, out / f"{step.name}.txt", min(step.seconds, left))
        outcomes.append(outcome)
        say(_line(outcome))
        _note(out, steps, outcomes)
    return outcomes


def _run(step: Step, log: Path, limit: float) -> Outcome:
    environment = os.environ | {"PYTHONUNBUFFERED": "1", "FASTKD_REQUIRE_NATIVE": "1", "MPLBACKEND": "Agg"}
    begin = time.monotonic()
    with log.open("w") as stream:
        stream.write("$ " + " ".join(step.command) + "\n")
        stream.flush()
        try:
            process = subprocess.Popen(
                step.command, cwd=ROOT, env=environment, stdout=stream, stderr=subprocess.STDOUT, start_new_session=True
            )
        except OSError as error:
            return Outcome(step.name, "failed", 0.0, str(error))
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # its children too: it is a session of its own
            process.wait()
            return Outcome(step.name, "timed out", time.monotonic() - begin, f"after {limit:.0f} s")
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    seconds = time.monotonic() - begin
    last = _last_line(log)
    return Outcome(step.name, "passed" if code == 0 else "failed", seconds, last if code == 0 else f"{code}: {last}")


def _last_line(log: Path) -> str:
    lines = [line.strip("= \n") for line in log.read_text(errors="replace").splitlines()[1:]]
    return next((line for line in reversed(lines) if line), "")[:200]


def _line(outcome: Outcome) -> str:
    return f"{outcome.name:10} {outcome.status:9} {outcome.seconds:6.1f} s  {outcome.detail}"


def failed(steps: Sequence[Step], outcomes: Sequence[Outcome]) -> list[str]:
    """The needed steps that did not pass: one that no time was left for too, one whose tool is missing not."""
    needed = {step.name for step in steps if step.needed and not step.skip}
    return [outcome.name for outcome in outcomes if outcome.status != "passed" and outcome.name in needed]


def _note(out: Path, steps: Sequence[Step], outcomes: Sequence[Outcome]) -> None:
    """After every step, so that a run that is cut off leaves what it found."""
    whole = len(outcomes) == len(steps)
    found = {"finished": whole, "failed": failed(steps, outcomes), "steps": [o._asdict() for o in outcomes]}
    (out / "summary.json").write_text(json.dumps(found, indent=1) + "\n")
    (out / "log.txt").write_text("\n".join(map(_line, outcomes)) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu_check", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("out", type=Path, help="folder for log.txt, summary.json, results/ and a file per step")
    parser.add_argument("--dry-run", action="store_true", help="say the steps and their limits, run nothing")
    parser.add_argument("--only", default="", help="comma-separated names of steps")
    options = parser.parse_args(argv)
    out = options.out.resolve()
    chosen = [step for step in steps(out) if not options.only or step.name in options.only.split(",")]
    if options.dry_run:
        for step in chosen:
            print(
                f"{step.name:10} {step.seconds:4} s  {f'skipped: {step.skip}' if step.skip else ' '.join(step.command)}"
            )
        return 0
    outcomes = run(chosen, out)
    wrong = failed(chosen, outcomes)
    print(f"FAILED: {', '.join(wrong)}; see {out}" if wrong else f"all needed steps passed; see {out}")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
