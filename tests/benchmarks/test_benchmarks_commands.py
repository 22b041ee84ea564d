"""`fastkd bench`, `python -m benchmarks` and `make gpu-check`: what they start, refuse and write."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastkd import _bench
from fastkd.cli import main

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import gpu_calls, gpu_check, gpu_steps  # noqa: E402
from benchmarks.gpu_steps import Outcome, Step  # noqa: E402


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
    outcomes = gpu_steps.run(steps, tmp_path, 60, say=said.append)
    assert [(o.status, o.detail) for o in outcomes[:3]] == [
        ("passed", "two"), ("failed", "3: why"), ("skipped", "not there"),
    ]  # fmt: skip
    assert [o.status for o in outcomes[3:]] == ["failed", "passed"] and len(said) == 5
    assert gpu_steps.failed(steps, outcomes) == ["wrong"]
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["finished"] and summary["failed"] == ["wrong"] and len(summary["steps"]) == 5
    assert "one\ntwo\n" in (tmp_path / "first.txt").read_text()
    assert "why" in (tmp_path / "log.txt").read_text()


def test_a_step_is_ended_at_its_limit_with_its_children(tmp_path):
    child = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'import time; print(1); time.sleep(60)'])"
    begin = time.monotonic()
    (outcome,) = gpu_steps.run([step("slow", child, 1.0)], tmp_path, 60, say=str)
    assert outcome.status == "timed out" and "after 1 s" in outcome.detail and time.monotonic() - begin < 20


def test_what_is_left_of_the_whole_time_is_the_limit(tmp_path):
    steps = [step("slow", "import time; time.sleep(60)"), step("late", "print(1)")]
    outcomes = gpu_steps.run(steps, tmp_path, total=1.0, say=str)
    assert [(o.status, o.detail) for o in outcomes][1] == ("skipped", "no time was left")
    assert outcomes[0].status == "timed out" and gpu_steps.failed(steps, outcomes) == ["slow", "late"]


@pytest.mark.parametrize("device", ["cuda", "cpu"])
@pytest.mark.parametrize("limit", [None, 2.0])
def test_the_steps_of_each_part(limit, device, tmp_path, capsys):
    wanted = {
        "correctness": ["build", "machine", "calls", "tests", "memcheck"],
        "times": ["bench"],
        "bytes": ["bytes", "racecheck", "steps"],
    }
    arguments = [str(tmp_path / "out"), "--dry-run"] + ["--stand-in"] * (device == "cpu")
    arguments += ["--limit", str(limit)] if limit else []
    assert gpu_check.main(arguments) == 0 and not (tmp_path / "out").exists()
    said = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in said] == [name for names in wanted.values() for name in names]
    for part, names in wanted.items():
        seconds = 60 * (limit or gpu_check.PARTS[part])
        steps = gpu_check.MAKE[part](tmp_path, seconds, device)
        assert [s.name for s in steps] == names and all(0 < s.seconds <= max(seconds, 120) for s in steps)
        for s in steps:
            deadline = float(s.command[s.command.index("--deadline") + 1]) if "--deadline" in s.command else 0
            assert deadline < s.seconds and ("cuda" in s.command) <= (device == "cuda")


def test_tests_are_chosen_by_the_marker_and_run_by_several_processes(tmp_path, monkeypatch):
    command = gpu_check.tests(tmp_path, stand_in=False)
    assert command[command.index("-m", 3) + 1] == "gpu and not slow" and "-k" not in command
    monkeypatch.setattr(gpu_check.importlib.util, "find_spec", lambda name: None)
    assert set(command) - set(gpu_check.tests(tmp_path, stand_in=False)) == {"-n", "8", "--dist", "worksteal"}


def test_sanitizers_see_our_kernels_alone_and_every_allocation(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check.shutil, "which", lambda name: f"/cuda/{name}")
    steps = {s.name: s for part in gpu_check.PARTS for s in gpu_check.MAKE[part](tmp_path, 400, "cuda")}
    for name in ("memcheck", "racecheck"):
        command = list(steps[name].command)
        assert command[0] == "/cuda/compute-sanitizer" and command[command.index("--tool") + 1] == name
        assert command[command.index("--kernel-name") + 1] == "kns=fastkd" and not steps[name].skip
    assert dict(steps["memcheck"].environment) == {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    assert steps["bytes"].command[0] == "/cuda/ncu"


def test_a_steps_environment_reaches_it(tmp_path):
    code = "import os; print(os.environ['ONE'], os.environ['TWO'])"
    steps = [step("says", code, environment={"TWO": "2"})]
    (outcome,) = gpu_steps.run(steps, tmp_path, 60, say=str, environment={"ONE": "1", "TWO": "1"})
    assert (
        outcome.detail == "1 2"
        and gpu_steps.planned(steps[0]).startswith("says")
        and "TWO=2" in gpu_steps.planned(steps[0])
    )


def test_the_exit_status_says_what_failed(tmp_path, monkeypatch, capsys):
    outcomes, given = [Outcome("tests", "failed", 1.0, "1: 3 failed")], []
    monkeypatch.setattr(gpu_steps, "run", lambda steps, out, total, environment: given.append((out, total)) or outcomes)
    arguments = [str(tmp_path), "--part", "correctness", "--only", "tests", "--limit", "3"]
    assert gpu_check.main(arguments) == 1 and given == [(tmp_path / "correctness", 180.0)]
    assert "FAILED: tests" in capsys.readouterr().out
    outcomes[0] = Outcome("tests", "passed", 1.0, "3 passed")
    assert gpu_check.main(arguments) == 0


def test_libraries_are_carried_in(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_check, "ROOT", tmp_path / "tree")
    (tmp_path / "tree" / "fastkd").mkdir(parents=True)
    with pytest.raises(SystemExit, match="expected libfastkd"):
        gpu_check.main([str(tmp_path / "out"), "--only", "nothing", "--libraries", str(tmp_path)])
    (tmp_path / "libfastkd_cuda.so").write_text("of another machine")
    assert gpu_check.main([str(tmp_path / "out"), "--only", "nothing", "--libraries", str(tmp_path)]) == 0
    assert (tmp_path / "tree" / "fastkd" / "libfastkd_cuda.so").read_text() == "of another machine"


JUNIT = """<testsuites><testsuite>
<testcase classname="tests.ops.test_mutual" name="a"/><testcase classname="tests.ops.test_mutual_rows" name="b"/>
<testcase classname="tests.ops.test_mutual.TestClass" name="c"><failure message="no"/></testcase>
<testcase classname="tests.ops.test_multi_teacher_rows" name="d"/>
<testcase classname="tests.ops.test_group_stats" name="e"><skipped/></testcase>
</testsuite></testsuites>"""


def test_times_stand_beside_what_the_tests_said(tmp_path):
    gpu_check.note_tests(tmp_path)
    assert set(json.loads((tmp_path / "tests.json").read_text()).values()) == {"not run"}
    (tmp_path / "correctness").mkdir()
    (tmp_path / "correctness" / "tests.xml").write_text(JUNIT)
    gpu_check.note_tests(tmp_path)
    said = json.loads((tmp_path / "tests.json").read_text())
    assert said["mutual"] == "FAILED: 1 of 3" and said["multi_teacher"] == said["linear_kd"] == "1 passed"
    assert said["group_stats"] == said["rkd_angle"] == "not run"


@pytest.mark.slow
def test_every_step_goes_through_on_a_stand_in(tmp_path):
    """All three parts on the CPU: the commands, the files, and tests of CUDA places on the emulator."""
    command = [sys.executable, "-m", "benchmarks.gpu_check", str(tmp_path), "--stand-in"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "skipped" not in done.stdout.replace("build      skipped", "")
    for part in gpu_check.PARTS:
        assert json.loads((tmp_path / part / "summary.json").read_text())["failed"] == []
    assert " passed" in (tmp_path / "correctness" / "tests.txt").read_text().splitlines()[-1]
    (written,) = (tmp_path / "results").glob("*.json")
    result = json.loads(written.read_text())
    assert {c["operation"] for c in result["comparisons"]} == set(gpu_calls.SMALL)
    assert result["tests"]["mutual"].endswith(" passed")


@pytest.mark.parametrize("name", gpu_calls.SMALL)
def test_the_calls_for_the_sanitizer_run(name, monkeypatch, capsys):
    """On the CPU here: that shapes and arguments fit."""
    monkeypatch.setattr(gpu_calls, "SMALL", {name: gpu_calls.SMALL[name]})
    cases = gpu_calls.small()
    gpu_calls.make(cases, "cpu")
    assert len(capsys.readouterr().out.splitlines()) == len(cases) >= 1


def test_large_calls_are_of_every_operation_of_its_own():
    own = [name for name in gpu_calls.SMALL if not name.startswith("linear")]  # of the others' kernels and of products
    assert [case.operation.name for case in gpu_calls.large()] == own
