"""Folders of images, one a class: what is in them, what is left out and why, and what cannot be meant."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastkd._core.extras import require

NESTED = "images"  # the one folder that a class folder may hold its images in, as Tiny-ImageNet's do
_SHOWN = 3  # names of each kind in a note


class LeftOut:
    """What stands in a data set's folders and is not used: counted, and the first ones named."""

    def __init__(self, folder: Path, usual: tuple[str, ...] = ()):
        self.folder = folder
        self.usual = usual  # endings of files that belong there and are not worth a word
        self.found: dict[str, list[str]] = {}

    def add(self, kind: str, path: str) -> None:
        """Counts `path` among what is left out as `kind`; of the usual endings only what is hidden."""
        if kind == HIDDEN or not path.endswith(self.usual):
            self.found.setdefault(kind, []).append(os.path.relpath(path, self.folder))

    def text(self) -> str:
        """One sentence; "" where nothing was left out."""
        if not self.found:
            return ""
        parts = [f"{kind}: {len(paths)} ({listed(sorted(paths), _SHOWN)})" for kind, paths in self.found.items()]
        return f"{self.folder}: not used are {', '.join(parts)}"


HIDDEN = "hidden files or folders"
LOOPS = "links to a folder that they stand in"
OTHERS = "files that do not end as images do"
BESIDE = "files beside the class folders"


def listed(names: Sequence[str], most: int = 5) -> str:
    """The first `most` names in a row, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def class_folders(folder: Path, left: LeftOut) -> list[str]:
    """The names of the class folders in `folder`, sorted."""
    found, _ = _contents(folder, left, BESIDE)
    if not found:
        raise FileNotFoundError(f"{folder} has no class folders; give it one folder of images for each class")
    return [os.path.basename(path) for path in found]


def check_several(folder: Path, classes: Sequence[str]) -> None:
    """A network of one class says it of every image, and is always right."""
    if len(classes) > 1:
        return
    only = folder / classes[0]
    within, _ = _contents(only, LeftOut(folder))
    deeper = [path for path in within if os.path.basename(path) != NESTED and _holds_images(path)]
    if deeper:
        names = listed([os.path.basename(path) for path in deeper])
        raise ValueError(
            f"{folder} has the class folder {classes[0]} alone, with folders of images in it ({names}): they stand one "
            f"level too deep; move them up into {folder}"
        )
    raise ValueError(
        f"{folder} has the class folder {classes[0]} alone: a network needs two classes at least; give each class its "
        "own folder"
    )


def labelled_files(folder: Path, classes: Sequence[str], left: LeftOut) -> tuple[list[str], np.ndarray]:
    """The image files of each class folder in order, and their labels int64 [N]."""
    paths: list[str] = []
    labels, empty = [], []
    for label, name in enumerate(classes):
        found = _images_of(folder / name, left)
        paths += found
        labels.append(np.full(len(found), label, dtype=np.int64))
        empty += [] if found else [name]
    if empty:
        endings = ", ".join(_extensions())
        raise FileNotFoundError(f"{folder} has no images for {listed(empty)}; put in files ending in {endings}")
    return paths, np.concatenate(labels)


def _images_of(folder: Path, left: LeftOut) -> list[str]:
    within, files = _contents(folder, left)
    if [os.path.basename(path) for path in within] == [NESTED] and not files:
        within, files = _contents(Path(within[0]), left)
    deeper = [path for path in within if _holds_images(path)]
    if deeper:
        names = listed([os.path.basename(path) for path in deeper])
        raise ValueError(
            f"the class folder {folder} holds folders of images ({names}): are they the classes, one level too deep? "
            "The images of a class must stand in its folder itself; move them"
        )
    return files


def _holds_images(folder: str, seen: set[str] | None = None) -> bool:
    """There or below. Links may lead round in a circle: no folder is looked at twice."""
    seen = set() if seen is None else seen
    if os.path.realpath(folder) in seen:
        return False
    seen.add(os.path.realpath(folder))
    within, files = _contents(Path(folder), LeftOut(Path(folder)))
    return bool(files) or any(_holds_images(each, seen) for each in within)


def _contents(folder: Path, left: LeftOut, others: str = OTHERS) -> tuple[list[str], list[str]]:
    """The folders in `folder` and its images, sorted by name; the rest is left out, as `others`."""
    folders, files = [], []
    endings = _extensions() if others == OTHERS else ()
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    left.add(HIDDEN, entry.path)
                elif entry.is_dir():
                    loops = entry.is_symlink() and _is_above(entry.path, folder)
                    left.add(LOOPS, entry.path) if loops else folders.append(entry.path)
                elif entry.name.lower().endswith(endings):
                    files.append(entry.path)
                else:
                    left.add(others, entry.path)
    except PermissionError as error:
        raise ValueError(
            f"the folder {folder} cannot be read ({error.strerror}): give the right to read it, or move it away"
        ) from error
    return sorted(folders), sorted(files)


def _is_above(link: str, folder: Path) -> bool:
    """Whether a link leads to the folder that it stands in, or to one above: following it would never end."""
    target = os.stat(link)
    above = folder.resolve()
    return any(os.path.samestat(target, os.stat(each)) for each in (above, *above.parents))


def _extensions() -> tuple[str, ...]:
    found: tuple[str, ...] = require("torchvision.datasets.folder", "Reading image folders").IMG_EXTENSIONS
    return found
