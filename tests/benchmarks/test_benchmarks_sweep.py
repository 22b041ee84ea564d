"""The benchmarks' counts, other libraries, sweeps, charts and training steps, at sizes that compute quickly."""

import argparse
import dataclasses
import importlib.metadata
import sys
from pathlib import Path

import pytest
import torch

import fastkd
from fastkd import functional

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from graphs_helpers import StandIn  # noqa: E402

from benchmarks import charts, counts, guard, measure, other, peers, registry, report, steps, sweep  # noqa: E402
from benchmarks.inputs import Embeddings, Logits, Maps, Networks  # noqa: E402
from benchmarks.registry import OPERATIONS, TRAINING, Case  # noqa: E402

TINY = steps.Group("plain2", 6, 5, image_size=8)


pytestmark = pytest.mark.usefixtures("one_thread")


def step_of(function, *arguments, passes=TRAINING):
    learning = tuple(a for a in arguments if a.requires_grad)
    return measure.Step(function, registry.Inputs(arguments, learning), passes)


def test_traffic_of_known_operators():
    a, b = torch.randn(100), torch.randn(100)
    assert counts.traffic_bytes(step_of(lambda x, y: x + y, a, b, passes="forward")) == 1200
    assert counts.traffic_bytes(step_of(lambda x: x.view(10, 10).t(), a, passes="forward")) == 0
    assert counts.traffic_bytes(step_of(lambda x: x.clone().mul_(2), a, passes="forward")) == 800 + 800
    # a number that was broadcast is read once: 4 bytes and the 400 of the result
    assert counts.traffic_bytes(step_of(lambda x: x.expand(100) * 2, torch.randn(1), passes="forward")) == 404


def test_traffic_of_a_loss_is_the_known_number_of_tensors():
    """27 units of eager distillation and 11 of cross-entropy, 3 units at least: K = 1."""
    case = Case(OPERATIONS["multi_teacher"], Logits(64, 500, 1), torch.float32, TRAINING)
    inputs = case.operation.make_inputs(case.shape, case.dtype, "cpu", 0)
    eager = measure.Step(case.operation.baselines["eager"](), inputs, TRAINING)
    fused = measure.Step(case.operation.fused, inputs, TRAINING)
    unit = 64 * 500 * 4
    assert counts.traffic_bytes(eager) / unit == pytest.approx(38, abs=0.1)
    assert counts.traffic_bytes(fused) / case.bytes_floor == pytest.approx(1, abs=0.01)
    assert 1 <= counts.launches(fused, "cpu") < counts.launches(eager, "cpu")


def test_launches_count_operators():
    a = torch.randn(5)
    one, three = (
        counts.launches(step_of(f, a, passes="forward"), "cpu")
        for f in (lambda x: x + 1, lambda x: (x + 1).exp().sum())
    )
    assert (one, three) == (1, 3)


