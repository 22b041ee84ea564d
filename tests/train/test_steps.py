"""Mixed precision, gradient scaling, accumulation, memory format, compiled networks, deterministic algorithms."""

import math

import pytest
import torch
from methods_helpers import batch, mlp
from orc_helpers import orc
from torch import nn
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run, untrained  # noqa: F401

from fastkd._core.labels import IGNORE_INDEX
from fastkd.cli.options import parse
from fastkd.methods import CE, KD
from fastkd.train import Runner, UserError
from fastkd.train.distributed import World, deterministic
from fastkd.train.metrics import read_csv
from fastkd.train.steps import Steps

CPU = torch.device("cpu")


def steps_of(method, lr=0.1, **options) -> Steps:
    return Steps(method, torch.optim.SGD(method.parameter_groups(lr), momentum=0.9), CPU, **options)


def test_bf16_runs_networks_and_losses_under_autocast_and_no_backward_pass():
    seen = {"forward": [], "backward": []}

    class Spy(nn.Module):
        def __init__(self):
            super().__init__()
            self.network = nn.Linear(5, 7)

        def forward(self, x):
            seen["forward"].append(torch.is_autocast_enabled("cpu"))
            z = self.network(x)
            seen["dtype"] = z.dtype
            z.register_hook(lambda grad: seen["backward"].append(torch.is_autocast_enabled("cpu")))
            return z

    method = CE(Spy())
    steps = steps_of(method, amp="bf16")
    x, y = batch()
    ((_, loss),) = steps.take(x.float(), y)
    assert seen == {"forward": [True], "backward": [False], "dtype": torch.bfloat16}
    assert loss.dtype == torch.float32 and not loss.requires_grad
    assert method.student.network.weight.dtype == torch.float32
    assert not torch.is_autocast_enabled("cpu")
    ((_, again),) = steps.take(x.float(), y)
    assert again < loss


@pytest.mark.parametrize("method", ["orc", "dkel", "feed-parallel", "ctsl-mkt"])
def test_bf16_learns_nearly_as_full_precision_does(tmp_path, method):
    losses = []
    for name in ("bf16", "none"):
        runner = Runner(config(tmp_path / name, method=method, amp=name, teacher="resnet8"))
        stage = runner.stages["student"]
        fit = runner.fit(stage, untrained(runner, stage), None)
        losses.append([row["train_loss"] for row in fit.run()])
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.05)
    assert losses[0][1] < losses[0][0]


def scaler(scale=2.0**16) -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=1000)


