"""A loss that is NaN or infinite: where it was is said, or its step is left out and nothing else changes."""

import math

import pytest
import torch
from test_resume import StopAt
from torch import nn
from torch.utils.data import TensorDataset
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import data, methods, models
from fastkd.cli import main
from fastkd.methods import CE, DML, Phase
from fastkd.train import Fit, Interrupted, Runner
from fastkd.train.metrics import Divergence, Meter, read_csv
from fastkd.train.steps import SKIPS
from fastkd.train.task import Setup, Task


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
    """The loss is not finite at the iterations in `at`, counted from 1. `seen`: state before and after each step."""

    def __init__(self, student, at, spoil=spoil_loss):
        super().__init__(student)
        self.at, self.spoil = set(at), spoil
        self.seen = []

    def iteration(self, batch, generator):
        for phase in super().iteration(batch, generator):
            if self.iterations + 1 in self.at:
                self.spoil(phase)
            before = copies(self.state)
            yield phase
            self.seen.append((phase.skipped, before, copies(self.state)))

    def state(self):
        return dict(self.student.named_parameters())


def copies(state):
    return {name: tensor.detach().clone() for name, tensor in state().items()}


def spoiled_fit(tmp_path, at, spoil=spoil_loss, **options):
    """Of 4 steps an epoch."""
    options = config(tmp_path, batch_size=16, **options)
    runner = Runner(options)
    network = models.create("plain2", 10, image_size=8, channels=1, width=0.0625)
    task = Task("student", options.epochs, folder=tmp_path / "run")
    return Fit(Spoiled(network, at, spoil), runner.data, Setup.here(options), task)


@pytest.mark.parametrize("spoil", [spoil_loss, spoil_gradient])
def test_skipped_step_changes_neither_weights_nor_optimizer(tmp_path, spoil):
    fit = spoiled_fit(tmp_path, [2], spoil, non_finite="skip", optimizer="sgd", epochs=1)

    def state():
        momenta = {f"momentum{i}": s["momentum_buffer"] for i, s in enumerate(fit.optimizer.state.values())}
        return dict(fit.method.student.named_parameters()) | momenta

    fit.method.state = state
    fit.run()
    assert [skipped for skipped, *_ in fit.method.seen] == [False, True, False, False]
    for skipped, before, after in fit.method.seen[1:]:
        assert all(torch.equal(before[name], after[name]) for name in before) == skipped
        assert any(name.startswith("momentum") for name in before)


def test_skipped_steps_are_counted_and_the_means_are_those_of_the_others(tmp_path):
    fit = spoiled_fit(tmp_path, [2, 5, 6], non_finite="skip", epochs=3)
    fit.run()
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    assert [row["train_skipped_steps"] for row in rows] == [1, 2, 0]
    assert all(0 < row["train_loss"] < 10 and 0 <= row["train_accuracy"] <= 1 for row in rows)
    assert all(torch.isfinite(tensor).all() for tensor in last_state(tmp_path / "run")["network"].values())


def test_epochs_line_counts_what_was_left_out(tmp_path, capfd):
    spoiled_fit(tmp_path, [2, 3], non_finite="skip", epochs=1, quiet=False).run()
    assert "  2 steps skipped  " in capfd.readouterr().err


def test_means_leave_out_a_batch_without_all_its_steps():
    meter = Meter(torch.device("cpu"), 1)
    for losses, skipped in (((1.0, 2.0), ()), ((5.0, math.nan), (1,)), ((3.0, 6.0), ())):
        for number, loss in enumerate(losses):
            parts = {f"part{number}": torch.tensor(loss)}
            facts = {"loss": torch.tensor(loss), "parts": parts, "name": "", "networks": (), "outputs": None}
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


def test_statistics_of_a_spoiled_batch_are_forgotten(tmp_path):
    """Without it a NaN stays in the running mean for ever, and every evaluation is NaN."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))
    images, labels = torch.randn(24, 1, 2, 2), torch.arange(24) % 3
    spoiled = images.clone()
    spoiled[11] = math.nan
    found = data.Data(TensorDataset(spoiled, labels), None, TensorDataset(images, labels), 3, 2, 1, ("a", "b", "c"))
    method, options = Spoiled(network, []), config(tmp_path, batch_size=6, non_finite="skip")
    method.state = lambda: {"mean": network[2].running_mean}
    fit = Fit(method, found, Setup.here(options), Task("student", 2))
    rows = fit.run()
    assert [row["train_skipped_steps"] for row in rows] == [1, 1]
    assert all(math.isfinite(row["test_loss"]) for row in rows)
    for (skipped, before, after), (_, *following) in zip(method.seen, method.seen[1:], strict=False):
        assert torch.isfinite(before["mean"]).all() != skipped and torch.isfinite(after["mean"]).all()
        assert not torch.equal(after["mean"], following[0]["mean"])  # the next batch's forward moves it on


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
    return Fit(method, data.load("digits", train_size=60), Setup.here(options), Task("student plain", 1))


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
