"""Other data are seen: by the description that every data set has, by the names in the cache, by runs that go on."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from data_helpers import cifar, image_folder, tiny_imagenet, write_images
from PIL import Image
from train_helpers import config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import data
from fastkd.cli import main
from fastkd.data import catalog, description
from fastkd.data.description import changes
from fastkd.runs.config import CompareConfig, differences
from fastkd.runs.runner import stage_key
from fastkd.train import Runner, UserError, same_data
from fastkd.train.distributed import World


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


# Changes of a folder: what is done, and what is said of it.


def one_byte(folder):
    """The pixels of one file, which keeps its name and its size."""
    path = folder / "train" / "dark" / "002.png"
    content, stat = bytearray(path.read_bytes()), path.stat()
    content[-20] ^= 1
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))


def another_size(folder):
    Image.new("RGB", (12, 12)).save(folder / "train" / "light" / "001.png")


def file_renamed(folder):
    (folder / "train" / "dark" / "002.png").rename(folder / "train" / "dark" / "x.png")


def class_renamed(folder):
    """The other class is the first one now: every label changes."""
    for part in ("train", "test"):
        (folder / part / "dark").rename(folder / part / "mellow")


def class_more(folder):
    for part in ("train", "test"):
        write_images(folder / part / "middle", 3, shade=90)


def class_less(folder):
    class_more(folder)
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "light")


def file_more(folder):
    Image.new("RGB", (12, 12)).save(folder / "train" / "light" / "100.png")


def file_less(folder):
    (folder / "train" / "light" / "003.png").unlink()


def file_of_another_class(folder):
    (folder / "train" / "light" / "003.png").rename(folder / "train" / "dark" / "103.png")


def test_image(folder):
    (folder / "test" / "light" / "002.png").unlink()


test_image.__test__ = False


def own_validation(folder):
    for name, shade in (("dark", 0), ("light", 180)):
        write_images(folder / "val" / name, 2, shade=shade)


FOLDER_CHANGES = {
    one_byte: "train: files of class dark have other bytes",
    another_size: "train: files of class light have another size",
    file_renamed: "train: files of class dark have other names",
    class_renamed: "the classes are others: now without dark and with mellow",
    class_more: "the classes are others: now with middle",
    class_less: "the classes are others: now without light and with middle",
    file_more: "train: class light has 7 files, had 6",
    file_less: "train: class light has 5 files, had 6",
    file_of_another_class: "train: class dark has 7 files, had 6; train: class light has 5 files, had 6",
    test_image: "test: class light has 2 files, had 3",
    own_validation: "there are now validation images",
}
by_name = pytest.mark.parametrize("change", FOLDER_CHANGES, ids=lambda change: change.__name__)


def described(name, **options):
    found = data.load(name, **options).description
    assert json.loads(json.dumps(found)) == found
    return found


def key_of(tmp_path, name, **options):
    """Of the teacher in the cache."""
    settings = dict(method="kd", data=name, train_size=None) | options
    runner = Runner(config(tmp_path, **settings), say=lambda text: None)
    return stage_key(runner.config, runner.stages["teacher"], runner.stages)


@by_name
@pytest.mark.parametrize("many", [False, True])
def test_every_change_of_a_folder_is_seen_and_named(tmp_path, monkeypatch, folder, change, many):
    """Also where there are too many files to read: by their times then."""
    if many:
        monkeypatch.setattr(description, "BY_CONTENT", -1)
    name = f"imagefolder:{folder}"
    before, key = described(name), key_of(tmp_path, name)
    assert described(name) == before and key_of(tmp_path, name) == key
    change(folder)
    expected = FOLDER_CHANGES[change].replace("other bytes", "another time") if many else FOLDER_CHANGES[change]
    assert "; ".join(changes(before, described(name))) == expected
    assert key_of(tmp_path, name) != key


def test_where_a_folder_stands_does_not_matter(tmp_path, monkeypatch, folder):
    """A copy has other times: they count only where there are too many files to read."""
    before, key = described(f"imagefolder:{folder}"), key_of(tmp_path, f"imagefolder:{folder}")
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    for path in copy.rglob("*.png"):
        os.utime(path, ns=(1, 1))
    assert described(f"imagefolder:{copy}") == before and key_of(tmp_path, f"imagefolder:{copy}") == key
    monkeypatch.setattr(description, "BY_CONTENT", -1)
    before = described(f"imagefolder:{folder}")
    assert set(changes(before, described(f"imagefolder:{copy}"))) == {
        f"{part}: files of class {name} have another time" for part in ("train", "test") for name in ("dark", "light")
    }
    folder.rename(tmp_path / "moved")
    assert described(f"imagefolder:{tmp_path / 'moved'}") == before


def test_files_are_read_only_where_they_are_few(monkeypatch, folder):
    read = []
    monkeypatch.setattr(description, "content_of", lambda path: read.append(path) or b"")
    described(f"imagefolder:{folder}", train_size=4)
    assert len(read) == 4 + 6  # those in use
    monkeypatch.setattr(description, "BY_CONTENT_FILES", 5)
    described(f"imagefolder:{folder}")
    assert len(read) == 10


@pytest.mark.parametrize(
    "options, expected",
    [
        ({"seed": 1}, ["the split: other images are in train and validation"]),
        ({"validation": 4}, ["the split: other images are in train and validation"]),
        ({"train_size": 5}, ["the split: other images are in train"]),
        ({"validation": 0}, ["there are no validation images any more"]),
        ({"image_size": 8}, ["image_size was 12, is 8"]),
    ],
)
@pytest.mark.parametrize("name", ["imagefolder", "digits"])
def test_another_split_is_seen_and_named(folder, name, options, expected):
    name = f"imagefolder:{folder}" if name == "imagefolder" else name
    usual = dict(train_size=6, validation=3, image_size=12)
    found = changes(described(name, **usual), described(name, **usual | options))
    assert [text for text in found if not text.startswith("augmentation")] == expected


def swapped(rows):
    rows[0], rows[1] = rows[0].replace("n01", "n02"), rows[1].replace("n02", "n01")


@pytest.mark.parametrize("change", ["class", "file", "bytes", "label"])
def test_changes_of_tiny_imagenet(tmp_path, change):
    base = tiny_imagenet(tmp_path) / "tiny-imagenet-200"
    before = described("tiny-imagenet", root=tmp_path)
    if change == "class":
        write_images(base / "train" / "n00" / "images", 2, (64, 64))
    elif change == "file":
        (base / "train" / "n02" / "images" / "001.png").unlink()
    elif change == "bytes":
        path = base / "val" / "images" / "000.png"
        path.write_bytes(path.read_bytes()[:-1] + b"!")
    else:
        path = base / "val" / "val_annotations.txt"
        rows = path.read_text().splitlines()
        swapped(rows)
        path.write_text("\n".join(rows))
    expected = {
        "class": ["the classes are others: now with n00"],
        "file": ["train: class n02 has 3 files, had 4"],
        "bytes": ["test: files of class n01 have other bytes"],
        "label": ["test: files of class n01 have other names", "test: files of class n02 have other names"],
    }
    assert changes(before, described("tiny-imagenet", root=tmp_path)) == expected[change]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("change", ["pixel", "label", "classes", "fewer"])
def test_changes_of_cifar(tmp_path, monkeypatch, name, change):
    import torchvision

    cifar(tmp_path, name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    kind = getattr(torchvision.datasets, name.upper())
    before = described(name, root=tmp_path)
    assert described(name, root=tmp_path) == before
    original = kind.__init__

    def changed(self, root, train=True, **options):
        original(self, root, train=train, **options)
        if change == "pixel" and train:
            self.data[3, 1, 2, 0] ^= 1
        elif change == "label" and not train:
            self.targets[:2] = self.targets[1::-1]
        elif change == "classes":
            self.classes = [self.classes[1], self.classes[0], *self.classes[2:]]
        elif change == "fewer" and train:
            self.data, self.targets = self.data[:-1], self.targets[:-1]

    monkeypatch.setattr(kind, "__init__", changed)
    expected = {
        "pixel": ["train: the pixels are others"],
        "label": ["test: the labels are others"],
        "classes": ["the classes have another order"],
        "fewer": ["train: there are 19 images, were 20"],
    }
    assert changes(before, described(name, root=tmp_path)) == expected[change]


@pytest.mark.parametrize("change, expected", [("images", "train: the pixels are others"), ("target", "")])
def test_digits_of_another_version_of_their_package(monkeypatch, change, expected):
    """Another label may also put other images into the test part."""
    import sklearn.datasets

    bunch = sklearn.datasets.load_digits()
    before, row = described("digits"), int(data.load("digits").train.rows[0])
    bunch[change][row] = (bunch[change][row] + 1) % 10
    monkeypatch.setattr(sklearn.datasets, "load_digits", lambda: bunch)
    found = changes(before, described("digits"))
    assert found == [expected] if expected else found


def test_fake_data_count_by_their_options():
    usual = dict(num_classes=3, channels=1, train_images=12, test_images=6, image_size=8)
    before = described("fake", **usual)
    assert described("fake", **usual) == before
    found = {name: changes(before, described("fake", **usual | {name: usual[name] + 1})) for name in usual}
    assert found["num_classes"] == ["the classes are others: now with class 3"]
    assert "train: there are 13 images, were 12" in found["train_images"]
    assert "channels was 1, is 2" in found["channels"] and "image_size was 8, is 9" in found["image_size"]
    assert all(found.values())


def test_order_of_classes_and_a_set_of_ones_own():
    before = described("fake", num_classes=3)
    other = before | {"classes": before["classes"][::-1]}
    assert changes(before, other) == ["the classes have another order"]
    rows = torch.utils.data.TensorDataset(torch.zeros(4, 1, 8, 8), torch.zeros(4, dtype=torch.long))
    own = catalog.Data(rows, None, rows, 3, 8, 1, ("a", "b", "c")).description
    assert own["parts"] == {"train": {"images": 4}, "test": {"images": 4}}


# Runs.

TINIEST = "--student plain2:width=0.125 --teacher plain2:width=0.125 --batch-size 6 --device cpu --quiet".split()


def command(folder, out, *more, method="ce", epochs=1):
    words = ["train", "--method", method, "--epochs", str(epochs), "--data", f"imagefolder:{folder}"]
    return [*words, "--out", str(out), *TINIEST, *more]


def test_a_run_goes_on_with_its_data_only(tmp_path, folder, capfd):
    """Every kind of change stops it in one sentence; with the old data it goes on with the same bits."""
    original, out = shutil.copytree(folder, tmp_path / "original"), tmp_path / "run"
    assert main(command(folder, out)) == main(command(folder, tmp_path / "whole", epochs=2)) == 0
    before = (out / same_data.FILE).read_bytes()
    for change, expected in FOLDER_CHANGES.items():
        change(folder)
        assert main(command(folder, out, "--resume", epochs=2)) == 2
        error = capfd.readouterr().err
        assert error.startswith(f"fastkd: {out} has trained on other data ({expected}): put them back"), error
        assert error.count("\n") == 1 and (out / same_data.FILE).read_bytes() == before
        shutil.rmtree(folder)
        shutil.copytree(original, folder)
    assert main(command(folder, out, "--resume", epochs=2)) == 0
    assert rows_without_times(out) == rows_without_times(tmp_path / "whole")


def test_what_is_known_to_be_the_same_goes_on(tmp_path, folder, capfd):
    out = tmp_path / "run"
    assert main(command(folder, out)) == 0
    file_more(folder)
    (out / same_data.FILE).unlink()  # as the error says; and as a run of an earlier version has none
    assert main(command(folder, out, "--resume", epochs=2)) == 0
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and f"note: {out}: no data.json tells on which data this has trained so far" in said
    assert main(command(folder, out, "--resume", epochs=3)) == 0
    assert not capfd.readouterr().err
    (out / same_data.FILE).write_text("{")
    assert main(command(folder, out, "--resume", epochs=4)) == 2
    assert f"{out / same_data.FILE} is damaged: delete it" in capfd.readouterr().err


def test_another_number_of_classes_in_a_run_without_a_record(tmp_path, folder, capfd):
    out = tmp_path / "run"
    assert main(command(folder, out)) == 0
    (out / same_data.FILE).unlink()
    class_more(folder)
    assert main(command(folder, out, "--resume", epochs=2)) == 2
    assert f"{out} has trained on other data (num_classes was 2, is 3)" in capfd.readouterr().err


def test_a_run_that_has_not_trained_takes_the_new_data(tmp_path, folder, capfd):
    """As where an image could not be read, and was replaced as the error says."""
    out, path = tmp_path / "run", folder / "train" / "dark" / "002.png"
    content = path.read_bytes()
    path.write_bytes(b"no image")
    assert main(command(folder, out)) == 2 and (out / same_data.FILE).exists()
    path.write_bytes(content)
    assert main(command(folder, out, "--resume")) == 0
    assert json.loads((out / same_data.FILE).read_text()) == described(f"imagefolder:{folder}")


def test_trained_guides_are_those_of_the_data(tmp_path, folder):
    """After a class was renamed, the first run's teacher knows the labels the wrong way round."""
    settings = dict(method="kd", data=f"imagefolder:{folder}", train_size=None, cache=str(tmp_path / "cache"))
    settings |= dict(batch_size=4, epochs=6, guide_epochs=12, augment=False, teacher="plain2:width=0.25")

    def teachers():
        return {path.name: path.stat().st_mtime_ns for path in (tmp_path / "cache").iterdir()}

    first = run(config(tmp_path, out=str(tmp_path / "a"), **settings))
    assert first["teacher"].rows[-1]["test_accuracy"] == 1
    before = teachers()
    run(config(tmp_path, out=str(tmp_path / "again"), **settings))
    assert list(teachers()) == list(before) and len(before) == 1
    class_renamed(folder)
    second = run(config(tmp_path, out=str(tmp_path / "b"), **settings))
    assert len(teachers()) == 2
    test = data.load(f"imagefolder:{folder}", augment=False).test
    images, labels = torch.stack([image for image, _ in test]), torch.tensor([label for _, label in test])
    with torch.no_grad():
        right = (second["teacher"].network.eval()(images).argmax(1) == labels).float().mean()
    assert right == second["teacher"].rows[-1]["test_accuracy"] == 1
    assert second["student"].rows[-1]["test_accuracy"] > 0.5


