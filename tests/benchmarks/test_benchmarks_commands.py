"""`fastkd bench`, `python -m benchmarks` and `make gpu-check`: what they start, refuse and write."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastkd import _bench
from fastkd.cli import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_calls, gpu_check  # noqa: E402
from benchmarks.gpu_check import Outcome, Step  # noqa: E402


def step(name, code, seconds=20, **rest):
    return Step(name, [sys.executable, "-c", code], seconds, **rest)


def test_fastkd_bench_starts_the_source_trees_benchmarks(monkeypatch, tmp_path):
    started = []

    def run(command, cwd):
        started.append((command[1:], cwd))
        return subprocess.CompletedProcess(command, 5)

    monkeypatch.setattr(_bench.subprocess, "run", run)
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "--steps", "--results", "here"]) == 5
    assert started == [(["-m", "benchmarks", "--steps", "--results", str(tmp_path / "here")], ROOT)]


def test_fastkd_bench_without_the_source_tree_is_one_sentence(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(_bench, "ROOT", tmp_path)
    assert main(["bench"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("fastkd: fastkd bench needs the source tree") and said.count("\n") == 1


def test_the_commands_say_their_options():
    run = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--help"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert all(
        option in run.stdout
        for option in ("--sweep", "--steps", "--scaling", "--all", "--brief", "--quick", "--deadline")
    )


def test_a_failed_step_does_not_stop_the_next(tmp_path):
    steps = [
        step("first", "print('one'); print('two')"),
        step("wrong", "import sys; print('why'); sys.exit(3)"),
        step("missing", "", skip="not there"),
        Step("nothing", ["/no/such/program"], 5, needed=False),
        step("last", "print('went on')"),
    ]
    said = []
    outcomes = gpu_check.run(steps, tmp_path, say=said.append)
    assert [(o.status, o.detail) for o in outcomes[:3]] == [
        ("passed", "two"), ("failed", "3: why"), ("skipped", "not there"),
    ]  # fmt: skip
    assert [o.status for o in outcomes[3:]] == ["failed", "passed"] and len(said) == 5
    assert gpu_check.failed(steps, outcomes) == ["wrong"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["failed"] == ["wrong"] and len(summary["steps"]) == 5
    assert "one\ntwo\n" in (tmp_path / "first.txt").read_text()
    assert "why" in (tmp_path / "log.txt").read_text()


def test_a_step_is_ended_at_its_limit_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1); time.sleep(60)'])"
    begin = time.monotonic()
    (outcome,) = gpu_check.run([step("slow", child, 1.0)], tmp_path, say=str)
    assert outcome.status == "timed out" and "after 1 s" in outcome.detail and time.monotonic() - begin < 20


def test_what_is_left_of_the_whole_time_is_the_limit(tmp_path):
    steps = [step("slow", "import time; time.sleep(60)"), step("late", "print(1)")]
    outcomes = gpu_check.run(steps, tmp_path, total=1.0, say=str)
    assert [(o.status, o.detail) for o in outcomes][1] == ("skipped", "no time was left")
    assert outcomes[0].status == "timed out" and gpu_check.failed(steps, outcomes) == ["slow", "late"]


def test_the_real_steps_fit_and_their_commands_exist(tmp_path, capsys):
    steps = gpu_check.steps(tmp_path)
    assert [s.name for s in steps] == ["machine", "build", "tests", "bench", "steps", "memcheck", "racecheck", "bytes"]
    assert gpu_check.TOTAL < 8 * 60 and all(0 < s.seconds <= 200 for s in steps)
    assert gpu_check.main([str(tmp_path / "out"), "--dry-run", "--only", "tests,bench"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 and "-k cuda tests" in said[0] and "benchmarks --device cuda --brief" in said[1]
    assert not (tmp_path / "out").exists()


def test_the_exit_status_says_what_failed(tmp_path, monkeypatch, capsys):
    outcomes = [Outcome("tests", "failed", 1.0, "1: 3 failed")]
    monkeypatch.setattr(gpu_check, "run", lambda steps, out: outcomes)
    assert gpu_check.main([str(tmp_path), "--only", "tests"]) == 1
    assert "FAILED: tests" in capsys.readouterr().out
    outcomes[0] = Outcome("tests", "passed", 1.0, "3 passed")
    assert gpu_check.main([str(tmp_path), "--only", "tests"]) == 0


@pytest.mark.parametrize("name", gpu_calls.SMALL)
def test_the_calls_for_the_sanitizer_run(name, monkeypatch, capsys):
    """On the CPU here: that shapes and arguments fit."""
    monkeypatch.setattr(gpu_calls, "SMALL", {name: gpu_calls.SMALL[name]})
    cases = gpu_calls.small()
    gpu_calls.make(cases, "cpu")
    assert len(capsys.readouterr().out.splitlines()) == len(cases) >= 1


def test_large_calls_are_of_every_operation_of_its_own():
    assert [case.operation.name for case in gpu_calls.large()] == list(gpu_calls.SMALL)[:-1]
