"""`fastkd report`: of runs that are finished, that are not, of several, and of what is no run."""

import re

import pytest
from train_helpers import config, one_thread, run  # noqa: F401

from fastkd.cli import main
from fastkd.runs.commands import compare, train
from fastkd.runs.config import CompareConfig, read_yaml, to_yaml
from fastkd.train.metrics import read_csv, write_csv


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    options = config(tmp_path_factory.mktemp("report"), method="kd", epochs=2, batch_size=16)
    train(options, "fastkd train ...", say=lambda text: None)
    return options


def unfinished(options, tmp_path, name="stopped", rows=1):
    """The folder as it is after the first of its epochs."""
    from pathlib import Path

    folder = tmp_path / name
    folder.mkdir()
    (folder / "config.yaml").write_text(to_yaml(options))
    write_csv(folder / "metrics.csv", read_csv(Path(options.out) / "metrics.csv")[:rows])
    return folder


def test_finished_run_keeps_its_own_report_and_gets_new_curves(finished, capsys):
    from pathlib import Path

    out = Path(finished.out)
    before = (out / "report.md").read_text()
    (out / "curves.png").unlink()
    assert main(["report", str(out)]) == 0
    assert (out / "report.md").read_text() == before and (out / "curves.png").stat().st_size > 10_000
    accuracy = f"{100 * read_csv(out / 'metrics.csv')[-1]['test_accuracy']:.2f}"
    assert re.search(rf"\| +kd \|.*2 of 2.*{accuracy} \(test\)", capsys.readouterr().out)


def test_run_that_is_not_finished_says_so_until_it_is(finished, tmp_path):
    folder = unfinished(finished, tmp_path)
    assert main(["report", str(folder)]) == 0
    text = (folder / "report.md").read_text()
    assert "This run is not finished. It has done 1 of 2 epochs" in text and "| teacher" in text
    assert (folder / "curves.png").exists()
    write_csv(folder / "metrics.csv", read_csv(f"{finished.out}/metrics.csv"))
    assert main(["report", str(folder)]) == 0
    assert "not finished" not in (folder / "report.md").read_text()


def test_several_runs_stand_side_by_side(finished, tmp_path, capsys):
    other = unfinished(finished, tmp_path)
    assert main(["report", finished.out, str(other), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both" / "report.md").read_text()
    assert "2 of 2" in text and "1 of 2" in text
    assert (tmp_path / "both" / "runs.png").stat().st_size > 10_000
    assert not (other / "report.md").exists()


def test_runs_of_a_comparison(tmp_path):
    values = read_yaml_values(config(tmp_path))
    options = CompareConfig(**values, methods=["ce", "dml"], seeds=[0], out=str(tmp_path / "compared"))
    compare(options, "fastkd compare ...", say=lambda text: None)
    assert main(["report", options.out, "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    assert re.search(r"ce-seed0 +\| +ce ", text) and re.search(r"dml-seed0 +\| +dml ", text)


def read_yaml_values(options):
    wanted = ("train_size", "teacher", "assistants", "student", "device", "quiet", "epochs")
    return {name: getattr(options, name) for name in wanted} | {"guide_epochs": 1, "own_epochs": 1}


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ([], "fastkd report needs the folder of a run"),
        (["{tmp}/nothing"], "there is no folder"),
        (["{tmp}"], "holds no run: it has no config.yaml"),
        (["{tmp}/empty"], "has finished no epoch yet"),
        (["{tmp}", "--format", "html"], "has no option --format"),
        (["{run}", "{run}", "--out", "{run}"], "holds a run or a study: name another folder"),
    ],
)
def test_wrong_calls(finished, tmp_path, capsys, arguments, sentence):
    unfinished(finished, tmp_path, "empty", rows=0)
    values = [argument.format(tmp=tmp_path, run=finished.out) for argument in arguments]
    assert main(["report", *values]) == 2
    error = capsys.readouterr().err
    assert sentence in error and error.count("\n") == 1


def test_the_options_that_are_shown_are_those_of_the_run(finished, tmp_path):
    folder = unfinished(finished, tmp_path)
    main(["report", str(folder)])
    text = (folder / "report.md").read_text()
    for name, value in read_yaml(folder / "config.yaml").items():
        assert re.search(rf"\| {name} +\| +{re.escape(str(value))} \|", text), name
