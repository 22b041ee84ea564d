"""The loop: what an epoch computes, metrics, schedules, plans, the cache, and resuming to the same bits."""

import csv
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from fastkd import data as datasets
from fastkd import methods, models
from fastkd.train import Fit, Interrupted, Runner, TrainConfig, UserError, checkpoint, evaluate, plan, train_epoch
from fastkd.train.config import CompareConfig, OptimizationOptions, differences, read_yaml, to_yaml
from fastkd.train.locks import lock
from fastkd.train.loop import cpu_threads, pick_device
from fastkd.train.metrics import Divergence, Meter, read_csv, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.plans import RECIPES, make_network, parse_network, stage_key

TINY = dict(
    train_size=60,
    teacher="plain2:width=0.25",
    assistants=["plain2:width=0.125"],
    student="plain2:width=0.0625",
    quiet=True,
    device="cpu",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks so small are slowed down by a second thread, on a busy machine tenfold."""
    with cpu_threads(1):
        yield


def config(tmp_path, **options) -> TrainConfig:
    return TrainConfig(**{"method": "ce", "epochs": 2, "out": str(tmp_path / "run")} | TINY | options)


def run(options: TrainConfig):
    return Runner(options, say=lambda text: None).run()


def assert_same(one, other, where="state"):
    """Bitwise equality of nested states."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def last_state(folder) -> dict:
    folder = Path(folder) / "checkpoints"
    return torch.load(checkpoint.path_of(folder, checkpoint.epochs(folder)[-1]), weights_only=True)


def rows_without_times(folder) -> list[dict]:
    timed = ("images_per_s", "seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_csv(Path(folder) / "metrics.csv")]


# What an epoch computes.


def small_fit(tmp_path, **options) -> Fit:
    runner = Runner(config(tmp_path, **options))
    return runner.fit(runner.stages["student"], [], tmp_path / "run")


def test_epoch_is_the_plain_loop(tmp_path):
    # Not AdamW: it divides by the gradient's size, and that of a bias in front of a batch normalisation is rounding.
    fit, other = (small_fit(tmp_path, optimizer="sgd", lr=0.05) for _ in range(2))
    network, optimizer = other.method.student, other.optimizer
    fit.train_batches.sampler.set_epoch(0)
    other.train_batches.sampler.set_epoch(0)
    meter = Meter(fit.device, 1)
    watching = meter.watch(fit.method.deployable())
    train_epoch(fit.method, fit.train_batches, fit.optimizer, meter)
    watching.remove()
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
    assert list(rows[0]) == [*expected, "test_loss", "test_accuracy", "images_per_s", "seconds"]
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


def test_meter_reads_accuracy_only_of_training_outputs():
    network = nn.Linear(4, 3)
    meter = Meter(torch.device("cpu"), 1)
    watching = meter.watch(network)
    inputs = torch.randn(8, 4)
    target = network(inputs).argmax(1)  # the network is in train mode: all right
    network.eval()(inputs + 100)  # must not count
    meter.end_batch(target)
    watching.remove()
    assert meter.means()["accuracy"] == 1.0
    assert math.isnan(Meter(torch.device("cpu"), 1).means()["accuracy"])


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
    fit = runner.fit(runner.stages["student"], [], tmp_path / "run")
    fit.method = Diverging(fit.method.student)
    fit.optimizer = make_optimizer(fit.method, fit.settings)
    with pytest.raises(
        Divergence, match=r"student plain2:width=0.0625 trained by Diverging: epoch 1, batch 3: .* inf"
    ) as e:
        fit.run()
    assert e.value.status == 1 and "\n" not in str(e.value)
    assert checkpoint.epochs(tmp_path / "run" / "checkpoints") == []


def test_late_look_still_names_the_batch():
    meter = Meter(torch.device("cpu"), 1)
    meter.look_every = 10
    for value in (1.0, math.nan, 1.0):
        phase = type("P", (), {"loss": torch.tensor(value), "parts": {}})()
        meter.add(phase, 4)
        meter.end_batch(torch.zeros(4, dtype=torch.long))
    with pytest.raises(Divergence, match="batch 2: the loss is nan"):
        meter.look()


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


# The same seed, the same bits; an interruption changes nothing.


def test_same_seed_same_bits_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(config(tmp_path, method="dgkd", out=str(tmp_path / name), seed=seed, options={"drop": "bernoulli"}))
    assert_same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    assert rows_without_times(tmp_path / "a") == rows_without_times(tmp_path / "b")
    a, c = (last_state(tmp_path / name)["network"]["fc.weight"] for name in "ac")
    assert not torch.equal(a, c)


def test_every_method_starts_from_the_same_student(tmp_path):
    data = datasets.load("digits", train_size=60)
    states = []
    for method in RECIPES:
        runner = Runner(config(tmp_path, method=method))
        stage = runner.stages["student"]
        guides = [make_network(runner.stages[g].network, data) for g in stage.guides]
        states.append(dict(runner.build(stage, guides).deployable().state_dict()))
    for state in states[1:]:
        assert_same(states[0], state)


class StopAt:
    """Sends Ctrl-C to this process at a batch of an epoch, counted over the whole stage."""

    def __init__(self, monkeypatch, step):
        self.left = step
        original = Meter.end_batch

        def end_batch(meter, target):
            original(meter, target)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Meter, "end_batch", end_batch)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8])  # of 4 a epoch: within an epoch and at its last batch
