"""The loop: what an epoch computes, its metrics, the optimiser and its schedules, options."""

import csv
import math
import os

import pytest
import torch
from torch import nn
from train_helpers import assert_same, config, one_thread, run  # noqa: F401

from fastkd import data as datasets
from fastkd import methods, models
from fastkd._core.locks import lock
from fastkd.runs.config import CompareConfig, differences, read_yaml, to_yaml
from fastkd.runs.runner import make_network, parse_network
from fastkd.train import Fit, Runner, TrainConfig, UserError, checkpoint, evaluate, train_epoch
from fastkd.train.devices import pick_device
from fastkd.train.metrics import Divergence, Meter, read_csv, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.settings import OptimizationOptions
from fastkd.train.steps import Steps


def small_fit(tmp_path, **options) -> Fit:
    runner = Runner(config(tmp_path, **options))
    return runner.fit(runner.stages["student"], {}, tmp_path / "run")


def test_epoch_is_the_plain_loop(tmp_path):
    # Not AdamW: it divides by the gradient's size, and that of a bias in front of a batch normalisation is rounding.
    fit, other = (small_fit(tmp_path, optimizer="sgd", lr=0.05) for _ in range(2))
    network, optimizer = other.method.student, other.optimizer
    fit.train_batches.sampler.set_epoch(0)
    other.train_batches.sampler.set_epoch(0)
    meter = Meter(fit.device, 1)
    train_epoch(fit.method, fit.train_batches, fit.optimizer, meter)
    loss, correct, network = 0.0, 0, network.train()
    for inputs, target in other.train_batches:
        logits = network(inputs)
        batch_loss = nn.functional.cross_entropy(logits, target)
        optimizer.zero_grad()
        batch_loss.backward()
        optimizer.step()
        loss += float(batch_loss.detach()) * len(target)
        correct += int((logits.argmax(1) == target).sum())
    for one, two in zip(fit.method.parameters(), network.parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    assert not torch.equal(one, small_fit(tmp_path).method.student.fc.bias)
    means = meter.means()
    assert means["loss"] == pytest.approx(loss / 60, rel=1e-4)
    assert means["ce"] == pytest.approx(means["loss"])
    assert means["accuracy"] == pytest.approx(correct / 60, abs=2 / 60)


def test_evaluate_counts_every_image_and_restores_the_mode(tmp_path):
    data = datasets.load("digits")
    network = make_network("plain2:width=0.125", data).train()
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    loss, accuracy = evaluate(network, datasets.loader(data.test, 100, shuffle=False), torch.device("cpu"))
    assert network.training
    assert_same(dict(network.state_dict()), before)
    network.eval()
    images, labels = next(iter(datasets.loader(data.test, len(data.test), shuffle=False)))
    with torch.no_grad():
        logits = network(images)
    assert loss == pytest.approx(float(nn.functional.cross_entropy(logits, labels)), rel=1e-4)
    assert accuracy == pytest.approx(float((logits.argmax(1) == labels).double().mean()), abs=1e-9)


def test_student_learns_and_metrics_have_a_row_an_epoch(tmp_path):
    results = run(config(tmp_path, epochs=15, train_size=200, student="plain2:width=0.5", validation=0.2))
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["epoch"]) for row in rows] == list(range(1, 16))
    expected = ["epoch", "lr", "train_loss", "train_ce", "train_accuracy", "validation_loss", "validation_accuracy"]
    assert list(rows[0]) == [*expected, "test_loss", "test_accuracy", "images_per_s", "seconds", "cpu_seconds"]
    assert float(rows[-1]["test_accuracy"]) > 0.8 > float(rows[0]["test_accuracy"])
    assert float(rows[-1]["train_loss"]) < float(rows[0]["train_loss"])
    network, data = results["student"].network, Runner(config(tmp_path, train_size=200, validation=0.2)).data
    _, accuracy = evaluate(network, datasets.loader(data.test, 64, shuffle=False), torch.device("cpu"))
    assert accuracy == pytest.approx(float(rows[-1]["test_accuracy"]))


def test_eval_every_leaves_cells_empty(tmp_path):
    run(config(tmp_path, epochs=3, eval_every=2))
    accuracies = [row["test_accuracy"] for row in read_csv(tmp_path / "run" / "metrics.csv")]
    assert [math.isnan(accuracy) for accuracy in accuracies] == [True, False, False]


def test_last_batch_of_one_image_is_left_out(tmp_path):
    fit = small_fit(tmp_path, train_size=61, batch_size=20)
    assert len(fit.data.train) % 20 == 1
    assert [len(target) for _, target in fit.train_batches] == [20, 20, 20]
    assert sum(len(t) for _, t in small_fit(tmp_path, train_size=62, batch_size=20).train_batches) == 62


