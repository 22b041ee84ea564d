"""Runs and their files: a disk that is full, checkpoints in the middle of an epoch, damaged ones."""

import contextlib
import os
import resource
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd.cli import main
from fastkd.runs.config import differences
from fastkd.train import TrainConfig, UserError, checkpoint
from fastkd.train.loop import Fit
from fastkd.train.metrics import Meter

OPTIONS = dict(batch_size=16, epochs=3)  # 4 steps an epoch


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


def run_until(step, monkeypatch, options, then=Killed):
    """A run that ends after so many steps of the student, as if it had been killed."""
    original, left = Fit.run, [step]

    def run_fit(fit):
        def end_batch(meter, *batch, original=Meter.end_batch):
            if fit.folder == Path(options.out):
                if left[0] == 0:
                    raise then
                left[0] -= 1
            original(meter, *batch)

        with monkeypatch.context() as patch:
            patch.setattr(Meter, "end_batch", end_batch)
            return original(fit)

    with monkeypatch.context() as patch:
        patch.setattr(Fit, "run", run_fit)
        with pytest.raises(then):
            run(options)


def checkpoints(folder):
    return sorted(os.listdir(folder / "checkpoints"))


@pytest.mark.parametrize("every, step, left", [(3, 7, "partial"), (1, 6, "partial"), (4, 6, ""), (2, 3, "first")])
def test_save_every_loses_little_and_changes_nothing(tmp_path, monkeypatch, every, step, left):
    run(config(tmp_path, out=str(tmp_path / "whole"), **OPTIONS))
    run_until(step, monkeypatch, config(tmp_path, save_every=every, **OPTIONS))
    files = {"partial": ["epoch-0001.pt", "partial.pt"], "": ["epoch-0001.pt"], "first": ["partial.pt"]}
    assert checkpoints(tmp_path / "run") == files[left]
    if left:
        state = checkpoint.load(tmp_path / "run" / "checkpoints" / checkpoint.PARTIAL)
        assert state["step"] == step // every * every
    run(config(tmp_path, save_every=every, resume=True, **OPTIONS))
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole")
    for name in checkpoints(tmp_path / "run"):
        one, other = (tmp_path / out / "checkpoints" / name for out in ("run", "whole"))
        assert one.read_bytes() == other.read_bytes()
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")


@pytest.mark.parametrize("method", ["orc", "dkel"])  # the others: test_resume.py
def test_method_with_counters_goes_on_from_a_killed_epoch(tmp_path, monkeypatch, method):
    options = dict(method=method, batch_size=16, epochs=2, cache=str(tmp_path / "cache"), own_epochs=1, guide_epochs=1)
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    run_until(7, monkeypatch, config(tmp_path, save_every=2, **options))
    assert checkpoint.PARTIAL in checkpoints(tmp_path / "run")
    run(config(tmp_path, resume=True, **options))
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")


@pytest.mark.parametrize("damaged", [["partial.pt"], ["epoch-0002.pt"], ["partial.pt", "epoch-0002.pt"]])
@pytest.mark.parametrize("keep", [0, 2])
def test_damaged_checkpoints_cost_work_and_nothing_else(tmp_path, monkeypatch, capfd, damaged, keep):
    run(config(tmp_path, out=str(tmp_path / "whole"), **OPTIONS))
    run_until(10, monkeypatch, config(tmp_path, save_every=1, keep=keep, **OPTIONS))
    for name in damaged:
        path = tmp_path / "run" / "checkpoints" / name
        path.write_bytes(path.read_bytes()[:-500])
    capfd.readouterr()
    run(config(tmp_path, resume=True, keep=keep, **OPTIONS))
    said = capfd.readouterr().err.splitlines()
    # A state in the middle of epoch 3 that is whole is newer than that after epoch 2, which no one looks at then.
    looked_at = [name for name in damaged if "partial.pt" in damaged]
    assert len(said) == len(looked_at) and all(name in line for name, line in zip(looked_at, said, strict=True))
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    assert rows_without_times(tmp_path / "run") == rows_without_times(tmp_path / "whole")
    kept = [name for name in checkpoints(tmp_path / "run") if name.endswith(".pt")]
    assert kept == [f"epoch-000{epoch}.pt" for epoch in ((1, 2, 3) if keep == 0 else (2, 3))]


