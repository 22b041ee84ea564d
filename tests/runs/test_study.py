"""Studies: what a file asks for, runs that are stopped and go on, their rows, and the statistics over them."""

import contextlib
import csv
import importlib
import math
import os
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from torch import nn
from train_helpers import assert_same, last_state

from fastkd._core.messages import UserError
from fastkd.cli import main
from fastkd.runs import folder, processes, study_command, study_pool, study_report, study_rows, study_worker
from fastkd.runs.revisit import method_of, runs_by
from fastkd.runs.runner import Result
from fastkd.runs.stages import Stage
from fastkd.runs.study import RECIPES, find, read
from fastkd.runs.study_cost import flops
from fastkd.runs.study_stats import half_width, holm, paired
from fastkd.train import Runner
from fastkd.train.devices import cpu_threads
from fastkd.train.metrics import read_csv
from fastkd.train.time_left import duration

FILE = dict(
    data="fake",
    image_size=8,
    train_size=60,
    epochs=1,
    batch_size=20,
    device="cpu",
    teacher="plain2:width=0.25",
    assistants=["plain2:width=0.125"],
    student="plain2:width=0.0625",
    seeds=2,
    baselines=["ce", "kd"],
    pairs=[["kd", "ce"]],
    methods={"ce": None, "kd": {"options": {"temperature": 2.0}}},
)


def written(tmp_path: Path, **changes) -> Path:
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump({k: v for k, v in (FILE | changes).items() if v != "gone"}, sort_keys=False))
    return path


def test_runs_come_seed_by_seed_with_all_settings_and_methods(tmp_path):
    settings = {"default": None, "slow": {"lr": 0.001, "methods": ["kd"], "seeds": [1]}}
    study = read(written(tmp_path, settings=settings, seeds=[0, 1]))
    assert [run.name for run in study.runs] == ["ce-seed0", "kd-seed0", "ce-seed1", "kd-seed1", "slow-kd-seed1"]
    assert [run.options.get("lr", 0.01) for run in study.runs] == [0.01] * 4 + [0.001]
    assert [run.name for run in study.chosen(["kd", "seed1"])] == ["kd-seed1", "slow-kd-seed1"]
    assert [run.name for run in study.chosen(["default", "ce"])] == ["ce-seed0", "ce-seed1"]
    with pytest.raises(UserError, match="--only kdd: no run"):
        study.chosen(["kdd"])


