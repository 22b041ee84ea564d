"""`fastkd compare --config NAME`: the recipe of one method compares it, with everything that it says."""

import pytest

from fastkd.cli.options import RECIPE_FOLDER, parse
from fastkd.runs.analyze import ANALYSES
from fastkd.runs.config import read_yaml
from fastkd.runs.job import CompareJob
from fastkd.runs.runner import Runner, load_data
from fastkd.train import UserError, plan

NAMES = sorted(path.stem for path in RECIPE_FOLDER.glob("*.yaml"))


def compared(*argv):
    return parse("compare", list(argv))


def trained(*argv):
    return parse("train", [*argv, "--out", "x"])


OF_NO_METHOD = ("digits", "demo")


@pytest.mark.parametrize("name", [name for name in NAMES if name not in OF_NO_METHOD])
def test_the_method_of_a_recipe_is_compared_with_ce(name):
    method = read_yaml(RECIPE_FOLDER / f"{name}.yaml")["method"]
    config, alone = compared("--config", name), trained("--config", name)
    assert config.methods == ["ce", method] and config.options == alone.options
    one = config.run(method, 0, config.options)
    # Networks, optimisation, data: each stage as in the run of the method itself.
    assert plan(one) == plan(alone)
    for option in ("data", "batch_size", "optimizer", "lr", "schedule", "milestones", "weight_decay", "epochs"):
        assert getattr(one, option) == getattr(alone, option), option


def test_digits_is_the_recipe_of_every_method():
    config, plain = compared("--config", "digits"), compared()
    assert config.methods == plain.methods and config.epochs == plain.epochs == 80
    assert config.guide_epochs == plain.guide_epochs == 80 and plain.seeds == [0, 1, 2]
    assert compared("--data", "cifar10").seeds == [0, 1, 2]


def test_the_demo_has_every_paper_and_a_run_for_every_analysis_of_runs():
    config = compared("--config", "demo")
    assert config.methods == compared().methods and {"dgkd", "orc", "ctsl-mkt", "dkel"} < set(config.methods)
    needed = [set(analysis.methods) for analysis in ANALYSES.values() if analysis.methods]
    assert all(any(method in config.methods for method in methods) for methods in needed)
    assert config.label_noise == 0.5 and len(config.seeds) > 3 and config.validation == 0
    seed, runs = config.seeds[0], CompareJob.of(config).runs()
    data = load_data(runs["ce", seed].config)
    for method in config.methods:
        assert list(Runner(runs[method, seed], data=data).stages)[-1] == "student"  # builds each stage


def test_a_recipe_is_found_beside_a_folder_of_its_name(tmp_path, monkeypatch):
    """`make demo` leaves its results in demo."""
    expected = compared("--config", "demo")
    monkeypatch.chdir(tmp_path)
    for name in ("demo", "other"):
        (tmp_path / name).mkdir()
    assert compared("--config", "demo") == expected
    with pytest.raises(UserError, match="the config other cannot be read, there is no such file or recipe"):
        compared("--config", "other")


def test_a_recipe_serves_methods_that_lack_one_of_its_options():
    """The demo's temperature is for others than these; what no method has is a mistake all the same."""
    job = CompareJob.of(compared("--config", "demo", "--methods", "ce,feed-parallel"))
    assert job.unused() == ["temperature"] and len(job.runs()) == 2 * len(job.config.seeds)
    assert CompareJob.of(compared("--config", "demo")).unused() == []
    wrong = CompareJob.of(compared("--methods", "ce,feed-parallel", "--options.temprature", "2"))
    assert wrong.unused() == []
    with pytest.raises(UserError, match="each of the methods has no option 'temprature'"):
        wrong.runs()
    assert len(CompareJob.of(compared("--config", "demo", "--methods", "ce")).runs()) == len(job.config.seeds)


def test_other_methods_may_be_asked_for(capfd):
    config = compared("--config", "dgkd_cifar100", "--methods", "ce,kd,dgkd", "--epochs", "3", "--options.lam", "0.5")
    assert config.methods == ["ce", "kd", "dgkd"] and config.epochs == 3
    assert config.options["lam"] == 0.5 and config.options["drop"] == "fixed"
    assert "the options that the config has for dgkd hold for kd, too" in capfd.readouterr().err
    assert compared("--config", "dgkd_cifar100", "--methods", "all").methods == ["all"]


def test_options_of_a_method_that_is_not_asked_for_are_left_out(capfd):
    config = compared("--config", "dgkd_cifar100", "--methods", "ce,kd")
    assert config.methods == ["ce", "kd"] and config.options == {} and config.data == "cifar100"
    assert capfd.readouterr().err == ""


def test_what_a_comparison_has_not_is_one_sentence(tmp_path):
    (tmp_path / "one.yaml").write_text("method: kd\nseed: 3\n")
    with pytest.raises(UserError, match=r"^the config .*one.yaml has an unknown option 'seed': did you mean seeds\? "):
        compared("--config", str(tmp_path / "one.yaml"))
    with pytest.raises(UserError, match=r"no such file or recipe: did you mean dgkd_cifar100\? the recipes are "):
        compared("--config", "dgkd_cifar1000")
