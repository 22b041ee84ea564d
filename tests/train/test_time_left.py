"""How long training still takes: from the epochs and runs that are over."""

import pytest

from fastkd.runs import compare as comparing
from fastkd.runs.config import CompareConfig
from fastkd.train import progress as progress_module
from fastkd.train.progress import Progress
from fastkd.train.time_left import duration, expected


def test_the_mean_of_the_same_kind_and_else_of_all_kinds():
    times = {"kd": [10.0, 14.0], "ce": [4.0]}
    assert expected(times, [("kd", 0.0), ("kd", 5.0), ("ce", 9.0), ("new", 0.0)]) == 12 + 7 + 0 + 8
    assert expected({}, [("kd", 0.0)]) is None and expected({"kd": []}, []) is None


@pytest.mark.parametrize("seconds, words", [(5, "5 s"), (89, "89 s"), (1000, "17 min"), (10000, "2 h 47 min")])
def test_in_words(seconds, words):
    assert duration(seconds) == words


def row(seconds):
    return {"train_loss": 1.0, "images_per_s": 5.0, "seconds": seconds}


@pytest.mark.parametrize(
    "before, epoch, said",
    [([], 0, "about 70 s left"), ([90.0, 30.0], 2, "about 3 min left"), ([1000.0] + 5 * [10.0], 6, "about 20 s left")],
)
def test_after_an_epoch(capsys, monkeypatch, before, epoch, said):
    """From the last five epochs, this one among them: (90 + 30 + 10) / 3 seconds for each of 4 that are left."""
    monkeypatch.setattr(Progress, "printed", 0.0)
    epochs = 8 if epoch == 0 else 7 if epoch == 2 else 9
    Progress("x", epoch, epochs, 3, False, before=[row(seconds) for seconds in before]).finish(row(10.0))
    assert said in capsys.readouterr().err


def test_nothing_is_left_after_the_last_epoch(capsys, monkeypatch):
    monkeypatch.setattr(Progress, "printed", 0.0)
    Progress("x", 1, 2, 3, False, before=[row(5.0)]).finish(row(10.0))
    assert "left" not in capsys.readouterr().err


class Images:
    """What the bar asks of a meter."""

    images = batches = 0

    def means(self):
        return {"loss": 1.0, "accuracy": 0.5}


def test_within_an_epoch(monkeypatch):
    """A second a batch: 2 of this epoch's 4 batches, and an epoch of 30 s as the one before."""
    clock, said = iter([0.0, 1.0, 2.0]), []
    monkeypatch.setattr(progress_module.time, "perf_counter", lambda: next(clock))
    progress, meter = Progress("x", 1, 3, 4, quiet=True, before=[row(30.0)]), Images()
    with progress:
        progress.bar = type("Bar", (), {"refresh": print, "close": print, "n": 0})()
        progress.bar.set_postfix_str = lambda text, refresh: said.append(text)
        for _ in range(2):
            meter.batches, meter.images = meter.batches + 1, meter.images + 8
            progress.update(meter)
    assert said == ["about 32 s left, loss 1.000, accuracy 50.0 %, 8 images/s"]


def test_a_comparison_says_it_before_each_run_but_the_first(tmp_path, monkeypatch):
    """Three seconds a run of kd and one of ce, by a clock of its own, without training."""

    class Runs:
        def __init__(self, job, say, data):
            self.method = job.config.method

        def run(self):
            now[0] += 3 if self.method == "kd" else 1
            return {}

    now, said = [0.0], []
    monkeypatch.setattr(comparing, "Runner", Runs)
    monkeypatch.setattr(comparing, "time_steps", lambda runner, results: {})
    monkeypatch.setattr(comparing.time, "monotonic", lambda: now[0])
    config = CompareConfig(methods=["ce", "kd"], seeds=[0, 1], out=str(tmp_path), device="cpu")
    comparing.run(config, said.append)
    told = "seed {}, {} ({} of 4 runs are finished, about {} s left)"
    expected = [(0, "kd", 1, 3), (1, "ce", 2, 4), (1, "kd", 3, 3)]
    assert said == ["seed 0, ce", *(told.format(*each) for each in expected)]


def test_runs_that_were_finished_before_say_nothing(tmp_path):
    config = CompareConfig(methods=["ce", "kd"], seeds=[0], epochs=3, out=str(tmp_path))
    done = tmp_path / "runs/ce-seed0/checkpoints"
    done.mkdir(parents=True)
    (done / "epoch-0003.pt").touch()
    pace = comparing.Pace(config)
    with pace.run("ce", 0):
        pass
    assert pace.left() == "" and pace.waiting == [("kd", 0)]
