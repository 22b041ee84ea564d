"""Where images come from: one function a data set, each returning a `Source`."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from fastkd._core.extras import require
from fastkd.data.decoding import UnreadableImage, open_image
from fastkd.data.folders import LeftOut, check_several, class_folders, labelled_files, listed
from fastkd.data.images import LARGE, Augmentation, BadImages, Files, InMemory
from fastkd.data.seeding import FAKE, stratified_order, stream

IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # mean and standard deviation of the channels
TINY_IMAGENET = (0.4802, 0.4481, 0.3975), (0.2770, 0.2691, 0.2821)
CIFAR = {
    "CIFAR10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "CIFAR100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}
DIGITS = (0.3053,), (0.3760,)
DIGITS_TEST = 0.3


@dataclass(frozen=True)
class Split:
    """Images and their labels. rows: those of the store that belong to this part, None for all."""

    store: InMemory | Files
    labels: np.ndarray  # int64 [N], of the whole store
    rows: np.ndarray | None = None


@dataclass(frozen=True)
class Source:
    """A data set before splitting, augmenting and normalising. left_out: what its folders hold beside, one sentence."""

    train: Split
    test: Split
    classes: tuple[str, ...]
    image_size: int
    channels: int
    mean: Sequence[float]
    std: Sequence[float]
    augmentation: Augmentation
    validation: Split | None = None
    left_out: str = ""


def digits(root: Path, download: bool, image_size: int | None) -> Source:
    """scikit-learn's 1797 handwritten digits, 8x8, one channel; a fixed 30 % of each class are the test images."""
    bunch = require("sklearn.datasets", "The digits data set").load_digits()
    images = torch.from_numpy(bunch.images).float().div(16).unsqueeze(1)  # [1797, 1, 8, 8] in 0..1
    labels = bunch.target.astype(np.int64)
    order = stratified_order(labels, 0)  # not the caller's seed: everybody is tested on the same images
    cut = round(DIGITS_TEST * len(labels))
    store = InMemory(images)
    return Source(
        train=Split(store, labels, np.sort(order[cut:])),
        test=Split(store, labels, np.sort(order[:cut])),
        classes=tuple(str(name) for name in bunch.target_names),
        image_size=image_size or 8,
        channels=1,
        mean=DIGITS[0],
        std=DIGITS[1],
        augmentation=Augmentation(padding=1),  # no flip: digits are not symmetric
    )


def _cifar(name: str, root: Path, download: bool, image_size: int | None) -> Source:
    build = getattr(require("torchvision.datasets", "CIFAR"), name)
    try:
        train, test = (build(str(root), train=part, download=download) for part in (True, False))
    except OSError as error:
        raise FileNotFoundError(
            f"{name} could not be downloaded ({error}); connect to the network, or put the unpacked archive into {root}"
        ) from error
    except RuntimeError as error:  # torchvision's for a missing or damaged folder
        advice = "delete it and download again" if download else "pass download=True, or put the unpacked archive there"
        raise FileNotFoundError(f"{name} was not found whole in {root}; {advice}") from error

    def part(data: Any) -> Split:
        images = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()  # uint8 [N, 3, 32, 32]
        return Split(InMemory(images), np.asarray(data.targets, dtype=np.int64))

    mean, std = CIFAR[name]
    return Source(
        train=part(train),
        test=part(test),
        classes=tuple(train.classes),
        image_size=image_size or 32,
        channels=3,
        mean=mean,
        std=std,
        augmentation=Augmentation(padding=4, flip=True),
    )


def cifar10(root: Path, download: bool, image_size: int | None) -> Source:
    """CIFAR-10 in memory, as torchvision keeps it under root/cifar-10-batches-py."""
    return _cifar("CIFAR10", root, download, image_size)


def cifar100(root: Path, download: bool, image_size: int | None) -> Source:
    """CIFAR-100 in memory, as torchvision keeps it under root/cifar-100-python."""
    return _cifar("CIFAR100", root, download, image_size)


