"""Four processes, processes that are lost under torchrun, and networks compiled for real."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from distributed_helpers import PAPERS, processes, train
from test_distributed import assert_same_run
from train_helpers import config, one_thread, rows_without_times, run  # noqa: F401

pytestmark = pytest.mark.slow
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
TORCHRUN += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
SMALL = "--train-size 400 --teacher plain2:width=0.25 --assistants plain2:width=0.125 --student plain2:width=0.0625"
SMALL += " --device cpu --quiet --guide-epochs 1 --resume"


def four(rank, folder):
    for method in PAPERS:
        train(folder / f"four-{method}", method)


def test_four_processes_do_what_one_does(tmp_path):
    for method in PAPERS:
        train(tmp_path / f"one-{method}", method)
    processes(four, 4, tmp_path, seconds=400)
    for method in PAPERS:
        assert_same_run(tmp_path / f"one-{method}", tmp_path / f"four-{method}")


def start(out: Path, epochs: int, *options: str) -> subprocess.Popen:
    command = [*TORCHRUN, *options, "-m", "fastkd", "train", "--method", "orc", "--out", str(out)]
    command += ["--epochs", str(epochs), "--timeout", "10", *SMALL.split()]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def children(launcher: subprocess.Popen) -> list[int]:
    """The process ids of the ranks, in their order."""
    found = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
    lines = {int(pid): Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0") for pid in found}
    return sorted(pid for pid, words in lines.items() if b"fastkd" in words)


def wait_for(path: Path, launcher: subprocess.Popen) -> None:
    end = time.monotonic() + 300
    while not path.exists():
        assert launcher.poll() is None, launcher.communicate()[0]
        assert time.monotonic() < end, f"{path} does not come"
        time.sleep(0.1)


def lose_one(tmp_path, number: int, *options: str, epochs: int = 500) -> tuple[int, str, float]:
    """A signal to the second process after two epochs: exit status, what was said, seconds until the end."""
    launcher = start(tmp_path / "run", epochs, *options)
    try:
        wait_for(tmp_path / "run" / "checkpoints" / "epoch-0002.pt", launcher)
        lost = children(launcher)[-1]
        os.kill(lost, number)
        started = time.monotonic()
        said = launcher.communicate(timeout=400)[0]
        return launcher.returncode, said, time.monotonic() - started
    finally:
        for pid in [] if launcher.poll() is not None else [*children(launcher), launcher.pid]:
            os.kill(pid, signal.SIGKILL)


def test_a_killed_process_ends_the_others(tmp_path):
    """torchrun looks ten times a second and may end the other before that has spoken: here it looks later."""
    status, said, seconds = lose_one(tmp_path, signal.SIGKILL, "--monitor-interval", "5")
    assert status == 1 and seconds < 80
    assert "fastkd: another process of this run has ended or did not answer within 10 s (--timeout)" in said
    assert (
        "--resume goes on from it" in said
        and "Traceback (most recent call last):\n  File" not in said.split("api.py")[0]
    )


def test_a_process_that_hangs_ends_the_others(tmp_path):
    """torchrun itself gives a stopped process 30 s to end."""
    status, said, seconds = lose_one(tmp_path, signal.SIGSTOP)
    assert status == 1 and 9 < seconds < 120
    assert "did not answer within 10 s" in said


def test_torchrun_starts_lost_processes_again(tmp_path):
    status, said, _ = lose_one(tmp_path, signal.SIGKILL, "--max-restarts", "1", epochs=40)
    assert status == 0, said
    assert [row["epoch"] for row in rows_without_times(tmp_path / "run")] == list(range(1, 41))
    assert "orc: test accuracy" in said
    # Batch normalisation and roles included, it is the run that was never lost.
    other = start(tmp_path / "other", 40)
    other.communicate(timeout=400)
    assert rows_without_times(tmp_path / "other") == rows_without_times(tmp_path / "run")


def test_a_full_disk_ends_all_processes_at_once(tmp_path):
    """The first process alone writes; the others would wait for it for 300 s."""
    command = [*TORCHRUN, "-m", "fastkd", "train", "--method", "ce", "--student", "plain4", "--train-size", "100"]
    command += ["--device", "cpu", "--epochs", "2", "--timeout", "300", "--out", str(tmp_path / "run")]
    limited = ["sh", "-c", 'ulimit -f 60; exec "$@"', "sh", *command]  # 30 kB
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(limited, env=environment, capture_output=True, text=True, timeout=150)
    assert done.returncode == 1
    assert "the file is too large" in done.stderr
    assert list((tmp_path / "run" / "checkpoints").iterdir()) == []


@pytest.mark.parametrize("method", ["orc", "ctsl-mkt"])
def test_networks_compiled_for_real(tmp_path, method):
    for name, on in (("plain", False), ("compiled", True)):
        run(config(tmp_path / name, method=method, compile=on, epochs=2))
    plain, compiled = (rows_without_times(tmp_path / name / "run") for name in ("plain", "compiled"))
    for a, b in zip(plain, compiled, strict=True):
        assert a["train_loss"] == pytest.approx(b["train_loss"], rel=1e-2)
        assert b["train_accuracy"] >= 0


def compiled(rank, folder):
    import torch

    original = torch.compile
    torch.compile = lambda network: original(network, backend="aot_eager")
    for method in ("orc", "dkel"):
        train(folder / f"compiled-{method}", method, compile=True, epochs=2, guide_epochs=1)


def test_compiled_networks_in_parallel(tmp_path):
    for method in ("orc", "dkel"):
        train(tmp_path / f"one-{method}", method, epochs=2, guide_epochs=1)
    processes(compiled, 2, tmp_path, seconds=400)
    for method in ("orc", "dkel"):
        assert_same_run(tmp_path / f"one-{method}", tmp_path / f"compiled-{method}", 1e-4, 1e-3)
