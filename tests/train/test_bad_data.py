"""Images that cannot be read and labels that are none: named, and left out where that was asked for."""

import errno
import math
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from test_resume import StopAt
from torch.utils.data import TensorDataset
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import data
from fastkd.cli import main
from fastkd.data.images import UnreadableImage, open_image
from fastkd.methods import CE
from fastkd.train import Fit, Interrupted, UserError
from fastkd.train.bad_images import FILE
from fastkd.train.metrics import read_csv
from fastkd.train.task import Setup, Task


def empty(path):
    path.write_bytes(b"")


def no_image(path):
    path.write_bytes(b"this is no image " * 9)


def truncated(path):
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def broken_chunk(path):
    """The checksum of a chunk of the PNG is wrong."""
    content = path.read_bytes()
    path.write_bytes(content.replace(b"IDAT", b"IDAX", 1))


def gone(path):
    path.unlink()


DAMAGES = [empty, no_image, truncated, broken_chunk, gone]


def write_images(folder, count, seed):
    rng = np.random.default_rng(seed)
    for number in range(count):
        label = number % 2
        path = folder / ("dark", "light")[label] / f"{number:03}.{('png', 'jpg')[number // 2 % 2]}"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 60, (12, 12, 3)) + 180 * label
        Image.fromarray(pixels.astype(np.uint8)).save(path)


@pytest.fixture
def folder(tmp_path):
    """12 x 12 images: 26 to train on and 10 to test on, in two classes, as PNG and JPEG."""
    for part, count, seed in (("train", 26, 0), ("test", 10, 1)):
        write_images(tmp_path / "set" / part, count, seed)
    return tmp_path / "set"


def train_files(folder):
    return sorted(path for path in (folder / "train").rglob("*") if path.is_file())


def batches_of(loader):
    return [(images, labels.tolist()) for images, labels in loader]


@pytest.mark.parametrize("damage", DAMAGES)
def test_unreadable_file_is_named(folder, damage):
    found = data.load(f"imagefolder:{folder}")
    path = train_files(folder)[2]  # a PNG
    damage(path)
    with pytest.raises(UnreadableImage) as error:
        open_image(str(path))
    assert str(error.value).startswith(f"image {path} cannot be read (") and "\n" not in str(error.value)
    with pytest.raises(ValueError, match=path.name):
        found.train[2]
    for workers in (0, 1):
        with pytest.raises(ValueError, match="cannot be read") as error:
            batches_of(data.loader(found.train, 8, shuffle=True, workers=workers))
        # The same sentence out of a worker: no traceback of its own in the message.
        assert str(error.value).startswith(f"image {path} cannot be read (") and "\n" not in str(error.value)


def test_what_is_not_the_files_fault_is_no_bad_image(folder, monkeypatch):
    def too_many(path):
        raise OSError(errno.EMFILE, "Too many open files")

    found = data.load(f"imagefolder:{folder}", bad_images="skip")
    monkeypatch.setattr(Image, "open", too_many)
    with pytest.raises(OSError, match="Too many open files"):
        batches_of(data.loader(found.train, 8, shuffle=True))


@pytest.mark.parametrize("views", [1, 2])
@pytest.mark.parametrize("workers", [0, 2])
def test_skipped_images_are_missing_from_their_batches_only(folder, views, workers):
    def load(**options):
        found = data.load(f"imagefolder:{folder}", views=views, image_size=12, **options)
        return data.loader(found.train, 8, shuffle=True, seed=3, workers=workers)

    whole = load()
    batches = batches_of(whole)
    whole.sampler.set_epoch(0)
    whole.sampler.start()
    indices = list(iter(whole.sampler))
    loader = load(bad_images="skip")
    files, bad = train_files(folder), [indices[1], indices[2], indices[20]]
    for index, damage in zip(bad, (truncated, no_image, gone), strict=True):
        damage(files[index])
    found = batches_of(loader)
    assert [len(labels) for _, labels in found] == [6, 8, 7, 2]
    for number, (images, labels) in enumerate(found):
        kept = [i for i, index in enumerate(indices[8 * number : 8 * number + 8]) if index not in bad]
        expected, expected_labels = batches[number]
        assert labels == [expected_labels[i] for i in kept]
        for one, other in zip(images, expected, strict=True) if views > 1 else [(images, expected)]:
            assert torch.equal(one, other[kept])
    assert loader.lost == 3 and loader.taken == 4
    assert set(loader.unreadable) == {str(files[index]) for index in bad}


