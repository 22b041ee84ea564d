"""The benchmarks' own parts: what is compared computes the same, the floor, the turns, the guard, the report."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from benchmarks import guard, measure, registry, report  # noqa: E402
from benchmarks.registry import FORWARD, OPERATIONS, TRAINING, Case, Logits  # noqa: E402

MULTI_TEACHER = OPERATIONS["multi_teacher"]
SMALL = Logits(6, 37, 3)


def loss_and_gradients(function, operation, shape):
    inputs = operation.make_inputs(shape, torch.float64, "cpu", seed=1)
    loss = function(*inputs.arguments)
    return loss, torch.autograd.grad(loss, inputs.learning)


@pytest.mark.parametrize("shape", [SMALL, Logits(1, 1, 1), Logits(5, 130, 2)], ids=str)
@pytest.mark.parametrize("baseline", [name for name in MULTI_TEACHER.baselines if name != "compile"])
def test_fused_and_baselines_compute_the_same(baseline, shape):
    loss, gradients = loss_and_gradients(MULTI_TEACHER.fused, MULTI_TEACHER, shape)
    other, others = loss_and_gradients(MULTI_TEACHER.baselines[baseline](), MULTI_TEACHER, shape)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients, others, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.slow
def test_compiled_baseline_computes_the_same():
    loss, _ = loss_and_gradients(MULTI_TEACHER.fused, MULTI_TEACHER, SMALL)
    other, _ = loss_and_gradients(MULTI_TEACHER.baselines["compile"](), MULTI_TEACHER, SMALL)
    torch.testing.assert_close(loss, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_tests_and_takes_its_shapes(name):
    operation = OPERATIONS[name]
    assert operation.name == name and list(ROOT.glob(operation.tests))
    inputs = operation.make_inputs(operation.shapes[0], operation.dtypes[0], "cpu", seed=0)
    assert inputs.learning and all(t.requires_grad for t in inputs.learning)
    again = operation.make_inputs(operation.shapes[0], operation.dtypes[0], "cpu", seed=0)
    assert torch.equal(inputs.learning[0], again.learning[0])
    quick = registry.cases(operation, operation.dtypes, quick=True)
    assert 0 < len(quick) < len(registry.cases(operation, operation.dtypes))


def test_bytes_of_the_floor():
    # float32 [128, 100]: student and 4 teachers read, 128 int64 targets read, with training one gradient written
    tensor, targets = 128 * 100 * 4, 128 * 8
    shape = Logits(128, 100, 4)
    assert Case(MULTI_TEACHER, shape, torch.float32, FORWARD).bytes_floor == 5 * tensor + targets
    assert Case(MULTI_TEACHER, shape, torch.float32, TRAINING).bytes_floor == 6 * tensor + targets
    assert Case(MULTI_TEACHER, shape, torch.bfloat16, TRAINING).bytes_floor == 3 * tensor + targets
    copy = measure.Copy(6 * tensor + targets, "cpu")
    assert copy.source.nbytes + copy.destination.nbytes == 6 * tensor + targets
    assert copy().sum() == copy.source.numel()


@pytest.mark.parametrize(("caches", "calls"), [(measure.COLD, 1), (measure.WARM, measure.WARM_CALLS)])
def test_interleave_takes_turns_and_counts_calls(caches, calls, monkeypatch):
    clock, said = [0.0], []
    cost = {"a": 1.0, "b": 3.0}

    def call(name):
        said.append(name)
        clock[0] += cost[name]

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    candidates = {name: lambda name=name: call(name) for name in cost}
    times = measure.interleave(candidates, caches=caches, seconds=0, least=4, most=10)
    assert times == {"a": [1.0] * 4, "b": [3.0] * 4}
    each = calls + (caches == measure.WARM)
    turns = said[6:]  # after the warm-up of three calls each
    assert turns == (["a"] * each + ["b"] * each + ["b"] * each + ["a"] * each) * 2
    times = measure.interleave(candidates, caches=caches, seconds=1e9, least=1, most=3)
    assert len(times["a"]) == 3


def test_quantiles_and_paired_ratios():
    assert measure.quantiles([float(n) for n in range(11)]) == (2.0, 5.0, 8.0)
    assert measure.quantiles([4.0]) == (4.0, 4.0, 4.0)
    # the machine slowed down ten times half-way: paired ratios do not see it
    assert measure.paired([2.0, 2.0, 20.0, 20.0], [1.0, 1.0, 10.0, 10.0]) == (2.0, 2.0, 2.0)


@pytest.mark.parametrize("passes", [FORWARD, TRAINING])
def test_extra_bytes_of_known_calls(passes):
    inputs = registry.Inputs((torch.randn(1000, requires_grad=True),), ())
    step = measure.Step(lambda x: ((x * 2) * 3).sum(), inputs._replace(learning=inputs.arguments), passes)
    peak = measure.extra_bytes(step, "cpu")
    # forward: two products of 4000 bytes live at once, then the sum
    assert 8000 <= peak < 12500
    assert measure.extra_bytes(measure.Step(lambda x: x.view(-1), inputs, FORWARD), "cpu") == 0


def fake_tests(tmp_path, body):
    (tmp_path / "tests").mkdir()
    (tmp_path / "tests" / "test_fake.py").write_text(body)
    return tmp_path


def test_the_guard_refuses_while_tests_fail(tmp_path):
    root = fake_tests(tmp_path, "def test_right():\n    pass\n\ndef test_wrong():\n    assert 1 == 2\n")
    with pytest.raises(guard.Refused, match=r"^fake: no speed-up is reported .* fail \(1 failed, 1 passed"):
        guard.require_passing("fake", "tests/test_fake*.py", root)


@pytest.mark.parametrize("body", ["raise RuntimeError\n", "def nothing():\n    pass\n"])
def test_the_guard_refuses_tests_that_do_not_run(tmp_path, body):
    with pytest.raises(guard.Refused, match="no speed-up"):
        guard.require_passing("fake", "tests/test_fake*.py", fake_tests(tmp_path, body))


def test_the_guard_wants_tests_and_lets_passing_ones_through(tmp_path):
    root = fake_tests(tmp_path, "def test_right():\n    pass\n")
    assert guard.require_passing("fake", "tests/test_fake*.py", root).startswith("1 passed")
    with pytest.raises(guard.Refused, match="no tests"):
        guard.require_passing("fake", "tests/test_other*.py", root)


CONFTEST = """
import sys
from pathlib import Path
sys.path.insert(0, {root!r})
from benchmarks.conftest import *
guard.ROOT = Path(__file__).parents[1]
"""
BENCHMARK = """
from dataclasses import replace
from benchmarks.registry import OPERATIONS, Logits
REAL = OPERATIONS["multi_teacher"]
OPERATION = replace(
    REAL, shapes=(Logits(2, 5, 1),), tests="tests/test_fake*.py", baselines={"eager": REAL.baselines["eager"]}
)

