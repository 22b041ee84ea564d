"""Image files that are decoded once give the same batches as files that are decoded again and again."""

import numpy as np
import pytest
import torch
from PIL import Image

from fastkd import data
from fastkd.data import images
from fastkd.data.kept_images import KeptFiles
from fastkd.train import TrainConfig, UserError


@pytest.fixture
def folder(tmp_path):
    rng = np.random.default_rng(0)
    for part, count in (("train", 6), ("test", 2)):
        for name in ("dark", "light"):
            (tmp_path / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (14, 11, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(tmp_path / part / name / f"{i}.png")
    return tmp_path


def epoch(part, number: int = 0):
    batches = data.loader(part, 5, shuffle=True, seed=3)
    batches.sampler.set_epoch(number)
    return [*batches]


def test_batches_are_those_of_files_and_each_file_is_opened_once(folder, monkeypatch):
    options = dict(image_size=8, views=2, validation=4)
    plain = data.load(f"imagefolder:{folder}", **options)
    kept = data.load(f"imagefolder:{folder}", keep_images=True, **options)
    wanted = {part: [epoch(getattr(plain, part), e) for e in (0, 1)] for part in ("train", "validation", "test")}
    opened = []
    monkeypatch.setattr(images, "open_image", lambda path, real=images.open_image: opened.append(path) or real(path))
    for part, epochs in wanted.items():
        for number, batches in enumerate(epochs):
            for (x, y), (a, b) in zip(epoch(getattr(kept, part), number), batches, strict=True):
                assert torch.equal(y, b) and all(map(torch.equal, x, a) if part == "train" else [torch.equal(x, a)])
    assert len(opened) == len(set(opened)) == 16
    assert kept.train.facts() == plain.train.facts()


def test_a_file_that_cannot_be_read_is_left_out_in_each_epoch(folder):
    (folder / "train" / "dark" / "0.png").write_bytes(b"none")
    kept = data.load(f"imagefolder:{folder}", image_size=8, keep_images=True, bad_images="skip")
    batches = data.loader(kept.train, 4, shuffle=False)
    for _ in range(2):
        assert [len(target) for _, target in batches] == [3, 4, 4]
        assert [*batches.unreadable] == [str(folder / "train" / "dark" / "0.png")]
    strict = data.load(f"imagefolder:{folder}", image_size=8, keep_images=True)
    with pytest.raises(ValueError, match=r"0.png cannot be read"):
        [*data.loader(strict.train, 4, shuffle=False)]


def test_large_images_and_data_in_memory_stay_as_they_are(folder):
    assert not isinstance(data.load(f"imagefolder:{folder}", image_size=96, keep_images=True).train.store, KeptFiles)
    assert data.load("digits", keep_images=True).train.facts() == data.load("digits").train.facts()


def test_validation_may_be_a_number_of_images_and_workers_keep_nothing():
    assert TrainConfig(validation=100.0).validation == 100
    for wrong in (1.5, -1, float("nan"), float("inf")):
        with pytest.raises(UserError, match="a fraction from 0 to below 1 or a number of images"):
            TrainConfig(validation=wrong)
    with pytest.raises(UserError, match="--keep-images needs --workers 0, got 2"):
        TrainConfig(keep_images=True, workers=2)