def test_batch_that_lost_too_many_is_left_out(folder):
    for path in train_files(folder)[1:8]:  # of the first batch of 8 one is left
        no_image(path)
    found = data.load(f"imagefolder:{folder}", bad_images="skip").train
    lengths = [len(labels) for _, labels in data.loader(found, 8, shuffle=False)]
    assert lengths == [1, 8, 8, 2]
    loader = data.loader(found, 8, shuffle=False, smallest=2)
    assert [len(labels) for _, labels in loader] == [8, 8, 2] and (loader.taken, loader.lost) == (4, 7)


def test_nothing_readable_is_an_error(folder):
    for path in train_files(folder):
        no_image(path)
    found = data.load(f"imagefolder:{folder}", bad_images="skip", image_size=12).train
    with pytest.raises(ValueError, match=r"none of the 26 images of an epoch could be used: .*cannot identify"):
        batches_of(data.loader(found, 8, shuffle=True))
    with pytest.raises(ValueError, match="cannot be read"):  # the first image tells the size
        data.load(f"imagefolder:{folder}", bad_images="skip")


def test_size_is_that_of_the_first_image_that_can_be_read(folder):
    no_image(train_files(folder)[0])
    assert data.load(f"imagefolder:{folder}", bad_images="skip").image_size == 12
    with pytest.raises(ValueError, match=r"000.png cannot be read"):
        data.load(f"imagefolder:{folder}")
    with pytest.raises(ValueError, match="bad_images must be 'error' or 'skip', got 'ignore'"):
        data.load(f"imagefolder:{folder}", bad_images="ignore")


@pytest.mark.parametrize("known", [True, False])
def test_a_pass_that_goes_on_has_the_rest_of_its_batches(known):
    """Without loading what comes before again, where the data set is one of ours."""
    images = data.load("digits", train_size=50).train
    loaded = []

    class Foreign(torch.utils.data.Dataset):
        def __len__(self):
            return len(images)

        def __getitem__(self, index):
            loaded.append(index)
            return images[index]

    if known:
        images.read = lambda indices, read=images.read: (loaded.extend(indices), read(indices))[1]
    loader = data.loader(images if known else Foreign(), 8, shuffle=True, seed=2)
    loader.sampler.set_epoch(5)
    expected = batches_of(loader)
    loaded.clear()
    found = batches_of(loader.go_on(5, 3))
    assert len(loaded) == (50 - 24 if known else 50)
    assert len(found) == 4 and loader.taken == 7
    for (one, labels), (other, others) in zip(found, expected[3:], strict=True):
        assert labels == others and (torch.equal(one, other) or not known)  # Foreign is not told the epoch
    assert len(batches_of(loader)) == 7  # the next pass is a whole one


# Runs.


def folder_config(tmp_path, folder, **options):
    facts = dict(data=f"imagefolder:{folder}", train_size=None, batch_size=8, epochs=3, bad_images="skip")
    return config(tmp_path, **facts | options)


def test_run_counts_names_and_leaves_out(tmp_path, folder, capfd):
    files = train_files(folder)
    bad = [files[2], files[9], next((folder / "test").rglob("*.jpg"))]
    for path, damage in zip(bad, (truncated, empty, truncated), strict=True):
        damage(path)
    for workers in (0, 2):
        out = str(tmp_path / f"workers{workers}")
        run(folder_config(tmp_path, folder, out=out, workers=workers, eval_every=3))
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 4, said  # the training images after the first epoch, the test image when it was looked at
    assert said[0].startswith("fastkd: note: 2 images cannot be read and left out: ") and str(files[2]) in said[0]
    assert said[1].startswith("fastkd: note: 1 image cannot be read") and f"{bad[2]} (" in said[1]
    for row in read_csv(tmp_path / "workers0" / "metrics.csv"):
        assert row["train_bad_images"] == 2
        assert row["test_bad_images"] == 1 if row["epoch"] == 3 else math.isnan(row["test_bad_images"])
    assert_same(last_state(tmp_path / "workers0"), last_state(tmp_path / "workers2"))
    assert rows_without_times(tmp_path / "workers0") == rows_without_times(tmp_path / "workers2")
    lines = (tmp_path / "workers0" / FILE).read_text().splitlines()
    assert [line.split(": ")[0] for line in lines] == sorted(map(str, bad))