def test_meter_takes_the_accuracy_of_the_last_outputs_of_a_batch():
    target = torch.tensor([0, 2, 1, 1])
    right = nn.functional.one_hot(target, 3).float()
    meter = Meter(torch.device("cpu"), 1)
    for outputs in (right.flip(1), None, right, None):  # a phase without them changes nothing
        meter.add(fake_phase(1.0, outputs=outputs), 4)
    meter.end_batch(target)
    meter.add(fake_phase(1.0), 4)
    meter.end_batch(target)  # a batch without any is not judged
    assert meter.judged == 4 and meter.images == 8
    assert meter.means()["accuracy"] == 1.0
    assert math.isnan(Meter(torch.device("cpu"), 1).means()["accuracy"])


def fake_phase(loss, parts=(), name="", outputs=None):
    facts = {"loss": torch.tensor(loss), "parts": dict(parts), "name": name, "networks": (), "skipped": False}
    return type("P", (), facts | {"outputs": outputs})()


def test_meter_gives_parts_the_name_of_their_phase():
    meter = Meter(torch.device("cpu"), 1)
    for name in ("private", "group"):
        parts = {"ce": torch.tensor(2.0), f"{name}_kd": torch.tensor(1.0)}
        meter.add(fake_phase(3.0, parts, name), 4)
    meter.end_batch(torch.zeros(4, dtype=torch.long))
    means = meter.means()
    assert [means[name] for name in ("private_ce", "private_kd", "group_ce", "group_kd")] == [2, 1, 2, 1]
    assert means["loss"] == 6


class Diverging(methods.CE):
    """Its loss is not finite from batch 3 on."""

    def iteration(self, batch, generator):
        for phase in super().iteration(batch, generator):
            if self.iterations == 2:
                phase._loss = phase._loss * math.inf
            yield phase


@pytest.mark.parametrize("log_every", [1, 50])
def test_divergence_names_network_epoch_and_batch(tmp_path, log_every):
    runner = Runner(config(tmp_path, batch_size=16, log_every=log_every))
    fit = runner.fit(runner.stages["student"], {}, tmp_path / "run")
    fit.method = Diverging(fit.method.student)
    fit.optimizer = make_optimizer(fit.method, fit.settings)
    fit.steps = Steps(fit.method, fit.optimizer, fit.device)
    with pytest.raises(
        Divergence, match=r"student plain2:width=0.0625 trained by Diverging: epoch 1, batch 3 \(step 3\): .* inf"
    ) as e:
        fit.run()
    assert e.value.status == 1 and "\n" not in str(e.value)
    assert checkpoint.epochs(tmp_path / "run" / "checkpoints") == []


def test_late_look_still_names_the_batch():
    meter = Meter(torch.device("cpu"), 1)
    meter.read_every = 10
    for value in (1.0, math.nan, 1.0):
        meter.add(fake_phase(value), 4)
        meter.end_batch(torch.zeros(4, dtype=torch.long))
    with pytest.raises(Divergence, match=r"batch 2 \(step 2\): the loss is nan"):
        meter.read_losses()


# Optimiser and schedule.


def rates(epochs=20, **options):
    options = OptimizationOptions(lr=0.1, optimizer="sgd", **options)
    method = methods.CE(nn.Linear(2, 2))
    optimizer = make_optimizer(method, options)
    schedule = make_schedule(optimizer, options, epochs)
    found = []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def torch_rates(build, epochs=20):
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    schedule, found = build(optimizer), []
    for _ in range(epochs):
        found.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return found


def test_schedules_equal_those_of_pytorch():
    schedulers = torch.optim.lr_scheduler
    assert rates() == [0.1] * 20
    multistep = torch_rates(lambda o: schedulers.MultiStepLR(o, [10, 15], 0.1))
    assert rates(schedule="multistep") == pytest.approx(multistep)
    assert rates(schedule="multistep", milestones=[10, 15]) == pytest.approx(multistep)
    cosine = torch_rates(lambda o: schedulers.CosineAnnealingLR(o, 20))
    assert rates(schedule="cosine") == pytest.approx(cosine)
    assert rates(warmup_epochs=4)[:6] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


def test_optimizers():
    method = methods.CE(nn.Linear(2, 2))
    sgd = make_optimizer(method, OptimizationOptions(optimizer="sgd", lr=0.3, nesterov=True, weight_decay=0.01))
    assert isinstance(sgd, torch.optim.SGD)
    group = sgd.param_groups[0]
    assert (group["lr"], group["momentum"], group["nesterov"], group["weight_decay"]) == (0.3, 0.9, True, 0.01)
    adamw = make_optimizer(method, OptimizationOptions(optimizer="adamw", lr=0.3, weight_decay=0.01))
    assert isinstance(adamw, torch.optim.AdamW) and adamw.param_groups[0]["weight_decay"] == 0.01


# Checkpoints and files.