def test_alone(case, candidate, alone):
    alone(case, candidate)

def test_interleaved(case, compare):
    compare(case)
"""


def run_benchmarks(folder, body):
    """A project of one small benchmark whose operation is tested by `body`: its output, the files that it wrote."""
    fake_tests(folder, body)
    (folder / "benches").mkdir()
    (folder / "benches" / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (folder / "benches" / "test_small.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable", "benches"]
    command += ["--bench-device=cpu", "--results=results", "--benchmark-max-time=0.01", "--rootdir=."]
    run = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr, list(folder.glob("results/*.json"))


def test_a_run_stops_with_one_sentence_where_the_tests_fail(tmp_path):
    code, output, written = run_benchmarks(tmp_path, "def test_wrong():\n    assert 1 == 2\n")
    assert code != 0 and not written
    said = [line for line in output.splitlines() if line.startswith("ERROR")]
    assert len(said) == 1 and "no speed-up is reported while its tests fail (1 failed" in said[0], output
    assert "faster" not in output


def test_a_run_writes_its_file_and_prints_the_table(tmp_path):
    code, output, written = run_benchmarks(tmp_path, "def test_right():\n    pass\n")
    assert code == 0 and len(written) == 1, output
    result = json.loads(written[0].read_text())
    report.validate(result)
    assert result["tests"]["multi_teacher"].startswith("1 passed")
    measured = {(c["passes"], c["caches"]) for c in result["comparisons"]}
    assert measured == {(p, c) for p in registry.PASSES for c in (measure.COLD, measure.WARM)}
    for c in result["comparisons"]:
        assert c["microseconds"]["fused"]["p50"] > 0 and set(c["ratios"]) == {"eager", "floor"}
    assert "faster than eager" in output and "test_alone" in output


def comparison(**changes):
    step = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    entry = {
        "operation": "multi_teacher", "shape": SMALL._asdict(), "dtype": "float32", "passes": TRAINING,
        "caches": "cold", "rounds": 7, "floor_bytes": 100,
        "microseconds": {name: step for name in ("fused", "eager", "floor")},
        "ratios": {"eager": step, "floor": step}, "extra_bytes": {"fused": 4, "eager": 8}, "others_cores": 0.0,
    }  # fmt: skip
    return entry | changes


def test_a_written_file_is_complete_and_the_table_says_what_was_not_measured(tmp_path):
    result = report.result([comparison()], "cpu", {"multi_teacher": "3 passed"})
    path = report.write(result, tmp_path)
    assert json.loads(path.read_text()) == result
    assert result["gpu"] == "not measured" and result["device"]["cores"] >= 1 and result["device"]["name"]
    table = report.table(result, tmp_path)
    assert "GPU: not measured" in table and "2.0x (1.0-3.0)" in table and "tests 3 passed" in table
    assert "Other processes" not in table
    assert "Other processes took up to 1.5" in report.table(result | {"comparisons": [comparison(others_cores=1.5)]})


def test_the_table_names_a_gpu_that_was_measured(tmp_path):
    result = report.result([comparison()], "cpu", {"multi_teacher": "3 passed"})
    gpu = result["device"] | {"kind": "cuda", "name": "NVIDIA X", "slug": "nvidia-x"}
    report.write(result | {"device": gpu}, tmp_path)
    assert "GPU: measured, nvidia-x.json" in report.table(result, tmp_path)


@pytest.mark.parametrize(
    "broken",
    [
        {"comparisons": []},
        {"date": None},
        {"device": {"name": "x"}},
        {"comparisons": [comparison(rounds="7")]},
        {"comparisons": [comparison(ratios={"eager": {"p50": 1.0}})]},
        {"surprise": 1},
    ],
)
def test_an_incomplete_result_is_refused(broken, tmp_path):
    result = report.result([comparison()], "cpu", {"multi_teacher": "3 passed"})
    with pytest.raises(ValueError, match="^result"):
        report.write(result | broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_committed_results_are_complete():
    for path in report.FOLDER.glob("*.json"):
        result = json.loads(path.read_text())
        report.validate(result)
        assert path.stem == result["device"]["slug"]
