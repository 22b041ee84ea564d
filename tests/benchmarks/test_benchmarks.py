"""The benchmarks' own parts: what is compared computes the same, the floor, the turns, the guard, the report."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_leaves

import fastkd

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import guard, measure, registry, report  # noqa: E402
from benchmarks.inputs import Embeddings, Heads, Maps, Networks, Projections  # noqa: E402
from benchmarks.registry import FORWARD, OPERATIONS, TRAINING, Case, Logits  # noqa: E402

SMALL = Logits(6, 37, 3)
# Shapes that compute quickly, of every operation.
SMALL_SHAPES = {
    "multi_teacher": [SMALL, Logits(1, 2, 1), Logits(5, 130, 2)],
    "multi_teacher_reverse": [SMALL, Logits(1, 2, 1), Logits(5, 130, 2)],
    "multi_teacher_jsd": [SMALL, Logits(1, 2, 1), Logits(5, 130, 2)],
    "multi_teacher_kd_with_gradient": [SMALL, Logits(1, 2, 1), Logits(5, 130, 2)],
    "multi_label": [SMALL, Logits(1, 2, 1), Logits(5, 130, 2)],
    "mutual": [Networks(6, 37, 4), Networks(1, 2, 2), Networks(5, 130, 3)],
    "cross_entropy": [Networks(6, 37, 4), Networks(1, 2, 2), Networks(5, 130, 3)],
    "group_stats": [Networks(6, 37, 4), Networks(1, 2, 2), Networks(5, 130, 3)],
    "feature_ensemble": [Maps(3, 5, 4, 4, 5), Maps(1, 1, 1, 2, 1), Maps(4, 9, 7, 3, 2)],
    "rkd_distance": [Embeddings(7, 5), Embeddings(2, 3), Embeddings(33, 16)],
    "rkd_angle": [Embeddings(7, 5), Embeddings(3, 3), Embeddings(33, 16)],
    "linear_kd": [Heads(6, 5, 37), Heads(1, 1, 2), Heads(5, 8, 130)],
    "linear_multi_teacher": [Projections(6, 5, 37, 2), Projections(1, 1, 2, 1), Projections(5, 8, 130, 3)],
}
SMALL_CASES = [(OPERATIONS[name], shape) for name, shapes in SMALL_SHAPES.items() for shape in shapes]


def results_and_gradients(function, operation, shape):
    inputs = operation.make_inputs(shape, torch.float64, "cpu", seed=1)
    result = function(*inputs.arguments)
    if not inputs.learning:
        return list(result), []
    return [result], torch.autograd.grad(result, inputs.learning)


def assert_same(operation, shape, name):
    results, gradients = results_and_gradients(operation.fused, operation, shape)
    others, expected_gradients = results_and_gradients(operation.baselines[name](), operation, shape)
    for result, expected in zip(results, others, strict=True):
        torch.testing.assert_close(result, expected, rtol=1e-12, atol=1e-12)
    for gradient, expected in zip(gradients, expected_gradients, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(gradient, expected, rtol=1e-10, atol=max(1e-14, 1e-13 * scale))


def test_every_operation_of_the_library_is_benchmarked():
    measured = {"multi_teacher": "multi_teacher_kd", "mutual": "mutual_kd", "multi_label": "multi_label_kd"}
    measured["linear_multi_teacher"] = "linear_multi_teacher_kd"
    options = {"multi_teacher_reverse", "multi_teacher_jsd"}  # of multi_teacher_kd
    own = set(OPERATIONS) - {"linear_kd"} - options  # linear_kd: of heads and multi_teacher_kd
    assert {measured.get(name, name) for name in own} == set(fastkd.backend_info()) - {"backend", "cpu", "cuda"}
    assert set(SMALL_SHAPES) == set(OPERATIONS)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("operation, shape", SMALL_CASES, ids=lambda v: getattr(v, "name", None) or str(v))
def test_fused_and_baselines_compute_the_same(operation, shape, backend):
    with fastkd.use_backend(backend):
        for name in operation.baselines:
            if name != "compile":
                assert_same(operation, shape, name)


@pytest.mark.slow
@pytest.mark.parametrize("name", OPERATIONS)
def test_compiled_baselines_compute_the_same(name):
    assert_same(OPERATIONS[name], SMALL_SHAPES[name][0], "compile")


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_operation_has_tests_and_takes_its_shapes(name):
    operation = OPERATIONS[name]
    assert operation.name == name and list(ROOT.glob(operation.tests))
    assert set(operation.large) | set(operation.alone_on_cpu) <= set(operation.shapes)
    on_gpu = registry.cases(operation, [torch.float32], device="cuda")
    assert {(case.shape, case.dtype) for case in on_gpu} >= set(operation.gpu) and on_gpu
    shape = SMALL_SHAPES[name][0]
    inputs = operation.make_inputs(shape, operation.dtypes[0], "cpu", seed=0)
    assert bool(inputs.learning) == (TRAINING in operation.passes) and all(t.requires_grad for t in inputs.learning)
    again = operation.make_inputs(shape, operation.dtypes[0], "cpu", seed=0)
    assert torch.equal(first_tensor(inputs.arguments), first_tensor(again.arguments))
    quick, full = (registry.cases(operation, operation.dtypes, quick=quick) for quick in (True, False))
    assert bool(quick) == bool(operation.shapes) and set(map(str, quick)) <= set(map(str, full))
    assert {case.passes for case in quick} <= {operation.passes[-1]}
    assert not {case.shape for case in quick} & set(operation.large)


def first_tensor(arguments):
    return arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]


def test_shapes_without_baselines_on_a_cpu():
    angle = OPERATIONS["rkd_angle"]
    case = Case(angle, angle.alone_on_cpu[0], torch.float32, TRAINING)
    assert case.baselines("cpu") == {} and set(case.baselines("cuda")) == {"eager", "compile"}
    assert set(Case(angle, angle.shapes[0], torch.float32, TRAINING).baselines("cpu")) == {"eager", "compile"}


def floor(name, shape, dtype=torch.float32, passes=TRAINING):
    return Case(OPERATIONS[name], shape, dtype, passes).bytes_floor


def test_bytes_of_the_floor():
    # float32 [128, 100]: student and 4 teachers read, 128 int64 targets read, with training one gradient written
    tensor, targets = 128 * 100 * 4, 128 * 8
    shape = Logits(128, 100, 4)
    assert floor("multi_teacher", shape, passes=FORWARD) == 5 * tensor + targets
    assert floor("multi_teacher", shape) == 6 * tensor + targets
    assert floor("multi_teacher", shape, torch.bfloat16) == 3 * tensor + targets
    copy = measure.Copy(6 * tensor + targets, "cpu")
    assert copy.source.nbytes + copy.destination.nbytes == 6 * tensor + targets
    assert copy().sum() == copy.source.numel()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", OPERATIONS)
def test_the_floor_is_the_tensors_read_and_written(name, dtype):
    """Of the inputs as they are made, of the gradients, and of results that are more than a number."""
    operation, shape = OPERATIONS[name], SMALL_SHAPES[name][0]
    if dtype not in operation.dtypes:
        pytest.skip(f"{name} is not measured in {dtype}")
    inputs = operation.make_inputs(shape, dtype, "cpu", seed=0)
    read = sum(t.nbytes for t in tree_leaves(inputs.arguments) if isinstance(t, torch.Tensor))
    result = operation.fused(*inputs.arguments)
    written = sum(t.nbytes for t in (inputs.learning or result))
    assert floor(name, shape, dtype, operation.passes[-1]) == read + written


@pytest.mark.parametrize("caches, calls", [(measure.COLD, 1), (measure.WARM, measure.WARM_CALLS)])
def test_interleave_takes_turns_and_counts_calls(caches, calls, monkeypatch):
    clock, said = [0.0], []
    cost = {"a": 2**-10, "b": 3 * 2**-10}

    def call(name):
        said.append(name)
        clock[0] += cost[name]

    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])
    candidates = {name: lambda name=name: call(name) for name in cost}
    times = measure.interleave(candidates, caches=caches, seconds=0, least=4, most=10)
    assert times == {name: [seconds] * 4 for name, seconds in cost.items()}
    each = calls + (caches == measure.WARM)
    turns = said[6:]  # after the warm-up of three calls each
    assert turns == (["a"] * each + ["b"] * each + ["b"] * each + ["a"] * each) * 2
    times = measure.interleave(candidates, caches=caches, seconds=1e9, least=1, most=3)
    assert len(times["a"]) == 3
    said.clear()
    cost["b"] = 1.0  # a slow one is warm after one call
    measure.interleave(candidates, caches=caches, seconds=0, least=1, most=1)
    assert said == ["a"] * 3 + ["b"] + ["a"] * each + ["b"] * each


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
from benchmarks.inputs import Embeddings, Networks

def small(name, shape, **changes):
    real = OPERATIONS[name]
    eager = {"eager": real.baselines["eager"]}
    return replace(real, shapes=(shape,), tests="tests/test_fake*.py", baselines=eager, **changes)

ANGLE = Embeddings(5, 3)
OPERATIONS = [
    small("multi_teacher", Logits(2, 5, 1)),
    small("group_stats", Networks(2, 5, 2)),
    small("rkd_angle", ANGLE, large=(), alone_on_cpu=(ANGLE,)),
]

def test_alone(case, candidate, alone):
    alone(case, candidate)

def test_interleaved(case, compare):
    compare(case)
"""


