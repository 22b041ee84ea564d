"""Plans: which networks guide which, and the cache of trained guides."""

from pathlib import Path

import pytest
import torch
from train_helpers import TINY, assert_same, config, last_state, one_thread, run  # noqa: F401

from fastkd.runs.runner import stage_key
from fastkd.train import (
    RECIPES,
    TrainConfig,
    UserError,
    plan,
)
from fastkd.train.metrics import read_csv


def shape(method, **options):
    stages = plan(TrainConfig(method=method, teacher="T", assistants=["A", "B"], student="S", **options))
    return [(s.name, s.network, s.method, *s.guides) for s in stages]


def together(method, **options):
    """What the student's stage trains: (name, network, stage that it goes on from, branches)."""
    stage = plan(TrainConfig(method=method, teacher="T", assistants=["A", "B"], student="S", **options))[-1]
    return [(learner.name, learner.network, learner.start, learner.branches) for learner in stage.learners]


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


def test_plans_of_one_teacher():
    for method in ("kd", "rkd", "ft"):
        assert shape(method) == [("teacher", "T", "ce"), ("student", "S", method, "teacher")]
        assert together(method) == [("student", "S", "", 0)]


def test_plans_of_networks_that_learn_together():
    group = [("student", "S", "", 0), ("assistant1", "A", "", 0), ("assistant2", "B", "", 0)]
    assert shape("orc") == [("teacher", "T", "ce"), ("student", "S", "orc")]
    assert together("orc") == [*group, ("teacher", "T", "teacher", 0)]
    for method in ("dml", "kdcl"):
        assert shape(method) == [("student", "S", method)]
        assert together(method) == group
    selves = [("self1", "S", "ce"), ("self2", "A", "ce"), ("self3", "B", "ce")]
    assert shape("ctsl-mkt") == [*selves, ("student", "S", "ctsl-mkt", "self1", "self2", "self3")]
    assert together("ctsl-mkt") == group
    alone = {"self_learning": False}
    assert shape("ctsl-mkt", options=alone) == shape("ctsl-mkt", options={"self_learning": [False] * 3})
    assert shape("ctsl-mkt", options=alone) == [("student", "S", "ctsl-mkt")]


def test_plans_of_branches():
    for method in ("dkel", "pcl"):
        assert shape(method) == [("student", "S", method)]
        assert together(method, branches=4) == [("student", "S", "", 4)]
        assert plan(TrainConfig(method=method, branches=4))[-1].views == 4
    assert plan(TrainConfig(method="kdcl"))[-1].views == 1
    assert plan(TrainConfig(method="kdcl", options={"views": True}))[-1].views == 3  # student and two assistants


def test_plans_of_the_students_own_architecture():
    teachers = [("teacher1", "S", "ce"), ("teacher2", "S", "ce")]
    assert shape("feed-parallel", num_teachers=2) == [
        *teachers,
        ("student", "S", "feed-parallel", *"teacher1 teacher2".split()),
    ]
    assert shape("aver-parallel", num_teachers=2) == [
        *teachers,
        ("student", "S", "aver-parallel", "teacher1", "teacher2"),
    ]
    for method in ("ban", "feed-sequential"):
        assert shape(method, generations=4, options={"lam": 0.5} if method == "ban" else {"beta": 5.0}) == [
            ("generation1", "S", "ce"),
            ("generation2", "S", method, "generation1"),
            ("generation3", "S", method, "generation2"),
            ("student", "S", method, "generation3"),
        ]
    stages = plan(TrainConfig(method="feed-sequential", generations=3, options={"beta": 5.0}))
    assert [stage.options for stage in stages] == [{}, {"beta": 5.0}, {"beta": 5.0}]
    assert len({stage.learners[0].name for stage in stages}) == 3  # each from a seed of its own


