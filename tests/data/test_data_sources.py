"""Data sets by name: their layouts on the disk, and what is said when something is missing or wrong."""

import importlib
import subprocess
import sys

import numpy as np
import pytest
import torch
from data_helpers import cifar, image_folder, tiny_imagenet, write_images
from PIL import Image

from fastkd import data
from fastkd.data.images import Augmentation, Files


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


@pytest.fixture
def tiny(tmp_path):
    return tiny_imagenet(tmp_path)


def stacked(dataset):
    return torch.stack([image for image, _ in dataset])


def labels_of(dataset):
    return [label for _, label in dataset]


def test_augmentation_leaves_the_global_generators_alone(folder):
    sets = [data.load("digits").train, data.load(f"imagefolder:{folder}", image_size=96).train]
    torch.manual_seed(0)
    np.random.seed(0)
    expected = torch.rand(1), np.random.rand()
    torch.manual_seed(0)
    np.random.seed(0)
    for each in sets:
        each[0], each[1]
    assert (torch.rand(1), np.random.rand()) == expected


@pytest.mark.parametrize("name, classes", [("cifar10", 10), ("cifar100", 100)])
def test_cifar(tmp_path, monkeypatch, name, classes):
    import torchvision

    cifar(tmp_path, name)
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "_check_integrity", lambda self: True)
    monkeypatch.setattr("torchvision.datasets.cifar.check_integrity", lambda *_: True)
    got = data.load(name, root=tmp_path, augment=False)
    assert (got.num_classes, got.image_size, got.channels) == (classes, 32, 3)
    assert (len(got.train), len(got.test)) == (20, 10) and got.classes[1] == "c1"
    raw = torch.from_numpy(getattr(torchvision.datasets, name.upper())(str(tmp_path)).data[3])  # [32, 32, 3]
    image = got.train[3][0] * got.train.std + got.train.mean
    torch.testing.assert_close(image, raw.permute(2, 0, 1) / 255)
    assert data.load(name, root=tmp_path).train.augmentation == Augmentation(padding=4, flip=True)


def test_tiny_imagenet(tiny):
    got = data.load("tiny-imagenet", root=tiny)
    assert got.classes == ("n01", "n02", "n03") and (len(got.train), len(got.test)) == (12, 5)
    assert got.image_size == 64 and got.train[0][0].shape == (3, 64, 64)
    assert labels_of(got.test) == [0, 1, 2, 0, 1]
    assert sorted(labels_of(got.train)) == [0] * 4 + [1] * 4 + [2] * 4


def test_image_folder(folder):
    got = data.load(f"imagefolder:{folder}", augment=False)
    assert got.classes == ("dark", "light") and (len(got.train), len(got.test)) == (12, 6)
    assert (got.image_size, got.channels, got.validation) == (12, 3, None)
    image, label = got.train[0]
    expected = torch.from_numpy(np.array(Image.open(folder / "train" / "dark" / "000.png"))).permute(2, 0, 1) / 255
    torch.testing.assert_close(image * got.train.std + got.train.mean, expected)
    assert label == 0 and sorted(labels_of(got.test)) == [0, 0, 0, 1, 1, 1]
    assert len(data.load(f"imagefolder:{folder}", validation=0.5).validation) == 6


def test_image_folder_with_val(folder):
    (folder / "test").rename(folder / "val")
    assert len(data.load(f"imagefolder:{folder}").test) == 6
    write_images(folder / "test" / "dark", 1)
    write_images(folder / "test" / "light", 2)
    got = data.load(f"imagefolder:{folder}", train_size=4)
    assert (len(got.train), len(got.validation), len(got.test)) == (4, 6, 3)
    assert got.validation.augmentation is None


@pytest.mark.parametrize("size", [8, 12, 96])
def test_files_of_any_shape_become_square(tmp_path, size):
    for part in ("train", "test"):
        write_images(tmp_path / part / "wide", 1, (40, 20))
        write_images(tmp_path / part / "tall", 1, (15, 30))
    Image.new("L", (9, 9)).save(tmp_path / "train" / "tall" / "grey.png")
    got = data.load(f"imagefolder:{tmp_path}", image_size=size, views=2)
    assert all(v.shape == (3, size, size) for views, _ in got.train for v in views)
    assert stacked(got.test).shape == (2, 3, size, size)
    assert got.train.augmentation.resized_crop == (size == 96)