def test_a_scaled_step_is_the_plain_one():
    x, y = batch()
    plain, scaled = CE(mlp(1)), CE(mlp(1))
    first, second = steps_of(plain), steps_of(scaled, scaler=scaler())
    for _ in range(3):
        for _ in first.take(x, y):
            pass
        for phase, _ in second.take(x, y):
            assert not phase.skipped
    for a, b in zip(plain.parameters(), scaled.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_an_overflow_skips_its_own_phase_only():
    """The networks are float64, so the scale itself is what overflows, in the pivot's phase: private stays finite."""
    method = orc(intensive="pivot")
    steps = steps_of(method, scaler=scaler(4.0))
    before = {k: v.clone() for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    hook = next(method.pivot.parameters()).register_hook(lambda grad: grad * math.inf)
    names, skipped, scales = [], [], []
    for phase, _ in steps.take(*batch(rows=8)):
        names.append(phase.name)
        skipped.append(phase.skipped)
        scales.append(steps.scaler.get_scale())
    hook.remove()
    assert names == ["intensive", "private", "group"] and skipped == [True, False, False]
    assert scales == [2.0, 2.0, 2.0]  # one update a phase
    same = {k: torch.equal(v, before[k]) for k, v in method.state_dict().items() if isinstance(v, torch.Tensor)}
    assert all(equal for name, equal in same.items() if name.startswith("pivot"))
    assert not any(equal for name, equal in same.items() if name.startswith("students"))


def test_a_mean_teacher_does_not_follow_a_skipped_step(tmp_path):
    runner = Runner(config(tmp_path, method="dkel"))
    fit = runner.fit(runner.stages["student"], {}, None)
    fit.initialise()
    fit.steps.scaler = scaler()
    hook = next(fit.method.student.parameters()).register_hook(lambda grad: grad * math.nan)
    before = [p.clone() for p in fit.method.teacher.parameters()]
    inputs, target = next(iter(fit.train_batches))
    fit.method.train()
    ((phase, _),) = fit.steps.take(inputs, target)
    assert phase.skipped and fit.method.steps == 0
    assert all(torch.equal(a, b) for a, b in zip(before, fit.method.teacher.parameters(), strict=True))
    hook.remove()
    ((phase, _),) = fit.steps.take(inputs, target)
    assert not phase.skipped and fit.method.steps == 1


def test_the_scale_is_saved():
    steps = steps_of(CE(mlp(1)), scaler=scaler(8.0))
    list(steps.take(*batch()))
    other = steps_of(CE(mlp(1)), scaler=scaler())
    other.load_state_dict(steps.state_dict())
    assert other.scaler.get_scale() == 8.0
    assert steps_of(CE(mlp(1))).state_dict() == {"in_row": 0, "scaler": {}}


def test_fp16_is_refused_on_a_cpu(tmp_path):
    with pytest.raises(UserError, match="--amp fp16 needs a GPU: use --amp bf16 on a CPU"):
        run(config(tmp_path, amp="fp16"))


def test_accumulation_gives_the_step_of_the_whole_batch():
    x, y = batch(rows=10)
    y[3] = IGNORE_INDEX
    whole, parts = (KD(mlp(1), mlp(2, hidden=9)) for _ in range(2))
    first, second = steps_of(whole), steps_of(parts, accumulate=3)
    for _ in range(3):
        ((_, a),) = first.take(x, y)
        ((phase, b),) = second.take(x, y)
        assert phase.chunks == 3
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
    for a, b in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    ((phase, _),) = second.take(x[:3], y[:3])
    assert phase.chunks == 1  # no part of one row


@pytest.mark.parametrize("method", ["orc", "dgkd", "feed-parallel"])
def test_accumulated_runs_and_their_metrics(tmp_path, method):
    small = dict(method=method, optimizer="sgd", lr=0.02, student="plain2:width=0.0625:norm=group")
    small |= dict(assistants=["plain2:width=0.125:norm=group"], teacher="plain2:width=0.25:norm=group")
    for name, parts in (("whole", 1), ("parts", 4)):
        run(config(tmp_path / name, accumulate=parts, **small))
    whole, parts = (rows_without_times(tmp_path / name / "run") for name in ("whole", "parts"))
    for a, b in zip(whole, parts, strict=True):
        assert a == pytest.approx(b, abs=2e-5)
        assert not math.isnan(b["train_accuracy"])


def test_losses_are_weighted_by_the_rows_of_all_processes():
    class Three(World):
        def sum(self, values):
            return values + 6  # rows of the two others

    method = CE(mlp(1))
    steps = steps_of(method, world=Three(0, 3))
    x, y = batch(rows=5)
    y[0] = IGNORE_INDEX
    gradients = []
    for taken in (steps, steps_of(method)):
        taken.optimizer.step = lambda: gradients.append([p.grad.clone() for p in method.parameters()])
        list(taken.take(x, y))
    for mine, alone in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, alone * 4 * 3 / 10)


def test_channels_last(tmp_path):
    states = []
    for name, on in (("on", True), ("off", False)):
        runner = Runner(config(tmp_path / name, method="feed-parallel", channels_last=on))
        stage = runner.stages["student"]
        fit = runner.fit(stage, untrained(runner, stage), tmp_path / name)
        layouts = []
        hook = torch.nn.modules.module.register_module_forward_hook(
            lambda module, inputs, output, layouts=layouts: (
                layouts.append(output.is_contiguous(memory_format=torch.channels_last) and output.shape[1] > 1)
                if isinstance(module, nn.Conv2d)
                else None
            )
        )
        fit.run()
        hook.remove()
        assert all(layouts) == on
        states.append((fit.rows, fit.method.state_dict()))
    for a, b in zip(states[0][0], states[1][0], strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    assert_same(list(states[0][1]), list(states[1][1]))


@pytest.mark.parametrize("method", ["orc", "dkel", "ctsl-mkt"])
def test_compiled_networks(tmp_path, method, monkeypatch):
    compiled = []
    original = torch.compile

    def compile_eagerly(network, **options):
        compiled.append(network)
        return original(network, backend="eager")

    monkeypatch.setattr(torch, "compile", compile_eagerly)
    rows = []
    for name, on in (("compiled", True), ("plain", False)):
        runner = Runner(config(tmp_path / name, method=method, compile=on, epochs=2))
        stage = runner.stages["student"]
        fit = runner.fit(stage, untrained(runner, stage), tmp_path / name)
        fit.run()
        rows.append(rows_without_times(tmp_path / name))
        assert last_state(tmp_path / name)["method"].keys() == fit.method.state_dict().keys()
    assert len(compiled) == len(fit.method.learner_names)
    for a, b in zip(*rows, strict=True):
        assert a == pytest.approx(b, rel=1e-4, nan_ok=True)
    torch.compiler.reset()


def test_deterministic_algorithms_within_a_run_only():
    torch.use_deterministic_algorithms(False)
    with deterministic(True):
        assert torch.are_deterministic_algorithms_enabled()
        assert not torch.is_deterministic_algorithms_warn_only_enabled()
        assert not torch.utils.deterministic.fill_uninitialized_memory
    assert not torch.are_deterministic_algorithms_enabled() and torch.utils.deterministic.fill_uninitialized_memory
    with deterministic(False):
        assert not torch.are_deterministic_algorithms_enabled()


def test_the_options_on_the_command_line(tmp_path, capsys):
    parse("train", ["--help"])
    text = capsys.readouterr().out
    for option in ("--amp none|bf16|fp16", "--accumulate N", "--channels-last", "--compile", "--deterministic"):
        assert option in text
    assert "--timeout X" in text and "torchrun --nproc-per-node N" in text
    got = parse("train", "--method kd --amp bf16 --accumulate 4 --channels-last --compile --timeout 5".split())
    assert (got.amp, got.accumulate, got.channels_last, got.compile) == ("bf16", 4, True, True)
    assert not got.deterministic and got.timeout == 5.0
    for wrong in ("--accumulate 0", "--timeout 0", "--timeout -1"):
        with pytest.raises(UserError, match=wrong.split()[0]):
            parse("train", ["--method", "kd", *wrong.split()])


def test_precision_belongs_to_a_run_and_to_its_guides(tmp_path):
    run(config(tmp_path, method="kd", epochs=1))
    run(config(tmp_path / "other", method="kd", epochs=1, amp="bf16", cache=str(tmp_path / "run" / "cache")))
    teachers = [p for p in (tmp_path / "run" / "cache").iterdir() if p.name.startswith("teacher")]
    assert len(teachers) == 2
    assert read_csv(teachers[0] / "metrics.csv") != read_csv(teachers[1] / "metrics.csv")