def test_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, step):
    options = dict(method="ce", batch_size=16, optimizer="adamw", epochs=3)
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch:
        StopAt(patch, step)
        with pytest.raises(Interrupted):
            run(config(tmp_path, **options))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    partial = tmp_path / "run" / "checkpoints" / checkpoint.PARTIAL
    assert partial.exists() == (step % 4 != 0)
    run(config(tmp_path, resume=True, **options))
    assert not partial.exists()
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")


@pytest.mark.parametrize("step", [2, 6, 14, 22])  # in the teacher, in the assistant, in the student
def test_interruption_of_any_stage(tmp_path, monkeypatch, step):
    options = dict(method="dgkd", batch_size=16, epochs=2, options={"drop": "fixed"}, validation=0.1)
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch:
        StopAt(patch, step)
        with pytest.raises(Interrupted):
            run(config(tmp_path, **options))
    run(config(tmp_path, resume=True, **options))
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


def test_run_killed_after_an_epochs_row_but_before_its_checkpoint(tmp_path):
    run(config(tmp_path, out=str(tmp_path / "whole"), epochs=3))
    run(config(tmp_path, epochs=3))
    checkpoint.path_of(tmp_path / "run" / "checkpoints", 3).unlink()  # the row of epoch 3 is written already
    run(config(tmp_path, epochs=3, resume=True))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


def test_more_epochs_by_resume_equal_a_longer_run(tmp_path):
    run(config(tmp_path, out=str(tmp_path / "whole"), epochs=4))
    run(config(tmp_path, epochs=2))
    run(config(tmp_path, epochs=4, resume=True))
    one, other = last_state(tmp_path / "run"), last_state(tmp_path / "whole")
    assert_same(one["network"], other["network"])
    assert_same(one["optimizer"], other["optimizer"])
    with pytest.raises(UserError, match="has run 4 epochs already"):
        run(config(tmp_path, epochs=3, resume=True))


def test_raised_epochs_follow_the_longer_schedule(tmp_path):
    run(config(tmp_path, epochs=2, schedule="cosine"))
    run(config(tmp_path, epochs=4, schedule="cosine", resume=True))
    found = [row["lr"] for row in read_csv(tmp_path / "run" / "metrics.csv")]
    expected = [0.01, 0.005, 0.005, 0.01 * 0.5 * (1 + math.cos(math.pi * 3 / 4))]
    assert found == pytest.approx(expected)


def test_sigint_to_a_process(tmp_path):
    """Ctrl-C of the command itself: status 130, one line with the command, and the same bits after it."""

    def command(name, *more):
        words = ["train", "--method", "ce", "--data", "digits", "--train-size", "100", "--student", "plain2"]
        return [sys.executable, "-m", "fastkd", *words, "--epochs", "12", "--out", str(tmp_path / name), *more]

    process = subprocess.Popen(command("run"), stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "epoch-0002.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr
    assert "--resume" in stderr.splitlines()[-1] and str(tmp_path / "run") in stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints" / "epoch-0012.pt").exists()
    for name in ("run", "whole"):
        subprocess.run(command(name, "--resume", "--quiet"), check=True, capture_output=True, timeout=120)
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))


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