def test_epochs_of_stages():
    def epochs(method):
        return [stage.epochs for stage in plan(TrainConfig(method=method, epochs=9, guide_epochs=5, own_epochs=7))]

    assert epochs("dgkd") == [5, 5, 5, 9]
    assert epochs("ctsl-mkt") == [7, 5, 5, 9]
    assert epochs("feed-parallel") == [7, 7, 7, 9]
    assert epochs("ban") == [7, 7, 9]


@pytest.mark.parametrize("method", ["orc", "ctsl-mkt", "dml", "kdcl"])
def test_methods_of_several_networks_need_assistants(method):
    with pytest.raises(UserError, match=f"{method} trains the student together with the assistants and needs one"):
        plan(TrainConfig(method=method, assistants=[]))


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("ban", {"generations": 1}, "give --generations 2 or more, got 1"),
        ("dkel", {"branches": 1}, "give --branches 2 or more, got 1"),
        ("ctsl-mkt", {"checkpoint": {"self9": "x.pt"}}, "no such guide: known are self1, self2, self3, teacher"),
        ("feed-parallel", {"checkpoint": {"teacher1": "no.pt"}}, "there is no file no.pt"),
    ],
)
def test_what_cannot_be_planned(method, options, message):
    with pytest.raises(UserError, match=message):
        plan(TrainConfig(method=method, **options))


def test_guides_are_dropped_for_the_student_only():
    config = TrainConfig(method="dgkd", assistants=["A"], options={"drop": "bernoulli", "temperature": 2.0})
    _teacher, assistant, student = plan(config)
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


def test_student_alone_is_its_own_self_teacher(tmp_path):
    shared = dict(cache=str(tmp_path / "cache"), epochs=1)
    run(config(tmp_path, method="ce", out=str(tmp_path / "a"), **shared))
    first = guide_folders(tmp_path / "cache")
    results = run(config(tmp_path, method="ctsl-mkt", out=str(tmp_path / "b"), **shared))
    assert_same(dict(results["self1"].network.state_dict()), last_state(tmp_path / "a")["network"])
    assert results["self1"].rows == read_csv(tmp_path / "a" / "metrics.csv")
    now = guide_folders(tmp_path / "cache")
    assert set(first) == {name for name in now if name.startswith("student-")} and first.items() <= now.items()
    run(config(tmp_path, method="ctsl-mkt", out=str(tmp_path / "c"), epochs=1))  # trained here, to the same bits
    assert_same(last_state(tmp_path / "c")["network"], last_state(tmp_path / "b")["network"])


def test_student_of_a_changed_schedule_is_not_shared(tmp_path):
    shared = dict(cache=str(tmp_path / "cache"), schedule="cosine")
    for epochs, folders in ((2, 1), (3, 1), (3, 1)):
        run(config(tmp_path, method="ce", epochs=epochs, resume=True, **shared))
        assert len(guide_folders(tmp_path / "cache")) == folders


def test_generations_and_teachers_share_networks(tmp_path):
    shared = dict(cache=str(tmp_path / "cache"), epochs=1)
    run(config(tmp_path, method="feed-parallel", out=str(tmp_path / "a"), **shared))
    first = guide_folders(tmp_path / "cache")
    results = run(config(tmp_path, method="ban", generations=2, out=str(tmp_path / "b"), **shared))
    assert len(first) == 2 and guide_folders(tmp_path / "cache") == first
    assert results["generation1"].folder.name.startswith("copy1-")


@pytest.mark.parametrize("method", RECIPES)
def test_networks_trained_before_are_not_changed(tmp_path, method):
    """Also the pivot of ORC, which goes on learning: as a copy."""
    results = run(config(tmp_path, method=method, epochs=1))
    for result in list(results.values())[:-1]:
        assert_same(dict(result.network.state_dict()), dict(last_state(result.folder)["network"]))
    if method == "orc":
        assert not torch.equal(results["student"].others["teacher"].fc.weight, results["teacher"].network.fc.weight)


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
