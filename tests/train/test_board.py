"""`--tensorboard`: what is written, when and by whom, and that the run is the same. By a stand-in, and the real one."""

import errno
import os
import resource
import sys
import threading
import types
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from distributed_helpers import processes, train
from train_helpers import config, one_thread, rows_without_times, run  # noqa: F401

from fastkd.cli import main
from fastkd.methods import CE
from fastkd.train import state
from fastkd.train.board import TensorBoard
from fastkd.train.metrics import Meter

OPTIONS = dict(batch_size=16, epochs=3)  # 4 steps an epoch, of 60 images
STEPS = list(range(1, 13))


class StandIn:
    """Keeps what it is asked for, as SummaryWriter would write it."""

    made: ClassVar[list["StandIn"]] = []

    def __init__(self, log_dir, purge_step):
        self.folder, self.purge_step = Path(log_dir), purge_step
        self.scalars, self.flushed, self.closed = [], [], False
        StandIn.made.append(self)

    def add_scalar(self, tag, value, step):
        assert not self.closed and isinstance(value, float | int)
        self.scalars.append((tag, step, value))

    def flush(self):
        self.flushed.append(len(self.scalars))

    def close(self):
        self.closed = True


def stand_in(kind=StandIn):
    StandIn.made = []
    sys.modules["torch.utils.tensorboard"] = types.SimpleNamespace(SummaryWriter=kind)


@pytest.fixture
def writers(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)  # put back afterwards
    stand_in()
    return StandIn.made


def shown(writers):
    """(tag, step) -> value of what a viewer shows of one folder: a later writer drops what it purges."""
    found = []
    for writer in writers:
        found = [each for each in found if each[1] < writer.purge_step] + writer.scalars
    assert len({each[:2] for each in found}) == len(found), "a step is there twice"
    return {each[:2]: each[2] for each in found}


def test_rows_and_losses_are_written_and_the_run_is_the_same(tmp_path, writers):
    run(config(tmp_path, out=str(tmp_path / "plain"), **OPTIONS))
    assert not writers
    run(config(tmp_path, tensorboard=True, **OPTIONS))
    (writer,) = writers
    assert writer.folder == tmp_path / "run" / "tensorboard" / "student-ce" and writer.closed
    found, rows = shown(writers), rows_without_times(tmp_path / "run")
    for number, row in enumerate(rows, 1):
        for name, value in row.items():
            assert found[f"epoch/{name}", 4 * number] == pytest.approx(value), name
    assert [step for tag, step in found if tag == "step/loss"] == STEPS
    assert [step for tag, step in found if tag == "step/accuracy"] == STEPS
    images = [16, 16, 16, 12]
    mean = sum(found["step/loss", step] * n for step, n in enumerate(images, 1)) / 60
    assert mean == pytest.approx(rows[0]["train_loss"])
    assert rows == rows_without_times(tmp_path / "plain")
    for name in os.listdir(tmp_path / "run" / "checkpoints"):
        one, other = (tmp_path / folder / "checkpoints" / name for folder in ("run", "plain"))
        assert one.read_bytes() == other.read_bytes()


def test_each_checkpoint_finds_all_before_it_in_the_file(tmp_path, writers, monkeypatch):
    original, seen = state.write, []

    def write(fit, *rest):
        (writer,) = writers
        seen.append((len(writer.scalars), writer.flushed[-1]))
        original(fit, *rest)

    monkeypatch.setattr(state, "write", write)
    run(config(tmp_path, tensorboard=True, save_every=3, **OPTIONS))
    assert len(seen) == 3 + 3 and all(written == flushed for written, flushed in seen)  # steps 3, 6, 9; 12 is the end


def test_every_stage_has_its_own_name_and_one_that_is_taken_from_the_cache_writes_nothing(tmp_path, writers):
    for _ in range(2):
        run(config(tmp_path, method="dgkd", tensorboard=True, resume=True, **OPTIONS))
    names = [str(writer.folder.relative_to(tmp_path / "run" / "tensorboard")) for writer in writers]
    assert names == ["teacher-ce", "assistant1-dgkd", "student-dgkd"]
    assert {"step/loss", "step/kd", "epoch/train_kd"} <= {tag for tag, *_ in writers[-1].scalars}


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@pytest.mark.parametrize("every, step, goes_on", [(3, 7, 7), (0, 6, 5), (0, 2, 1), (0, 8, 5)])
def test_a_killed_run_goes_on_without_doubled_steps(tmp_path, writers, monkeypatch, every, step, goes_on):
    """Killed after a step that was written and not saved; step 8 is the end of an epoch, its row written."""
    run(config(tmp_path, out=str(tmp_path / "whole"), tensorboard=True, **OPTIONS))
    whole = shown(writers)
    stand_in()
    with monkeypatch.context() as patch:
        if step == 8:
            original = state.write

            def write(fit, *rest):
                if fit.step == 8:
                    raise Killed
                original(fit, *rest)

            patch.setattr(state, "write", write)
        else:
            original = TensorBoard.step

            def step_of(board, meter):
                original(board, meter)
                if meter.first_step + meter.batches == step:
                    raise Killed

            patch.setattr(TensorBoard, "step", step_of)
        with pytest.raises(Killed):
            run(config(tmp_path, tensorboard=True, save_every=every, **OPTIONS))
    run(config(tmp_path, tensorboard=True, resume=True, save_every=every, **OPTIONS))
    assert [writer.purge_step for writer in StandIn.made] == [1, goes_on]
    assert max(at for _, at, _ in StandIn.made[0].scalars) == step
    timed = ("images_per_s", "seconds", "cpu_seconds")
    again = {k: v for k, v in shown(StandIn.made).items() if not k[0].endswith(timed)}
    assert again == pytest.approx({k: v for k, v in whole.items() if not k[0].endswith(timed)}, rel=1e-12)