def _file_augmentation(size: int) -> Augmentation:
    if size >= LARGE:
        return Augmentation(flip=True, resized_crop=True)
    return Augmentation(padding=size // 8, flip=True)


def _size_of(paths: Sequence[str], bad_images: BadImages = "error") -> int:
    """The shorter side of the first image if it is small, else 224."""
    for path in paths:
        try:
            shorter = min(open_image(path).size)
        except UnreadableImage:
            if bad_images == "error" or path == paths[-1]:
                raise
        else:
            return shorter if shorter < LARGE else 224
    raise ValueError("imagefolder: there must be at least one image, got none")


def tiny_imagenet(root: Path, download: bool, image_size: int | None) -> Source:
    """Tiny-ImageNet-200 in the layout of its archive; the labelled val images are the test images."""
    require("PIL.Image", "Reading images")
    folder = root / "tiny-imagenet-200"
    if not folder.is_dir():
        raise FileNotFoundError(
            f"tiny-imagenet was not found at {folder} and is not downloaded automatically; "
            f"get tiny-imagenet-200.zip from cs231n.stanford.edu and unzip it in {root}"
        )
    annotations = folder / "val" / "val_annotations.txt"
    if not (folder / "train").is_dir() or not annotations.is_file():
        raise FileNotFoundError(
            f"tiny-imagenet: {folder} lacks train/ or val/val_annotations.txt; "
            f"unzip the archive again, or use imagefolder:{folder} if val/ was sorted into class folders"
        )
    left = LeftOut(folder, usual=("_boxes.txt",))
    classes = class_folders(folder / "train", left)
    check_several(folder / "train", classes)
    index = {name: i for i, name in enumerate(classes)}
    rows = [line.split("\t") for line in annotations.read_text().splitlines() if line.strip()]
    unknown = sorted({row[1] for row in rows} - set(classes))
    if unknown:
        raise ValueError(f"tiny-imagenet: {annotations} names classes without a train folder: {listed(unknown)}")
    test_paths = [str(folder / "val" / "images" / row[0]) for row in rows]
    missing = [path for path in test_paths if not Path(path).is_file()]
    if missing or not test_paths:
        raise FileNotFoundError(
            f"tiny-imagenet: of the {len(test_paths)} images in {annotations} {len(missing)} are missing; unzip again"
        )
    train_paths, train_labels = labelled_files(folder / "train", classes, left)
    size = image_size or _size_of(train_paths, "skip")  # training tells which cannot be read
    return Source(
        train=Split(Files(train_paths, size), train_labels),
        test=Split(Files(test_paths, size), np.array([index[row[1]] for row in rows], dtype=np.int64)),
        classes=tuple(classes),
        image_size=size,
        channels=3,
        mean=TINY_IMAGENET[0],
        std=TINY_IMAGENET[1],
        augmentation=_file_augmentation(size),
        left_out=left.text(),
    )


def image_folder(folder: Path, image_size: int | None, bad_images: BadImages = "error") -> Source:
    """FOLDER/train/<class>/*, with FOLDER/test or FOLDER/val; where both are, val is the validation set.

    A class folder may hold one folder `images` instead, as Tiny-ImageNet's do, and no other folders of images.
    """
    require("PIL.Image", "Reading images")
    if not folder.is_dir():
        raise FileNotFoundError(f"imagefolder: there is no folder {folder}; write imagefolder:DIR with an existing DIR")
    held_out = [name for name in ("test", "val") if (folder / name).is_dir()]
    if not (folder / "train").is_dir() or not held_out:
        raise FileNotFoundError(
            f"imagefolder: {folder} must hold train/ and test/ or val/, each with one folder of images a class"
        )
    left, parts = LeftOut(folder), {}
    classes = class_folders(folder / "train", left)
    check_several(folder / "train", classes)
    for name in held_out:
        others = class_folders(folder / name, left)
        if others != classes:
            raise ValueError(
                f"imagefolder: the classes of {folder}/train and {folder}/{name} differ (only in train: "
                f"{listed(sorted(set(classes) - set(others))) or 'none'}; only in {name}: "
                f"{listed(sorted(set(others) - set(classes))) or 'none'}); give both the same class folders"
            )
    for name in ("train", *held_out):
        parts[name] = labelled_files(folder / name, classes, left)
    size = image_size or _size_of(parts["train"][0], bad_images)
    made = {name: Split(Files(paths, size), labels) for name, (paths, labels) in parts.items()}
    return Source(
        train=made["train"],
        test=made[held_out[0]],
        validation=made["val"] if len(held_out) == 2 else None,
        classes=tuple(classes),
        image_size=size,
        channels=3,
        mean=IMAGENET[0],
        std=IMAGENET[1],
        augmentation=_file_augmentation(size),
        left_out=left.text(),
    )


def fake(
    root: Path,
    download: bool,
    image_size: int | None,
    *,
    num_classes: int = 10,
    channels: int = 3,
    train_images: int = 512,
    test_images: int = 256,
) -> Source:
    """Made-up images that can be learnt: a blurred random pattern for each class, and noise.

    They are the same for every seed, as real data are.
    """
    if num_classes < 2:
        raise ValueError(f"load: fake needs num_classes of at least 2, got {num_classes}")
    size, labels = image_size or 32, np.arange(train_images + test_images) % num_classes
    rng = stream(0, FAKE)
    coarse = torch.from_numpy(rng.random((num_classes, channels, 4, 4), dtype=np.float32))
    patterns = F.interpolate(coarse, (size, size), mode="bilinear", align_corners=False)  # [classes, C, size, size]
    noise = torch.from_numpy(rng.random((len(labels), channels, size, size), dtype=np.float32))
    images = (255 * (0.5 * patterns[torch.from_numpy(labels)] + 0.5 * noise)).to(torch.uint8)
    return Source(
        train=Split(InMemory(images[:train_images]), labels[:train_images]),
        test=Split(InMemory(images[train_images:]), labels[train_images:]),
        classes=tuple(f"class {i}" for i in range(num_classes)),
        image_size=size,
        channels=channels,
        mean=(0.5,) * channels,
        std=(0.2,) * channels,
        augmentation=Augmentation(padding=max(1, size // 8), flip=True),
    )
