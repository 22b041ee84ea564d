"""`fastkd analyze ablate METHOD`: the rows of each paper's table, and the comparison that they are."""

import csv

import pytest
from train_helpers import TINY, one_thread  # noqa: F401

from fastkd.cli import main
from fastkd.runs import compare as comparing
from fastkd.runs.ablations import ABLATIONS, _spread, variants
from fastkd.runs.config import CompareConfig
from fastkd.runs.folder import read
from fastkd.runs.job import CompareJob
from fastkd.runs.revisit import job_of
from fastkd.runs.runner import Runner
from fastkd.train import UserError

# What each row changes in the student's method as it is built: {attribute: value}.
EXPECTED = {
    "orc": {
        "full": dict(teach_by=("intensive", "private", "group"), mix="mixup", rank_by="ce", errors_only=True),
        "group-alone": dict(teach_by=("group",)),
        "no-intensive": dict(teach_by=("private", "group")),
        "no-private": dict(teach_by=("intensive", "group")),
        "mean-of-teachers": dict(combine="mean"),
        "feedback-alone": dict(mix="feedback"),
        "batch-alone": dict(mix="batch"),
        "fixed-teacher": dict(rank_by="fixed"),
        "by-accuracy": dict(rank_by="accuracy"),
        "not-errors-alone": dict(errors_only=False),
    },
    "ctsl-mkt": {
        "full": dict(mutual_response=[True] * 2, mutual_relation=[True] * 2, self_learning=[True] * 2),
        "no-response": dict(mutual_response=[False] * 2),
        "no-relation": dict(mutual_relation=[False] * 2),
        "no-self": dict(self_learning=[False] * 2),
        "self-without-t2": dict(scale_by_t2=False),
    },
    "dkel": {
        "full": dict(init=1, decay=0.5, variant="intended"),
        "no-init": dict(init=None, decay=0.5),
        "no-decay": dict(init=1, decay=None),
        "neither": dict(init=None, decay=None),
        "ramped-ensemble": dict(ensemble_ramp=True),
        "released": dict(variant="released"),
    },
    "dgkd": {
        "full": dict(drop="none"),
        "drop-one": dict(drop="fixed", drop_num=1),
        "survival-0.5": dict(drop="bernoulli", survival=0.5),
        "survival-0.75": dict(drop="bernoulli", survival=0.75),
        "assistants-0": dict(drop="none"),
        "takd": dict(lam=0.9),
    },
    "feed-parallel": {"teachers-1": dict(beta=5.0), "teachers-2": dict(beta=5.0)},
    "feed-sequential": {"generations-2": dict(mode="sequential"), "generations-3": dict(mode="sequential")},
}
GUIDES = {"full": 2, "drop-one": 2, "survival-0.5": 2, "survival-0.75": 2, "assistants-0": 1, "takd": 1}
GUIDES |= {"teachers-1": 1, "teachers-2": 2, "generations-2": 1, "generations-3": 1}


@pytest.mark.parametrize("method", ABLATIONS)
def test_every_row_builds_what_it_says(method, tmp_path):
    job = CompareJob.of(CompareConfig(ablate=method, seeds=[0], out=str(tmp_path), **TINY))
    runs = job.runs()
    assert [name for name, _ in runs] == ["ce", *EXPECTED[method]] == job.methods
    data = None
    for (label, _), one in runs.items():
        runner = Runner(one, lambda text: None, data=data)
        data, stage = runner.data, runner.stages["student"]
        trained = {name: runner._learners(runner.stages[name], {})[0] for name in stage.needs}
        built = runner.build(stage, trained)
        for name, value in EXPECTED[method].get(label, {}).items():
            assert getattr(built, name) == value, (label, name)
        if method in ("dgkd", "feed-parallel", "feed-sequential") and label != "ce":
            assert len(stage.guides) == GUIDES[label]
        assert one.folder.name == f"{label}-seed0"
    chain = {"feed-sequential": {"generations-2": 2, "generations-3": 3}}.get(method, {})
    assert {label: len(runs[label, 0].stages) for label in chain} == chain


def test_assistants_are_evenly_apart():
    assert [_spread(list("abc"), n) for n in range(4)] == [[], ["b"], ["a", "c"], ["a", "b", "c"]]
    assert _spread(list("abcdefg"), 3) == ["b", "d", "f"]
    seven = CompareConfig(ablate="dgkd", assistants=list("abcdefg"))
    assert variants(seven)["assistants-3"].settings == {"assistants": ["b", "d", "f"]}
    assert "drop-one" not in variants(CompareConfig(ablate="dgkd", assistants=[]))


def test_an_ablation_is_a_comparison(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(comparing, "time_steps", lambda *_: {"native": 0.0, "reference": 0.0})
    out = tmp_path / "ablation"
    asked = f"analyze ablate dkel --quick --epochs 1 --quiet --train-size 60 --student {TINY['student']}".split()
    asked += ["--out", str(out)]
    assert main([*asked, "--methods", "ce,full,no-init"]) == 0
    with open(out / "results.csv") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["epoch"]) for row in rows] == [
        (label, "0", "1") for label in ("ce", "full", "no-init")
    ]
    report = (out / "report.md").read_text()
    assert report.startswith("# Ablation of dkel on digits") and "- **no-init**: dkel with init=None." in report
    assert (out / "comparison.png").stat().st_size > 10_000
    job = job_of(next(run for run in read(out) if run.options["method"] == "no-init"))
    assert job.config.method == "dkel" and job.config.options == {"init": None} and job.config.seed == 0
    assert main([*asked, "--methods", "ce,full,no-init,no-decay", "--resume"]) == 0
    assert (out / "runs" / "no-decay-seed0").is_dir()
    capsys.readouterr()


def test_wrong_calls(capsys):
    with pytest.raises(UserError, match=r"^there is no ablation of 'kd': .*use dgkd, orc, ctsl-mkt, dkel"):
        CompareJob.of(CompareConfig(ablate="kd"))
    with pytest.raises(UserError, match=r"^the ablation of orc has no 'fixed': .*use ce, full, group-alone"):
        CompareJob.of(CompareConfig(ablate="orc", methods=["fixed"]))
    assert main(["analyze", "ablate", "--out", "x"]) == 2
    assert "fastkd analyze ablate needs a method: dgkd, orc" in capsys.readouterr().err