def run_benchmarks(folder, body, *options):
    """A project of small benchmarks whose operations are tested by `body`: its output, the files that it wrote."""
    fake_tests(folder, body)
    (folder / "benches").mkdir()
    (folder / "benches" / "conftest.py").write_text(CONFTEST.format(root=str(ROOT)))
    (folder / "benches" / "test_small.py").write_text(BENCHMARK)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--benchmark-enable", "benches"]
    command += ["--bench-device=cpu", "--results=results", "--benchmark-max-time=0.01", "--rootdir=.", *options]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    run = subprocess.run(command, cwd=folder, env=alone, capture_output=True, text=True)
    return run.returncode, run.stdout + run.stderr, list(folder.glob("results/*.json"))


@pytest.mark.slow
def test_only_what_is_measured_must_pass_and_a_run_stops_with_one_sentence(tmp_path):
    """-k chooses the cases; --quick asks the tests of the place that is measured."""
    body = "import pytest\n\n@pytest.mark.parametrize('place', ['simt', 'cpu'])\n"
    body += "def test_it(place):\n    assert place == '{}'\n"
    (tmp_path / "right").mkdir()
    code, output, written = run_benchmarks(tmp_path / "right", body.format("cpu"), "--quick", "-k", "group_stats")
    assert code == 0 and not written and "group_stats: tests 1 passed, 1 deselected" in output, output
    assert "multi_teacher" not in output and "test_alone" not in output
    (tmp_path / "wrong").mkdir()
    code, output, written = run_benchmarks(tmp_path / "wrong", body.format("simt"), "--quick", "-k", "group_stats")
    assert code != 0 and not written
    said = [line for line in output.splitlines() if line.startswith("ERROR")]
    assert len(said) == 1 and "group_stats: no speed-up is reported while its tests fail (1 failed" in said[0], output
    assert "faster" not in output