@pytest.mark.parametrize("fails", ["__init__", "add_scalar", "flush", "close"])
def test_a_broken_writer_is_named_once_and_the_run_goes_on(tmp_path, monkeypatch, capsys, fails):
    def full(*args, **kwargs):
        asked.append(args)
        raise OSError(errno.ENOSPC, "No space left on device")

    asked = []
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    stand_in(type("Full", (StandIn,), {fails: full}))
    run(config(tmp_path, tensorboard=True, **OPTIONS))
    said = capsys.readouterr().err
    assert said.count("No space left on device") == 1 == said.count("\n") and "student-ce is written no more" in said
    assert len(asked) == 1 and len(rows_without_times(tmp_path / "run")) == 3


def test_a_missing_package_is_one_sentence_before_anything_is_made(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    for name in [name for name in sys.modules if name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    for command in (["train", "--method", "ce"], ["compare"]):
        assert main([*command, "--tensorboard", "--out", str(tmp_path / "run")]) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastkd: --tensorboard needs tensorboard (") and said.count("\n") == 1
        assert 'pip install ".[tensorboard]"' in said
    assert not (tmp_path / "run").exists()


def test_a_meter_that_looks_seldom_is_written_seldom(writers, tmp_path):
    """As on a GPU. The mean since the last look, over the images of batches of which no phase was left out."""
    board, meter = TensorBoard(tmp_path / "curves"), Meter(torch.device("cpu"), 1)
    meter.read_every, meter.first_step = 3, 40
    method = CE(torch.nn.Linear(4, 3))
    with board.opened(41):
        board.watch(meter)
        for batch, (loss, rows) in enumerate([(1.0, 2), (2.0, 2), (4.0, 4), (8.0, 2), (16.0, 2)], 1):
            (phase,) = method.phases(torch.randn(rows, 4), torch.zeros(rows, dtype=torch.long))
            phase.skipped = batch == 4
            meter.add(phase, rows, torch.tensor(loss))
            meter.end_batch(torch.zeros(rows, dtype=torch.long))
        meter.read_losses()
    losses = [each[1:] for each in writers[0].scalars if each[0] == "step/loss"]
    assert losses == [(43, (2 + 4 + 16) / 8), (45, 16.0)]


def of_two(rank, folder):
    stand_in()
    train(folder / "two", "kd", tensorboard=True, epochs=2, guide_epochs=1)
    if rank == 0:
        torch.save([w.scalars for w in StandIn.made], folder / "scalars.pt")
    else:
        assert not StandIn.made


def test_of_two_processes_the_first_one_writes_means_over_both(tmp_path, writers):
    before = torch.get_num_threads()
    train(tmp_path / "one", "kd", tensorboard=True, epochs=2, guide_epochs=1)
    torch.set_num_threads(before)
    processes(of_two, 2, tmp_path)
    for one, two in zip([w.scalars for w in writers], torch.load(tmp_path / "scalars.pt"), strict=True):
        assert [each[:2] for each in one] == [each[:2] for each in two]
        for (tag, step, a), (_, _, b) in zip(one, two, strict=True):
            if not tag.endswith(("images_per_s", "seconds")):
                assert a == pytest.approx(b, abs=1e-5), (tag, step)


# --- the package itself -----------------------------------------------------------------------------------------------


def read_back(folder):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(folder), size_guidance={accumulator.SCALARS: 0})
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_event_files_of_a_killed_run_hold_each_step_once(tmp_path, monkeypatch):
    pytest.importorskip("tensorboard")
    original = state.write

    def write(fit, *rest):
        if fit.step == 8:
            raise Killed
        original(fit, *rest)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(state, "write", write)
        run(config(tmp_path, tensorboard=True, **OPTIONS))
    folder = tmp_path / "run" / "tensorboard" / "student-ce"
    assert [step for step, _ in read_back(folder)["step/loss"]] == STEPS[:8]
    run(config(tmp_path, tensorboard=True, resume=True, **OPTIONS))
    assert len(list(folder.iterdir())) == 2
    found, rows = read_back(folder), rows_without_times(tmp_path / "run")
    assert [step for step, _ in found["step/loss"]] == STEPS
    expected = [(4 * i, pytest.approx(row["test_accuracy"])) for i, row in enumerate(rows, 1)]
    assert found["epoch/test_accuracy"] == expected


def test_the_writers_thread_on_a_full_disk_is_one_word(tmp_path, capsys, monkeypatch):
    pytest.importorskip("tensorboard")
    tracebacks = []
    monkeypatch.setattr(threading, "excepthook", tracebacks.append)
    board, before = TensorBoard(tmp_path / "curves"), resource.getrlimit(resource.RLIMIT_FSIZE)
    with board.opened(1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            for step in range(1, 200):
                board.row(step, {"loss": float(step)})
            board.flush()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        for step in range(200, 300):
            board.row(step, {"loss": float(step)})
    said = capsys.readouterr().err
    assert not tracebacks and threading.excepthook == tracebacks.append
    assert "is written no more (File too large)" in said and said.count("\n") == 1, said
    assert 10 < len(read_back(tmp_path / "curves")["epoch/loss"]) < 200
