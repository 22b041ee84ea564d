"""A run is resolved once, when its command starts; what is handed down is not looked up again."""

import inspect

import pytest
import torch
from train_helpers import TINY, config, one_thread, untrained  # noqa: F401

from fastkd.data import loader
from fastkd.methods import ORC
from fastkd.runs import commands, job, report
from fastkd.runs.config import CompareConfig
from fastkd.runs.figures import log_scale, pyplot
from fastkd.runs.job import CompareJob, Job
from fastkd.runs.runner import Result, Runner
from fastkd.train import Fit, UserError
from fastkd.train.distributed import World


@pytest.fixture
def calls(monkeypatch):
    """(function, its first argument) of each look-up of a device or a method."""
    seen = []
    for name in ("pick_device", "recipe"):
        original = getattr(job, name)
        monkeypatch.setattr(job, name, lambda what, n=name, o=original: seen.append((n, what)) or o(what))
    return seen


def test_train_finds_device_and_method_once(tmp_path, calls):
    commands.train(config(tmp_path, method="kd", epochs=1), "x", say=lambda text: None)
    assert calls == [("recipe", "kd"), ("pick_device", "cpu"), ("recipe", "ce")]  # ce: of the teacher's stage


def test_compare_finds_its_device_once(tmp_path, calls):
    made = CompareJob.of(CompareConfig(**TINY | {"methods": ["ce", "kd"], "seeds": [0, 1], "out": str(tmp_path)}))
    runs = made.runs()
    assert calls[:3] == [("recipe", "ce"), ("recipe", "kd"), ("pick_device", "cpu")]
    assert set(calls[3:]) <= {("recipe", "ce")}  # of the teacher's stage, where something asks for it
    assert [*runs] == [("ce", 0), ("kd", 0), ("ce", 1), ("kd", 1)]
    assert all(one.device is made.device and one.recipe is made.recipes[name] for (name, _), one in runs.items())


def test_a_comparison_keeps_logits_where_a_method_has_some():
    options = {"methods": ["ce", "kd"], "seeds": [0], "logits_cache": True}
    runs = CompareJob.of(CompareConfig(**TINY | options)).runs()
    assert [one.config.logits_cache for one in runs.values()] == [False, True]


def test_other_processes_are_quiet_and_have_the_options_of_the_first(tmp_path):
    class Second(World):
        def broadcast(self, function):
            return config(tmp_path, method="dml", quiet=False)

    here = Job.of(config(tmp_path, quiet=False))
    there = here.among(Second(1, 2))
    assert there.config.method == "dml" and there.config.quiet and not here.config.quiet
    assert there.device is here.device and there.recipe.method.__name__ == "DML"


def test_what_is_not_there_is_said_at_once(tmp_path):
    with pytest.raises(UserError, match="there is no method 'kdd': did you mean kd"):
        Job.of(config(tmp_path, method="kdd", device="cuda:99"))
    with pytest.raises(UserError, match="--device cuda:99 is not there"):
        Job.of(config(tmp_path, device="cuda:99"))


def test_fit_has_four_arguments():
    assert list(inspect.signature(Fit).parameters) == ["method", "data", "setup", "task"]


def test_earlier_stages_keep_their_last_checkpoint_alone(tmp_path):
    runner = Runner(config(tmp_path, method="kd", keep=3))
    fits = [runner.fit(stage, untrained(runner, stage), None) for stage in runner.stages.values()]
    assert [fit.settings.keep for fit in fits] == [1, 3]


class NeverRun(torch.nn.Linear):
    def forward(self, x):
        raise AssertionError("a report runs no network")


def test_a_report_runs_no_network(tmp_path):
    runner = Runner(config(tmp_path, method="orc"))
    stages, row = runner.stages, {"epoch": 1, "test_accuracy": 0.5, "promotions_student": 2, "promotions_assistant1": 1}
    others = {learner.name: NeverRun(2, 2) for learner in stages["student"].learners[1:]}
    results = {name: Result(stage, NeverRun(2, 2), [row], None) for name, stage in stages.items()}
    results["student"].others = others
    accuracies = {"assistant1": 0.25, "teacher": 0.75}
    text = report.train_report(runner.job, results, accuracies, runner.data, "x")
    lines = [line for line in text.splitlines() if "with the student" in line]
    assert [line.split("|")[-2].strip() for line in lines] == ["25.00", "75.00"]
    assert "Steps in which a network was a temporary teacher: student 2, assistant1 1." in text


def test_the_names_of_what_a_method_counts_are_the_runs(tmp_path):
    runner = Runner(config(tmp_path, method="orc"))
    fit = runner.fit(runner.stages["student"], untrained(runner, runner.stages["student"]), None)
    fit.method.promotions[1] = 3
    assert fit.method.counts() == {"promotions": {"students.0": 0, "students.1": 3}}
    assert fit.counts() == {"promotions_student": 0, "promotions_assistant1": 3}
    assert set(ORC.counted) == set(fit.method.counts())


def test_accuracies_of_networks_are_those_of_the_test_images(tmp_path):
    runner = Runner(config(tmp_path))
    network = runner.build(runner.stages["student"], {}).deployable().eval()
    images, labels = next(iter(loader(runner.data.test, len(runner.data.test), shuffle=False)))
    with torch.no_grad():
        expected = float((network(images).argmax(1) == labels).double().mean())
    assert runner.accuracies({"a": network}) == {"a": pytest.approx(expected, abs=1.1 / len(labels))}


@pytest.mark.parametrize("which", ["x", "y"])
def test_logarithmic_axes(which):
    plt = pyplot()
    figure, panel = plt.subplots()
    log_scale(panel, which)
    assert (panel.get_xscale(), panel.get_yscale()) == (("log", "linear") if which == "x" else ("linear", "log"))
    assert getattr(panel, f"{which}axis").get_major_formatter()(0.5, 0) == "0.5"
    plt.close(figure)
