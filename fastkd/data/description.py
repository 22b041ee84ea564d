"""What data consist of, in words and digests: equal descriptions are equal images and labels in an equal order.

It goes into the name under which a trained network is kept, into the folder of a run, and is compared when the run
goes on. Images in memory count by their bytes, files by their class, name and size, and up to `BY_CONTENT` bytes by
their bytes, too; of larger sets, which would take long to read, by their times (`cp -a`, `rsync -a`, tar and zip keep
them). Where the data stand does not matter.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from fastkd.data.decoding import VERSION
from fastkd.data.folders import listed
from fastkd.data.images import Files, ImageSet
from fastkd.data.parts import length_of

BY_CONTENT = 64 << 20  # bytes of a part's files up to which they are read
BY_CONTENT_FILES = 20_000


def describe(parts: dict[str, Dataset[Any] | None], classes: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """JSON-like. parts: name -> its data set; facts: more that the pixels depend on."""
    found = {name: _part(part, classes) for name, part in parts.items() if part is not None}
    return {"classes": list(classes), **facts, "decoding": VERSION, "parts": found}


def _part(images: Dataset[Any], classes: Sequence[str]) -> dict[str, Any]:
    if not isinstance(images, ImageSet):  # somebody's own: all that can be known
        return {"images": length_of(images)}
    found: dict[str, Any]
    found = {"images": len(images), "of": len(images.store), "rows": _digest(images.rows.astype(np.int64))}
    if isinstance(images.store, Files):
        return found | _files(images, images.store, classes)
    return found | {"pixels": _digest(*images.store.blocks(images.rows)), "labels": _digest(images.labels)}


def _files(images: ImageSet, store: Files, classes: Sequence[str]) -> dict[str, Any]:
    """For each class: how many files its folder has, their names, and of those in use the sizes and the contents."""
    paths, used = store.paths, np.zeros(len(store), dtype=bool)
    used[images.rows] = True
    stats = {row: _stat(paths[row]) for row in images.rows.tolist()}
    total = sum(size for size, _ in stats.values())
    by_content = total <= BY_CONTENT and len(stats) <= BY_CONTENT_FILES
    folder = os.path.dirname(os.path.commonprefix(paths))  # noqa: RUF071  # letters, then folders
    order = np.argsort(images.store_labels, kind="stable")
    ends = np.searchsorted(images.store_labels[order], np.arange(len(classes) + 1))
    found = {}
    for label, name in enumerate(classes):
        rows = order[ends[label] : ends[label + 1]].tolist()
        mine = [row for row in rows if used[row]]
        names = _digest(*(os.fsencode(paths[row][len(folder) :]) for row in rows))
        sizes = _digest(*(str(stats[row][0]).encode() for row in mine))
        contents = (content_of(paths[row]) if by_content else str(stats[row][1]).encode() for row in mine)
        found[name] = [len(rows), names, sizes, _digest(*contents)]
    return {"compared": "content" if by_content else "times", "files": found}


def _stat(path: str) -> tuple[int, int]:
    try:
        found = os.stat(path)
    except OSError:  # reading it says what is wrong
        return 0, 0
    return found.st_size, found.st_mtime_ns


def content_of(path: str) -> bytes:
    """What tells the content of a file from another's, the same for all that cannot be read."""
    try:
        with open(path, "rb") as file:
            return hashlib.sha256(file.read()).digest()
    except OSError:
        return b"none"


def _digest(*blocks: Any) -> str:
    found = hashlib.sha256()
    for block in blocks:
        found.update(block.data if isinstance(block, np.ndarray) else b"%d:%b" % (len(block), block))
    return found.hexdigest()[:16]


def changes(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two descriptions, each in a few words: "train: class cat has 4 files, had 5"."""
    if old["classes"] != new["classes"]:
        return [_changed_classes(old["classes"], new["classes"])]
    found = []
    for part in dict.fromkeys([*old["parts"], *new["parts"]]):
        before, now = old["parts"].get(part), new["parts"].get(part)
        if before is None or now is None:
            found.append(f"there are {'no' if now is None else 'now'} {part} images{' any more' * (now is None)}")
        else:
            found += [f"{part}: {text}" for text in _changed_part(before, now)]
    splits = [name for name, part in old["parts"].items() if _split(part) != _split(new["parts"].get(name, {}))]
    if not found and splits:
        found.append(f"the split: other images are in {' and '.join(splits)}")
    others = [name for name in (*old, *new) if name not in ("classes", "parts") and old.get(name) != new.get(name)]
    return found + [f"{name} was {old.get(name)}, is {new.get(name)}" for name in dict.fromkeys(others)]


def _split(part: dict[str, Any]) -> dict[str, Any]:
    return {name: part.get(name) for name in ("images", "of", "rows", "labels")}


def _changed_classes(old: list[str], new: list[str]) -> str:
    gone, come = [name for name in old if name not in new], [name for name in new if name not in old]
    what = [f"without {listed(gone)}"] * bool(gone) + [f"with {listed(come)}"] * bool(come)
    return f"the classes are others: now {' and '.join(what)}" if what else "the classes have another order"


def _changed_part(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    if "files" in old and "files" in new:
        yield from _changed_files(old, new)
    elif "pixels" in old and "pixels" in new and old["rows"] == new["rows"] and old["of"] == new["of"]:
        yield from (f"the {what} are others" for what in ("pixels", "labels") if old[what] != new[what])
    elif old["of"] != new["of"] if "of" in old and "of" in new else old != new:
        yield f"there are {new.get('of', new['images'])} images, were {old.get('of', old['images'])}"


def _changed_files(old: dict[str, Any], new: dict[str, Any]) -> Iterator[str]:
    comparable = old["rows"] == new["rows"]  # sizes and contents are of the files in use
    alike = comparable and old["compared"] == new["compared"]
    for name, (count, names, sizes, contents) in new["files"].items():
        count_before, names_before, sizes_before, contents_before = old["files"][name]
        if count != count_before:
            yield f"class {name} has {count} files, had {count_before}"
        elif names != names_before:
            yield f"files of class {name} have other names"
        elif comparable and sizes != sizes_before:
            yield f"files of class {name} have another size"
        elif alike and contents != contents_before:
            what = "other bytes" if new["compared"] == "content" else "another time"
            yield f"files of class {name} have {what}"
