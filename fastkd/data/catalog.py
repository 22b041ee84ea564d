"""`load`: a data set by name, split, augmented and normalised."""

import dataclasses
import functools
import inspect
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import numpy as np
from torch.utils.data import Dataset

from fastkd._core.messages import guess
from fastkd.data import sources
from fastkd.data.description import describe
from fastkd.data.images import BadImages, ImageSet
from fastkd.data.kept_images import keep
from fastkd.data.seeding import check_seed, noisy_labels, stratified_order
from fastkd.data.sources import Source, Split

_SOURCES = {
    "digits": sources.digits,
    "cifar10": sources.cifar10,
    "cifar100": sources.cifar100,
    "tiny-imagenet": sources.tiny_imagenet,
    "fake": sources.fake,
}
_FOLDER = "imagefolder"


@dataclass(frozen=True)
class Data:
    """Map-style datasets of (float32 image [C, H, W] normalised, int label), and what a network must know of them.

    With several views an image of `train` is a tuple of tensors. `validation` is None if there is none.

    >>> data = fastkd.data.load("fake", image_size=8, train_images=16, test_images=4).with_views(2)
    >>> [view.shape for view in data.train[0][0]]
    [torch.Size([3, 8, 8]), torch.Size([3, 8, 8])]
    """

    train: Dataset[Any]
    validation: Dataset[Any] | None
    test: Dataset[Any]
    num_classes: int
    image_size: int
    channels: int
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        for part in ("train", "validation", "test"):
            labels = getattr(getattr(self, part), "labels", None)
            if isinstance(labels, np.ndarray) and len(labels):
                _check_labels(part, labels, self.num_classes)

    @functools.cached_property
    def description(self) -> dict[str, Any]:
        """What the data consist of, JSON-like: equal for equal images, labels and splits, wherever they stand.

        Reads images in memory, and of image files the names, sizes and times, and up to 64 MB of contents.
        """
        parts = {"train": self.train, "validation": self.validation, "test": self.test}
        facts: dict[str, Any] = {"image_size": self.image_size, "channels": self.channels}
        if isinstance(self.train, ImageSet):
            change = self.train.augmentation
            facts |= {"mean": self.train.mean.flatten().tolist(), "std": self.train.std.flatten().tolist()}
            facts |= {"augmentation": None if change is None else dataclasses.asdict(change)}
        return describe(parts, self.classes, facts)

    def with_views(self, views: int) -> "Data":
        """The same data with so many independent augmentations of each training image, in the same memory."""
        _check_number("Data.with_views", "views", views)
        train: Any = self.train  # a data set of fastkd.data
        return dataclasses.replace(self, train=train.with_views(views))


def names() -> list[str]:
    """The names that `load` knows; imagefolder stands for imagefolder:DIR.

    >>> "cifar100" in fastkd.data.names()
    True
    """
    return [*_SOURCES, _FOLDER]


def load(
    name: str,
    *,
    root: str | Path = ".data",
    download: bool = False,
    train_size: int | None = None,
    validation: float | int = 0.0,
    seed: int = 0,
    image_size: int | None = None,
    augment: bool = True,
    views: int = 1,
    bad_images: BadImages = "error",
    variants: int = 0,
    label_noise: float = 0.0,
    note: Callable[[str], None] = warnings.warn,
    keep_images: bool = False,
    **options: Any,
) -> Data:
    """The data set `name` as `Data`.

    name        digits (scikit-learn's, 8x8), cifar10, cifar100, tiny-imagenet, fake, or imagefolder:DIR with
                DIR/train/<class>/* and DIR/test or DIR/val (with both, val is the validation set)
    root        folder of the downloaded data; digits, fake and imagefolder do not look at it
    download    cifar10 and cifar100: fetch what is missing
    train_size  number of training images kept, of each class its share; smaller sets are parts of larger ones
    validation  fraction (float below 1) or number (int) of training images set apart, of each class its share;
                they are never augmented, and neither train_size nor augment changes which they are
    seed        of the split, of train_size and of the augmentation; test images never depend on it
    image_size  images are resized to it; None for the data's own (imagefolder: of the first image, 224 for large ones)
    augment     random shift by 1 pixel of 8 (CIFAR: 4 of 32) and, but for digits, mirroring; for image files and
                image_size >= 96 a random resized crop and mirroring
    views       number of independent augmentations of each training image
    bad_images  an image file that cannot be read: "error" raises where it is met, "skip" leaves it out of its batch
                (`loader` says more)
    variants    0: each epoch augments the images anew; K: the epochs cycle through K augmentations, epoch e has that
                of epoch e % K
    label_noise probability with which a training image has the label of another class, drawn by `seed`, the same in
                every epoch; validation and test images keep theirs
    note        told in a sentence what an imagefolder or tiny-imagenet holds and is not used: hidden files and folders,
                files that do not end as images do, links to a folder that they stand in
    keep_images image files cut to fewer than 96 pixels are decoded once and stay in memory (in each worker, for a pass)
    options     fake only: num_classes, channels, train_images, test_images

    Pixels are normalised by the data set's mean and standard deviation (imagefolder: ImageNet's). Image files of any
    mode become 8-bit RGB, as a viewer on white paper shows them: 16-bit grey keeps its order and range (v / 257),
    transparency is laid over white, EXIF's rotation is carried out; 32-bit integers and floats, whose range nothing
    tells, count as files that cannot be read.

    Raises ValueError for a bad argument, FileNotFoundError for missing data, ImportError for a missing package.

    >>> data = fastkd.data.load("fake", image_size=8, train_images=16, test_images=4, validation=0.25)
    >>> len(data.train), len(data.validation), len(data.test), data.num_classes
    (12, 4, 4, 10)
    """
    _check(seed, train_size, validation, image_size, views)
    if bad_images not in get_args(BadImages):
        raise ValueError(f"load: bad_images must be 'error' or 'skip', got {bad_images!r}")
    if isinstance(variants, bool) or not isinstance(variants, int) or variants < 0:
        raise ValueError(f"load: variants must be an integer of at least 0, got {variants!r}")
    if isinstance(label_noise, bool) or not isinstance(label_noise, int | float) or not 0 <= label_noise < 1:
        raise ValueError(f"load: label_noise must be a probability from 0 to below 1, got {label_noise!r}")
    source = _source(name, Path(root).expanduser(), download, image_size, bad_images, options)
    if source.left_out:
        note(source.left_out)
    source = keep(source) if keep_images else source
    train, held_out = _split(source, train_size, validation, seed)

    def make(part: Split, **extra: Any) -> ImageSet:
        extra["bad_images"] = bad_images
        return ImageSet(part.store, part.labels, part.rows, source.image_size, source.mean, source.std, **extra)

    change = source.augmentation if augment else None
    images = make(train, augmentation=change, views=views, seed=seed, variants=variants)
    if label_noise:
        found = noisy_labels(images.store_labels, label_noise, len(source.classes), seed)
        images = images.with_labels(found[images.rows])
    return Data(
        train=images,
        validation=None if held_out is None else make(held_out),
        test=make(source.test),
        num_classes=len(source.classes),
        image_size=source.image_size,
        channels=source.channels,
        classes=source.classes,
    )