def test_what_computes_something_else_is_not_measured():
    case = Case(OPERATIONS["group_stats"], Networks(6, 37, 4), torch.float32, FORWARD)
    steps = measure.candidates(case, "cpu")
    del steps["compile"]
    steps["eager"].function = lambda *arguments: [t + 1 for t in case.operation.fused(*arguments)]
    with pytest.raises(AssertionError, match="eager computes something else"):
        report.comparisons(case, steps, "cpu", seconds=0)


def test_a_candidate_without_memory_is_left_out_but_not_the_fused_one():
    def full():
        raise torch.OutOfMemoryError("full")

    inputs = registry.Inputs((), ())
    fits, full = (measure.Step(function, inputs, FORWARD) for function in (lambda: 3, full))
    steps = {measure.FUSED: fits, "eager": full, "compile": fits}
    assert measure.results(steps) == {measure.FUSED: 3, "compile": 3}
    with pytest.raises(torch.OutOfMemoryError):
        measure.results({measure.FUSED: full, "eager": fits})


def test_slow_calls_are_measured_cold_only(monkeypatch):
    monkeypatch.setattr(measure, "SLOW", 0.0)
    case = Case(OPERATIONS["rkd_distance"], Embeddings(5, 3), torch.float32, TRAINING)
    steps = {measure.FUSED: measure.candidates(case, "cpu")[measure.FUSED]}
    assert [c["caches"] for c in report.comparisons(case, steps, "cpu", seconds=0)] == [measure.COLD]


