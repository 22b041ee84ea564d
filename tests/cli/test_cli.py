"""The command line: every method runs, every mistake is one line and status 2, options and configs."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastkd import data as datasets
from fastkd import models
from fastkd._core.extras import require
from fastkd.cli import main
from fastkd.runs import compare, runner
from fastkd.runs.config import read_yaml
from fastkd.train import RECIPES, Runner, TrainConfig, UserError
from fastkd.train.metrics import read_csv

RECIPE_FOLDER = Path(__file__).resolve().parents[2] / "fastkd" / "recipes"
SMALL = "--train-size 60 --teacher plain2:width=0.25 --assistants plain2:width=0.125 --student plain2:width=0.0625"
SMALL += " --device cpu --quiet"


PAPERS = ["dgkd", "orc", "ctsl-mkt", "dkel", "feed-parallel"]


def words(text: str) -> list[str]:
    return text.split()


def train(out, text: str = "--method ce --epochs 1") -> int:
    return main(["train", "--out", str(out), *words(SMALL), *words(text)])


@pytest.fixture(autouse=True)
def no_traceback(monkeypatch):
    monkeypatch.delenv("FASTKD_TRACEBACK", raising=False)


@pytest.mark.parametrize("method", RECIPES)
def test_every_method_runs_with_the_defaults(tmp_path, method, capsys):
    out = tmp_path / "run"
    assert main(["train", "--method", method, "--epochs", "1", "--train-size", "256", "--out", str(out)]) == 0
    assert {"checkpoints", "config.yaml", "metrics.csv", "curves.png", "report.md"} <= set(os.listdir(out))
    assert os.listdir(out / "checkpoints") == ["epoch-0001.pt"]
    state = torch.load(out / "checkpoints" / "epoch-0001.pt", weights_only=True)
    assert state["facts"]["method"] == method
    said = capsys.readouterr()
    accuracy = 100 * read_csv(out / "metrics.csv")[-1]["test_accuracy"]
    assert f"{method}: test accuracy {accuracy:.2f} % after epoch 1" in said.out
    assert "images/s" in said.err


def test_a_run_is_refused_resumed_and_started_afresh(tmp_path, capsys):
    out = tmp_path / "run"
    assert train(out, "--method ce --epochs 1 --resume") == 0  # nothing is there: starts
    assert train(out, "--method ce --epochs 2") == 2
    assert "holds a run already: add --resume" in capsys.readouterr().err
    assert len(read_csv(out / "metrics.csv")) == 1
    assert main(["train", "--out", str(out), "--epochs", "2", "--resume"]) == 0  # the other options are the run's own
    assert [row["epoch"] for row in read_csv(out / "metrics.csv")] == [1, 2]
    assert train(out, "--method ce --epochs 2 --resume --lr 0.5") == 2
    error = capsys.readouterr().err
    assert "--lr was 0.01, now 0.5" in error and "--method" not in error


MISTAKES = {
    "": "--method is missing: give one of ce, kd",
    "--method dgdk": "did you mean dgkd?",
    "--method kd --epochs x": "--epochs must be an integer, got 'x'",
    "--method kd --epochs 0": "--epochs must be an integer of at least 1, got 0",
    "--method kd --epochs": "--epochs needs a value",
    "--method kd --lr nan": "--lr must be a",
    "--method kd --lr 1,5": "--lr must be a number, got '1,5'",
    "--method kd --optimizer sdg": "--optimizer must be one of sgd, adamw, got 'sdg'",
    "--method kd --epoch 3": "unknown option --epoch: did you mean --epochs?",
    "--method kd --temperature 3": "unknown option --temperature: it is the method's, write --options.temperature",
    "--method kd --options.temperatur 3": "did you mean options.temperature?",
    "--method kd --options.temperature -3": "temperature must be a finite number > 0, got -3",
    "--method kd --options.temperature warm": "temperature must be",
    "--method kd --student plain33": "did you mean plain3",
    "--method kd --teacher plain3:widht=2": "has no option 'widht'",
    "--method kd --teacher plain3:wide": "is not NAME:option=value",
    "--method kd --data digit": "did you mean digits?",
    "--method kd --data imagefolder:/no/such/folder": "/no/such/folder",
    "--method kd --data cifar10 --data-root /no/such/folder": "add --download",
    "--method kd --device gpuu": "--device must be cpu, cuda",
    "--method kd --device cuda:99": "--device cuda:99 is not there",
    "--method kd --config /no/such.yaml": "the config /no/such.yaml cannot be read",
    "--method kd --checkpoint.teacher /no/such.pt": "there is no file /no/such.pt",
    "--method kd --checkpoint.teachr /no/such.pt": "there is no such guide",
    "--method kd --seed -1": "--seed must be an integer of at least 0",
    "--method kd --train-size 99999": "99999",
    "surprise --method kd": "surprise",
    "--method orc --assistants []": "orc trains the student together with the assistants and needs one at least",
    "--method orc --options.promote 3": "promote must be",
    "--method orc --teacher resnet14 --options.process_group 3": "orc has no option 'process_group'",
    "--method ctsl-mkt --checkpoint.self7 /no/such.pt": "there is no such guide: known are self1, self2, self3",
    "--method dkel --branches 1": "dkel needs peers on one stem: give --branches 2 or more, got 1",
    "--method dkel --student mobilenet_v2": "mobilenet_v2",
    "--method feed-parallel --num-teachers 0": "--num-teachers must be an integer of at least 1, got 0",
    "--method feed-sequential --options.mode parallel": "feed-sequential has no option 'mode'",
    "--method ban --generations 1": "ban is a chain of networks: give --generations 2 or more, got 1",
    "--method ctslmkt": "did you mean ctsl-mkt?",
    "--method feed": "did you mean feed-parallel or feed-sequential?",
}


@pytest.mark.parametrize("text", MISTAKES)
def test_a_mistake_is_one_line_and_status_2(tmp_path, capfd, text):
    out = tmp_path / "run"
    assert main(["train", "--out", str(out), *words(text)]) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and error.startswith("fastkd: "), error
    assert MISTAKES[text] in error
    assert not (out / "config.yaml").exists()  # what never ran does not stand in the way of the next try


def test_mistakes_of_the_command(tmp_path, capfd):
    (tmp_path / "file").touch()
    (tmp_path / "bad.yaml").write_text("epochs: 1\nlearning_rate: 3\n")
    (tmp_path / "broken.yaml").write_text("epochs: [1\n")
    calls = {
        "trian": "did you mean train?",
        "info --verbose": "takes no options",
        "train --method ce": "--out is missing",
        f"train --method ce --out {tmp_path}/file": "is a file: name a folder",
        f"train --method ce --out {tmp_path}/file/x": "cannot be made",
        f"train --method ce --out {tmp_path}/x --config {tmp_path}/bad.yaml": "unknown option 'learning_rate'",
        f"train --method ce --out {tmp_path}/x --config {tmp_path}/broken.yaml": "is not YAML",
        f"compare --methods ce,kdd --out {tmp_path}/x": "did you mean kd?",
        f"compare --seeds 1,1 --out {tmp_path}/x": "--seeds must be one or more different values",
        f"compare --methods ce,kd --options.lamb 1 --out {tmp_path}/x": "did you mean options.lam?",
    }
    for call, expected in calls.items():
        assert main(words(call)) == 2, call
        error = capfd.readouterr().err
        assert error.count("\n") == 1 and expected in error, error


def test_damaged_checkpoint_is_refused_by_name(tmp_path, capfd):
    out = tmp_path / "run"
    assert train(out, "--method ce --epochs 2") == 0
    path, first = (out / "checkpoints" / f"epoch-000{epoch}.pt" for epoch in (2, 1))
    path.write_bytes(path.read_bytes()[:1000])
    capfd.readouterr()
    assert train(out, "--method ce --epochs 3 --resume") == 0
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"{path} is damaged" in error and "goes on" in error and "after epoch 1" in error
    assert [row["epoch"] for row in read_csv(out / "metrics.csv")] == [1, 2, 3]
    for damaged in (first, path, path.with_name("epoch-0003.pt")):
        damaged.write_bytes(b"")
    assert train(out, "--method ce --epochs 4 --resume") == 2
    error = capfd.readouterr().err
    assert (
        error.count("\n") == 1 and f"no checkpoint in {out}/checkpoints can be used" in error and "it is empty" in error
    )
    teacher = tmp_path / "teacher.pt"
    teacher.write_bytes(b"no checkpoint")
    assert train(tmp_path / "kd", f"--method kd --epochs 1 --checkpoint.teacher {teacher}") == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"{teacher} is damaged or no checkpoint" in error


def test_divergence_is_one_line_and_status_1(tmp_path, capfd):
    assert train(tmp_path / "run", "--method ce --epochs 5 --lr 1e30 --optimizer sgd --no-channels-last") == 1
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "student plain2:width=0.0625 trained by CE: epoch 1, batch 2" in error


def test_traceback_for_developers(tmp_path, monkeypatch):
    monkeypatch.setenv("FASTKD_TRACEBACK", "1")
    with pytest.raises(Exception, match="did you mean dgkd"):
        train(tmp_path / "run", "--method dgdk")


def test_command_line_goes_over_config_over_defaults(tmp_path):
    (tmp_path / "c.yaml").write_text("epochs: 3\nlr: 0.02\nbatch_size: 30\noptions: {temperature: 2.0, lam: 0.5}\n")
    text = f"--lr 0.03 --options.lam 0.25 --config {tmp_path}/c.yaml --method kd --epochs 1"
    assert train(tmp_path / "run", text) == 0
    kept = read_yaml(tmp_path / "run" / "config.yaml")
    assert (kept["epochs"], kept["lr"], kept["batch_size"], kept["momentum"]) == (1, 0.03, 30, 0.9)
    assert kept["options"] == {"temperature": 2.0, "lam": 0.25}
    again = ["train", "--config", str(tmp_path / "run" / "config.yaml"), "--out", str(tmp_path / "again")]
    assert main(again) == 0  # config.yaml holds all that is needed
    files = [tmp_path / name / "checkpoints" / "epoch-0001.pt" for name in ("run", "again")]
    assert files[0].read_bytes() == files[1].read_bytes()


OF_RUNS = sorted(path for path in RECIPE_FOLDER.glob("*.yaml") if path.name != "demo.yaml")  # which is a comparison's


@pytest.mark.parametrize("path", OF_RUNS, ids=lambda path: path.name)
def test_configs_are_good(path, capsys, monkeypatch):
    """Each parses, prints itself, and names networks, methods and options that are there: all stages are built."""
    values = read_yaml(path)
    named = [values["method"]] if "method" in values else PAPERS
    for method in named:
        assert main(["train", "--config", str(path), "--method", method, "--print-config"]) == 0
        assert "epochs: " in capsys.readouterr().out
        config = TrainConfig(**values | {"method": method, "out": "x"})
        sizes = {"digits": (10, 8, 1), "cifar10": (10, 32, 3), "cifar100": (100, 32, 3), "tiny-imagenet": (200, 64, 3)}
        classes, size, channels = sizes.get(config.data, (1000, 224, 3))
        few = dict(num_classes=classes, channels=channels, train_images=classes, test_images=classes)
        data = datasets.load("fake", image_size=8, **few)
        data = dataclasses.replace(data, image_size=size)
        monkeypatch.setattr(runner, "load_data", lambda config: data)  # noqa: B023
        made = Runner(config)  # builds each stage
        assert list(made.stages)[-1] == "student"
        if method == "dgkd":
            networks = [runner.make_network(stage.network, data) for stage in made.stages.values()]
            built = [models.parameters_count(network) for network in networks]
            if "seven" in path.name:  # plain4's classifier is larger than the convolution that plain5 has more
                built = [int(stage.network.removeprefix("plain")) for stage in made.stages.values()]
                assert built == [10, 9, 8, 7, 6, 5, 4, 3, 2]
            assert built == sorted(built, reverse=True)


@pytest.mark.parametrize("name", ["dgkd_cifar100", "dgkd_cifar100.yaml", "configs/dgkd_cifar100.yaml"])
def test_a_recipe_is_found_by_its_name_anywhere(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--config", name, "--epochs", "2", "--print-config"]) == 0
    said = capsys.readouterr().out
    assert "student: plain2\n" in said and "epochs: 2\n" in said
    assert main(["compare", "--config", "digits", "--print-config"]) == 0
    assert "train_size: 200\n" in capsys.readouterr().out


def test_a_file_goes_before_the_recipe_of_its_name_and_an_unknown_name_gets_a_list(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("digits").write_text("epochs: 7\n")
    assert main(["train", "--method", "kd", "--config", "digits", "--print-config"]) == 0
    assert "epochs: 7" in capsys.readouterr().out
    assert main(["train", "--method", "kd", "--config", "dgkd_cifar-100", "--out", "x"]) == 2
    said = capsys.readouterr().err
    assert "no such file or recipe: did you mean dgkd_cifar100? the recipes are ctsl_mkt_cifar10," in said
    assert said.count("\n") == 1 and "digits" in said and not Path("x").exists()


def test_every_paper_has_its_recipe():
    found = {read_yaml(path).get("method") for path in RECIPE_FOLDER.glob("*.yaml")}
    assert {*PAPERS, "feed-sequential"} <= found
    for name, epochs, milestones in (("cifar10", 300, [150, 225]), ("tiny-imagenet", 100, [30, 60])):
        values = read_yaml(RECIPE_FOLDER / f"dkel_{name}.yaml")
        assert (values["epochs"], values["milestones"], values["nesterov"]) == (epochs, milestones, True)
        assert (values["weight_decay"], values["batch_size"], values["branches"]) == (5e-4, 128, 3)


def test_papers_recipe_of_dgkd():
    for name, guides, student in (
        ("cifar10", 3, "resnet8"), ("cifar100", 4, "plain2"), ("cifar100_seven", 8, "plain2"),
    ):  # fmt: skip
        values = read_yaml(RECIPE_FOLDER / f"dgkd_{name}.yaml")
        assert (values["epochs"], values["batch_size"], values["momentum"]) == (160, 128, 0.9)
        assert (values["weight_decay"], values["optimizer"], values["student"]) == (1e-4, "sgd", student)
        assert len(values["assistants"]) + 1 == guides
        assert values["augment"] is False  # as the code whose loss they take


@pytest.mark.parametrize("command", ["train", "compare"])
def test_help_names_options_methods_and_networks(capsys, command):
    assert main([command, "--help"]) == 0
    text = capsys.readouterr().out
    for expected in (
        "--batch-size N",
        "--resume",
        "--options.NAME",
        "dgkd",
        "survival=0.75",
        "resnet110",
        "imagefolder",
        "dgkd_cifar100",
    ):
        assert expected in text
    assert "_size" not in text and "type: " not in text
    assert max(len(line) for line in text.splitlines()) <= 110


def test_general_help_version_and_info(capsys):
    for argv in ([], ["--help"], ["info", "--help"], ["--version"]):
        assert main(argv) == 0
    said = capsys.readouterr().out
    assert "fastkd compare" in said
    assert main(["info"]) == 0
    text = capsys.readouterr().out
    assert torch.__version__ in text and "multi_teacher_kd" in text and "cpu:" in text


def test_compare(tmp_path, capsys):
    call = ["compare", "--methods", "ce,dgkd", "--seeds", "0,1", "--epochs", "2", "--out", str(tmp_path / "c")]
    call += [*words(SMALL), "--options.temperature", "2"]
    assert main(call) == 0
    said = capsys.readouterr().out
    assert {"report.md", "comparison.png", "metrics.csv", "results.csv"} <= set(os.listdir(tmp_path / "c"))
    for expected in ("| ce ", "| dgkd ", "native [ms/step]", "reference [ms/step]", "report.md", "comparison.png"):
        assert expected in said
    assert len((tmp_path / "c" / "metrics.csv").read_text().splitlines()) == 1 + 2 * 2 * 2
    checkpoints = sorted((tmp_path / "c" / "runs").glob("*/checkpoints/epoch-0002.pt"))
    assert [path.parts[-3] for path in checkpoints] == ["ce-seed0", "ce-seed1", "dgkd-seed0", "dgkd-seed1"]
    assert "temperature=2" in (tmp_path / "c" / "report.md").read_text()
    times = [path.stat().st_mtime_ns for path in checkpoints]
    assert main(call) == 2
    assert main([*call, "--resume"]) == 0
    assert [path.stat().st_mtime_ns for path in checkpoints] == times  # nothing was trained again


def test_one_run_of_a_comparison_is_the_single_run(tmp_path):
    options = words(SMALL) + words("--epochs 2 --guide-epochs 1 --schedule cosine --train-size 60")
    assert main(["compare", "--methods", "kd", "--seeds", "3", "--out", str(tmp_path / "c"), *options]) == 0
    assert main(["train", "--method", "kd", "--seed", "3", "--out", str(tmp_path / "t"), *options]) == 0
    one = torch.load(tmp_path / "c" / "runs" / "kd-seed3" / "checkpoints" / "epoch-0002.pt", weights_only=True)
    other = torch.load(tmp_path / "t" / "checkpoints" / "epoch-0002.pt", weights_only=True)
    assert all(torch.equal(one["network"][name], other["network"][name]) for name in one["network"])


def test_import_is_light_and_the_module_runs():
    code = (
        "import fastkd, sys; bad = {'jsonargparse', 'torchvision', 'matplotlib', 'yaml', 'sklearn'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", f"{code}; assert not bad, bad"], check=True)
    process = subprocess.run([sys.executable, "-m", "fastkd", "train", "--epochs", "x"], capture_output=True, text=True)
    assert process.returncode == 2
    assert process.stderr == "fastkd: --epochs must be an integer, got 'x'\n"


@pytest.mark.parametrize("command", ["train", "compare"])
def test_without_the_extras_a_command_says_what_to_install(command, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "jsonargparse", None)
    for argv in ([command, "--help"], [command, "--out", "x"]):
        assert main(argv) == 2
        said = capsys.readouterr().err
        assert said.startswith("fastkd: The command line needs jsonargparse (") and said.count("\n") == 1
        assert said.endswith('pip install ".[train]" in the sources of fastkd\n')


def test_a_package_that_another_one_misses_is_named(tmp_path, monkeypatch):
    (tmp_path / "outer_module.py").write_text("import yaml\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "yaml", None)
    with pytest.raises(ImportError, match=r"^Reading needs pyyaml \(.*: pip install \"\.\[train\]\" in the sources"):
        require("outer_module", "Reading")


def test_compare_all_takes_every_method(tmp_path, monkeypatch, capfd):
    asked = []

    def stop(config, say):
        asked.append(config.methods)
        raise UserError("stop")

    monkeypatch.setattr(compare, "run", stop)
    for methods in ("all", "ce,orc"):
        assert main(["compare", "--methods", methods, "--out", str(tmp_path / methods)]) == 2
    assert main(["compare", "--out", str(tmp_path / "default")]) == 2
    assert asked == [list(RECIPES), ["ce", "orc"], ["ce", "kd", *PAPERS, "feed-sequential"]]


def test_compare_trains_ce_first_and_keeps_the_order(tmp_path, capsys):
    call = ["compare", "--methods", "ctsl-mkt,ce", "--seeds", "0", "--epochs", "1", "--out", str(tmp_path / "c")]
    assert main([*call, *words(SMALL)]) == 0
    said = capsys.readouterr().out
    assert said.index("| ctsl-mkt ") < said.index("| ce ")
    assert len(list((tmp_path / "c" / "cache").glob("student-*"))) == 1
    kept = next((tmp_path / "c" / "cache").glob("student-*")) / "checkpoints" / "epoch-0001.pt"
    own = tmp_path / "c" / "runs" / "ce-seed0" / "checkpoints" / "epoch-0001.pt"
    assert kept.read_bytes() == own.read_bytes()