def test_the_passes_of_a_training_step_add_up(monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(measure.time, "perf_counter", lambda: clock[0])

    class Slow(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            clock[0] += 1
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            clock[0] += 4
            return grad

    step = step_of(lambda x: Slow.apply(x).sum(), torch.ones(3, requires_grad=True))
    assert measure.timed(step, "cpu", 5) == (5.0, 1.0) and step.between is None
    forward = {}
    times = measure.interleave(
        {"fused": step, "floor": lambda: None}, caches=measure.WARM, seconds=0, least=2, forward=forward
    )
    assert times["fused"] == [5.0, 5.0] and forward == {"fused": [1.0, 1.0]}


@pytest.mark.parametrize("operation", ["multi_teacher", "mutual", "feature_ensemble", "rkd_distance", "rkd_angle"])
def test_other_libraries_that_are_here_compute_the_same(operation):
    shapes = {"multi_teacher": Logits(6, 37, 3), "mutual": Networks(6, 37, 3), "feature_ensemble": Maps(3, 5, 4, 4, 2)}
    inputs = OPERATIONS[operation].make_inputs(shapes.get(operation, Embeddings(7, 5)), torch.float64, "cpu", 0)
    expected = OPERATIONS[operation].fused(*inputs.arguments)
    found = peers.baselines(operation, "cpu")
    if not found:
        pytest.skip("no other library is installed")
    for function in found.values():
        torch.testing.assert_close(function(*inputs.arguments), expected, rtol=1e-12, atol=1e-12)


def test_other_libraries_that_are_not_measured_are_named(monkeypatch):
    def version(name):
        if name == "torchdistill":
            raise importlib.metadata.PackageNotFoundError
        return "1.0"

    monkeypatch.setattr(peers.importlib.metadata, "version", version)
    said = peers.report("cpu")
    assert said["torchdistill"] == "not measured: not installed (pip install torchdistill)"
    assert said["liger"] == said["fla"] == "not measured: needs a GPU"
    assert peers.baselines("multi_teacher", "cpu") == {}
    monkeypatch.setattr(peers.torchdistill_losses, "MODULE", "fastkd.nothing_like_this")
    monkeypatch.setattr(peers.importlib.metadata, "version", lambda name: "1.0")
    assert "cannot be imported (ModuleNotFoundError" in peers.report("cpu")["torchdistill"]


@pytest.mark.parametrize("name", sweep.SWEEPS)
def test_sweeps_are_of_rising_sizes_and_of_fitting_shapes(name):
    one = sweep.SWEEPS[name]
    for device in ("cpu", "cuda"):
        sizes = [getattr(case.shape, one.size) for case in one.cases(device)]
        assert sizes == sorted(set(sizes)) and len(sizes) >= 4
    assert set(one.alone_on_cpu) <= set(one.shapes)


@pytest.fixture
def small_sweeps(monkeypatch):
    shapes = {"multi_teacher": (Logits(2, 5, 1), Logits(2, 9, 1)), "rkd_angle": (Embeddings(4, 3), Embeddings(6, 3))}
    small = {
        name: dataclasses.replace(sweep.SWEEPS[name], shapes=own, alone_on_cpu=own[1:]) for name, own in shapes.items()
    }
    monkeypatch.setattr(sweep, "SWEEPS", small)
    for name in shapes:
        eager = {"eager": OPERATIONS[name].baselines["eager"]}
        monkeypatch.setitem(OPERATIONS, name, dataclasses.replace(OPERATIONS[name], baselines=eager))
    monkeypatch.setattr(guard, "require_passing", lambda name, tests, **rest: f"{tests} passed")


@pytest.fixture
def tiny_steps(monkeypatch):
    monkeypatch.setattr(steps, "GROUPS", {"plain2": TINY})
    monkeypatch.setattr(guard, "require_passing", lambda name, tests, **rest: f"{tests} passed")


def options(folder, **changes):
    given = {"device": "cpu", "results": str(folder), "keyword": "", "large": False, "deadline": None}
    return argparse.Namespace(**(given | {"quick": False, "brief": True} | changes))


def is_png(path: Path) -> bool:
    return path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n" and path.stat().st_size > 10_000


def test_a_sweep_writes_its_file_and_charts_and_prints_the_table(tmp_path, small_sweeps, capsys):
    assert other.run("sweep", options(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "GPU: not measured" in said and "faster than eager" in said and "liger: not measured" in said
    (file,) = tmp_path.glob("sweep/*.json")
    result = report.json.loads(file.read_text())
    report.validate(result, sweep.LAYOUT)
    assert [p["shape"]["rows"] for p in result["sweeps"]["rkd_angle"]["points"]] == [4, 6]
    assert set(result["sweeps"]["rkd_angle"]["points"][1]["ratios"]) == {"floor"}
    pictures = sorted(path.name for path in tmp_path.glob("sweep/*.png"))
    assert pictures == [f"{file.stem}-multi_teacher.png", f"{file.stem}-rkd_angle.png"]
    assert all(is_png(path) for path in tmp_path.glob("sweep/*.png"))


def test_a_deadline_leaves_the_rest_out_and_a_keyword_writes_nothing(tmp_path, small_sweeps, capsys):
    assert other.run("sweep", options(tmp_path, deadline=1e-9)) == 0
    assert "1 of 2 left out" in capsys.readouterr().out
    (file,) = tmp_path.glob("sweep/*.json")
    assert list(report.json.loads(file.read_text())["sweeps"]) == ["multi_teacher"]
    file.unlink()
    assert other.run("sweep", options(tmp_path, keyword="rkd")) == 0
    assert not list(tmp_path.glob("sweep/*.json"))
    assert other.run("sweep", options(tmp_path, keyword="nothing")) == 2


def test_nothing_is_measured_while_tests_fail(tmp_path, monkeypatch):
    def fails(name, tests, **rest):
        raise guard.Refused(f"{name}: no speed-up is reported")

    monkeypatch.setattr(guard, "require_passing", fails)
    for kind in ("sweep", "steps"):
        with pytest.raises(guard.Refused, match="no speed-up"):
            other.run(kind, options(tmp_path))
    assert not list(tmp_path.rglob("*.json"))


def test_the_overview_is_a_picture(tmp_path):
    operation = dataclasses.replace(
        OPERATIONS["multi_teacher"], baselines={"eager": OPERATIONS["multi_teacher"].baselines["eager"]}
    )
    case = Case(operation, Logits(3, 7, 2), torch.float32, TRAINING)
    found = report.comparisons(case, measure.candidates(case, "cpu"), "cpu", seconds=0, least=2)
    result = report.result(found, "cpu", {"multi_teacher": "3 passed"})
    report.validate(result)
    assert is_png(charts.overview(result, tmp_path / "a" / "overview.png"))


def test_every_method_and_its_tests_are_there():
    assert set(steps.EVERY) == set(steps.ABOUT) == set(steps.TESTS) == set(steps.NUMBERS)
    assert all(list(ROOT.glob(pattern)) for pattern in steps.TESTS.values())
    assert ("resnet56", "ORC") not in steps.chosen("", "cpu", large=False)
    assert ("resnet56", "ORC") in steps.chosen("", "cpu", large=True)
    assert steps.chosen("vgg13 orc", "cpu", large=False) == [("vgg13", "ORC")]


def test_training_steps_write_their_file_and_chart(tmp_path, tiny_steps, capsys, monkeypatch):
    monkeypatch.setattr(other, "training_steps", lambda names, device, options: {
        "steps": [steps.measured(group, method, device, seconds=0, least=2) for group, method in names]
    })  # fmt: skip
    assert other.run("steps", options(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "stage by stage" in said and "and channels-last" in said
    assert "images/s" in said and "of the step" in said and "GPU: not measured" in said
    (file,) = tmp_path.glob("steps/*.json")
    result = report.json.loads(file.read_text())
    report.validate(result, steps.LAYOUT)
    assert [entry["method"] for entry in result["steps"]] == list(steps.EVERY)
    for entry in result["steps"]:
        assert entry["losses"] >= 1 and set(entry["milliseconds"]) >= {"fused", "reference", "fused loss"}
        assert set(entry["milliseconds"]) >= {steps.PREPARED, steps.ALL} and entry["ratios"]["all"]["p50"] > 0
        assert entry["loss_share"]["fused"] > 0 and entry["images_per_second"]["fused"] > 0
    assert is_png(file.with_suffix(".png"))


def test_on_a_gpu_a_step_is_made_from_graphs_too(tiny_steps, monkeypatch, tmp_path):
    """By a stand-in for CUDA graphs."""
    monkeypatch.setattr(steps, "recorder_for", lambda device: StandIn())
    entry = steps.measured("plain2", "ORC", "cpu", seconds=0, least=2)
    assert entry["milliseconds"][steps.GRAPHS]["p50"] > 0 and entry["ratios"]["graphs"]["p50"] > 0
    result = report.result([], "cpu", {}) | {"steps": [entry]}
    assert f"with CUDA graphs: ORC {entry['ratios']['graphs']['p50']:.2f}x" in steps.table(result, tmp_path)


def test_a_step_as_runs_make_it_gives_the_same_losses():
    """Folded frozen networks and another order in memory change the last digits alone."""
    usual = steps.TrainingStep("FEED", TINY, "cpu")()
    for called, step in steps.as_run("FEED", TINY, "cpu").items():
        torch.testing.assert_close(step(), usual, rtol=1e-4, atol=1e-5)
        assert all(twin._copy.folded for twin in step.step.method._twins.values())
        first = next(p for p in step.step.method.parameters() if p.dim() == 4 and p.shape[1] > 1)
        assert first.is_contiguous(memory_format=torch.channels_last) == (called == steps.ALL)


@pytest.mark.parametrize("method", steps.EVERY)
def test_backends_that_differ_are_not_measured(method, monkeypatch):
    step = steps.TrainingStep(method, TINY, "cpu")
    steps.require_same(step)

    def wrong(function):
        def call(*args, **kwargs):
            result = function(*args, **kwargs)
            if fastkd.backend_info()["backend"] != "auto":
                return result
            return result * 1.1 if isinstance(result, torch.Tensor) else (result[0] * 1.1, *result[1:])  # and its terms

        return call

    for name in ("multi_teacher_kd", "mutual_kd", "feature_ensemble"):
        monkeypatch.setattr(functional, name, wrong(getattr(functional, name)))
    with pytest.raises(AssertionError, match=r"fused .*, reference"):
        steps.require_same(step)


def test_recorded_losses_are_those_of_the_step_and_functions_are_put_back():
    before = {name: getattr(functional, name) for name in functional.__all__}
    step = steps.TrainingStep("DGKD", TINY, "cpu")
    with steps.recorded() as calls:
        step()
    assert {name: getattr(functional, name) for name in functional.__all__} == before
    assert [call.function.__name__ for call in calls] == ["multi_teacher_kd"]
    losses = steps.Losses(calls)
    losses()
    student = losses.calls[0].args[0]
    assert student.is_leaf and student.grad is not None and losses.learning == [student]
    alone = student.detach().requires_grad_()
    loss, _ = calls[0].function(alone, *losses.calls[0].args[1:], **losses.calls[0].kwargs)
    loss.backward()
    torch.testing.assert_close(student.grad, alone.grad, rtol=0, atol=0)
    with fastkd.use_backend("reference"):
        losses()
    torch.testing.assert_close(student.grad, alone.grad, rtol=1e-4, atol=1e-6)
