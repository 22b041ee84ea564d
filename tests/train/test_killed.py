"""A run that SIGKILL ends at any moment, in the middle of a write too, and that is resumed ends with the same bits."""

import io
import multiprocessing
import os
import random
import time
from pathlib import Path

import pytest
from processes_helpers import forking
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd._core import files as whole_files
from fastkd._core.locks import lock
from fastkd.train import checkpoint
from fastkd.train.devices import cpu_threads
from fastkd.train.metrics import Meter

OPTIONS = dict(method="kd", batch_size=16, epochs=4, guide_epochs=2, save_every=3, keep=2, threads=1)
PIECES = 8


@pytest.fixture(scope="module")
def processes():
    return forking()


def slow_down(step: float, piece: float) -> None:
    """So many seconds for each step and for each eighth of a file's writing: more moments to be killed at."""

    class SlowFile(io.FileIO):
        def write(self, content):
            view = memoryview(content).cast("B")
            size = max(1, len(view) // PIECES)
            for start in range(0, len(view), size):
                super().write(view[start : start + size])
                time.sleep(piece)
            return len(view)

    whole_files.open = lambda path, mode: SlowFile(path, mode)
    end_batch = Meter.end_batch

    def slow_end_batch(meter, target, *rows):
        time.sleep(step)
        end_batch(meter, target, *rows)

    Meter.end_batch = slow_end_batch


def train(options, step: float = 0.0, piece: float = 0.0) -> None:
    multiprocessing.set_start_method("fork", force=True)  # of the loader's processes, as under the command
    slow_down(step, piece)
    Path(options.out).mkdir(exist_ok=True)
    with lock(Path(options.out)), cpu_threads(1):
        run(options)


def half_written(folder: Path) -> list[Path]:
    return list(folder.rglob(".*.tmp"))


def start_and_kill(context, options, until, step: float, piece: float) -> bool:
    """Whether the process was killed, which it is when `until(seconds)` says so; False where it was done before."""
    process = context.Process(target=train, args=(options, step, piece))
    process.start()
    begun = time.monotonic()
    while process.is_alive() and not until(time.monotonic() - begun):
        time.sleep(0.002)
    process.kill()
    process.join(60)
    assert process.exitcode in (0, -9)
    return process.exitcode == -9


def assert_same_runs(out: Path, whole: Path) -> None:
    """The same files with the same bytes, but for wall-clock times; nothing half-written or damaged beside them."""
    assert_same(last_state(out), last_state(whole))
    assert rows_without_times(out) == rows_without_times(whole)
    folders = ["checkpoints", next(whole.glob("cache/*/checkpoints")).relative_to(whole)]
    for folder in folders:
        files = sorted(path.name for path in (whole / folder).iterdir())
        assert sorted(path.name for path in (out / folder).iterdir()) == files
        assert checkpoint.PARTIAL not in files
        for name in files:
            assert (out / folder / name).read_bytes() == (whole / folder / name).read_bytes(), name
    assert not half_written(out)


def never_killed(tmp_path, **options) -> Path:
    run(config(tmp_path, out=str(tmp_path / "whole"), **OPTIONS | options))
    return tmp_path / "whole"


def test_run_that_is_killed_twice(tmp_path, processes):
    """Once in the middle of an epoch, once while a checkpoint is written."""
    options = config(tmp_path, resume=True, **OPTIONS)
    out = tmp_path / "run"
    moments = [
        lambda seconds: (out / "checkpoints" / checkpoint.PARTIAL).exists(),
        lambda seconds: (out / "checkpoints" / "epoch-0003.pt").exists() and half_written(out / "checkpoints"),
    ]
    for moment in moments:
        assert start_and_kill(processes, options, moment, step=0.01, piece=0.005)
    assert half_written(out / "checkpoints") and checkpoint.epochs(out / "checkpoints")
    assert not start_and_kill(processes, options, lambda seconds: False, step=0, piece=0)
    assert_same_runs(out, never_killed(tmp_path))


def test_run_that_is_killed_while_it_keeps_logits(tmp_path, processes):
    """Once in an epoch that fills the cache, once in one that reads from it; as never killed, and as without it."""
    keeping = dict(logits_cache=True, variants=2, train_size=64)
    options = config(tmp_path, resume=True, **OPTIONS | keeping)
    out = tmp_path / "run"
    moments = [
        lambda seconds: len(list(out.glob("cache/logits/*/v0001.npy"))) > 0,
        lambda seconds: (out / "checkpoints" / "epoch-0003.pt").exists(),
    ]
    for moment in moments:
        assert start_and_kill(processes, options, moment, step=0.03, piece=0)
    assert not start_and_kill(processes, options, lambda seconds: False, step=0, piece=0)
    for name, others in (("whole", keeping), ("plain", {"variants": 2, "train_size": 64})):
        whole = config(tmp_path, out=str(tmp_path / name), **OPTIONS | others)
        run(whole)
        assert_same(last_state(out)["method"], last_state(tmp_path / name)["method"])
        assert rows_without_times(out) == rows_without_times(tmp_path / name)
    stored = [sorted(folder.glob("cache/logits/*/*.npy")) for folder in (out, tmp_path / "whole")]
    assert [path.read_bytes() for path in stored[0]] == [path.read_bytes() for path in stored[1]]
    assert len(stored[0]) == 4


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_run_that_is_killed_at_random_moments(tmp_path, processes, seed):
    """At least 20 times, every second time during a write; with and without processes that load the images."""
    rng = random.Random(seed)
    kills = killed_while_writing = number = 0
    whole = never_killed(tmp_path)
    while kills < 20:
        number += 1
        out = tmp_path / f"run{number}"
        done = False
        while not done:
            delay = rng.uniform(0, 1.2)
            writing = rng.random() < 0.5
            seen = []

            def moment(seconds, out=out, delay=delay, writing=writing, seen=seen):
                if not writing:
                    return seconds > delay
                if not seen and half_written(out) and seconds > delay:
                    seen.append(seconds)
                return bool(seen) and seconds - seen[0] > delay / 20

            options = config(tmp_path, out=str(out), resume=True, workers=2 * (kills % 4 == 3), **OPTIONS)
            done = not start_and_kill(processes, options, moment, step=0.02, piece=0.005)
            kills += not done
            killed_while_writing += not done and bool(half_written(out))
        assert_same_runs(out, whole)
    assert killed_while_writing >= 5, f"{killed_while_writing} of {kills}"


def test_worker_that_outlives_its_parent_does_not_hold_the_lock(tmp_path):
    started, ended = os.pipe(), os.pipe()
    with lock(tmp_path):
        child = os.fork()
        if child == 0:  # as a loader's process, which sees its parent's death seconds later
            os.write(started[1], b"1")
            os.close(ended[1])
            os.read(ended[0], 1)
            os._exit(0)
        os.read(started[0], 1)
    try:
        with lock(tmp_path):
            pass
    finally:
        os.close(ended[1])
        os.waitpid(child, 0)
