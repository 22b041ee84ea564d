"""Steps one after another, each a command with its limit: what gpu_check is made of."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
LEAST = 5  # seconds, under which a step is not begun


class Step(NamedTuple):
    """One command. `needed`: its failure is the run's. `skip`: why it is left out, or ""."""

    name: str
    command: Sequence[str]
    seconds: float
    needed: bool = True
    skip: str = ""
    environment: Mapping[str, str] = MappingProxyType({})


class Outcome(NamedTuple):
    name: str
    status: str  # passed | failed | timed out | skipped
    seconds: float
    detail: str = ""


def run(
    steps: Sequence[Step],
    out: Path,
    total: float,
    say: Callable[[str], object] = print,
    environment: dict[str, str] | None = None,
) -> list[Outcome]:
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
            limit = min(step.seconds, left)
            outcome = _run(step, out / f"{step.name}.txt", limit, (environment or {}) | dict(step.environment))
        outcomes.append(outcome)
        say(_line(outcome))
        _note(out, steps, outcomes)
    return outcomes


def _run(step: Step, log: Path, limit: float, environment: dict[str, str]) -> Outcome:
    always = {"PYTHONUNBUFFERED": "1", "FASTKD_REQUIRE_NATIVE": "1", "MPLBACKEND": "Agg"}
    environment = os.environ | always | environment
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


def planned(step: Step) -> str:
    """One line of a dry run."""
    before = "".join(f"{name}={value} " for name, value in step.environment.items())
    command = f"skipped: {step.skip}" if step.skip else before + " ".join(step.command)
    return f"{step.name:10} {step.seconds:4.0f} s  {command}"
