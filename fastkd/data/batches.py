"""Batches in an order that depends on the seed and the epoch only."""

from collections.abc import Iterator

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from .seeding import SHUFFLE, WORKERS, check_seed, stream


class EpochSampler(Sampler[int]):
    """Indices of `dataset`, shuffled by (seed, epoch) or in order.

    `set_epoch(epoch)` says which epoch the next pass over the loader is; without it passes count 0, 1, 2, ...
    """

    def __init__(self, dataset: Dataset, shuffle: bool, seed: int):
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.generator = torch.Generator()  # DataLoader draws its workers' seeds from it
        self.epoch = 0
        self._order: list[int] | None = None

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def start(self) -> None:
        """Fixes order and augmentation of the pass that begins now. Before the workers start: they copy the dataset."""
        epoch, n = self.epoch, len(self.dataset)
        self._order = stream(self.seed, SHUFFLE, epoch).permutation(n).tolist() if self.shuffle else list(range(n))
        self.generator.manual_seed(int(stream(self.seed, WORKERS, epoch).integers(2**63)))
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        self.epoch = epoch + 1

    def __iter__(self) -> Iterator[int]:
        if self._order is None:
            self.start()
        order, self._order = self._order, None
        return iter(order)

    def __len__(self) -> int:
        return len(self.dataset)


class _Loader(DataLoader):
    def __iter__(self):
        self.sampler.start()
        return super().__iter__()


def loader(
    dataset: Dataset, batch_size: int, *, shuffle: bool, seed: int = 0, workers: int = 0, drop_last: bool = False
) -> DataLoader:
    """A DataLoader whose batches of epoch e are the same in every process, for any number of workers.

    Each pass is the next epoch; `loader.sampler.set_epoch(e)` before a pass makes it epoch e, as after a resume.
    The same holds for datasets that are not from `fastkd.data` as to the order; random transforms of their own are
    seeded by (seed, epoch) in workers. Batches are (float32 [B, C, H, W], int64 [B]); with several views the first is
    a list of tensors. Memory is pinned where there is a GPU.

    Data in memory need no workers. One pass at a time: a second begun before the first ends changes its epoch.

    Raises ValueError for a batch_size or a number of workers out of range, and if `drop_last` leaves no batch.
    """
    check_seed("loader", seed)
    for argument, value, least in (("batch_size", batch_size, 1), ("workers", workers, 0)):
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"loader: {argument} must be an integer of at least {least}, got {value!r}")
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"loader: drop_last leaves no batch of {batch_size} from {len(dataset)} images; use a smaller batch_size"
        )
    sampler = EpochSampler(dataset, shuffle, seed)
    return _Loader(
        dataset,
        batch_size,
        sampler=sampler,
        num_workers=workers,
        drop_last=drop_last,
        generator=sampler.generator,
        pin_memory=torch.cuda.is_available(),
    )
