"""Seeds side by side: the same results as one after another, one line of progress, a clean stop."""

import os
import signal
import threading
import time

import pytest
import torch
from train_helpers import TINY, one_thread  # noqa: F401

from fastkd.runs import compare as comparing
from fastkd.runs import compare_pool
from fastkd.runs.compare_pool import Line, processes
from fastkd.runs.config import CompareConfig
from fastkd.train.interrupts import Interrupted


def config(folder, **options) -> CompareConfig:
    usual = {"methods": ["kd", "ce"], "seeds": [0, 1], "epochs": 2, "guide_epochs": 1, "out": str(folder)}
    return CompareConfig(**TINY | usual | options)


@pytest.mark.parametrize(
    "options, device, expected",
    [
        ({"seeds": [0, 1], "jobs": 3}, "cpu", 2),
        ({"seeds": [0, 1], "jobs": 1}, "cpu", 1),
        ({"seeds": [0, 1]}, "cpu", 1),  # over before a process has started
        ({"seeds": list(range(9))}, "cpu", 3),
        ({"seeds": list(range(9))}, "cuda", 1),
        ({"seeds": list(range(9)), "threads": 2}, "cpu", 1),
        ({"seeds": list(range(9)), "data": "fake"}, "cpu", 1),  # PyTorch's own number of threads
    ],
)
def test_how_many_at_once(tmp_path, monkeypatch, options, device, expected):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    assert processes(config(tmp_path, **options), device) == expected


def networks(folder):
    files = sorted(folder.glob("runs/*/checkpoints/epoch-0002.pt"))
    return {file.parts[-3]: torch.load(file, weights_only=True)["network"] for file in files}


def test_side_by_side_as_one_after_another(tmp_path):
    """In the same folders, to the bit; what processes say is in a file, and nothing is trained a second time."""
    said = []
    for name, jobs in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        found = comparing.run(config(tmp_path / name, jobs=jobs), say=said.append)
        assert list(found.results) == ["kd", "ce"] and list(found.results["ce"]) == [0, 1]
    one, two = networks(tmp_path / "one"), networks(tmp_path / "two")
    assert list(one) == list(two) == ["ce-seed0", "ce-seed1", "kd-seed0", "kd-seed1"]
    assert all(torch.equal(one[run][key], two[run][key]) for run in one for key in one[run])
    parallel = said[said.index("seed 1, kd") + 1 :]
    assert parallel[0].startswith("2 seeds, 2 side by side;") and "log.txt" in parallel[0]
    assert len(parallel) <= 1 + 4 and parallel[-1] == "4 of 4 runs are finished"
    assert (tmp_path / "two" / "log.txt").exists()


def test_ctrl_c_stops_all_and_leaves_what_is_done(tmp_path):
    asked = config(tmp_path, epochs=2000, seeds=[0, 1], jobs=2)

    def stop():
        while len(list(tmp_path.glob("runs/*/metrics.csv"))) < 1:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=stop, daemon=True).start()
    with pytest.raises(Interrupted):
        compare_pool.carry_out(asked, 2, lambda text: None)
    assert list(tmp_path.glob("runs/ce-seed*/checkpoints/epoch-*.pt"))
    assert not list(tmp_path.glob("runs/*/checkpoints/epoch-2000.pt"))


def test_one_line_says_how_far_it_is(tmp_path, monkeypatch):
    said = []
    line = Line(config(tmp_path, seeds=list(range(6))), said.append)
    line.started = time.monotonic() - 60
    for number, path in enumerate(line.last, start=1):
        path.parent.mkdir(parents=True)
        path.touch()
        line.show()
        if number == 4:
            assert line.text(4) == "4 of 12 runs are finished, about 2 min left"
    assert [text.split(" runs")[0] for text in said] == ["3 of 12", "6 of 12", "9 of 12", "12 of 12"]
    assert said[-1] == "12 of 12 runs are finished"
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert Line(config(tmp_path, quiet=True), said.append).terminal is False
