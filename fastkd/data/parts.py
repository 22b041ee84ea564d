"""One process's part of each batch, where several processes train together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.utils.data import Dataset

from fastkd._core.labels import IGNORE_INDEX
from fastkd.data.decoding import UnreadableImage
from fastkd.data.images import BadImages, ImageSet

LEAST = 2  # rows: batch normalisation cannot train on one


def part_of(rows: int, rank: int, ranks: int) -> slice | None:
    """The rows of a batch of `rows` that process `rank` of `ranks` takes; None where it has none.

    Parts are contiguous, in the order of the ranks, as even as they go, and of 2 rows at least: of a short last batch
    the last ranks have none.
    """
    busy = max(1, min(ranks, rows // LEAST))
    return slice(rows * rank // busy, rows * (rank + 1) // busy) if rank < busy else None


def length_of(dataset: Dataset[Any]) -> int:
    """The images of a map-style data set."""
    return len(dataset)  # type: ignore[arg-type]  # torch.utils.data.Dataset itself has no length


class RankPart(Dataset[Any]):
    """`dataset` as process `rank` of `ranks` sees it: of each batch of indices it reads its own part.

    All processes take the same batches from a loader of this data set, so that the order of one process and its place
    in an epoch are those of all. A process without a row in a batch, or without one that can be read, must take part in
    the step all the same: it is given 2 images with labels of -100, which count nowhere.

    Args:
        dataset: map-style, of (image, label).
    """

    def __init__(self, dataset: Dataset[Any], rank: int, ranks: int):
        self.dataset, self.rank, self.ranks = dataset, rank, ranks

    def __len__(self) -> int:
        return length_of(self.dataset)

    @property
    def bad_images(self) -> BadImages:
        """What the data set does with images that cannot be read."""
        found: BadImages = getattr(self.dataset, "bad_images", "error")
        return found

    def set_epoch(self, epoch: int) -> None:
        """Hands `epoch` to the data set, where it has a use for it."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        if isinstance(self.dataset, ImageSet):
            return self.read(indices)[0]
        mine = part_of(len(indices), self.rank, self.ranks)
        if mine is not None:
            return self._read(indices[mine])
        return [(image, IGNORE_INDEX) for image, _ in self._read(indices[:LEAST])]

    def read(self, indices: Sequence[int]) -> tuple[list[Any], list[int]]:
        """For an ImageSet: the items of a batch, and the index of each, -1 for an image that counts nowhere."""
        mine = part_of(len(indices), self.rank, self.ranks)
        rows = [] if mine is None else list(indices[mine])
        assert isinstance(self.dataset, ImageSet)
        items = self.dataset.read(rows) if rows else []
        good = sum(not isinstance(item, UnreadableImage) for item in items)
        blanks = max(0, min(LEAST - good, len(indices) - good))
        return items + [(self.dataset.blank(), IGNORE_INDEX)] * blanks, rows + [-1] * blanks

    def _read(self, indices: Sequence[int]) -> list[Any]:
        if hasattr(self.dataset, "__getitems__"):
            return list(self.dataset.__getitems__(indices))
        return [self.dataset[index] for index in indices]
