"""--logits-cache: runs with it and without it are the same, to the bit, and the frozen networks run once an image."""

import dataclasses
import errno
import shutil

import pytest
import torch
from distributed_helpers import processes
from distributed_helpers import train as train_here
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd._core.files import StorageError
from fastkd.cli import main
from fastkd.data import logits as files
from fastkd.runs.config import CompareConfig, differences
from fastkd.runs.plans import RECIPES
from fastkd.runs.runner import stage_key
from fastkd.train import Runner, UserError
from fastkd.train.distributed import World
from fastkd.train.kept_logits import KeptLogits
from fastkd.train.kept_logits import size as in_words

# Batches of one size: a network's answer to an image may change in the last bit with the rows beside it.
OPTIONS = dict(train_size=64, batch_size=16, epochs=3, guide_epochs=2, own_epochs=2)
METHODS = {"kd": {}, "dgkd": {"drop": "bernoulli"}, "aver": {}, "takd": {}, "ctsl-mkt": {}, "ban": {}}
METHODS |= {"dkd": {}, "dist": {}, "ae-kd": {}, "ebkd": {}, "aver-parallel": {}}


@pytest.fixture
def passes(monkeypatch):
    """(stage, frozen network) of each forward pass of a frozen network in the training of stages that keep logits."""
    seen, hooks, start, end = [], [], KeptLogits.__init__, KeptLogits.tell

    def watch(kept, folder, method, *rest, who, **options):
        for name in method.frozen_names:
            network, entry = method.get_submodule(name), (who.split()[0], name)
            hooks.append(network.register_forward_hook(lambda *arguments, entry=entry: seen.append(entry)))
        start(kept, folder, method, *rest, who=who, **options)

    def leave(kept):
        end(kept)
        while hooks:
            hooks.pop().remove()

    monkeypatch.setattr(KeptLogits, "__init__", watch)
    monkeypatch.setattr(KeptLogits, "tell", leave)
    return seen


def assert_same_results(one, other):
    first, second = last_state(one), last_state(other)
    for part in ("method", "optimizer", "random"):
        assert_same(first[part], second[part])
    assert rows_without_times(one) == rows_without_times(other)


@pytest.mark.parametrize(
    "method, how",
    [
        *((method, {"variants": 1}) for method in METHODS),
        *((method, {"augment": False, "accumulate": 2}) for method in ("kd", "dgkd", "ctsl-mkt")),
        ("aver", {"variants": 2, "workers": 1}),
    ],
)
def test_same_bits_and_one_pass_an_image(tmp_path, passes, method, how):
    options = OPTIONS | how | {"options": METHODS[method], "method": method, "cache": str(tmp_path / "cache")}
    run(config(tmp_path, out=str(tmp_path / "plain"), **options))
    assert not passes
    run(config(tmp_path, out=str(tmp_path / "kept"), logits_cache=True, **options))
    assert_same_results(tmp_path / "kept", tmp_path / "plain")
    frozen = 1 if method in ("kd", "takd", "ban", "dkd", "dist") else 2
    most = frozen * how.get("variants", 1) * 4 * how.get("accumulate", 1)  # 4 batches
    if method == "dgkd":  # a guide that was dropped in one epoch may be run in the next
        assert 0 < len(passes) <= 2 * most
    else:
        assert sum(who.startswith(method) for who, _ in passes) == most
    passes.clear()
    run(config(tmp_path, out=str(tmp_path / "again"), logits_cache=True, **options))
    assert method == "dgkd" or not passes  # in the next run none at all
    assert_same_results(tmp_path / "again", tmp_path / "plain")


def test_stages_share_what_is_kept(tmp_path, passes):
    """The student of dgkd reads what its assistant left, in the epochs that both have."""
    run(config(tmp_path, method="aver", logits_cache=True, **OPTIONS))
    teacher = [who for who, name in passes if name == "guides.0"]
    assert teacher == ["assistant1"] * 8 + ["aver:"] * 4  # 2 epochs each of its own augmentation, then the third
    assert len(list((tmp_path / "run" / "cache" / "logits").iterdir())) == 2


