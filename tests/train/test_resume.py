"""The same seed gives the same bits, and an interruption changes nothing."""

import math
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from train_helpers import (  # noqa: F401
    assert_same,
    config,
    last_state,
    one_thread,
    rows_without_times,
    run,
    untrained,
)

from fastkd.cli import main
from fastkd.train import RECIPES, Interrupted, Runner, UserError, checkpoint
from fastkd.train.metrics import Meter, read_csv


def test_same_seed_same_bits_other_seed_other_weights(tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        run(config(tmp_path, method="dgkd", out=str(tmp_path / name), seed=seed, options={"drop": "bernoulli"}))
    assert_same(last_state(tmp_path / "a"), last_state(tmp_path / "b"))
    assert rows_without_times(tmp_path / "a") == rows_without_times(tmp_path / "b")
    a, c = (last_state(tmp_path / name)["network"]["fc.weight"] for name in "ac")
    assert not torch.equal(a, c)


def test_every_method_starts_from_the_same_student(tmp_path):
    states = []
    for name in RECIPES:
        runner = Runner(config(tmp_path, method=name))
        stage = runner.stages["student"]
        method = runner.build(stage, untrained(runner, stage))
        # The mean teacher of dkel, the network to ship, starts apart from its student.
        network = method.student.peer(0) if name == "dkel" else method.deployable()
        states.append(dict(network.state_dict()))
    for state in states[1:]:
        assert_same(states[0], state)


class StopAt:
    """Sends Ctrl-C to this process at a batch of an epoch, counted over the whole stage."""

    def __init__(self, monkeypatch, step):
        self.left = step
        original = Meter.end_batch

        def end_batch(meter, target, *rows):
            original(meter, target, *rows)
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGINT)

        monkeypatch.setattr(Meter, "end_batch", end_batch)


@pytest.mark.parametrize("step", [1, 3, 4, 5, 8])  # of 4 a epoch: within an epoch and at its last batch
def test_interrupted_run_ends_with_the_same_bits(tmp_path, monkeypatch, step):
    options = dict(method="ce", batch_size=16, optimizer="adamw", epochs=3)
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    before = signal.getsignal(signal.SIGINT)  # ignored where the tests run in the background of a script
    with monkeypatch.context() as patch:
        StopAt(patch, step)
        with pytest.raises(Interrupted):
            run(config(tmp_path, **options))
    assert signal.getsignal(signal.SIGINT) is before
    partial = tmp_path / "run" / "checkpoints" / checkpoint.PARTIAL
    assert partial.exists() == (step % 4 != 0)
    run(config(tmp_path, resume=True, **options))
    assert not partial.exists()
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_goes_on_with_the_same_bits(tmp_path, monkeypatch, method):
    """From the middle of an epoch and from the end of one; also ORC's roles, DKEL's average and its initialisation."""
    options = dict(method=method, batch_size=16, epochs=2, cache=str(tmp_path / "cache"), own_epochs=1, guide_epochs=1)
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    with monkeypatch.context() as patch:
        StopAt(patch, 6)  # in the student's second epoch: what it needs is in the cache
        with pytest.raises(Interrupted):
            run(config(tmp_path, **options))
    shutil.copytree(tmp_path / "run", tmp_path / "after")
    (tmp_path / "after" / "checkpoints" / checkpoint.PARTIAL).unlink()
    for name in ("run", "after"):
        run(config(tmp_path, out=str(tmp_path / name), resume=True, **options))
        assert_same(last_state(tmp_path / name), last_state(tmp_path / "whole"))
        assert rows_without_times(tmp_path / name) == rows_without_times(tmp_path / "whole")


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


@pytest.mark.parametrize("workers", ["0", pytest.param("2", marks=pytest.mark.slow)])
def test_ctrl_c_of_the_command(tmp_path, workers):
    """SIGINT to all its processes, as a terminal sends it: status 130, how to go on, and the same bits after it."""

    def words(name, *more):
        options = ["--method", "ce", "--train-size", "100", "--student", "plain2", "--epochs", "8"]
        return ["train", *options, "--workers", workers, "--out", str(tmp_path / name), *more]

    command = [sys.executable, "-m", "fastkd", *words("run")]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "run" / "checkpoints" / "epoch-0002.pt").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert "Traceback" not in stderr and "Error" not in stderr
    assert "--resume" in stderr.splitlines()[-1] and str(tmp_path / "run") in stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "checkpoints" / "epoch-0008.pt").exists()
    for name in ("run", "whole"):
        assert main(words(name, "--resume", "--quiet")) == 0
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