def test_python_sees_a_folder_that_changes_within_one_process(tmp_path, folder):
    settings = dict(data=f"imagefolder:{folder}", train_size=None, epochs=1)
    run(config(tmp_path, **settings))
    file_less(folder)
    with pytest.raises(UserError, match="train: class light has 5 files, had 6"):
        run(config(tmp_path, resume=True, **settings | {"epochs": 2}))


def test_another_split_stops_a_run_from_python(tmp_path):
    run(config(tmp_path))
    with pytest.raises(UserError, match="the split: other images are in train"):
        run(config(tmp_path, resume=True, epochs=3, seed=5))
    assert last_state(tmp_path / "run")["epoch"] == 2


# Several processes.


class Two(World):
    """Two processes, the other one with data of its own."""

    def gather(self, value):
        return [value, same_data._without_times(self.group)]

    def broadcast(self, function):
        return function()


@pytest.mark.parametrize("many", [False, True])
def test_processes_have_the_same_data(tmp_path, monkeypatch, folder, many):
    if many:
        monkeypatch.setattr(description, "BY_CONTENT", -1)
    mine = described(f"imagefolder:{folder}")
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)  # with other times
    same_data.check_alike(Two(0, 2, described(f"imagefolder:{copy}")), mine)
    file_less(copy)
    message = r"process 1 of this run has other data than the first one \(train: class light has 5 files, had 6\)"
    with pytest.raises(UserError, match=message):
        same_data.check_alike(Two(0, 2, described(f"imagefolder:{copy}")), mine)


