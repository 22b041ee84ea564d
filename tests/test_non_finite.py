"""A loss that is NaN or infinite: where it was is said, or its step is left out and nothing else changes."""

import math

import pytest
import torch
from test_resume import StopAt
from torch import nn
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import data, methods, models
from fastkd.cli import main
from fastkd.methods import CE, DML, Phase
from fastkd.train import Fit, Interrupted, Runner
from fastkd.train.metrics import Divergence, Meter, read_csv
from fastkd.train.steps import SKIPS, Steps


class NaNGradient(torch.autograd.Function):
    """A finite value whose gradient is not."""

    @staticmethod
    def forward(context, x):
        return x.clone()

    @staticmethod
    def backward(context, gradient):
        return gradient * math.nan


def spoil_loss(phase):
    phase._loss = phase._loss * math.inf


def spoil_gradient(phase):
    phase._loss = NaNGradient.apply(phase._loss)


class Spoiled(CE):
    """The loss is not finite at the iterations in `at`, counted from 1."""

    def __init__(self, student, at, spoil=spoil_loss):
        super().__init__(student)
        self.at, self.spoil = set(at), spoil

    def iteration(self, batch, generator):
        for phase in super().iteration(batch, generator):
            if self.iterations + 1 in self.at:
                self.spoil(phase)
            yield phase


def spoiled_fit(tmp_path, at, spoil=spoil_loss, **options):
    """Of 4 steps an epoch."""
    options = config(tmp_path, batch_size=16, **options)
    runner = Runner(options)
    network = models.create("plain2", 10, image_size=8, channels=1, width=0.0625)
    return Fit(Spoiled(network, at, spoil), runner.data, options, tmp_path / "run", options.epochs, 0, "student", {})


def snapshot(fit):
    state = {"method": fit.method.state_dict(), "optimizer": fit.optimizer.state_dict()["state"]}
    return torch.utils._pytree.tree_map(lambda x: x.clone() if isinstance(x, torch.Tensor) else x, state)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_skipped_step_changes_neither_weights_nor_optimizer(tmp_path, spoil):
    fit = spoiled_fit(tmp_path, [2], spoil, non_finite="skip", optimizer="sgd")
    batches = iter(fit.train_batches)
    skipped = []
    for number in range(3):
        inputs, target = next(batches)
        before = snapshot(fit)
        fit.steps.start_batch()
        for phase in fit.method.phases(inputs, target):
            fit.steps.take(phase)
            skipped.append(phase.skipped)
        after = snapshot(fit)
        learns = {name for name, _ in fit.method.named_parameters()}
        same = all(torch.equal(before["method"][name], after["method"][name]) for name in learns)
        assert same == (number == 1)
        if number == 1:
            assert_same(before["optimizer"], after["optimizer"])
            assert fit.steps.in_row == 1 and all(p.grad is None for p in fit.method.parameters())
    assert skipped == [False, True, False] and fit.steps.in_row == 0


def test_skipped_steps_are_counted_and_the_means_are_those_of_the_others(tmp_path):
    fit = spoiled_fit(tmp_path, [2, 5, 6], non_finite="skip", epochs=3)
    fit.run()
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["train_skipped_steps"] for row in rows] == [1, 2, 0]
    assert all(0 < row["train_loss"] < 10 and 0 <= row["train_accuracy"] <= 1 for row in rows)
    assert all(torch.isfinite(tensor).all() for tensor in last_state(tmp_path / "run")["network"].values())


def test_means_leave_out_a_batch_without_all_its_steps():
    meter = Meter(torch.device("cpu"), 1)
    for losses, skipped in (((1.0, 2.0), ()), ((5.0, math.nan), (1,)), ((3.0, 6.0), ())):
        for number, loss in enumerate(losses):
            parts = {f"part{number}": torch.tensor(loss)}
            facts = {"loss": torch.tensor(loss), "parts": parts, "name": "", "networks": ()}
            meter.add(type("P", (), facts | {"skipped": number in skipped})(), 4)
        meter.end_batch(torch.zeros(4, dtype=torch.long))
    means = meter.means()
    assert (means["loss"], means["part0"], means["part1"]) == (6, 2, 4)
    assert (meter.skipped, meter.batches, meter.images, meter.measured) == (1, 3, 12, 8)
    other = Meter(torch.device("cpu"), 1)
    other.load_state_dict(meter.state_dict())
    assert str(other.means()) == str(means)
    empty = Meter(torch.device("cpu"), 1)
    assert math.isnan(empty.means()["loss"])


def test_ten_in_a_row_end_the_run(tmp_path):
    fit = spoiled_fit(tmp_path, range(6, 6 + SKIPS), non_finite="skip", epochs=6)
    message = (
        rf"^student trained by Spoiled: epoch 4, batch 3 \(step 15\): .* not finite in {SKIPS} steps in a row: try"
    )
    with pytest.raises(Divergence, match=message) as error:
        fit.run()
    assert error.value.status == 1 and "--non-finite" not in str(error.value)
    nearly = spoiled_fit(tmp_path / "b", [*range(6, 5 + SKIPS), *range(16, 20)], non_finite="skip", epochs=6)
    nearly.run()


