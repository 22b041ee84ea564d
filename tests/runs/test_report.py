"""Reports: tables, pictures, statistics of a comparison, the time of a step."""

import math
import re

import pytest
import torch
from train_helpers import TINY, one_thread, untrained  # noqa: F401

import fastkd
from fastkd import data as datasets
from fastkd.runs import compare as comparing
from fastkd.runs import compare_figure
from fastkd.runs import figures as figures_module
from fastkd.runs.commands import train
from fastkd.runs.config import CompareConfig
from fastkd.runs.figures import draw_curves
from fastkd.runs.runner import Result
from fastkd.runs.tables import table, terms
from fastkd.train import Runner, TrainConfig, evaluate


def test_table_is_aligned_markdown():
    text = table(["method", "x [%]"], [["ce", "1.0"], ["a-long-name", "10.25"]])
    assert text.splitlines() == [
        "| method      | x [%] |",
        "| :---------- | ----: |",
        "| ce          |   1.0 |",
        "| a-long-name | 10.25 |",
    ]


def image_size(path) -> tuple[int, int]:
    content = path.read_bytes()
    assert content.startswith(b"\x89PNG")
    return int.from_bytes(content[16:20], "big"), int.from_bytes(content[20:24], "big")


@pytest.mark.parametrize("epochs", [1, 5])
def test_curves(tmp_path, epochs, monkeypatch):
    rows = [
        {"epoch": e, "train_loss": 1 / e, "train_accuracy": 0.5, "test_loss": 1.0, "test_accuracy": math.nan}
        for e in range(1, epochs + 1)
    ]
    figures = []
    monkeypatch.setattr(figures_module, "save_figure", lambda figure, path: figures.append(figure))
    draw_curves(rows, tmp_path / "c.png", "title", {"teacher": 0.97})
    loss, accuracy = figures[0].axes
    assert (loss.get_xlabel(), loss.get_ylabel(), accuracy.get_ylabel()) == ("epoch", "loss per image", "accuracy [%]")
    lines = {line.get_label(): line for line in [*loss.lines, *accuracy.lines]}
    assert list(lines["training (the method's loss)"].get_ydata()) == [1 / e for e in range(1, epochs + 1)]
    assert list(lines["training (augmented, before each step)"].get_ydata()) == [50.0] * epochs
    assert lines["teacher, test, last epoch"].get_ydata()[0] == 97.0
    assert "test" not in lines  # never measured


def test_train_leaves_a_report_that_says_what_was_done(tmp_path):
    out = tmp_path / "run"
    config = TrainConfig(method="takd", epochs=2, seed=3, out=str(out), validation=0.1, **TINY)
    results = train(config, "fastkd train --method takd", say=lambda text: None)
    assert image_size(out / "curves.png")[0] > 800
    text = (out / "report.md").read_text()
    last = results["student"].rows[-1]
    assert f"Test accuracy of the student after epoch 2: **{100 * last['test_accuracy']:.2f} %**" in text
    assert f"(validation: {100 * last['validation_accuracy']:.2f} %)" in text
    count = sum(p.numel() for p in results["student"].network.parameters())
    assert re.search(rf"\| student +\| +plain2:width=0.0625 \| +{count:,} \| +takd \| +assistant1 \| +2 \|", text)
    for expected in ("fastkd train --method takd", torch.__version__, "A chain", "temperature=5.0", "curves.png"):
        assert expected in text
    assert "60 training images" in text and "No epoch, network or setting was chosen by the test images" in text


def fake_comparison(tmp_path, accuracies: dict[str, list[float]]) -> comparing.Comparison:
    seeds = list(range(len(next(iter(accuracies.values())))))
    config = CompareConfig(methods=list(accuracies), seeds=seeds, out=str(tmp_path), **TINY)
    comparison = comparing.Comparison(config)
    for method, values in accuracies.items():
        runner = Runner(config.run(method, 0, {}))
        stage = runner.stages["student"]
        network = runner.build(stage, untrained(runner, stage)).deployable()
        comparison.runners[method] = runner
        comparison.seconds[method] = {"native": 0.001, "reference": 0.002}
        comparison.results[method] = {
            seed: {"student": Result(stage, network, [{"epoch": 1, "test_loss": 1.0, "test_accuracy": value}], None)}
            for seed, value in zip(seeds, values, strict=True)
        }
    return comparison


def test_summary_statistics(tmp_path):
    comparison = fake_comparison(tmp_path, {"ce": [0.80, 0.90, 0.85], "kd": [0.82, 0.91, 0.83]})
    rows = comparing.summary_table(comparison).splitlines()
    assert [cell.strip() for cell in rows[2].split("|")[1:-1]] == ["ce", "85.00 +- 5.00", "-", "-", "-", "1.00", "2.00"]
    kd = [cell.strip() for cell in rows[3].split("|")[1:-1]]
    # Gains 2, 1, -2: mean 1/3, sample standard deviation sqrt(13 / 3); t with 2 degrees of freedom is 4.3027.
    assert kd == ["kd", "85.33 +- 4.93", "0.33 +- 2.08", "-4.84 to +5.50", "2 of 3", "1.00", "2.00"]


def test_one_seed_has_no_spread(tmp_path):
    rows = comparing.summary_table(fake_comparison(tmp_path, {"kd": [0.5]})).splitlines()
    assert [cell.strip() for cell in rows[2].split("|")[1:4]] == ["kd", "50.00", "-"]