@pytest.mark.slow
def test_a_run_writes_its_file_and_prints_the_table(tmp_path):
    code, output, written = run_benchmarks(tmp_path, "def test_right():\n    pass\n")
    assert code == 0 and len(written) == 1, output
    result = json.loads(written[0].read_text())
    report.validate(result)
    assert set(result["tests"]) == {"multi_teacher", "group_stats", "rkd_angle"}
    assert all(said.startswith("1 passed") for said in result["tests"].values())
    measured = [(c["operation"], c["passes"], c["caches"]) for c in result["comparisons"]]
    passes = {"multi_teacher": registry.PASSES, "group_stats": [FORWARD], "rkd_angle": [TRAINING]}
    assert measured == [(o, p, c) for o in passes for p in passes[o] for c in (measure.COLD, measure.WARM)]
    for c in result["comparisons"]:
        others = set() if c["operation"] == "rkd_angle" else {"eager"}
        assert c["microseconds"]["fused"]["p50"] > 0 and set(c["ratios"]) == others | {"floor"}
        assert set(c["extra_bytes"]) == others | {"fused"}
    assert "faster than eager" in output and "test_alone" in output


def comparison(**changes):
    step = {"p20": 1.0, "p50": 2.0, "p80": 3.0}
    entry = {
        "operation": "multi_teacher", "shape": SMALL._asdict(), "dtype": "float32", "passes": TRAINING,
        "caches": "cold", "rounds": 7, "floor_bytes": 100,
        "microseconds": {name: step for name in ("fused", "eager", "floor")},
        "ratios": {"eager": step, "floor": step}, "extra_bytes": {"fused": 4, "eager": 8}, "others_cores": 0.0,
        "parts": {"fused": {"forward": step, "backward": step}}, "launches": {"fused": 3, "eager": 40},
        "traffic_bytes": {"fused": 100, "eager": 900},
    }  # fmt: skip
    return entry | changes


def test_a_written_file_is_complete_and_the_table_says_what_was_not_measured(tmp_path):
    result = report.result([comparison()], "cpu", {"multi_teacher": "3 passed"})
    path = report.write(result, tmp_path)
    assert json.loads(path.read_text()) == result
    assert result["gpu"] == "not measured" and result["device"]["cores"] >= 1 and result["device"]["name"]
    table = report.table(result, tmp_path)
    assert "GPU: not measured" in table and "2.0x (1.0-3.0)" in table and "tests 3 passed" in table
    assert "Other processes" not in table and "does not run" not in table
    assert "Other processes took up to 1.5" in report.table(result | {"comparisons": [comparison(others_cores=1.5)]})