def test_interrupted_run_that_leaves_out_images_goes_on_with_the_same_bits(tmp_path, folder, monkeypatch):
    files = train_files(folder)
    for path in files[:12:2]:
        empty(path)
    options = dict(image_size=12, batch_size=4)  # 7 batches, some of them too small
    run(folder_config(tmp_path, folder, out=str(tmp_path / "whole"), **options))
    whole = last_state(tmp_path / "whole")
    listed = (tmp_path / "whole" / FILE).read_text()
    for step in (1, 4, whole["step"] - 2):
        out = tmp_path / f"run{step}"
        with monkeypatch.context() as patch:
            StopAt(patch, step)
            with pytest.raises(Interrupted):
                run(folder_config(tmp_path, folder, out=str(out), **options))
        run(folder_config(tmp_path, folder, out=str(out), resume=True, **options))
        assert_same(last_state(out), whole)
        assert rows_without_times(out) == rows_without_times(tmp_path / "whole")
        assert (out / FILE).read_text() == listed


def test_more_bad_images_than_a_note_names(tmp_path, folder, capfd):
    for path in train_files(folder)[:9]:
        empty(path)
    run(folder_config(tmp_path, folder, image_size=12, epochs=1))
    said = capfd.readouterr().err
    assert "9 images cannot be read" in said and "and 4 more; all are listed in " in said and said.count("\n") == 1
    assert len((tmp_path / "run" / FILE).read_text().splitlines()) == 9


@pytest.mark.parametrize("workers", ["0", "2"])
def test_command_stops_with_one_line_and_goes_on_with_skip(tmp_path, folder, capfd, workers):
    bad = train_files(folder)[7]
    truncated(bad)
    words = f"train --method ce --epochs 1 --student plain2 --batch-size 8 --device cpu --quiet --workers {workers}"
    words = [*words.split(), "--data", f"imagefolder:{folder}", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.startswith(f"fastkd: image {bad} cannot be read (") and error.count("\n") == 1, error
    assert main([*words, "--resume", "--bad-images", "skip"]) == 0
    assert f"1 image cannot be read and left out: {bad} (" in capfd.readouterr().err


# Labels.


def labelled(train, test=(0, 1, 2)):
    """Images of one channel that know nothing of classes, and say there are 3."""

    def images(labels):
        return TensorDataset(torch.randn(len(labels), 1, 8, 8), torch.tensor(labels))

    return data.Data(images(train), None, images(test), 3, 8, 1, ("a", "b", "c"))


class Net(torch.nn.Sequential):
    def __init__(self):
        super().__init__(torch.nn.Flatten(), torch.nn.Linear(64, 3))


@pytest.mark.parametrize("train, test", [([0, 1, 3, 2], [0]), ([0, 1, -1, 2], [0]), ([0, 1, 2, 2], [0, 3])])
@pytest.mark.parametrize("workers", [0, 1])
def test_label_out_of_range_in_somebodys_data(tmp_path, train, test, workers):
    settings = config(tmp_path, workers=workers)
    fit = Fit(CE(Net()), labelled(train, test), Setup.here(settings), Task("student", 1))
    with pytest.raises(UserError, match=r"the data hold the label (3|-1), but there are 3 classes \(0 to 2\)"):
        fit.run()


def test_label_that_counts_nowhere_is_no_error(tmp_path):
    fit = Fit(CE(Net()), labelled([0, -100, 2, 1]), Setup.here(config(tmp_path)), Task("student", 1))
    fit.run()


def test_label_out_of_range_in_our_data(folder):
    found = data.load(f"imagefolder:{folder}")
    labels = found.train.labels.copy()
    labels[[5, 7]] = 2
    found.train.labels = labels
    with pytest.raises(ValueError, match=r"2 of 26 train images have a label .* 2 classes .* image 5 with label 2"):
        data.Data(found.train, None, found.test, 2, 12, 3, ("dark", "light"))


def test_folders_that_differ_or_are_empty_are_named_by_the_command(tmp_path, folder, capfd):
    def error():
        words = ["train", "--method", "ce", "--data", f"imagefolder:{folder}", "--out", str(tmp_path / "run")]
        assert main(words) == 2
        said = capfd.readouterr().err
        assert said.count("\n") == 1 and not (tmp_path / "run" / "config.yaml").exists()
        return said

    os.rename(folder / "test" / "light", folder / "test" / "bright")
    assert "only in train: light; only in test: bright" in error()
    os.rename(folder / "test" / "bright", folder / "test" / "light")
    write_images(folder / "val", 4, seed=2)
    shutil.rmtree(folder / "val" / "dark")
    said = error()
    assert f"{folder}/val differ" in said and "only in train: dark; only in val: none" in said
    (folder / "val" / "dark").mkdir()
    assert f"{folder}/val has no images for dark" in error()
    shutil.rmtree(folder / "val")
    for path in (folder / "train" / "light").iterdir():
        path.unlink()
    assert f"{folder}/train has no images for light" in error()