# Comparisons.


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr("fastkd.runs.compare.ROUNDS", 1)
    monkeypatch.setattr("fastkd.runs.compare.draw", lambda comparison, path: None)


def comparison(folder, out, *more, methods="ce,kd", seeds="0"):
    words = ["compare", "--methods", methods, "--seeds", seeds, "--epochs", "1", "--guide-epochs", "1"]
    return [*words, "--data", f"imagefolder:{folder}", "--out", str(out), *TINIEST, *more]


def test_a_comparison_goes_on_with_its_data_only(tmp_path, folder, capfd, quick):
    out = tmp_path / "compare"
    assert main(comparison(folder, out)) == 0
    capfd.readouterr()
    class_renamed(folder)
    # The new seed comes first, and is not trained either.
    assert main(comparison(folder, out, "--resume", seeds="1,0")) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and f"{out}/runs/ce-seed0 has trained on other data (the classes are others" in error
    assert sorted(os.listdir(out / "runs")) == ["ce-seed0", "kd-seed0"]
    assert "seeds:\n- 0\n" in (out / "config.yaml").read_text()  # what was refused is not kept
    for name in ("ce", "kd"):
        (out / "runs" / f"{name}-seed0" / same_data.FILE).unlink()
    assert main(comparison(folder, out, "--resume")) == 0
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and "ce-seed0" in said and "kd-seed0: no data.json tells" in said