# Plans and the cache.


def shape(method, **options):
    stages = plan(TrainConfig(method=method, teacher="T", assistants=["A", "B"], student="S", **options))
    return [(s.name, s.network, s.method, *s.guides) for s in stages]


def test_plans():
    teacher = ("teacher", "T", "ce")
    dense = [("assistant1", "A", "dgkd", "teacher"), ("assistant2", "B", "dgkd", "teacher", "assistant1")]
    everyone = ("teacher", "assistant1", "assistant2")
    assert shape("ce") == [("student", "S", "ce")]
    assert shape("kd") == [teacher, ("student", "S", "kd", "teacher")]
    assert shape("aver") == [teacher, *dense, ("student", "S", "aver", *everyone)]
    assert shape("dgkd") == [teacher, *dense, ("student", "S", "dgkd", *everyone)]
    chain = [("assistant1", "A", "takd", "teacher"), ("assistant2", "B", "takd", "assistant1")]
    assert shape("takd") == [teacher, *chain, ("student", "S", "takd", "assistant2")]


def test_guides_are_dropped_for_the_student_only():
    config = TrainConfig(method="dgkd", assistants=["A"], options={"drop": "bernoulli", "temperature": 2.0})
    teacher, assistant, student = plan(config)
    assert assistant.options == {"temperature": 2.0}
    assert student.options == {"drop": "bernoulli", "temperature": 2.0}


def guide_folders(cache):
    return {folder.name: (folder / "metrics.csv").stat().st_mtime_ns for folder in Path(cache).iterdir()}


def test_cache_is_shared_between_methods_and_changes_with_what_determines_it(tmp_path):
    cache = tmp_path / "cache"
    shared = dict(cache=str(cache), epochs=1)
    run(config(tmp_path, method="aver", out=str(tmp_path / "a"), **shared))
    first = guide_folders(cache)
    assert sorted(name.partition("-")[0] for name in first) == ["assistant1", "teacher"]
    run(config(tmp_path, method="dgkd", out=str(tmp_path / "b"), **shared))
    assert guide_folders(cache) == first  # neither trained again nor others made
    run(config(tmp_path, method="kd", out=str(tmp_path / "c"), **shared | {"seed": 1}))
    assert len(guide_folders(cache)) == 3


@pytest.mark.parametrize(
    "change",
    [{"lr": 0.02}, {"epochs": 3}, {"seed": 3}, {"teacher": "plain3"}, {"train_size": 61}, {"augment": False}],
)
def test_key_of_a_guide(tmp_path, change):
    def keys(**options):
        options = config(tmp_path, method="dgkd", **options)
        stages = {stage.name: stage for stage in plan(options)}
        return [stage_key(options, stages[name], stages) for name in ("teacher", "assistant1")]

    same = keys(out="elsewhere", workers=2, quiet=False, student="plain3", keep=1)
    assert same == keys()
    assert all(a != b for a, b in zip(keys(), keys(**change), strict=True))


def test_guides_are_not_changed_by_the_student(tmp_path):
    results = run(config(tmp_path, method="dgkd"))
    for name in ("teacher", "assistant1"):
        assert_same(dict(results[name].network.state_dict()), dict(last_state(results[name].folder)["network"]))


def test_checkpoint_option_replaces_training(tmp_path):
    run(config(tmp_path, out=str(tmp_path / "t"), student=TINY["teacher"]))
    path = str(tmp_path / "t" / "checkpoints" / "epoch-0002.pt")
    results = run(config(tmp_path, method="kd", checkpoint={"teacher": path}))
    assert not (tmp_path / "run" / "cache").exists()
    assert_same(dict(results["teacher"].network.state_dict()), last_state(tmp_path / "t")["network"])
    plain = tmp_path / "plain.pt"
    torch.save(results["teacher"].network.state_dict(), plain)
    run(config(tmp_path, method="kd", checkpoint={"teacher": str(plain)}, out=str(tmp_path / "p")))
    with pytest.raises(UserError, match="does not fit the network plain4"):
        run(config(tmp_path, method="kd", checkpoint={"teacher": path}, teacher="plain4", out=str(tmp_path / "q")))


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
