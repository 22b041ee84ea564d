"""--prepare-teachers and --channels-last: on where they are faster, kept with the run, the same results to rounding."""

from types import SimpleNamespace

import pytest
import torch
import yaml
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run, untrained  # noqa: F401

from fastkd.cli import main
from fastkd.cli.options import parse
from fastkd.data import LogitsCache
from fastkd.models.inference import Prepared
from fastkd.runs.config import differences
from fastkd.runs.runner import stage_key
from fastkd.train import Runner
from fastkd.train.devices import keeps_channels_last, prepares_teachers
from fastkd.train.settings import Settings

CPU, GPU = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    "device, options, last, prepared",
    [
        (CPU, {}, True, True),
        (CPU, {"amp": "bf16"}, True, False),  # whose rounding would differ
        (CPU, {"cuda_graph": True}, True, False),
        (CPU, {"channels_last": False, "prepare_teachers": False}, False, False),
        (GPU, {}, False, False),  # not measured there
        (GPU, {"channels_last": True, "prepare_teachers": True}, True, True),
    ],
)
def test_where_they_are_on(device, options, last, prepared):
    settings = Settings(**options)
    assert (keeps_channels_last(settings, device), prepares_teachers(settings, device)) == (last, prepared)


def test_words_of_the_command_line():
    for words, expected in (
        ("", (None, None)),
        ("--channels-last --prepare-teachers", (True, True)),
        ("--no-channels-last --no-prepare-teachers", (False, False)),
    ):
        got = parse("train", f"--method kd {words}".split())
        assert (got.channels_last, got.prepare_teachers) == expected
    with pytest.raises(Exception, match=r"--prepare-teachers must be true or false, got 2"):
        Settings(prepare_teachers=2)


def steps(runner, count: int = 3):
    """The student's run, after so many steps."""
    stage = runner.stages["student"]
    torch.manual_seed(0)
    fit = runner.fit(stage, untrained(runner, stage), None)
    fit.method.train()
    batches = fit.train_batches.go_on(0, 0)
    for (x, y), _ in zip(batches, range(count), strict=False):
        list(fit.steps.take(x, y))
    return fit.method


@pytest.mark.parametrize("method", ["dgkd", "feed-parallel", "ft", "rkd"])
def test_a_run_s_frozen_networks_are_copies_and_its_steps_the_same(tmp_path, method):
    options = {"method": method, "channels_last": False, "optimizer": "sgd"}  # AdamW's first steps follow signs
    fast, plain = (steps(Runner(config(tmp_path, prepare_teachers=on, **options))) for on in (None, False))
    assert len(fast._twins) == len(fast.frozen_names) and not plain._twins
    assert all(isinstance(twin._copy, Prepared) and twin._copy.folded for twin in fast._twins.values())
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_kept_with_the_run(tmp_path):
    out = str(tmp_path / "run")
    assert main(["train", "--method", "kd", *SMALL, "--out", out]) == 0
    facts = last_state(out)["facts"]
    assert (facts["channels_last"], facts["prepare_teachers"]) == (True, True)
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["channels_last"] is kept["prepare_teachers"] is None
    text = "Feature maps in channels-last order; frozen networks copies made for inference (--prepare-teachers)."
    assert text in (tmp_path / "run" / "report.md").read_text()
    both = ({"channels_last": on, "prepare_teachers": on} for on in (False, True))
    assert differences(*both) == []


SMALL = "--train-size 60 --teacher plain2:width=0.25 --student plain2:width=0.0625 --quiet --device cpu".split()
SMALL += ["--guide-epochs", "1", "--epochs", "2"]


@pytest.mark.parametrize("command", ["train", "compare"])
def test_an_old_run_goes_on_as_it_began(tmp_path, command):
    """Whose config.yaml has no such option, or another default."""
    what = ["--method", "kd"] if command == "train" else ["--methods", "kd", "--seeds", "0"]
    off = ["--no-channels-last", "--no-prepare-teachers"]
    states = []
    for name, first in (("whole", []), ("old", ["--epochs", "1"])):
        out = tmp_path / name
        assert main([command, *what, *SMALL, *off, *first, "--out", str(out)]) == 0
        if first:
            for file in out.rglob("config.yaml"):
                values = yaml.safe_load(file.read_text())
                del values["prepare_teachers"]
                file.write_text(yaml.safe_dump(values))
            assert main([command, *what, "--epochs", "2", "--resume", "--out", str(out)]) == 0
            assert yaml.safe_load((out / "config.yaml").read_text())["prepare_teachers"] is False
        states.append(last_state(out if command == "train" else out / "runs" / "kd-seed0"))
    assert_same(*states)


def test_caches_are_the_same_ones(tmp_path, monkeypatch):
    """Neither a network's key nor a logits cache knows of it: what one run left, the other reads."""
    keys = []
    for on in (True, False):
        runner = Runner(config(tmp_path, method="kd", prepare_teachers=on, channels_last=on))
        stage = runner.stages["teacher"]
        keys.append(stage_key(runner.config, stage, runner.stages, SimpleNamespace(description={})))
    assert keys[0] == keys[1]
    counts = []
    monkeypatch.setattr("fastkd.train.kept_logits.KeptLogits.tell", lambda kept: counts.append(counted(kept.cache)))
    shared = {"method": "kd", "logits_cache": True, "cache": str(tmp_path / "cache"), "variants": 1, "augment": True}
    for name, on in (("on", True), ("off", False)):
        run(config(tmp_path / name, prepare_teachers=on, **shared))
    assert counts == [(60, 60), (120, 0)]  # two epochs of 60 images


def counted(cache: LogitsCache) -> tuple[int, int]:
    return cache.read, cache.computed
