"""The analyses of finished runs: of a comparison and of one run, from the log and from checkpoints."""

import csv
import shutil
import statistics

import pytest
import torch
from train_helpers import TINY, one_thread  # noqa: F401

from fastkd.cli import main
from fastkd.runs import compare as comparing
from fastkd.runs import feed_analyses
from fastkd.runs.commands import compare
from fastkd.runs.config import CompareConfig
from fastkd.runs.diversity import KINDS, _pairs, measures
from fastkd.runs.folder import read
from fastkd.runs.revisit import revisited
from fastkd.train.metrics import read_csv

SIZES = {name: value for name, value in TINY.items() if name != "train_size"}


@pytest.fixture(scope="module")
def compared(tmp_path_factory):
    out = tmp_path_factory.mktemp("analyses") / "demo"
    methods = ["ce", "dkel", "feed-parallel", "feed-sequential"]
    options = SIZES | dict(train_size=60, epochs=2, guide_epochs=1, own_epochs=1, eval_every=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(feed_analyses, "STEPS", 5)
        patch.setattr(comparing, "time_steps", lambda *_: {"native": 0.0, "reference": 0.0})
        compare(CompareConfig(methods=methods, seeds=[0, 1], out=str(out), **options), "", say=lambda text: None)
        yield out


def rows_of(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_a_run_of_a_comparison_is_read_by_its_own_folder(compared, tmp_path, capsys):
    (one,) = read(compared / "runs" / "dkel-seed1")
    assert one.options["method"] == "dkel" and one.options["seed"] == 1 and len(one.rows) == 2
    assert main(["report", str(one.folder), "--out", str(tmp_path / "report")]) == 0
    assert main(["report", str(compared / "cache")]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_diversity_of_the_last_checkpoint_is_what_the_run_would_have_logged(compared, tmp_path):
    (run,) = read(compared / "runs" / "dkel-seed0")
    found = measures(run)
    assert list(found) == [2]  # compare keeps the last checkpoint alone
    logged = CompareConfig(methods=["dkel"], seeds=[0], out=str(tmp_path / "logged"), diversity=True)
    options = {name: value for name, value in run.options.items() if name in SIZES or "epochs" in name}
    options |= dict(train_size=60, eval_every=1, keep=0)
    compare(CompareConfig(**vars(logged) | options), "", say=lambda text: None)
    (again,) = read(tmp_path / "logged")
    assert list(measures(again)) == [1, 2] and measures(again)[2] == pytest.approx(found[2], abs=1e-9)
    assert len(found[2]) == 6 + 2 * 15 + 30
    pairs = _pairs(run, found[2])
    assert pairs["learner and its own average"] == [f"peer{k}.mean_teacher{k}" for k in (1, 2, 3)]
    assert {kind: len(each) for kind, each in pairs.items()} == dict(zip(KINDS, (3, 6, 3, 3), strict=True))


def test_every_analysis_of_a_comparison_that_has_moved(compared, tmp_path, capsys):
    moved = tmp_path / "elsewhere"
    shutil.copytree(compared, moved)
    for name in ("diversity", "reconstruction", "generations"):
        assert main(["analyze", name, str(moved), "--out", str(tmp_path / "out")]) == 0
        assert (tmp_path / "out" / f"{name}.png").stat().st_size > 10_000
    assert main(["analyze", "roles", str(moved), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "--methods ce,dkel,feed-parallel,feed-sequential,orc" in said
    command = said.partition("fastkd compare ")[2].partition(" adds one")[0]
    assert main(["compare", *command.split()]) == 0  # no option of the first command is needed again
    assert main(["analyze", "roles", str(moved), "--out", str(tmp_path / "out")]) == 0
    assert {row["run"] for row in rows_of(tmp_path / "out" / "roles-hard.csv")} == {"orc-seed0", "orc-seed1"}
    rows = rows_of(tmp_path / "out" / "diversity.csv")
    assert {row["run"] for row in rows} == {"dkel-seed0", "feed-parallel-seed0", "feed-sequential-seed0"}
    kinds = {row["trained"] for row in rows_of(tmp_path / "out" / "reconstruction.csv")}
    sequential = {f"sequential, generation {number}" for number in (1, 2, 3)}
    assert kinds == {"alone", "parallel, 2 teachers"} | sequential


def test_generations_are_those_of_the_log(compared, tmp_path):
    runs = [run for run in read(compared) if run.options["method"] == "feed-sequential"]
    feed_analyses.generations(runs, tmp_path)
    rows = rows_of(tmp_path / "generations.csv")
    assert [(row["run"][-1], row["generation"]) for row in rows] == [(s, g) for s in "01" for g in "123"]
    accuracies = [float(row["test_accuracy"]) for row in rows]
    for number, run in enumerate(runs):
        assert accuracies[3 * number + 2] == run.rows[-1]["test_accuracy"]
        first, second, last = accuracies[3 * number : 3 * number + 3]
        gains = [float(row["gain_over_previous"]) for row in rows[3 * number : 3 * number + 3]]
        assert gains == pytest.approx([0, second - first, last - second])
        assert float(rows[3 * number + 2]["gain_over_first"]) == pytest.approx(last - first)
        cached = read_csv(next((compared / "cache").glob("copy2-*")) / "metrics.csv")
        assert any(value == pytest.approx(cached[-1]["test_accuracy"]) for value in accuracies)


def test_a_network_of_two_runs_is_restored_once(compared, tmp_path, monkeypatch):
    """The first generation is the first teacher of parallel FEED, in the cache."""
    seen = []
    monkeypatch.setattr(feed_analyses, "restored", lambda network, again: seen.append(network) or (1.0, len(seen)))
    feed_analyses.reconstruction([run for run in read(compared) if "feed" in run.options["method"]], tmp_path)
    rows = rows_of(tmp_path / "reconstruction.csv")
    assert len(rows) == 2 * (3 + 3) and len(seen) == 2 * (3 + 2)
    errors = {(row["seed"], row["network"]): row["relative_error"] for row in rows}
    assert all(errors[seed, "teacher1"] == errors[seed, "generation1"] for seed in "01")


def test_the_runs_of_an_ablation_are_analysed_by_their_methods(tmp_path, capsys):
    """Their names are the rows of the ablation, not methods."""
    options = SIZES | dict(train_size=60, epochs=1, guide_epochs=1, own_epochs=1, generations=2)
    out = tmp_path / "ablation"
    methods = ["ce", "generations-2"]
    compare(CompareConfig(ablate="feed-sequential", methods=methods, seeds=[0], out=str(out), **options), "")
    assert main(["analyze", "generations", str(out), "--out", str(tmp_path / "out")]) == 0
    assert [row["generation"] for row in rows_of(tmp_path / "out" / "generations.csv")] == ["1", "2"]
    assert main(["analyze", "roles", str(out), "--out", str(tmp_path / "out")]) == 2
    assert "fastkd train --method orc --out DIR makes one" in capsys.readouterr().err


def test_reconstruction_leaves_the_network_as_it_is_and_repeats(compared):
    run = next(run for run in read(compared) if run.options["method"] == "ce")
    with revisited(run) as again:
        network = again.student().network
        before = {name: value.clone() for name, value in network.state_dict().items()}
        absolute, relative = feed_analyses.restored(network, again)
        maps = [network.forward_features(x).maps[-1].abs().mean((1, 2, 3)) for x, _ in again.fit().held_out["test"]]
        assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert 0 < absolute < 3 * statistics.fmean(torch.cat(maps).tolist()) and relative > 0
    assert (absolute, relative) == feed_analyses.restored(network, again)


def test_what_is_gone_is_named(compared, tmp_path, capsys):
    broken = tmp_path / "broken"
    shutil.copytree(compared, broken)
    shutil.rmtree(broken / "cache")
    assert main(["analyze", "generations", str(broken), "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert "does not hold its trained generation1" in said and "--resume" in said and said.count("\n") == 1
    shutil.rmtree(broken / "runs" / "dkel-seed0" / "checkpoints")
    assert main(["analyze", "diversity", str(broken / "runs" / "dkel-seed0"), "--out", str(tmp_path / "out")]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    (broken / "runs" / "dkel-seed1" / "data.json").write_text('{"classes": [], "parts": {}}')
    assert main(["analyze", "diversity", str(broken / "runs" / "dkel-seed1"), "--out", str(tmp_path / "out")]) == 2
    assert "trained on other data" in capsys.readouterr().err