def test_a_methods_options_go_over_those_of_all_and_a_settings_over_both(tmp_path):
    methods = {"ce": None, "kd": {"options": {"temperature": 2.0}}, "hot": {"method": "kd", "lr": 0.5}}
    settings = {"default": None, "cold": {"options": {"temperature": 1.0}}}
    study = read(written(tmp_path, methods=methods, settings=settings, seeds=1, options={"temperature": 8.0}))
    found = {run.name: (run.options["method"], run.options["options"]) for run in study.runs}
    assert found["ce-seed0"] == ("ce", {})  # it has no temperature
    assert found["kd-seed0"] == ("kd", {"temperature": 2.0})
    assert found["hot-seed0"] == ("kd", {"temperature": 8.0})
    assert found["cold-kd-seed0"] == found["cold-hot-seed0"] == ("kd", {"temperature": 1.0})
    assert study.runs[2].config(tmp_path).lr == 0.5


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"methods": ["ce", "kdd"]}, "there is no method 'kdd'"),
        (
            {"methods": {"ce": None, "hot": {"methd": "kd"}}},
            "'hot' of the study has an unknown option 'methd'",
        ),
        ({"methods": "gone"}, "methods must be a list of names"),
        ({"methods": ["ce", "a/b"]}, "the name 'a/b' in methods"),
        ({"seeds": [0, 0]}, "seeds must be different integers"),
        ({"epocs": 3}, "'epocs' is unknown: did you mean epochs"),
        ({"seed": 3}, "'seed' belongs to the study itself"),
        ({"lr": "fast"}, "--lr must be a finite number >= 0, got 'fast'"),
        ({"epochs": 0}, "--epochs must be an integer of at least 1"),
        ({"baselines": ["dgkd"]}, "'dgkd' is compared"),
        ({"baselines": ["default:kd"]}, "'default:kd' is compared"),
        ({"pairs": [["kd", "slow:kd"]]}, "'slow:kd' is compared"),
        ({"methods": {"ce": None, "kd": {"options": {"beta": 1}}}}, "kd has no option 'beta'"),
        ({"settings": {"a": {"methods": ["orc"]}}}, "the setting a has a method 'orc'"),
    ],
)
def test_mistakes_in_a_file_are_one_sentence_before_anything_runs(tmp_path, changes, message, capsys):
    assert main(["study", str(written(tmp_path, **changes)), "--out", str(tmp_path / "out")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_studies_of_the_package_can_be_read():
    assert find("cifar10-16px") == RECIPES / "cifar10-16px.yaml"
    for path in RECIPES.glob("*.yaml"):
        assert read(path).runs
    with pytest.raises(UserError, match="did you mean cifar10-16px"):
        find("cifar10-16p")


@pytest.mark.parametrize("name", sorted(path.stem for path in RECIPES.glob("gpu-*.yaml")))
def test_studies_for_a_gpu_start(name):
    """With made images: every method's networks are built, of all stages."""
    made = {"data": "fake", "image_size": 8, "train_size": 20, "device": "cpu", "download": False}
    for run in read(find(name), made).chosen(["default", "seed0"]):
        runner = Runner(run.config(Path("nowhere")), say=lambda text: None)
        assert list(runner.stages)[-1] == "student" and runner.config.epochs in (30, 40, 75)


def test_options_on_the_command_line():
    found = study_command.overrides(
        ["--download", "--train-size", "50", "--assistants", "a,b", "--lr=1e-3", "--options.beta", "2", "--no-augment"]
    )
    assert found == {
        "download": True,
        "train_size": 50,
        "assistants": ["a", "b"],
        "lr": 0.001,
        "options": {"beta": 2},
        "augment": False,
    }
    with pytest.raises(UserError, match="no option --epocs"):
        study_command.overrides(["--epocs", "1"])


def test_a_study_in_two_processes_is_resumed_and_trains_each_teacher_once(tmp_path, capsys):
    path, out = written(tmp_path), tmp_path / "out"
    command = ["study", str(path), "--out", str(out), "--jobs", "2"]
    assert main([*command, "--only", "seed0"]) == 0
    first = (out / "study.csv").read_text()
    assert main(command) == 0
    assert "2 of 4 runs are finished" in capsys.readouterr().out
    assert (out / "study.csv").read_text().startswith(first)
    with open(out / "study.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [(row["method"], row["seed"], row["setting"]) for row in rows] == [
        (method, seed, "default") for seed in "01" for method in ("ce", "kd")
    ]
    last = read_csv(out / "runs" / "kd-seed1" / "metrics.csv")[-1]
    assert float(rows[3]["accuracy"]) == pytest.approx(last["test_accuracy"]) and rows[3]["judged_on"] == "test"
    teachers = [read_csv(folder / "metrics.csv")[-1]["test_accuracy"] for folder in (out / "cache").glob("teacher-*")]
    assert sorted(teachers) == sorted(float(row["teacher_accuracy"]) for row in rows[1::2])
    assert {"report.md", "gains-default.png", "costs-default.png"} <= {p.name for p in out.iterdir()}
    assert "4 of 4 runs" in (out / "report.md").read_text()
    assert main(["study", str(out / "study.csv"), "--out", str(tmp_path / "again")]) == 0
    table = study_report.accuracies(study_rows.read_rows(out / "study.csv"))
    assert table in (out / "report.md").read_text() and table in (tmp_path / "again" / "report.md").read_text()
    assert main([*command, "--epochs", "3"]) == 2
    assert "--epochs was 1, now 3" in capsys.readouterr().err
    runs = folder.read(out)  # analyses and reports take a study's folder
    assert [run.folder.name for run in runs] == ["ce-seed0", "ce-seed1", "kd-seed0", "kd-seed1"]
    assert [method_of(run) for run in runs_by(runs, ("kd",), "it")] == ["kd", "kd"]
    assert main(["report", str(out), "--out", str(tmp_path / "report")]) == 0
    assert "# 4 runs" in (tmp_path / "report" / "report.md").read_text()
    assert main(["report", str(out), "--out", str(out)]) == 2
    assert "holds a run or a study: name another folder" in capsys.readouterr().err


def test_rows_of_another_machine_are_not_done_again(tmp_path, capsys):
    path, out, there = written(tmp_path), tmp_path / "out", tmp_path / "there"
    assert main(["study", str(path), "--out", str(there), "--only", "ce"]) == 0
    known = ["--known", str(there / "study.csv")]
    assert main(["study", str(path), "--out", str(out), *known, "--only", "seed0"]) == 0
    assert "1 of 2 runs are finished" in capsys.readouterr().out
    rows, kept = ((folder / "study.csv").read_text().splitlines() for folder in (out, there))
    assert [row for row in rows if row.startswith(("method", "ce"))] == kept and len(rows) == 4
    assert not (out / "runs" / "ce-seed0" / "metrics.csv").exists()
    first = (out / "study.csv").read_text()
    assert main(["study", str(path), "--out", str(out), *known, "--only", "seed0"]) == 0  # nothing is done twice
    assert (out / "study.csv").read_text() == first
    for options, message in [
        (["--epochs", "3"], "ce, seed 0, setting default has epochs 1, the study 3"),
        (["--train-size", "40"], "has train_images 60, the study 40"),
        (["--seeds", "1"], None),
    ]:
        status = main(["study", str(path), "--out", str(tmp_path / "other"), *known, *options])
        assert status == 2 and (message or "no option --seeds") in capsys.readouterr().err
    fewer = written(tmp_path, methods=["kd"], baselines=["kd"], pairs=[])
    assert main(["study", str(fewer), "--out", str(tmp_path / "other"), *known]) == 2
    assert "has a row of ce, seed 0, setting default, which is no run of small" in capsys.readouterr().err
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    "rows, message",
    [
        ("ce,0,default,,1", "row 1: a finished run has an accuracy, got ''"),
        ("ce,0,default,high,1", "row 1: accuracy must be a number, got 'high'"),
        ("ce,0.5,default,0.9,1", "row 1: seed must be an integer, got '0.5'"),
        ("ce,0,default,0.9,1,2", "row 1: it has more or fewer columns"),
        ("ce,0,default,0.9,1\nce,1,default", "row 2: it has more or fewer columns"),
        ("ce,0,default,0.9,1\nce,0,default,0.8,1", "has two rows of ce, seed 0, setting default: take one out"),
        ("ce,0,default,0.9,\xff", "is not a study.csv"),
    ],
)
def test_a_table_that_is_not_whole_is_refused_in_one_sentence(tmp_path, rows, message, capsys):
    table = tmp_path / "study.csv"
    table.write_bytes(f"method,seed,setting,accuracy,epochs\n{rows}\n".encode("latin-1"))
    out = tmp_path / "out"
    assert main(["study", str(written(tmp_path)), "--out", str(out), "--known", str(table)]) == 2
    said = capsys.readouterr().err
    assert message in said and "study.csv" in said
    assert not list(out.glob("runs/*"))


def test_a_run_that_is_stopped_in_time_goes_on_to_the_same_end(tmp_path, capsys):
    path, out = written(tmp_path, methods=["ce"], seeds=1, baselines=["ce"], pairs=[], epochs=150), tmp_path / "out"
    assert main(["study", str(path), "--out", str(out), "--limit", "0"]) == 0
    assert "stopped with 0 of 1" in capsys.readouterr().out and not (out / "runs").exists()
    run = read(path).runs[0]
    pool = study_pool.Pool(out, 1, math.inf, lambda run, status: pytest.fail(f"it ended with {status}"))
    metrics = out / "runs" / run.name / "metrics.csv"
    pool._start(processes.forking("fastkd.runs.study_worker"), run)
    while not metrics.exists():  # until the first epoch is over
        pool._collect()
    pool._stop()
    while pool.active:
        pool._collect()
    assert 0 < len(read_csv(metrics)) < 150 and study_pool.spent(out)[run.name] > 0
    assert main(["study", str(path), "--out", str(out)]) == 0
    with cpu_threads(1):
        Runner(run.config(tmp_path / "whole"), say=lambda text: None).run()
    assert_same(last_state(out / "runs" / run.name), last_state(tmp_path / "whole" / "runs" / run.name))


def test_ctrl_c_starts_no_other_run_and_is_told_by_the_exit_status(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(study_pool, "catch_interrupt", lambda: contextlib.nullcontext(lambda: True))
    assert main(["study", str(written(tmp_path)), "--out", str(tmp_path / "out")]) == 130
    assert "stopped with 0 of 4 runs finished; the same command goes on" in capsys.readouterr().out


def test_a_failed_run_does_not_stop_the_others(tmp_path, capsys):
    path = written(tmp_path, methods={"ce": None, "wild": {"method": "ce", "lr": 1e30}}, seeds=1, baselines=["ce"])
    path = written(
        tmp_path, methods={"wild": {"method": "ce", "lr": 1e30}, "ce": None}, seeds=1, baselines=["ce"], pairs=[]
    )
    assert main(["study", str(path), "--out", str(tmp_path / "out")]) == 1
    assert "wild-seed0 failed" in capsys.readouterr().out
    assert "wild-seed0" not in (tmp_path / "out" / "study.csv").read_text()
    assert [row["method"] for row in study_rows.read_rows(tmp_path / "out" / "study.csv")] == ["ce"]
    assert "finite" in (tmp_path / "out" / "runs" / "wild-seed0" / "log.txt").read_text()


def test_with_validation_images_a_row_says_nothing_of_test_images(tmp_path):
    run = read(written(tmp_path, validation=100, epochs=1)).runs[1]
    config = run.config(tmp_path)
    runner = Runner(config, say=lambda text: None)
    assert len(runner.data.validation) == 100
    row = study_worker.describe(config, runner.run())
    assert row["judged_on"] == "validation"
    metrics = read_csv(Path(config.out) / "metrics.csv")[-1]
    assert row["accuracy"] == pytest.approx(metrics["validation_accuracy"])
    assert metrics["test_accuracy"] not in row.values()


def stage_flops(tmp_path, number: int, stage: str) -> tuple[float, Runner]:
    config = read(written(tmp_path)).runs[number].config(tmp_path)
    runner = Runner(config, say=lambda text: None)
    fresh = {s.name: Result(s, runner._learner(s.learners[0], {}), [], None) for s in runner.stages.values()}
    return flops(runner, runner.stages[stage], fresh), runner


def forward_flops(runner: Runner, stage: Stage) -> tuple[float, float]:
    """Of one image: of all layers, and of the first one, whose inputs get no gradient. From the shapes."""
    network, found = runner._learner(stage.learners[0], {}).eval(), []

    def count(layer, inputs, output) -> None:
        found.append(2 * output[0].numel() * layer.weight[0].numel() if output.dim() == 4 else 2 * layer.weight.numel())

    for layer in network.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            layer.register_forward_hook(count)
    network(torch.zeros(1, runner.data.channels, runner.data.image_size, runner.data.image_size))
    return sum(found), found[0]


def test_flops_are_those_of_the_layers_shapes(tmp_path):
    alone, runner = stage_flops(tmp_path, 0, "student")
    whole, first = forward_flops(runner, runner.stages["student"])
    images = 60 * 1  # an epoch
    assert alone == images * (3 * whole - first)  # forward, gradients of weights and of inputs
    taught, runner = stage_flops(tmp_path, 1, "student")
    assert taught == alone + images * forward_flops(runner, runner.stages["teacher"])[0]


def test_paired_differences_have_the_books_values():
    values = {seed: 0.5 + 0.01 * gain for seed, gain in enumerate([1, 2, 3, 4, 5])}
    found = paired(values | {9: 0.0}, {seed: 0.5 for seed in range(5)})
    # mean 3, standard deviation 1.5811, t = 3 / (1.5811 / sqrt 5) = 4.2426 with 4 degrees of freedom
    assert (found.mean, found.better, found.seeds) == (pytest.approx(0.03), 5, 5)
    assert found.half == pytest.approx(0.0277645 * 1.5811388 / math.sqrt(5), rel=1e-5)  # t(0.975, 4) = 2.77645
    assert found.p == pytest.approx(0.0132355, rel=1e-4)
    assert found.verdict == "holds"
    assert paired({0: 0.4, 1: 0.42}, {0: 0.5, 1: 0.5}).verdict == "cannot tell"
    assert paired({0: 0.4, 1: 0.401}, {0: 0.5, 1: 0.5}).verdict == "does not"
    one = paired({0: 0.6}, {0: 0.5})
    assert one.verdict == "cannot tell" and math.isnan(one.p) and math.isnan(half_width([0.6]))
    assert paired({0: 0.6}, {1: 0.5}) is None


def test_orderings_stand_where_both_methods_are_and_between_settings():
    """Of a setting with some methods only those pairs; of pairs that name settings a table of their own."""
    accuracies = {("default", "ce"): (0.5, 0.6), ("default", "kd"): (0.7, 0.81), ("slow", "kd"): (0.6, 0.7)}
    rows = [
        dict(method=method, setting=setting, seed=seed, accuracy=value)
        for (setting, method), values in accuracies.items()
        for seed, value in enumerate(values)
    ]
    pairs = (("kd", "ce"), ("kd", "dgkd"), ("kd", "slow:kd"), ("slow:kd", "default:ce"))
    planned = {"default": ["ce", "kd", "dgkd"] * 2, "slow": ["kd", "kd"]}
    text = study_report.tables(rows, study_report.Facts("small", planned, ("ce",), pairs))
    default, slow, between = (part for part in text.split("## ")[1:])
    assert default.startswith("default: 4 of 6 runs") and slow.startswith("slow: 2 of 2 runs")
    found = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in map(_cells, default.splitlines())}
    assert found["kd > ce"][0] == "+20.50" and found["kd > dgkd"][-1] == "no runs yet"
    assert "ordering" not in slow
    found = {cells[0].strip(): [cell.strip() for cell in cells[1:]] for cells in map(_cells, between.splitlines())}
    assert [(name, values[0], values[-1]) for name, values in found.items() if ">" in name] == [
        ("kd > slow:kd", "+10.50", "holds"),  # 10 and 11 points: 10.5 +- 6.4
        ("slow:kd > default:ce", "+10.00", "holds"),
    ]
    alone = study_report.tables(rows, study_report.Facts("small", {}, ("ce",), pairs[:2]))
    assert "kd > ce" in alone and "kd > dgkd" not in alone  # nothing says that dgkd is to come


def _cells(line: str) -> list[str]:
    return line.strip("|").split("|")


def test_the_page_of_the_studies_is_that_of_their_rows(monkeypatch):
    """`python tools/study_page.py` writes its tables; nobody types a number."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools"))
    page = importlib.import_module("study_page")
    text = page.PAGE.read_text()
    assert len(page.BLOCK.findall(text)) == 6
    assert page.rewritten(text) == text
    study, rows = read(find("digits-orderings")), study_rows.read_rows(page.DOCS / "study-orderings.csv")
    assert page.state(study, rows) == "**224 of 224 runs: all methods of seeds 0, 1, 2, 3, 4, 5, 6, 7.**"
    assert page.state(study, rows[:30]) == "**30 of 224 runs: all methods of seed 0; 2 of 28 of seed 1.**"


def test_labels_of_methods_that_cost_and_reach_the_same_stand_apart(tmp_path, monkeypatch):
    names = [f"method-{number}" for number in range(6)]
    rows = [dict(method=name, setting="default", seed=0, accuracy=0.5, flops=1e12, flops_before=0) for name in names]
    drawn = []
    monkeypatch.setattr(study_report, "save_figure", lambda figure, path: drawn.append(figure))
    study_report.draw_costs(rows, tmp_path / "costs.png")
    figure = drawn[0]
    figure.draw_without_rendering()
    boxes = [text.get_window_extent() for text in figure.axes[0].texts]
    assert [text.get_text() for text in figure.axes[0].texts] == names
    heights = sorted((box.y0, box.y1) for box in boxes)
    assert all(low[1] <= high[0] + 1 for low, high in pairwise(heights))


def test_holm_steps_down():
    assert holm([0.04, 0.01, math.nan, 0.03]) == [
        pytest.approx(0.06),
        pytest.approx(0.03),
        pytest.approx(math.nan, nan_ok=True),
        pytest.approx(0.06),
    ]
    assert holm([0.9, 0.8]) == [1.0, 1.0]


def test_each_process_takes_a_seed_of_its_own_so_that_none_waits_for_anothers_teacher(tmp_path, monkeypatch):
    """Runs end in turn, the one that was started first before the others."""
    started, running = [], []

    class Process:
        exitcode = 0

        def __init__(self, target, args):
            self.name = Path(args[0].out).name
            self.sentinel, writes = os.pipe()
            os.close(writes)  # the other end is at its end, as that of a process that ended

        def start(self):
            started.append(self.name)
            running.append(self)

        def is_alive(self):
            return running[0] is not self

        def join(self):
            running.remove(self)
            os.close(self.sentinel)

    monkeypatch.setattr(study_pool, "forking", lambda *imported: SimpleNamespace(Process=Process))
    runs = read(written(tmp_path, seeds=2)).runs
    for jobs in (2, 3):  # 3: more than seeds
        started.clear()
        study_pool.Pool(tmp_path, jobs, math.inf, lambda run, status: None).carry_out(runs)
        assert started == ["ce-seed0", "ce-seed1", "kd-seed0", "kd-seed1"]


def test_time_left_is_what_runs_of_the_same_method_took(tmp_path):
    runs = read(written(tmp_path, seeds=3)).runs
    for run, seconds in zip(runs[:3], (10.0, 40.0, 20.0), strict=True):
        study_pool.add_spent(tmp_path, run, seconds)
    done = {run.name for run in runs[:2]}
    assert study_pool.left(tmp_path, runs, set(), 1) is None
    # ce of seed 1 has had its 10 s; left are kd of seed 1 (40), ce (10) and kd (40) of seed 2
    assert study_pool.left(tmp_path, runs, done, 2) == pytest.approx(45.0)
    assert [duration(s) for s in (5, 1000, 10000)] == ["5 s", "17 min", "2 h 47 min"]