def test_a_comparison_takes_more_seeds_and_methods(tmp_path, folder, capfd, quick):
    out = tmp_path / "compare"
    assert main(comparison(folder, out, methods="ce")) == 0
    first = out / "runs" / "ce-seed0" / "checkpoints" / "epoch-0001.pt"
    before = first.read_bytes(), first.stat().st_mtime_ns
    assert main(comparison(folder, out, "--resume", methods="ce", seeds="0,1")) == 0
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 2
    assert main(comparison(folder, out, "--resume", methods="ce,kd", seeds="0,1")) == 0
    assert sorted(os.listdir(out / "runs")) == ["ce-seed0", "ce-seed1", "kd-seed0", "kd-seed1"]
    assert (first.read_bytes(), first.stat().st_mtime_ns) == before
    assert len((out / "results.csv").read_text().splitlines()) == 1 + 4
    capfd.readouterr()
    assert main(comparison(folder, out, "--resume", methods="ce,kd", seeds="1")) == 2
    assert "--seeds was [0, 1], now [1]" in capfd.readouterr().err


def test_options_that_may_grow():
    old = {"methods": ["ce", "kd"], "seeds": [0, 1], "lr": 0.1}
    assert not differences(old, old | {"seeds": [2, 1, 0], "methods": ["dgkd", "kd", "ce"]})
    assert differences(old, old | {"seeds": [0]}) == ["--seeds was [0, 1], now [0]"]
    assert differences(old, old | {"methods": ["ce"]}) == ["--methods was ['ce', 'kd'], now ['ce']"]
    assert CompareConfig().seeds == [0, 1, 2]


def test_a_note_of_what_is_left_out_comes_once_in_a_comparison(tmp_path, folder, capfd, quick):
    (folder / "train" / "dark" / "notes.txt").touch()
    assert main(comparison(folder, tmp_path / "compare", methods="ce", seeds="0,1")) == 0
    assert capfd.readouterr().err.count("not used are") == 1


def test_rows_are_numbers():
    """The rows of a split enter as int64, whatever type they have."""
    found = data.load("fake", train_images=8, test_images=4, image_size=8)
    expected = found.description
    found.train.rows = found.train.rows.astype(np.int32)
    del found.__dict__["description"]
    assert found.description == expected