def test_bars_show_means_deviations_and_seeds(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(compare_figure, "save_figure", lambda figure, path: figures.append(figure))
    compare_figure.draw_bars(fake_comparison(tmp_path, {"ce": [0.8, 0.9], "dgkd": [0.9, 0.95]}), tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert [bar.get_height() for bar in axis.patches] == pytest.approx([85, 92.5])
    points = [
        sorted(collection.get_offsets()[:, 1]) for collection in axis.collections if len(collection.get_offsets()) > 1
    ]
    assert [80, 90] in [pytest.approx(p) for p in points] and [90, 95] in [pytest.approx(p) for p in points]
    assert "[%]" in axis.get_ylabel() and "does not start at 0" in axis.get_ylabel()


def test_gains_are_ordered_with_their_intervals(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(compare_figure, "save_figure", lambda figure, path: figures.append(figure))
    accuracies = {"kd": [0.82, 0.93], "ce": [0.80, 0.90], "dgkd": [0.9, 0.99], "takd": [0.78, 0.91]}
    compare_figure.draw(fake_comparison(tmp_path, accuracies), tmp_path / "x.png")
    axis = figures[0].axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["takd  -0.5", "kd  +2.5", "dgkd  +9.5"]
    means = [container.lines[0].get_xdata()[0] for container in axis.containers]
    assert means == pytest.approx([-0.5, 2.5, 9.5])
    (low, high) = axis.containers[2].lines[2][0].get_segments()[0][:, 0]  # half: t(1) = 12.706 times 0.5
    assert (low, high) == pytest.approx((9.5 - 6.353, 9.5 + 6.353), abs=1e-2)
    assert [c.lines[0].get_color() for c in axis.containers] == ["0.55", "0.55", "C0"]
    points = [sorted(each.get_offsets()[:, 0]) for each in axis.collections if len(each.get_offsets()) == 2]
    assert pytest.approx([9, 10]) in points
    compare_figure.draw(fake_comparison(tmp_path, {"ce": [0.8, 0.9]}), tmp_path / "x.png")
    assert "test accuracy" in figures[1].axes[0].get_ylabel()


def test_files_of_a_comparison(tmp_path):
    comparison = fake_comparison(tmp_path, {"ce": [0.8, 0.9], "kd": [0.7, 0.6]})
    for path in comparing.write(comparison, "fastkd compare"):
        assert path.exists()
    assert image_size(tmp_path / "comparison.png")[0] > 300
    results = (tmp_path / "results.csv").read_text().splitlines()
    assert results[0] == (
        "method,seed,epoch,test_loss,test_accuracy,seconds_per_step_native,seconds_per_step_reference"
    )
    assert results[1:] == [
        "ce,0,1,1,0.8,0.001,0.002",
        "ce,1,1,1,0.9,0.001,0.002",
        "kd,0,1,1,0.7,0.001,0.002",
        "kd,1,1,1,0.6,0.001,0.002",
    ]
    text = (tmp_path / "report.md").read_text()
    assert "-20.00 +- 14.14" in text  # a method that does not help is shown as it is
    assert "+- standard deviation over the seeds" in text and "fastkd compare" in text


def test_steps_are_timed_with_both_backends_and_change_no_guide(tmp_path, monkeypatch):
    config = TrainConfig(method="kd", epochs=1, out=str(tmp_path), **TINY)
    runner = Runner(config)
    teacher = untrained(runner, runner.stages["student"])["teacher"]
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    used = []
    original = fastkd.use_backend
    monkeypatch.setattr(fastkd, "use_backend", lambda name: used.append(name) or original(name))
    seconds = comparing.time_steps(runner, {"teacher": Result(runner.stages["teacher"], teacher, [], None)}, rounds=4)
    assert set(seconds) == {"native", "reference"} and all(0 < s < 10 for s in seconds.values())
    assert used.count("auto") == used.count("reference") == 4 + comparing.WARM_UP
    assert used[:4] != sorted(used[:4]) and {used[0], used[1]} == {"auto", "reference"}  # in turns
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())


def test_terms_of_the_loss_add_up_over_peers():
    row = {"train_loss": 9.0, "train_accuracy": 0.5, "train_peers.0.ce": 1.0, "train_peers.1.ce": 2.0, "test_loss": 1.0}
    assert terms([row]) == {}  # one term is the loss
    assert terms([row | {"train_peers.0.kd": 4.0}]) == {"ce": [3.0], "kd": [4.0]}


def test_report_of_a_group_shows_all_its_networks(tmp_path):
    out = tmp_path / "run"
    results = train(TrainConfig(method="orc", epochs=2, out=str(out), **TINY), "x", say=lambda text: None)
    text = (out / "report.md").read_text()
    for name in ("teacher ", "student ", "assistant1 ", "teacher, going on "):
        assert f"| {name}" in text
    row = next(line for line in text.splitlines() if line.startswith("| teacher, going on"))
    loader = datasets.loader(Runner(TrainConfig(method="ce", out=str(out), **TINY)).data.test, 64, shuffle=False)
    _, accuracy = evaluate(results["student"].others["teacher"], loader, torch.device("cpu"))
    assert row.split("|")[-2].strip() == f"{100 * accuracy:.2f}"
    assert "| group_kd " in text and "Steps in which a network was a temporary teacher: student " in text
    assert image_size(out / "curves.png")[0] > 2000  # a third panel: the terms
