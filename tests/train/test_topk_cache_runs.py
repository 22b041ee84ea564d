"""--logits-cache with --logits-topk: what a run keeps, reads and refuses."""

import dataclasses
import math

import pytest
import torch
from distributed_helpers import processes
from distributed_helpers import train as train_here
from test_logits_cache_runs import OPTIONS, assert_same_results, passes  # noqa: F401
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import TopK, functional
from fastkd.cli import main
from fastkd.runs import commands
from fastkd.runs.config import CompareConfig, differences
from fastkd.runs.folder import read
from fastkd.runs.plans import RECIPES
from fastkd.runs.revisit import revisited
from fastkd.runs.runner import stage_key
from fastkd.train import Runner, UserError

TOPK = OPTIONS | {"logits_cache": True, "logits_topk": 3, "variants": 1, "options": {"temperature": 1.0}}
TAKE = ("kd", "aver", "takd", "dgkd", "ban")


@pytest.mark.parametrize("method", TAKE)
def test_the_next_run_reads_and_has_the_same_bits(tmp_path, passes, method):  # noqa: F811
    options = TOPK | {"method": method, "cache": str(tmp_path / "cache")}
    run(config(tmp_path, out=str(tmp_path / "one"), **options))
    assert passes
    passes.clear()
    run(config(tmp_path, out=str(tmp_path / "two"), **options))
    assert not passes
    assert_same_results(tmp_path / "one", tmp_path / "two")
    whole = options | {"logits_topk": 10}
    run(config(tmp_path, out=str(tmp_path / "whole"), **whole))
    run(config(tmp_path, out=str(tmp_path / "plain"), **options | {"logits_topk": 0, "logits_cache": False}))
    losses = {name: rows_without_times(tmp_path / name)[0]["train_loss"] for name in ("two", "whole", "plain")}
    assert losses["whole"] == pytest.approx(losses["plain"], abs=2e-3)  # float16 of log p
    assert 1e-4 < losses["plain"] - losses["two"] < 0.5  # a divergence of fewer classes is no greater


def test_the_loss_of_a_run_is_that_of_topk_from_whole_logits(tmp_path, monkeypatch):
    """In the first step, from the teacher's logits of those images."""
    seen, original = [], functional.multi_teacher_kd

    def watch(logits, teachers, *arguments, **options):
        loss = original(logits, teachers, *arguments, **options)
        seen.append((logits.detach(), teachers, arguments, options, loss[0].item()))
        return loss

    monkeypatch.setattr(functional, "multi_teacher_kd", watch)
    runner = Runner(config(tmp_path, method="kd", **TOPK), say=lambda text: None)
    teacher = runner.run()["teacher"].network
    data = runner.data.train
    data.set_epoch(0)
    student, (known,), (target,), options, loss = seen[0]
    assert isinstance(known, TopK) and known.ids.shape == (16, 3)
    images = torch.stack([data[row][0] for row in range(len(data))])
    log_p = teacher(images).double().log_softmax(-1)
    # The rows of the batch, by their three likeliest classes and what these have.
    top, ids = log_p.topk(3)
    distance = (top[None] - known.log_probs.double()[:, None]).abs().sum(-1)
    rows = distance.masked_fill((ids[None] != known.ids.long()[:, None]).any(-1), math.inf).argmin(1)
    tail = log_p[rows].scatter(1, ids[rows], -math.inf).logsumexp(-1)
    exact = TopK(ids[rows], top[rows], tail_log_prob=tail)
    assert loss == pytest.approx(original(student, [exact], target, **options)[0].item(), abs=1e-3)


@pytest.mark.parametrize("step", [6, 9])
def test_interrupted_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, step):
    from test_storage import run_until

    options = TOPK | {"method": "kd", "variants": 2, "save_every": 3}
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    run_until(step, monkeypatch, config(tmp_path, **options))
    run(config(tmp_path, resume=True, **options))
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    stored = [sorted(folder.glob("cache/logits/*/*.npy")) for folder in (tmp_path / "run", tmp_path / "whole")]
    assert [p.read_bytes() for p in stored[0]] == [p.read_bytes() for p in stored[1]] and len(stored[0]) == 4


def test_what_a_run_says(tmp_path, capfd):
    run(config(tmp_path, **TOPK | {"method": "kd", "quiet": False}))
    said = [line for line in capfd.readouterr().err.splitlines() if "note" in line]
    start, folder = "fastkd: note: kd: student plain2:width=0.0625: ", tmp_path / "run" / "cache" / "logits"
    assert said == [
        f"{start}the 3 likeliest classes of frozen logits (1 network, 64 images, 1 augmentation) take 1.7 kB in "
        f"{folder}, 0 bytes are there",  # 64 * (6 * 3 + 4 + 4)
        f"{start}67 % of 192 rows of frozen logits were read from {folder}, the others computed",
    ]


REFUSED = {
    "kd": ({}, "student, trained by kd, .*: at temperature 4, other than 1, .*"),
    "aver": ({"standardize": True, "temperature": 1.0}, "assistant1, trained by dgkd, .*: standardize takes .*"),
    "takd": ({}, "assistant1, trained by takd, .*: at temperature 5, other than 1, .*"),
    "ebkd": ({"temperature": 1.0}, "student, trained by ebkd, .*: weights='entropy' reads .*"),
    "ae-kd": ({"temperature": 1.0}, "student, trained by ae-kd, .*: the teachers' weights come from .*"),
    "dkd": ({}, "student, trained by dkd, .*: its loss reads the logits of all classes"),
    "dist": ({}, "student, trained by dist, .*: its loss reads the logits of all classes"),
    "ctsl-mkt": ({}, "student, trained by ctsl-mkt, .*: its loss reads the logits of all classes"),
}