def test_checkpoints_are_named_kept_and_load_into_a_network(tmp_path):
    results = run(config(tmp_path, epochs=3, keep=2))
    folder = tmp_path / "run" / "checkpoints"
    assert sorted(os.listdir(folder)) == ["epoch-0002.pt", "epoch-0003.pt"]
    state = torch.load(folder / "epoch-0003.pt", weights_only=True)
    assert (state["epoch"], state["step"]) == (3, 6)
    network = models.create("plain2", 10, image_size=8, channels=1, width=0.0625)
    network.load_state_dict(state["network"])
    assert_same(dict(network.state_dict()), dict(results["student"].network.state_dict()))


def test_csv_round_trip(tmp_path):
    rows = [{"epoch": 1, "a": 0.5}, {"epoch": 2, "a": math.nan, "b": 1e-9}]
    write_csv(tmp_path / "m.csv", rows)
    assert (tmp_path / "m.csv").read_text() == "epoch,a,b\n1,0.5,\n2,,1e-09\n"
    assert read_csv(tmp_path / "m.csv")[1]["b"] == 1e-9
    (tmp_path / "m.csv").write_text("epoch\nx\n")
    with pytest.raises(UserError, match="not a metrics file"):
        read_csv(tmp_path / "m.csv")


def test_lock(tmp_path):
    with lock(tmp_path), pytest.raises(UserError, match="another process is running"), lock(tmp_path):
        pass
    with lock(tmp_path):
        pass


# Options.


def test_parse_network():
    assert parse_network("plain4") == ("plain4", {})
    parsed = parse_network("plain4:width=0.5:norm=group:depth=3:x=true")
    assert parsed == ("plain4", {"width": 0.5, "norm": "group", "depth": 3, "x": True})
    with pytest.raises(UserError, match="NAME:option=value"):
        parse_network("plain4:wide")


@pytest.mark.parametrize(
    "options, message",
    [
        ({"epochs": 0}, "--epochs must be an integer of at least 1, got 0"),
        ({"batch_size": 2.5}, "--batch-size must be an integer"),
        ({"lr": -1.0}, "--lr must be a finite number >= 0"),
        ({"lr": math.nan}, "--lr must be"),
        ({"validation": 1.0}, "--validation must be a fraction"),
        ({"nesterov": True, "momentum": 0.0}, "--nesterov needs --momentum"),
        ({"milestones": [-1.0]}, "--milestones must be positive"),
        ({"seed": -1}, "--seed must be"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(UserError, match=message):
        TrainConfig(**options)


def test_config_goes_through_yaml(tmp_path):
    one = CompareConfig(methods=["ce"], seeds=[3], options={"lam": 0.5}, weight_decay=1e-5)
    (tmp_path / "c.yaml").write_text(to_yaml(one))
    assert CompareConfig(**read_yaml(tmp_path / "c.yaml")) == one
    assert differences({"lr": 0.1, "out": "a", "epochs": 1}, {"lr": 0.2, "out": "b", "epochs": 2}) == [
        "--lr was 0.1, now 0.2"
    ]


def test_device():
    assert pick_device("cpu") == torch.device("cpu")
    with pytest.raises(UserError, match="--device must be"):
        pick_device("gpuu")
    with pytest.raises(UserError, match="is not there"):
        pick_device("cuda:99")


# Several networks, several views.


def test_metrics_of_a_group_count_its_promotions(tmp_path):
    results = run(config(tmp_path, method="orc", epochs=2, batch_size=20, options={"promote": 1}))
    rows = read_csv(tmp_path / "run" / "metrics.csv")
    for name in ("intensive", "private_ce", "private_kd", "group_ce", "group_kd"):
        assert all(math.isfinite(row[f"train_{name}"]) for row in rows), name
    assert [row["promotions_student"] + row["promotions_assistant1"] for row in rows] == [3, 6]  # since the start
    assert all(row["lr"] == 0.01 for row in rows)  # the students', not the pivot's
    assert list(results["student"].others) == ["assistant1", "teacher"]


@pytest.mark.parametrize("method, views", [("dkel", 3), ("pcl", 3), ("kdcl", 2)])
def test_views_are_for_training_only(tmp_path, method, views):
    options = {"views": True} if method == "kdcl" else {}
    runner = Runner(config(tmp_path, method=method, options=options))
    fit = runner.fit(runner.stages["student"], {}, None)
    inputs, _ = next(iter(fit.train_batches))
    assert len(inputs) == views and not torch.equal(inputs[0], inputs[1])
    assert isinstance(next(iter(fit.held_out["test"]))[0], torch.Tensor)
    assert isinstance(runner.data.train[0][0], torch.Tensor)  # other stages have one view


def test_a_method_is_initialised_once_before_the_first_epoch(tmp_path, monkeypatch):
    calls = []

    def initialise(self, batches, lr, chunks=1):
        (inputs, target), *_ = batches
        calls.append((self.iterations, len(inputs), len(target), lr))

    monkeypatch.setattr(methods.CE, "initialise", initialise, raising=False)
    run(config(tmp_path, epochs=2, batch_size=15))
    assert calls == [(0, 15, 15, 0.01)]
    run(config(tmp_path, epochs=3, batch_size=15, resume=True))
    assert len(calls) == 1
