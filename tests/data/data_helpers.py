"""Data sets on the disk, made small: image folders, Tiny-ImageNet's layout, CIFAR's archives."""

import pickle

import numpy as np
from PIL import Image


def write_images(folder, count, size=(12, 12), shade=0):
    folder.mkdir(parents=True)
    rng = np.random.default_rng(shade)
    for i in range(count):
        pixels = np.clip(rng.integers(0, 60, (size[1], size[0], 3)) + shade, 0, 255).astype(np.uint8)
        Image.fromarray(pixels).save(folder / f"{i:03}.png")


def image_folder(base):
    """train/, test/ with two classes, dark and light."""
    for part, count in (("train", 6), ("test", 3)):
        write_images(base / "set" / part / "dark", count)
        write_images(base / "set" / part / "light", count, shade=180)
    return base / "set"


def tiny_imagenet(root):
    """Tiny-ImageNet's layout with three classes of 4 images and 5 images for testing."""
    base = root / "tiny-imagenet-200"
    for i, wnid in enumerate(("n01", "n02", "n03")):
        write_images(base / "train" / wnid / "images", 4, (64, 64), 80 * i)
    write_images(base / "val" / "images", 5, (64, 64))
    lines = [f"{i:03}.png\tn0{1 + i % 3}\t0\t0\t9\t9" for i in range(5)]
    (base / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def cifar(root, name):
    """A CIFAR of 20 training and 10 test images, as the archive has it; returns the patched checks' class."""
    import torchvision

    rng = np.random.default_rng(0)
    kind = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[name]
    base = root / kind.base_folder
    base.mkdir(parents=True)
    key, classes = ("labels", 10) if name == "cifar10" else ("fine_labels", 100)
    for files, count in ((kind.train_list, 20), (kind.test_list, 10)):
        each = count // len(files)
        for file, _ in files:
            pixels = rng.integers(0, 256, (each, 3072)).astype(np.uint8)
            (base / file).write_bytes(pickle.dumps({"data": pixels, key: [i % classes for i in range(each)]}))
    meta = {kind.meta["key"]: [f"c{i}" for i in range(classes)]}
    (base / kind.meta["filename"]).write_bytes(pickle.dumps(meta))