def test_damaged_network_in_the_cache_is_trained_again_when_its_folder_is_deleted(tmp_path, capfd):
    words = (
        "train --method kd --epochs 1 --train-size 60 --teacher plain2 --student plain2 --device cpu --quiet".split()
    )
    words += ["--resume", "--out", str(tmp_path / "run")]
    assert main(words) == 0
    (path,) = (tmp_path / "run" / "cache").glob("teacher-*/checkpoints/epoch-0001.pt")
    path.write_bytes(b"")
    assert main(words) == 2
    error = capfd.readouterr().err
    assert f"no checkpoint in {path.parent} can be used" in error and "delete this folder" in error
    assert error.count("\n") == 1
    shutil.rmtree(path.parent)
    assert main(words) == 0


def test_options_are_shown_and_checked(capfd):
    assert main(["train", "--help"]) == 0
    text = capfd.readouterr().out
    for option in ("--save-every N", "--keep N", "--bad-images error|skip", "--non-finite stop|skip"):
        assert option in text
    for name, value in (("save_every", -1), ("keep", -1), ("bad_images", "ignore"), ("non_finite", "go on")):
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} must be .*, got {value!r}"):
            TrainConfig(**{name: value})


def test_options_may_change_when_a_run_goes_on():
    free = {"save_every": 3, "bad_images": "skip", "non_finite": "skip", "keep": 1}
    assert differences({"save_every": 0, "bad_images": "error", "non_finite": "stop", "keep": 0}, free) == []


# A full disk.


@contextlib.contextmanager
def largest_file(size):
    """No file may grow beyond `size` bytes: a real failure of the write."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize("save_every", [0, 1])
def test_full_disk_stops_the_run_and_leaves_what_is_there(tmp_path, monkeypatch, capfd, save_every):
    words = "--method ce --train-size 60 --batch-size 16 --student plain2:width=0.125 --device cpu --quiet".split()
    words = ["train", *words, "--save-every", str(save_every), "--epochs", "4"]
    assert main([*words, "--out", str(tmp_path / "whole")]) == 0
    steps, original = [], Meter.end_batch

    def end_batch(meter, *batch):
        original(meter, *batch)
        steps.append(1)
        if len(steps) == 11:  # in the third epoch
            resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))

    with monkeypatch.context() as patch, largest_file(resource.getrlimit(resource.RLIMIT_FSIZE)[0]):
        patch.setattr(Meter, "end_batch", end_batch)
        assert main([*words, "--out", str(tmp_path / "run")]) == 1
    error = capfd.readouterr().err
    folder = tmp_path / "run" / "checkpoints"
    assert error.startswith(f"fastkd: {folder}/{'partial' if save_every else 'epoch-0003'}.pt cannot be written, ")
    assert error.count("\n") == 1 and "make room and repeat the command with --resume" in error
    assert checkpoints(tmp_path / "run") == ["epoch-0001.pt", "epoch-0002.pt", *["partial.pt"] * save_every]
    for name in checkpoints(tmp_path / "run"):
        checkpoint.load(folder / name)
    assert main([*words, "--resume", "--out", str(tmp_path / "run")]) == 0
    assert checkpoints(tmp_path / "run") == checkpoints(tmp_path / "whole")
    for name in checkpoints(tmp_path / "run"):
        assert (folder / name).read_bytes() == (tmp_path / "whole" / "checkpoints" / name).read_bytes()


@pytest.mark.slow
def test_disk_that_is_really_full(tmp_path):
    """A file system of 400 KB, in a namespace of its own; skipped where none may be made."""
    script = f"mount -t tmpfs -o size=400k none {tmp_path} && "
    if subprocess.run(["unshare", "-rm", "sh", "-c", script + "true"], capture_output=True).returncode:
        pytest.skip("no file system can be mounted here")
    words = "train --method ce --train-size 60 --student plain2:width=0.25 --epochs 30 --device cpu --quiet"
    words += f" --out {tmp_path}/run"
    command = f"{sys.executable} -m fastkd {words}; echo $?; ls -A {tmp_path}/run/checkpoints; "
    first = f"{tmp_path}/run/checkpoints/epoch-0001.pt"
    command += (
        f'{sys.executable} -c \'from fastkd.train import checkpoint; print(checkpoint.load("{first}")["epoch"])\''
    )
    done = subprocess.run(["unshare", "-rm", "sh", "-c", script + command], capture_output=True, text=True)
    status, *files, epoch = done.stdout.split()
    assert (status, epoch) == ("1", "1"), done
    assert files and all(name.startswith("epoch-") and name.endswith(".pt") for name in files)
    assert done.stderr.count("\n") == 1 and "cannot be written, the disk is full: make room" in done.stderr