def _check(seed: int, train_size: int | None, validation: float | int, image_size: int | None, views: int) -> None:
    check_seed("load", seed)
    for argument, value in (("train_size", train_size), ("image_size", image_size), ("views", views)):
        if value is not None or argument == "views":
            _check_number("load", argument, value)
    good = isinstance(validation, int | float) and not isinstance(validation, bool) and validation >= 0
    if not good or (isinstance(validation, float) and validation >= 1):
        raise ValueError(
            f"load: validation must be a fraction (float from 0 to below 1) or a number of images (int), "
            f"got {validation!r}"
        )


def _check_labels(part: str, labels: np.ndarray, classes: int) -> None:
    wrong = np.flatnonzero((labels < 0) | (labels >= classes))
    if len(wrong):
        raise ValueError(
            f"{len(wrong)} of {len(labels)} {part} images have a label that is not one of the {classes} classes (0 to "
            f"{classes - 1}), the first is image {wrong[0]} with label {labels[wrong[0]]}; correct the labels or "
            "num_classes"
        )


def _check_number(operation: str, argument: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{operation}: {argument} must be an integer of at least 1, got {value!r}")


def _source(
    name: str, root: Path, download: bool, image_size: int | None, bad_images: BadImages, options: dict[str, Any]
) -> Source:
    if not isinstance(name, str):
        raise TypeError(f"load: name must be a string such as 'digits', got {type(name).__name__}")
    kind, _, folder = name.partition(":")
    key = re.sub("[-_ ]", "", kind.lower()).removesuffix("200")
    if key == _FOLDER:
        if not folder:
            raise ValueError("load: imagefolder needs a folder; write imagefolder:DIR")
        _check_options(name, (), options)
        return sources.image_folder(Path(folder).expanduser(), image_size, bad_images)
    build = {known.replace("-", ""): build for known, build in _SOURCES.items()}.get(key)
    if build is None or folder:
        near = guess(kind.lower(), names())
        raise ValueError(f"load: no data set is called {name!r}; {near}known are {', '.join(names())}:DIR")
    parameters = inspect.signature(build).parameters.values()
    known = tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)
    _check_options(name, known, options)
    return build(root, download, image_size, **options)


def _check_options(name: str, known: tuple[str, ...], options: dict[str, Any]) -> None:
    for option, value in options.items():
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none of its own"
            raise TypeError(f"load: {name} has no option {option!r}; {has}")
        _check_number("load", option, value)


def _split(source: Source, train_size: int | None, validation: float | int, seed: int) -> tuple[Split, Split | None]:
    """The training images that are kept, and the validation images."""
    part = source.train
    rows = np.arange(len(part.store)) if part.rows is None else part.rows
    count = round(validation * len(rows)) if isinstance(validation, float) else validation
    if validation and source.validation is not None:
        raise ValueError(
            "load: this folder has its own val/; leave validation at 0, or rename val/ to cut one from train/"
        )
    if validation and not 0 < count < len(rows):
        raise ValueError(
            f"load: validation={validation!r} takes {count} of {len(rows)} training images; "
            f"choose from 1 to {len(rows) - 1}"
        )
    left = len(rows) - count
    if train_size is not None and train_size > left:
        apart = f" after {count} for validation" if count else ""
        raise ValueError(f"load: train_size is {train_size}, but there are {left} training images{apart}; choose fewer")
    order = stratified_order(part.labels[rows], seed)  # validation first, then training: each a stratified piece
    kept = order[count : count + (left if train_size is None else train_size)]
    held_out = Split(part.store, part.labels, rows[np.sort(order[:count])]) if count else source.validation
    return Split(part.store, part.labels, rows[np.sort(kept)]), held_out