@pytest.mark.parametrize("log_every", [1, 3, 50])
def test_stop_names_epoch_batch_step_and_what_to_do(tmp_path, log_every):
    fit = spoiled_fit(tmp_path, [7], epochs=3, save_every=1)
    fit.settings.log_every = log_every
    message = r"^student trained by Spoiled: epoch 2, batch 3 \(step 7\): the loss is inf: .*, or --non-finite skip$"
    with pytest.raises(Divergence, match=message):
        fit.run()
    again = spoiled_fit(tmp_path, [], epochs=3)
    again.resume()
    assert again.step == 6  # nothing behind the loss was saved


def test_run_that_stopped_goes_on_with_skip(tmp_path):
    with pytest.raises(Divergence):
        spoiled_fit(tmp_path, [7], epochs=3).run()
    fit = spoiled_fit(tmp_path, [7], epochs=3, non_finite="skip")
    fit.resume()
    fit.run()
    whole = spoiled_fit(tmp_path / "b", [7], epochs=3, non_finite="skip")
    whole.run()
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "b" / "run"))


def test_interrupted_among_skipped_steps_ends_with_the_same_bits(tmp_path, monkeypatch):
    """How many were skipped in a row is part of the state."""
    at = [*range(3, 10), 11]
    spoiled_fit(tmp_path / "whole", at, epochs=4, non_finite="skip").run()
    with monkeypatch.context() as patch:
        StopAt(patch, 6)
        with pytest.raises(Interrupted):
            spoiled_fit(tmp_path, at, epochs=4, non_finite="skip").run()
    fit = spoiled_fit(tmp_path, at, epochs=4, non_finite="skip")
    fit.resume()
    assert fit.steps.in_row == 4
    fit.run()
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole" / "run"))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole" / "run")


def test_statistics_of_a_spoiled_batch_are_forgotten():
    """Without it a NaN stays in the running mean for ever, and every evaluation is NaN."""
    torch.manual_seed(0)
    method = CE(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3)))
    steps = Steps(method, torch.optim.SGD(method.parameters(), lr=0.1), "skip")
    good, target = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
    spoiled = good.clone()
    spoiled[2] = math.nan
    for number, inputs in enumerate((good, spoiled, good)):
        before = method.student[1].running_mean.clone()
        steps.start_batch()
        for phase in method.phases(inputs, target):
            steps.take(phase)
            assert phase.skipped == (number == 1)
        changed = not torch.equal(before, method.student[1].running_mean)
        assert changed == (number != 1)
    assert torch.isfinite(method.student.eval()(good)).all()


class TwoPhases(methods.Method):
    """Two networks, one phase each; the second one's loss is NaN."""

    def __init__(self, networks):
        super().__init__(learners={"students": networks})

    def iteration(self, batch, generator):
        for number, name in enumerate(("first", "second")):
            network = self.learner(f"students.{number}")

            def terms(inputs, target, network=network, number=number):
                loss = nn.functional.cross_entropy(network(inputs), target) * (math.nan if number else 1)
                return loss, {"ce": loss.detach()}

            yield Phase([network], terms, batch, name)

    def deployable(self):
        return self.students[0]


def plain():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))


def fit_of(tmp_path, method, **options):
    options = config(tmp_path, **options)
    return Fit(
        method, data.load("digits", train_size=60), options, None, 1, 0, "student plain", {"learners": ["a", "b"]}
    )


def test_phase_and_network_are_named(tmp_path):
    message = r"by TwoPhases: epoch 1, batch 1 \(step 1\), phase second of students.1: the loss is nan"
    with pytest.raises(Divergence, match=message):
        fit_of(tmp_path, TwoPhases([plain(), plain()])).run()
    message = r"by DML: epoch 1, batch 1 \(step 1\), networks \w+\.0, \w+\.1: the loss is nan"
    networks = [plain(), plain()]
    networks[1][1].weight.data.fill_(math.nan)
    with pytest.raises(Divergence, match=message):
        fit_of(tmp_path, DML(networks)).run()


def test_phase_that_is_skipped_does_not_stop_the_others(tmp_path):
    fit = fit_of(tmp_path, TwoPhases([plain(), plain()]), non_finite="skip", batch_size=10)
    before = [network[1].weight.clone() for network in fit.method.students]
    (row,) = fit.run()
    assert row["train_skipped_steps"] == 6 and math.isnan(row["train_loss"])
    changed = [not torch.equal(w, n[1].weight) for w, n in zip(before, fit.method.students, strict=True)]
    assert changed == [True, False]


def test_skip_changes_nothing_where_all_is_finite(tmp_path):
    for name in ("stop", "skip"):
        run(config(tmp_path, out=str(tmp_path / name), method="orc", epochs=1, non_finite=name))
    assert_same(last_state(tmp_path / "stop"), last_state(tmp_path / "skip"))


def test_command(tmp_path, capfd):
    words = "train --method ce --epochs 8 --lr 1e30 --optimizer sgd --student plain2 --train-size 60 --quiet".split()
    words += ["--device", "cpu", "--out", str(tmp_path / "run")]
    assert main([*words, "--non-finite", "skip"]) == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "not finite in 10 steps in a row" in error
    assert main([*words, "--non-finite", "ignore"]) == 2
    assert "--non-finite must be one of stop, skip, got 'ignore'" in capfd.readouterr().err
