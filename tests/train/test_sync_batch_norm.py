"""`--sync-batch-norm`: what becomes torch.nn.SyncBatchNorm, when, and that nothing of it is left afterwards."""

import dataclasses
import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run, untrained  # noqa: F401

from fastkd.runs import runner
from fastkd.runs.config import differences
from fastkd.runs.runner import stage_key
from fastkd.train import Runner, UserError, batch_norm, loop
from fastkd.train.devices import prepare
from fastkd.train.distributed import World

CPU = torch.device("cpu")


def norms(module):
    return {name: m for name, m in module.named_modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)}


def kinds(module):
    return {type(m) for m in norms(module).values()}


@dataclasses.dataclass(frozen=True)
class TwoOf(World):
    """Two processes, of which one is here. DistributedDataParallel takes no SyncBatchNorm on a CPU."""

    size: int = 2

    def broadcast(self, function):
        return function()

    def wrap(self, method, network, device):
        object.__setattr__(self, "wrapped", [*getattr(self, "wrapped", []), network])
        return network


@pytest.mark.parametrize("method", ["kd", "dkel", "orc", "feed-parallel"])
def test_all_that_trains_is_converted_before_it_is_wrapped(tmp_path, method):
    options = config(tmp_path, method=method, sync_batch_norm=True)
    made = Runner(options)
    stage = made.stages["student"]
    built, alone = (made.build(stage, untrained(made, stage)) for _ in range(2))
    frozen = [built.get_submodule(name) for name in built.frozen_names]
    before, here = dict(built.state_dict()), dict(built.named_parameters())
    world = TwoOf()
    prepare(built, options, CPU, world)
    prepare(alone, options, CPU)
    assert kinds(alone) == {nn.BatchNorm2d}  # one process
    assert set().union(*map(kinds, world.wrapped)) == {nn.SyncBatchNorm}
    assert all(kinds(network) == {nn.BatchNorm2d} for network in frozen)
    if method == "dkel":
        assert kinds(built.teacher) == {nn.SyncBatchNorm}
    assert_same(dict(built.state_dict()), before)
    after = dict(built.named_parameters())
    assert list(after) == list(here) and all(after[name] is here[name] for name in here)


def test_what_was_replaced_comes_back_as_it_was():
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=1e-3, momentum=0.2), nn.Sequential(nn.BatchNorm2d(4, affine=False)),
        nn.Flatten(), nn.BatchNorm1d(16, track_running_stats=False),
    )  # fmt: skip
    network[1].eval()
    network[1].running_mean.fill_(0.5)
    holder = loop.Method(learners={"student": network})
    images = torch.randn(5, 3, 4, 4)
    expected, said, state = network(images), repr(network), {k: v.clone() for k, v in network.state_dict().items()}
    batch_norm.synchronise(holder)
    assert repr(network) != said and kinds(network) == {nn.SyncBatchNorm} and not network[1].training
    assert torch.equal(network(images), expected)
    batch_norm.restore(holder)
    assert repr(network) == said and not network[1].training and network[4].training
    assert list(network.state_dict()) == list(state) and torch.equal(network(images), expected)


def test_a_run_leaves_plain_networks_and_the_same_bits(tmp_path):
    run(config(tmp_path, method="dml", out=str(tmp_path / "plain")))
    made = Runner(config(tmp_path, method="dml"))
    fit = made.fit(made.stages["student"], {}, tmp_path / "run")
    batch_norm.synchronise(fit.method)  # in one process it computes as the plain one does
    assert kinds(fit.method) == {nn.SyncBatchNorm}
    fit.run()
    assert kinds(fit.method) == {nn.BatchNorm2d} and all(kinds(n) == {nn.BatchNorm2d} for n in fit.others.values())
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "plain"))
    done = made.fit(made.stages["student"], {}, tmp_path / "run")  # a stage that is finished already
    batch_norm.synchronise(done.method)
    done.resume()
    done.run()
    assert kinds(done.method.deployable()) == {nn.BatchNorm2d}


def test_one_process_has_no_use_for_it(tmp_path):
    for name, wanted in (("with", True), ("without", False)):
        run(config(tmp_path, sync_batch_norm=wanted, out=str(tmp_path / name)))
    assert_same(last_state(tmp_path / "with"), last_state(tmp_path / "without"))
    assert rows_without_times(tmp_path / "with") == rows_without_times(tmp_path / "without")


def test_processes_on_cpus_are_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(runner, "world", TwoOf)
    monkeypatch.setattr(runner, "load_data", lambda config: pytest.fail("data were loaded"))
    with pytest.raises(UserError, match=r"^--sync-batch-norm with 2 processes needs GPUs.*norm=group$"):
        Runner(config(tmp_path, sync_batch_norm=True))
    batch_norm.check(config(tmp_path, sync_batch_norm=True), torch.device("cuda", 1), World(1, 2))
    batch_norm.check(config(tmp_path), CPU, World(1, 2))


def test_it_belongs_to_the_results_where_several_processes_run(tmp_path, monkeypatch):
    options = config(tmp_path, method="kd")
    wanted = dataclasses.replace(options, sync_batch_norm=True)
    stages = Runner(options).stages

    def keys(one):
        return [stage_key(one, stages[name], stages) for name in ("teacher", "student")]

    alone = keys(options)
    assert keys(wanted) == alone
    monkeypatch.setattr(runner, "world", lambda: World(0, 2))
    assert keys(options) == alone  # caches that are there stay good
    assert not set(keys(wanted)) & set(alone)
    old, new = dataclasses.asdict(options), dataclasses.asdict(wanted)
    assert differences(old, new) == ["--sync-batch-norm was False, now True"]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs 2 GPUs")
def test_two_gpus_run_as_one(tmp_path):
    """DKEL, in whose step the mean teacher is in train mode, too; 64 images in batches of 16."""
    command = ["-m", "fastkd", "train", "--method", "dkel", "--device", "cuda", "--sync-batch-norm", "--epochs", "2"]
    command += ["--train-size", "64", "--batch-size", "16", "--optimizer", "sgd", "--lr", "0.02", "--quiet"]
    two = ["-m", "torch.distributed.run", "--nproc-per-node", "2", *command, "--out", str(tmp_path / "two")]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "NVIDIA_TF32_OVERRIDE": "0"}
    for each in ([*command, "--out", str(tmp_path / "one")], two):
        subprocess.run([sys.executable, *each], check=True, env=environment, timeout=240)
    one, other = last_state(tmp_path / "one"), last_state(tmp_path / "two")
    assert list(one["method"]) == list(other["method"])
    for a, b in zip(rows_without_times(tmp_path / "one"), rows_without_times(tmp_path / "two"), strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-3)
    for name, value in one["network"].items():
        torch.testing.assert_close(other["network"][name], value, rtol=1e-2, atol=1e-3, msg=name)
