"""Plans: which networks guide which, and the cache of trained guides."""

from pathlib import Path

import pytest
import torch
from train_helpers import TINY, assert_same, config, last_state, one_thread, run  # noqa: F401

from fastkd.train import (
    TrainConfig,
    UserError,
    plan,
)
from fastkd.train.runner import stage_key


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
