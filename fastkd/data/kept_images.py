"""Image files that are decoded once: small images, of which epochs read the same again and again."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastkd.data.decoding import UnreadableImage
from fastkd.data.images import LARGE, Files
from fastkd.data.sources import Source, Split


class KeptFiles(Files):
    """`Files` whose images stay in memory once they are read and cut to `size`, as uint8."""

    def __init__(self, paths: Sequence[str], size: int):
        super().__init__(paths, size)
        # By numpy, whose zeros take no memory before they are written.
        self.images = torch.from_numpy(np.zeros((len(self.paths), 3, size, size), np.uint8))
        self.known = np.zeros(len(self.paths), dtype=bool)

    def fetch(self, rows: np.ndarray) -> Tensor | list[Any]:
        """uint8 [B, 3, size, size], or where files cannot be read a list with an UnreadableImage for each of them."""
        bad = {}
        missing = rows[~self.known[rows]]
        for row, image in zip(missing.tolist(), super().fetch(missing), strict=True):
            if isinstance(image, UnreadableImage):
                bad[row] = image
            else:
                self.images[row] = super().render([image], None)[0]
                self.known[row] = True
        images = self.images[torch.from_numpy(rows)]
        return [bad.get(row, image) for row, image in zip(rows.tolist(), images, strict=True)] if bad else images

    def render(self, raw: Tensor | list[Any], keys: np.ndarray | None) -> Tensor:
        """The images of one fetch: uint8 [n, 3, size, size]."""
        return raw if isinstance(raw, Tensor) else torch.stack(raw)


def keep(source: Source) -> Source:
    """The same images, kept in memory where they are files that are always cut alike (below `LARGE` pixels)."""

    def kept(part: Split) -> Split:
        if not isinstance(part.store, Files) or part.store.size >= LARGE:
            return part
        return dataclasses.replace(part, store=KeptFiles(part.store.paths, part.store.size))

    validation = None if source.validation is None else kept(source.validation)
    return dataclasses.replace(source, train=kept(source.train), test=kept(source.test), validation=validation)