def test_resized_crops_are_reproducible_and_differ(folder):
    def images(epoch):
        train = data.load(f"imagefolder:{folder}", image_size=96, views=2).train
        train.set_epoch(epoch)
        return [train[i][0] for i in range(3)]

    assert all(torch.equal(a, b) for x, y in zip(images(0), images(0), strict=True) for a, b in zip(x, y, strict=True))
    assert not torch.equal(images(0)[0][0], images(0)[0][1]) and not torch.equal(images(0)[0][0], images(1)[0][0])


def test_large_pictures_default_to_224(tmp_path):
    for part in ("train", "test"):
        write_images(tmp_path / part / "a", 1, (120, 100))
        write_images(tmp_path / part / "b", 1, (12, 12))
    assert data.load(f"imagefolder:{tmp_path}").image_size == 224


def test_fake_data_can_be_learnt():
    got = data.load("fake", image_size=8, num_classes=4, channels=1, train_images=200, test_images=100, augment=False)
    assert (got.num_classes, got.channels, got.image_size) == (4, 1, 8) and len(got.test) == 100
    x, y = stacked(got.train).flatten(1), torch.tensor(labels_of(got.train))
    means = torch.stack([x[y == c].mean(0) for c in range(4)])
    nearest = torch.cdist(stacked(got.test).flatten(1), means).argmin(1)
    assert (nearest == torch.tensor(labels_of(got.test))).float().mean() > 0.9
    assert torch.equal(x, stacked(data.load("fake", image_size=8, num_classes=4, channels=1, train_images=200,
                                            test_images=100, augment=False, seed=9).train).flatten(1))  # fmt: skip
    assert data.load("fake").train[0][0].shape == (3, 32, 32)


def test_names_and_spellings(tiny):
    assert data.names() == ["digits", "cifar10", "cifar100", "tiny-imagenet", "fake", "imagefolder"]
    assert len(data.load("Tiny_ImageNet-200", root=tiny).test) == 5
    assert data.load("Digits").channels == 1


@pytest.mark.parametrize(
    "name, options, error, words",
    [
        ("cifra10", {}, ValueError, ["cifra10", "did you mean cifar10", "imagefolder:DIR"]),
        ("digits:x", {}, ValueError, ["digits:x"]),
        (3, {}, TypeError, ["name", "int"]),
        ("imagefolder", {}, ValueError, ["imagefolder:DIR"]),
        ("imagefolder:/no/such/place", {}, FileNotFoundError, ["/no/such/place"]),
        ("digits", {"train_size": 2000}, ValueError, ["train_size", "2000", "1258"]),
        ("digits", {"train_size": 1258, "validation": 8}, ValueError, ["1250", "after 8 for validation"]),
        ("digits", {"train_size": 0}, ValueError, ["train_size", "0"]),
        ("digits", {"validation": 1.0}, ValueError, ["validation", "1.0"]),
        ("digits", {"validation": -1}, ValueError, ["validation", "-1"]),
        ("digits", {"validation": 1258}, ValueError, ["validation", "1258", "1 to 1257"]),
        ("digits", {"validation": 1e-6}, ValueError, ["validation", "takes 0"]),
        ("digits", {"views": 0}, ValueError, ["views", "0"]),
        ("digits", {"views": 1.5}, ValueError, ["views", "1.5"]),
        ("digits", {"views": None}, ValueError, ["views", "None"]),
        ("digits", {"seed": -1}, ValueError, ["seed", "-1"]),
        ("digits", {"image_size": True}, ValueError, ["image_size", "True"]),
        ("digits", {"num_classes": 3}, TypeError, ["num_classes", "none of its own"]),
        ("fake", {"classes": 3}, TypeError, ["classes", "num_classes"]),
        ("fake", {"num_classes": 0}, ValueError, ["num_classes", "0"]),
        ("cifar10", {}, FileNotFoundError, ["CIFAR10", "download=True"]),
        ("tiny-imagenet", {}, FileNotFoundError, ["tiny-imagenet-200", "unzip"]),
    ],
)
def test_wrong_calls_say_what_to_do(tmp_path, name, options, error, words):
    with pytest.raises(error) as caught:
        data.load(name, root=tmp_path, **options)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


