"""What stands in the folders of a data set: classes one level too deep, one class alone, what is left out."""

import os
import shutil
import warnings

import pytest
from data_helpers import image_folder, tiny_imagenet, write_images
from rights_helpers import without_privileges

from fastkd import data
from fastkd.cli import main


@pytest.fixture
def folder(tmp_path):
    return image_folder(tmp_path)


@pytest.fixture
def tiny(tmp_path):
    return tiny_imagenet(tmp_path)


def load(folder, **options):
    """The data, and what was said of them."""
    said = []
    return data.load(f"imagefolder:{folder}", note=said.append, **options), said


def refusal(folder, error=ValueError):
    with pytest.raises(error) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("parts", [("train", "test"), ("train",)])
def test_classes_one_level_too_deep(folder, parts):
    for part in parts:
        (folder / part).rename(folder / "deep")
        (folder / part).mkdir()
        (folder / "deep").rename(folder / part / "images")
    message = refusal(folder)
    assert "class folder images alone" in message and "(dark, light)" in message and "one level too deep" in message
    assert f"move them up into {folder}/train" in message


def test_one_class(folder):
    for part in ("train", "test"):
        shutil.rmtree(folder / part / "light")
    message = refusal(folder)
    assert f"{folder}/train has the class folder dark alone" in message and "needs two classes at least" in message
    with pytest.raises(ValueError, match="fake needs num_classes of at least 2, got 1"):
        data.load("fake", num_classes=1)


@pytest.mark.parametrize("part", ["train", "test"])
def test_folders_of_images_in_a_class_folder(folder, part):
    write_images(folder / part / "light" / "more" / "yellow", 1)
    message = refusal(folder)
    assert (
        f"the class folder {folder}/{part}/light holds folders of images (more)" in message and "move them" in message
    )


def test_folders_without_images_do_no_harm(folder):
    (folder / "train" / "light" / "notes").mkdir()
    (folder / "train" / "light" / "notes" / "a.txt").touch()
    found, said = load(folder)
    assert len(found.train) == 12 and not said


def test_tiny_imagenets_layout_is_one_class_a_folder(folder, tiny):
    for part in ("train", "test"):
        for name in ("dark", "light"):
            (folder / part / name).rename(folder / part / "images")
            (folder / part / name).mkdir()
            (folder / part / "images").rename(folder / part / name / "images")
    assert len(load(folder)[0].train) == 12
    write_images(folder / "train" / "dark" / "other", 1)
    assert "holds folders of images (images, other)" in refusal(folder)
    said = []
    base = tiny / "tiny-imagenet-200"
    (base / "train" / "n01" / "n01_boxes.txt").touch()  # part of the archive
    data.load("tiny-imagenet", root=tiny, note=said.append)
    assert not said
    (base / "train" / "n01" / "images" / "._000.JPEG").touch()
    data.load("tiny-imagenet", root=tiny, note=said.append)
    assert len(said) == 1 and "hidden files or folders: 1 (train/n01/images/._000.JPEG)" in said[0]
    for name in ("n02", "n03"):
        shutil.rmtree(base / "train" / name)
    (base / "val" / "val_annotations.txt").write_text("000.png\tn01\t0\t0\t9\t9\n")
    with pytest.raises(ValueError, match="class folder n01 alone: a network needs two classes"):
        data.load("tiny-imagenet", root=tiny)


def clutter(folder):
    """Four hidden ones, five files of other kinds, one beside the classes, three links that lead round."""
    dark = folder / "train" / "dark"
    for path in (folder / "train" / ".DS_Store", dark / "._000.png", folder / "test" / "light" / ".thumbs.png"):
        path.touch()
    write_images(folder / "train" / ".cache", 1)
    for name in ("a.gif", "b.txt", "c.PNG.bak", "d", "e.heic"):
        (dark / name).touch()
    shutil.copy(dark / "000.png", folder / "train" / "stray.png")
    (dark / "up").symlink_to(folder, target_is_directory=True)
    (dark / "self").symlink_to(dark, target_is_directory=True)
    (folder / "test" / "all").symlink_to(folder / "test", target_is_directory=True)