def test_float16(tmp_path, passes):
    options = OPTIONS | {"method": "kd", "variants": 1, "cache": str(tmp_path / "cache")}
    run(config(tmp_path, out=str(tmp_path / "plain"), **options))
    options |= {"logits_cache": True, "logits_dtype": "float16"}
    for name in ("half", "again"):
        run(config(tmp_path, out=str(tmp_path / name), **options))
    assert len(passes) == 4
    assert_same_results(tmp_path / "half", tmp_path / "again")
    first, second = (last_state(tmp_path / name)["network"] for name in ("plain", "half"))
    assert any(not torch.equal(first[name], second[name]) for name in first)
    plain, half = (rows_without_times(tmp_path / name)[0]["train_loss"] for name in ("plain", "half"))
    assert plain == pytest.approx(half, abs=0.02)


def test_bfloat16_comes_back_as_it_was(tmp_path, passes):
    options = OPTIONS | {"method": "kd", "augment": False, "amp": "bf16", "cache": str(tmp_path / "cache")}
    run(config(tmp_path, out=str(tmp_path / "plain"), **options))
    for name in ("kept", "again"):
        run(config(tmp_path, out=str(tmp_path / name), logits_cache=True, **options))
        assert_same_results(tmp_path / name, tmp_path / "plain")
    assert len(passes) == 4


def test_the_key_sees_the_seed_and_the_teacher(tmp_path):
    def folders():
        return len(list((tmp_path / "cache" / "logits").iterdir()))

    options = dict(OPTIONS, method="kd", logits_cache=True, cache=str(tmp_path / "cache"), epochs=1, guide_epochs=1)
    teacher = run(config(tmp_path, out=str(tmp_path / "a"), **options))["teacher"].network
    assert folders() == 1
    run(config(tmp_path, out=str(tmp_path / "b"), seed=1, **options))
    assert folders() == 2
    for number, factor in enumerate((1.0, 1.0001)):
        state = {name: value * factor if "weight" in name else value for name, value in teacher.state_dict().items()}
        torch.save(state, tmp_path / "teacher.pt")
        given = {"teacher": str(tmp_path / "teacher.pt")}
        run(config(tmp_path, out=str(tmp_path / f"c{number}"), checkpoint=given, **options))
        assert folders() == 2 + number  # the same weights from a file are the same network
    run(config(tmp_path, out=str(tmp_path / "d"), amp="bf16", checkpoint=given, **options))
    assert folders() == 4


def test_a_truncated_file_is_made_anew(tmp_path, passes, capfd):
    options = OPTIONS | {"method": "kd", "variants": 1, "cache": str(tmp_path / "cache"), "logits_cache": True}
    run(config(tmp_path, out=str(tmp_path / "one"), **options))
    (path,) = tmp_path.glob("cache/logits/*/v0000.npy")
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    capfd.readouterr()
    run(config(tmp_path, out=str(tmp_path / "two"), **options))
    assert f"note: {path} is truncated or damaged: it is made anew" in capfd.readouterr().err
    assert len(passes) == 8 and path.read_bytes() == content
    assert_same_results(tmp_path / "one", tmp_path / "two")