def no_train(folder):
    (folder / "train").rename(folder / "training")


def no_test(folder):
    (folder / "test").rename(folder / "evaluation")


def another_class(folder):
    write_images(folder / "train" / "extra", 1)


def empty_class(folder):
    for part in ("train", "test"):
        (folder / part / "empty").mkdir()


def no_classes(folder):
    (folder / "train").rename(folder / "old")
    (folder / "train").mkdir()


def own_val(folder):
    write_images(folder / "val" / "dark", 1)
    write_images(folder / "val" / "light", 1)


def damaged(folder):
    (folder / "train" / "dark" / "000.png").write_bytes(b"not an image")


@pytest.mark.parametrize(
    "spoil, error, words",
    [
        (no_train, FileNotFoundError, ["train/", "test/ or val/"]),
        (no_test, FileNotFoundError, ["train/", "test/ or val/"]),
        (another_class, ValueError, ["differ", "only in train: extra", "only in test: none"]),
        (empty_class, FileNotFoundError, ["no images for empty", ".png"]),
        (no_classes, FileNotFoundError, ["no class folders"]),
        (own_val, ValueError, ["own val/", "validation"]),
        (damaged, ValueError, ["000.png", "cannot be read"]),
    ],
)
def test_bad_image_folders(folder, spoil, error, words):
    spoil(folder)
    with pytest.raises(error) as caught:
        data.load(f"imagefolder:{folder}", validation=0.25)
    message = str(caught.value)
    assert all(word in message for word in words) and "\n" not in message, message


@pytest.mark.parametrize(
    "spoil, error, words",
    [
        (
            lambda d: (d / "val" / "val_annotations.txt").unlink(),
            FileNotFoundError,
            ["_annotations.txt", "imagefolder"],
        ),
        (lambda d: (d / "val" / "images" / "000.png").unlink(), FileNotFoundError, ["5 images", "1 are missing"]),
        (lambda d: (d / "train" / "n02").rename(d / "n02"), ValueError, ["without a train folder", "n02"]),
    ],
)
def test_bad_tiny_imagenet(tiny, spoil, error, words):
    spoil(tiny / "tiny-imagenet-200")
    with pytest.raises(error) as caught:
        data.load("tiny-imagenet", root=tiny)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_no_network(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise OSError("Network is unreachable")

    monkeypatch.setattr("urllib.request.urlopen", refuse)
    with pytest.raises(FileNotFoundError, match=r"could not be downloaded .*Network is unreachable.*connect"):
        data.load("cifar10", root=tmp_path, download=True)


@pytest.mark.parametrize(
    "package, name, shown", [("sklearn", "digits", "scikit-learn"), ("PIL", "imagefolder:", "pillow")]
)
def test_a_missing_package_is_named_with_its_extra(monkeypatch, folder, package, name, shown):
    real = importlib.import_module

    def pretend(module, *args):
        if module.split(".")[0] == package:
            raise ModuleNotFoundError(f"No module named {package!r}")
        return real(module, *args)

    monkeypatch.setattr(importlib, "import_module", pretend)
    with pytest.raises(ImportError) as caught:
        data.load(f"{name}{folder}" if name.endswith(":") else name)
    assert shown in str(caught.value) and 'pip install ".[train]"' in str(caught.value)


def test_import_needs_neither_torchvision_nor_scikit_learn():
    blocked = "import sys; sys.modules.update(dict.fromkeys(['torchvision', 'sklearn', 'PIL'])); "
    code = blocked + "import fastkd.data, fastkd.models; print(fastkd.data.load('fake').num_classes)"
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True)
    assert (done.stdout, done.returncode) == ("10\n", 0), done.stderr


def test_files_store_reads_in_order(folder):
    paths = sorted(str(p) for p in (folder / "train" / "dark").iterdir())
    store = Files(paths, 12)
    both = store.render(store.fetch(np.array([2, 0])), None)
    assert both.dtype == torch.uint8 and both.shape == (2, 3, 12, 12)
    assert torch.equal(both[0].permute(1, 2, 0), torch.from_numpy(np.array(Image.open(paths[2]))))