def test_what_is_left_out_is_counted_and_named_once(folder):
    clean, said = load(folder)
    assert not said
    clutter(folder)
    found, said = load(folder)
    assert found.train.store.paths == clean.train.store.paths and found.test.store.paths == clean.test.store.paths
    assert found.description == clean.description
    (text,) = said
    assert text.startswith(f"{folder}: not used are ") and "\n" not in text
    for part in (
        "hidden files or folders: 4 (test/light/.thumbs.png, train/.DS_Store, train/.cache and 1 more)",
        "files that do not end as images do: 5 (train/dark/a.gif, train/dark/b.txt, train/dark/c.PNG.bak and 2 more)",
        "files beside the class folders: 1 (train/stray.png)",
        "links to a folder that they stand in: 3 (test/all, train/dark/self, train/dark/up)",
    ):
        assert part in text, text
    with pytest.warns(UserWarning, match="not used are"):
        data.load(f"imagefolder:{folder}")
    shutil.rmtree(folder / "train" / ".cache")


def test_the_command_says_it_once(folder, tmp_path, capfd):
    clutter(folder)
    words = ["train", "--method", "kd", "--teacher", "plain2:width=0.125", "--student", "plain2:width=0.125"]
    words += ["--epochs", "1", "--device", "cpu", "--quiet", "--data", f"imagefolder:{folder}"]
    assert main([*words, "--out", str(tmp_path / "run")]) == 0
    assert capfd.readouterr().err.count("not used are") == 1


def test_links_to_folders_elsewhere_are_classes_and_circles_end(folder, tmp_path):
    expected = load(folder)[0]
    (folder / "train" / "light").rename(tmp_path / "elsewhere")
    (folder / "train" / "light").symlink_to(tmp_path / "elsewhere", target_is_directory=True)
    found, said = load(folder)
    assert [str(path) for path in found.train.store.paths] == expected.train.store.paths and not said
    for one, other in (("left", "right"), ("right", "left")):  # each holds a link to the other
        (tmp_path / one).mkdir()
        (tmp_path / one / other).symlink_to(tmp_path / other, target_is_directory=True)
    (folder / "train" / "dark" / "round").symlink_to(tmp_path / "left", target_is_directory=True)
    assert load(folder)[0].train.store.paths == expected.train.store.paths


def test_a_clean_folder_gives_no_warning(folder):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.load(f"imagefolder:{folder}")


@pytest.mark.parametrize("place", ["train", "train/light", "test/light"])
def test_a_folder_that_may_not_be_read(folder, tmp_path, capfd, place):
    path = folder / place
    path.chmod(0o311)
    try:
        with without_privileges():
            assert f"the folder {path} cannot be read (Permission denied): give the right" in refusal(folder)
            words = ["train", "--method", "ce", "--data", f"imagefolder:{folder}", "--out", str(tmp_path / "run")]
            assert main(words) == 2
            error = capfd.readouterr().err
            assert error.startswith(f"fastkd: the folder {path} cannot be read") and error.count("\n") == 1
    finally:
        os.chmod(path, 0o755)


def write_points(folder):
    """Images of one pixel."""
    from PIL import Image

    for part in ("train", "test"):
        for name, shade in (("dark", 20), ("light", 230)):
            (folder / part / name).mkdir(parents=True)
            for number in range(4):
                Image.new("RGB", (1, 1), (shade + number,) * 3).save(folder / part / name / f"{number}.png")


def test_images_of_one_pixel(tmp_path, capfd):
    write_points(tmp_path / "points")
    words = ["train", "--method", "ce", "--student", "plain2:width=0.125", "--epochs", "1", "--device", "cpu"]
    words += ["--quiet", "--data", f"imagefolder:{tmp_path / 'points'}", "--out", str(tmp_path / "run")]
    assert main(words) == 2
    error = capfd.readouterr().err
    assert error.count("\n") == 1 and "the shorter side of the first image has 1 of the 8 pixels" in error
    assert "give --image-size" in error
    assert main([*words, "--image-size", "8"]) == 0
    assert data.load(f"imagefolder:{tmp_path / 'points'}", image_size=96).train[0][0].shape == (3, 96, 96)