def test_images_that_cannot_be_read(tmp_path, passes):
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 10), ("val", 2)):
        for label in ("a", "b"):
            (tmp_path / "images" / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(tmp_path / "images" / part / label / f"{number}.png")
    for name in ("a/1", "b/7"):
        (tmp_path / "images" / "train" / f"{name}.png").write_bytes(b"no image")
    options = dict(data=f"imagefolder:{tmp_path / 'images'}", bad_images="skip", image_size=8, train_size=None)
    options |= dict(epochs=3, guide_epochs=1, method="kd", batch_size=20, variants=1, cache=str(tmp_path / "cache"))
    run(config(tmp_path, out=str(tmp_path / "plain"), **options))
    run(config(tmp_path, out=str(tmp_path / "kept"), logits_cache=True, **options))
    assert len(passes) == 1
    assert_same_results(tmp_path / "kept", tmp_path / "plain")


@pytest.mark.parametrize("step", [6, 9])
def test_interrupted_run_goes_on_with_the_same_bits(tmp_path, monkeypatch, step):
    from test_storage import run_until

    options = OPTIONS | {"method": "kd", "logits_cache": True, "variants": 2, "save_every": 3}
    run(config(tmp_path, out=str(tmp_path / "whole"), **options))
    run_until(step, monkeypatch, config(tmp_path, **options))
    run(config(tmp_path, resume=True, **options))
    assert_same(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
    stored = [sorted(folder.glob("cache/logits/*/*.npy")) for folder in (tmp_path / "run", tmp_path / "whole")]
    assert [p.read_bytes() for p in stored[0]] == [p.read_bytes() for p in stored[1]] and len(stored[0]) == 4


# --- what is said and refused ---


def test_what_a_run_says(tmp_path, capfd):
    options = OPTIONS | {"method": "kd", "logits_cache": True, "quiet": False}
    run(config(tmp_path, **options))
    said = [line for line in capfd.readouterr().err.splitlines() if "note" in line]
    folder = tmp_path / "run" / "cache" / "logits"
    start = "fastkd: note: kd: student plain2:width=0.0625: "
    assert said == [
        f"{start}frozen logits (1 network, 64 images, 3 augmentations) take 8.4 kB in {folder}, 0 bytes are there; as "
        "each epoch has its own augmentation, only other stages and runs read them: see --variants",
        f"{start}0 % of 192 rows of frozen logits were read from {folder}, the others computed",
    ]
    run(config(tmp_path, **options | {"out": str(tmp_path / "b"), "variants": 1}))
    said = [line for line in capfd.readouterr().err.splitlines() if "note" in line]
    assert "1 augmentation) take 2.8 kB" in said[0] and "see --variants" not in said[0]
    assert "67 % of 192 rows" in said[1]


def test_a_disk_without_room(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=8447)  # 3 * 64 * (10 * 4 + 4) are 8448
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    options = OPTIONS | {"method": "kd", "logits_cache": True}
    with pytest.raises(StorageError, match=r"need 8.4 kB more in .*, where 8.4 kB are free: make room, or take fewer"):
        run(config(tmp_path, **options))
    run(config(tmp_path, logits_dtype="float16", resume=True, **options))  # half as much
    check = KeptLogits.check_room

    def with_another(kept, *arguments):  # another process has no room: all stop
        with monkeypatch.context() as patch:
            patch.setattr(World, "any", lambda world, flag: True)
            check(kept, *arguments)

    monkeypatch.setattr(KeptLogits, "check_room", with_another)
    with pytest.raises(StorageError, match="make room"):
        run(config(tmp_path, **options | {"out": str(tmp_path / "other"), "logits_dtype": "float16"}))
    assert in_words(999) == "999 bytes" and in_words(25_000_000_000) == "25.0 GB"


def test_a_disk_that_gets_full(tmp_path, monkeypatch):
    options = OPTIONS | {"method": "kd", "logits_cache": True}
    original, left = files.write_rows, [5]

    def write(path, *arguments):
        left[0] -= 1
        if left[0] == 0:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        original(path, *arguments)

    monkeypatch.setattr(files, "write_rows", write)
    with pytest.raises(StorageError, match=r"v0000.npy cannot be written, the disk is full: make room and .* --resume"):
        run(config(tmp_path, **options))
    run(config(tmp_path, resume=True, **options))


@pytest.mark.parametrize("method", [*RECIPES, "ctsl-mkt views", "ctsl-mkt self_learning"])
def test_methods_with_nothing_to_keep_are_refused(tmp_path, method):
    method, _, switch = method.partition(" ")
    if (method in METHODS or method == "ca-mkd") and not switch:  # ca-mkd: its assistants learn from the teacher's
        Runner(config(tmp_path, method=method, logits_cache=True))
        return
    options = {"options": {switch: switch == "views"}} if switch else {}
    with pytest.raises(UserError, match=f"^--logits-cache: no frozen network of {method} .*: leave the option out$"):
        Runner(config(tmp_path, method=method, logits_cache=True, **options))


def test_options_that_are_wrong(tmp_path, capsys):
    for option, message in (("--variants=-1", "--variants must be an integer"), ("--logits-dtype=int8", "float16")):
        assert main(["train", "--method", "kd", "--out", str(tmp_path / "run"), option]) == 2
        assert message in capsys.readouterr().err


def test_stage_keys_change_only_where_results_do(tmp_path):
    def keys(**options):
        runner = Runner(config(tmp_path, method="kd", **options))
        return [stage_key(runner.config, stage, runner.stages) for stage in runner.stages.values()]

    teacher, student = keys()
    assert keys(logits_cache=True) == keys(variants=0) == keys(logits_dtype="float16") == [teacher, student]
    assert keys(augment=False) == keys(augment=False, variants=2)
    assert not {teacher, student} & {*keys(variants=2)} and keys(variants=2) != keys(variants=3)
    assert keys(logits_cache=True, logits_dtype="float16")[0] == teacher
    assert keys(logits_cache=True, logits_dtype="float16")[1] != student


def test_what_may_change_when_a_run_goes_on(tmp_path):
    one = dataclasses.asdict(config(tmp_path, method="kd"))
    assert not differences(one, one | {"logits_cache": True})
    assert differences(one, one | {"variants": 2}) == ["--variants was 0, now 2"]


def test_compare_shares_and_lets_others_pass(tmp_path, passes):
    from fastkd.runs import compare

    options = dict(train_size=64, batch_size=16, epochs=2, guide_epochs=1, own_epochs=1, quiet=True, device="cpu")
    options |= dict(teacher="plain2:width=0.25", assistants=["plain2:width=0.125"], student="plain2:width=0.0625")
    found = CompareConfig(
        methods=["ce", "kd", "ban"], seeds=[0], out=str(tmp_path), variants=1, logits_cache=True, **options
    )
    compare.run(found, say=lambda text: None)
    assert [who for who, _ in passes] == ["kd:"] * 4 + ["generation2"] * 4 + ["ban:"] * 4
    assert len(list((tmp_path / "cache" / "logits").iterdir())) == 3


# --- several processes ---

EXACT = dict(options={}, variants=1, epochs=2, guide_epochs=1, own_epochs=1)


def program(rank, folder):
    shared = EXACT | {"cache": str(folder / "cache")}
    train_here(folder / "two", "ctsl-mkt", **shared)
    train_here(folder / "kept", "ctsl-mkt", logits_cache=True, **shared)
    calls, original = [], files._Network.put
    files._Network.put = lambda *arguments: calls.append(1) or original(*arguments)
    train_here(folder / "again", "ctsl-mkt", logits_cache=True, **shared)
    assert not calls
    train_here(folder / "kept-kd", "kd", logits_cache=True, accumulate=2, **shared)
    assert len(calls) == 8 + (rank == 0)  # two chunks of each batch of 16, one of the last one


def test_two_processes(tmp_path):
    """66 images in batches of 16 and one of 2, of which the second process has no row."""
    processes(program, 2, tmp_path)
    train_here(tmp_path / "kd", "kd", accumulate=2, **EXACT)
    for one, other in (("two", "kept"), ("kept", "again"), ("kd", "kept-kd")):
        first, second = last_state(tmp_path / one)["method"], last_state(tmp_path / other)["method"]
        for name, value in first.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(second[name], value, rtol=0, atol=1e-5, msg=f"{other} {name}")
    assert len(list(tmp_path.glob("cache/logits/*/v0000.npy"))) == 3
