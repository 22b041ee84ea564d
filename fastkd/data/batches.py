"""Batches in an order that depends on the seed and the epoch only."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler, default_collate

from fastkd.data.decoding import UnreadableImage
from fastkd.data.images import ImageSet
from fastkd.data.parts import RankPart, length_of
from fastkd.data.seeding import SHUFFLE, WORKERS, check_seed, stream


class EpochSampler(Sampler[int]):
    """Indices of `dataset`, shuffled by (seed, epoch) or in order.

    `set_epoch(epoch)` says which epoch the next pass over the loader is; without it passes count 0, 1, 2, ...

    >>> sampler = fastkd.data.EpochSampler(range(6), shuffle=True, seed=0)
    >>> first, second = list(sampler), list(sampler)
    >>> sampler.set_epoch(0)
    >>> first == list(sampler), sorted(second)
    (True, [0, 1, 2, 3, 4, 5])
    """

    def __init__(self, dataset: Dataset[Any], shuffle: bool, seed: int):
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.generator = torch.Generator()  # DataLoader draws its workers' seeds from it
        self.epoch = self.skip = 0
        self._order: list[int] | None = None

    def set_epoch(self, epoch: int, skip: int = 0) -> None:
        """The next pass is of this epoch, without its first `skip` images."""
        self.epoch, self.skip = epoch, skip

    def start(self) -> None:
        """Fixes order and augmentation of the pass that begins now. Before the workers start: they copy the dataset."""
        epoch, n = self.epoch, length_of(self.dataset)
        order = stream(self.seed, SHUFFLE, epoch).permutation(n).tolist() if self.shuffle else list(range(n))
        self._order = order[self.skip :]
        self.generator.manual_seed(int(stream(self.seed, WORKERS, epoch).integers(2**63)))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.epoch, self.skip = epoch + 1, 0

    def __iter__(self) -> Iterator[int]:
        if self._order is None:
            self.start()
        order, self._order = self._order, None
        return iter(order or ())

    def __len__(self) -> int:
        return length_of(self.dataset)


class _Reader(Dataset[Any]):
    """An ImageSet, or a part of one, that hands on what could not be read; the loader decides, in the main process."""

    def __init__(self, images: ImageSet | RankPart):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[list[Any], list[int]]:
        return self.images.read(indices) if isinstance(self.images, RankPart) else (self.images.read(indices), indices)


def _collate(items: list[Any]) -> tuple[Any, ...]:
    return default_collate(items), [], None


def _collate_read(read: tuple[list[Any], list[int]]) -> tuple[Any, ...]:
    """(inputs, target) of the good items, None where there are none; (path, reason) of the others; rows of the good."""
    items, rows = read
    bad = [(item.path, item.reason) for item in items if isinstance(item, UnreadableImage)]
    if bad:
        good = [i for i, item in enumerate(items) if not isinstance(item, UnreadableImage)]
        items, rows = [items[i] for i in good], [rows[i] for i in good]
    return default_collate(items) if items else None, bad, np.asarray(rows, dtype=np.int64)


def image_set(dataset: Dataset[Any]) -> ImageSet | None:
    """The images of `fastkd.data` that `dataset` is, or is a part of; None for other data sets."""
    dataset = dataset.dataset if isinstance(dataset, RankPart) else dataset
    return dataset if isinstance(dataset, ImageSet) else None


class Loader(DataLoader[Any]):
    """What `loader` returns: a DataLoader that knows where it is and what it could not read.

    Attributes:
        taken: batches of the present pass that were taken from the data, those left out among them.
        lost: images of the present pass that could not be read.
        unreadable: path -> reason, of all passes.
        rows: which images the batch holds that was given last: int64 [B], indices of the data set (-1 for an image that
            counts nowhere, see `RankPart`); None for data sets that are not from `fastkd.data`.
    """

    sampler: EpochSampler
    batch_size: int

    def __init__(self, dataset: Dataset[Any], batch_size: int, sampler: EpochSampler, smallest: int, **options: Any):
        reader: Dataset[Any] = dataset
        collate: Callable[[Any], tuple[Any, ...]] = _collate
        if isinstance(dataset, ImageSet) or (isinstance(dataset, RankPart) and image_set(dataset) is not None):
            reader, collate = _Reader(dataset), _collate_read
        super().__init__(
            reader, batch_size, sampler=sampler, generator=sampler.generator, collate_fn=collate, **options
        )
        self.bad_images: str = getattr(dataset, "bad_images", "error")
        self.smallest = smallest
        self.taken = self.lost = 0
        self.unreadable: dict[str, str] = {}
        self.rows: np.ndarray | None = None
        self._before = (0, 0)

    def go_on(self, epoch: int, taken: int, lost: int = 0) -> Iterator[Any]:
        """The batches of this epoch that come after the first `taken`, of which `lost` images could not be read.

        Images of `fastkd.data` that were used already are not loaded again. Other datasets are: what they do to an
        image may depend on what they did before.
        """
        if image_set(self.sampler.dataset) is not None:
            self.sampler.set_epoch(epoch, taken * self.batch_size)
            self._before = taken, lost
            return iter(self)
        self.sampler.set_epoch(epoch)
        batches = iter(self)
        for _ in range(taken):
            next(batches)
        return batches

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]  # torch names its own iterator
        self.sampler.start()
        (self.taken, self.lost), self._before = self._before, (0, 0)
        return self._pass(super().__iter__())

    def _pass(self, batches: Iterator[Any]) -> Iterator[Any]:
        used = self.taken
        try:
            for batch, bad, rows in batches:
                self.taken += 1
                if bad and self.bad_images == "error":
                    raise UnreadableImage(*bad[0])
                # Workers make batches ahead: an image that is lost there counts when its batch comes here.
                self.lost += len(bad)
                self.unreadable.update(bad)
                if batch is not None and not (bad and len(batch[1]) < self.smallest):
                    used += 1
                    self.rows = rows
                    yield batch
        finally:
            del batches  # with it the workers go at once; the traceback of an error would keep them
        if self.lost and not used:
            path, reason = next(iter(self.unreadable.items()))
            raise ValueError(
                f"none of the {self.lost} images of an epoch could be used: {path} cannot be read ({reason}), and so on"
            )


def loader(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool,
    seed: int = 0,
    workers: int = 0,
    drop_last: bool = False,
    smallest: int = 1,
) -> Loader:
    """A DataLoader whose batches of epoch e are the same in every process, for any number of workers.

    Each pass is the next epoch; `loader.sampler.set_epoch(e)` before a pass makes it epoch e, as after a resume.
    The same holds for datasets that are not from `fastkd.data` as to the order; random transforms of their own are
    seeded by (seed, epoch) in workers. Batches are (float32 [B, C, H, W], int64 [B]); with several views the first is
    a list of tensors. Memory is pinned where there is a GPU.

    An image file that cannot be read raises UnreadableImage, a ValueError that names it. With `bad_images="skip"` in
    `load` it is left out, its batch goes on without it, and `loader.lost` and `loader.unreadable` tell; a batch that
    lost images and has fewer than `smallest` left is left out altogether.

    Data in memory need no workers. One pass at a time: a second begun before the first ends changes its epoch.

    Raises ValueError for a batch_size or a number of workers out of range, and if `drop_last` leaves no batch.

    >>> data = fastkd.data.load("fake", image_size=8, train_images=10, test_images=4)
    >>> [tuple(images.shape) for images, labels in fastkd.data.loader(data.train, 4, shuffle=True)]
    [(4, 3, 8, 8), (4, 3, 8, 8), (2, 3, 8, 8)]
    """
    check_seed("loader", seed)
    for argument, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"loader: {argument} must be an integer of at least {least}, got {value!r}")
    if drop_last and length_of(dataset) < batch_size:
        raise ValueError(
            f"loader: drop_last leaves no batch of {batch_size} from {length_of(dataset)} images; choose fewer"
        )
    return Loader(
        dataset,
        batch_size,
        EpochSampler(dataset, shuffle, seed),
        smallest,
        num_workers=workers,
        drop_last=drop_last,
        pin_memory=torch.cuda.is_available(),
    )