def test_the_table_has_one_part_per_operation_and_says_what_did_not_run(tmp_path):
    alone = comparison(operation="rkd_angle", shape={"rows": 9, "width": 3})
    alone |= {"ratios": {"floor": alone["ratios"]["floor"]}, "extra_bytes": {"fused": 4}}
    alone |= {"launches": {"fused": 3}, "traffic_bytes": {"fused": 100}}
    both = [comparison(operation="rkd_angle", shape={"rows": 5, "width": 3}), alone]
    tests = {"multi_teacher": "3 passed", "rkd_angle": "4 passed"}
    table = report.table(report.result([comparison(), *both], "cpu", tests), tmp_path).splitlines()
    assert [line for line in table if ": tests" in line] == [
        "multi_teacher: tests 3 passed",
        "rkd_angle: tests 4 passed",
    ]
    (row,) = [line for line in table if "rows=9" in line]
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[:7] == ["rows=9 width=3", "float32", TRAINING, "cold", "2", "2 + 2", "-"]
    assert cells[7:] == ["2.0x (1.0-3.0)", "0.00", "-", "3 -", "1.0x -"]
    assert "-: does not run at this shape." in table


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
    with pytest.raises(ValueError, match=r"^result"):
        report.write(result | broken, tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_committed_results_are_complete():
    for path in report.FOLDER.glob("*.json"):
        result = json.loads(path.read_text())
        report.validate(result, report.layout_of(result))
        assert path.stem == result["device"]["slug"]


def wrong_gradient(student, teachers, *rest):
    """The loss's value, and the gradient of twice the loss."""
    loss = OPERATIONS["multi_teacher"].fused(student, teachers, *rest)
    return loss.detach() + 2 * (loss - loss.detach())


def candidates_of(case, **functions):
    inputs = case.operation.make_inputs(case.shape, case.dtype, "cpu", 0)
    functions = {measure.FUSED: case.operation.fused} | functions
    return {name: measure.Step(function, inputs, case.passes) for name, function in functions.items()}


def test_gradients_are_compared_not_only_losses():
    case = Case(OPERATIONS["multi_teacher"], SMALL, torch.float32, TRAINING)
    steps = candidates_of(case, eager=case.operation.baselines["eager"](), wrong=wrong_gradient)
    apart = {}
    report.require_same(measure.results(steps, apart), case.dtype)
    assert apart["fused"] == 0 and apart["eager"] < 1e-6 and apart["wrong"] == pytest.approx(1)
    with pytest.raises(AssertionError, match="wrong has other gradients: 1 of"):
        report.require_same_gradients(apart, case.dtype)
    with pytest.raises(AssertionError, match="unwritten"):
        report.require_same_gradients({"unwritten": float("nan")}, case.dtype)


def test_where_all_is_reported_a_wrong_candidate_is_noted_and_timed():
    case = Case(OPERATIONS["multi_teacher"], SMALL, torch.float32, TRAINING)
    steps, noted = candidates_of(case, wrong=wrong_gradient), []
    (found,) = report.comparisons(case, steps, "cpu", seconds=0, least=2, caches=[measure.COLD], wrong=noted)
    assert "wrong has other gradients" in noted[0] and noted[0].startswith(str(case))
    assert {"fused", "wrong", "floor"} == set(found["microseconds"])
    with pytest.raises(AssertionError, match="wrong has other gradients"):
        report.comparisons(case, candidates_of(case, wrong=wrong_gradient), "cpu", seconds=0, least=2)


def test_cases_in_turn_begin_with_one_of_each_operation():
    cases = [c for op in OPERATIONS.values() for c in registry.cases(op, [torch.float32], device="cuda")]
    planned = registry.in_turn(cases)
    first = planned[: len(OPERATIONS)]
    assert [c.operation.name for c in first] == list(OPERATIONS) and sorted(map(str, planned)) == sorted(
        map(str, cases)
    )
    assert all((c.shape, c.dtype) in c.operation.gpu for c in first if c.operation.gpu)
    assert registry.in_turn([]) == []


def test_the_commit_of_a_tree_without_git(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "FOLDER", tmp_path / "benchmarks" / "results")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert report.commit() == "unknown"
    (tmp_path / "COMMIT").write_text("0123456789ab\n")
    assert report.commit() == "0123456789ab"
    monkeypatch.setenv("FASTKD_COMMIT", "ba9876543210")
    assert report.commit() == "ba9876543210"