@pytest.mark.parametrize("method", REFUSED)
def test_methods_that_cannot_are_refused(tmp_path, method):
    options, message = REFUSED[method]
    with pytest.raises(UserError, match=f"^--logits-topk: {message}; leave the option out$"):
        Runner(config(tmp_path, **TOPK | {"method": method, "options": options}))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("options, message", [
    ({"logits_topk": 11}, "--logits-topk must be at most 10, the number of classes, got 11"),
    ({"logits_cache": False}, "--logits-topk 3 says what --logits-cache keeps: give that, too"),
    ({"logits_dtype": "float16"}, "--logits-topk and --logits-dtype cannot be used .* form is fixed, leave out one"),
])  # fmt: skip
def test_options_that_are_wrong(tmp_path, options, message):
    with pytest.raises(UserError, match=f"^{message}$"):
        Runner(config(tmp_path, **TOPK | {"method": "kd"} | options))


def test_the_command_line(tmp_path, capsys):
    short = ["--method", "kd", "--out", str(tmp_path / "run"), "--train-size", "32", "--epochs", "1", "--quiet"]
    networks = ["--teacher", "plain2:width=0.125", "--student", "plain2:width=0.0625"]
    assert main(["train", *short, *networks, "--logits-cache", "--logits-topk", "3"]) == 2
    assert "--logits-topk: student, trained by kd" in capsys.readouterr().err
    assert main(["train", *short, *networks, "--logits-cache", "--logits-topk", "3", "--options.temperature", "1"]) == 0
    assert len(list((tmp_path / "run" / "cache" / "logits").iterdir())) == 1


def test_keys_and_what_holds_a_run(tmp_path):
    def keys(**options):
        runner = Runner(config(tmp_path, method="kd", options={"temperature": 1.0}, **options))
        return [stage_key(runner.config, stage, runner.stages) for stage in runner.stages.values()]

    teacher, student = keys()
    found = [keys(logits_cache=True, logits_topk=k) for k in (0, 2, 3)]
    assert [key[0] for key in found] == [teacher] * 3  # it learns from nobody
    assert found[0][1] == student and len({key[1] for key in found}) == 3
    one = dataclasses.asdict(config(tmp_path, method="kd", logits_cache=True))
    assert differences(one, one | {"logits_topk": 2}) == ["--logits-topk was 0, now 2"]


def test_compare_takes_it_where_it_can_and_says_where_not(tmp_path):
    from fastkd.runs import compare

    options = {"train_size": 64, "batch_size": 16, "epochs": 1, "guide_epochs": 1, "quiet": True, "device": "cpu"}
    options |= {"teacher": "plain2:width=0.25", "student": "plain2:width=0.0625", "variants": 1, "seeds": [0]}
    options |= {"logits_cache": True, "logits_topk": 3, "options": {"temperature": 1.0}, "out": str(tmp_path / "a")}
    compare.run(CompareConfig(methods=["ce", "ban", "kd"], **options), say=lambda text: None)
    assert len(list((tmp_path / "a" / "cache" / "logits").iterdir())) == 3  # of two generations and of the teacher
    with pytest.raises(UserError, match=r"^--logits-topk: student, trained by dkd"):
        compare.run(
            CompareConfig(methods=["ce", "dkd"], **options | {"out": str(tmp_path / "b")}), say=lambda text: None
        )


def test_every_recipe_takes_it_or_says_why_not(tmp_path):
    taken = []
    for method, recipe in RECIPES.items():
        options = {"temperature": 1.0} if "temperature" in recipe.arguments else {}
        try:
            Runner(config(tmp_path, **TOPK | {"method": method, "options": options}))
        except UserError as error:
            assert str(error).startswith("--logits-")
        else:
            taken.append(method)
    # aver-parallel is aver; ca-mkd's assistants are trained by dgkd, its student runs them all.
    assert sorted(taken) == sorted([*TAKE, "aver-parallel", "ca-mkd"])


def program(rank, folder):
    shared = {"variants": 1, "epochs": 2, "guide_epochs": 1, "options": {"temperature": 1.0}, "logits_cache": True}
    train_here(folder / "two", "kd", cache=str(folder / "cache"), logits_topk=3, **shared)


def test_two_processes(tmp_path):
    """66 images in batches of 16 and one of 2, of which the second process has no row."""
    processes(program, 2, tmp_path)
    shared = {"variants": 1, "epochs": 2, "guide_epochs": 1, "options": {"temperature": 1.0}, "logits_cache": True}
    train_here(tmp_path / "one", "kd", cache=str(tmp_path / "cache"), logits_topk=3, **shared)
    first, second = (last_state(tmp_path / name)["method"] for name in ("one", "two"))
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(second[name], value, rtol=0, atol=1e-4, msg=name)


def test_an_analysis_finds_the_networks_of_this_run(tmp_path, capsys):
    """And not those of the same command without --logits-topk, in the same cache."""
    options = TOPK | {"method": "ban", "cache": str(tmp_path / "cache"), "epochs": 1}
    commands.train(config(tmp_path, out=str(tmp_path / "sparse"), **options), "", say=lambda text: None)
    sparse = folders(tmp_path / "cache")
    run(config(tmp_path, out=str(tmp_path / "whole"), **options | {"logits_topk": 0, "logits_cache": False}))
    with revisited(read(tmp_path / "sparse")[0]) as again:
        found = {result.folder.name for result in again.earlier.values()}
    assert len(found) == len(again.earlier) > 1 and found <= sparse
    assert main(["analyze", "generations", str(tmp_path / "sparse"), "--out", str(tmp_path / "analysis")]) == 0


def folders(cache):
    return {path.name for path in cache.iterdir()}
