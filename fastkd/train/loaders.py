"""The batches of a run: of each process its part of the training images, and of those that are held out."""

from __future__ import annotations

from typing import Any

from fastkd.data import Data, loader
from fastkd.data.batches import Loader
from fastkd.data.parts import RankPart
from fastkd.train.distributed import ALONE, World
from fastkd.train.interrupts import leave_interrupts
from fastkd.train.settings import Settings


def training_batches(data: Data, settings: Settings, seed: int, world: World = ALONE) -> Loader:
    """In an order of `seed`, another one in each epoch. A last batch of one image is left out."""
    images: Any = data.train
    size = _batch_size(data, settings)
    batches = loader(
        _part(images, world),
        size,
        shuffle=True,
        seed=seed,
        workers=settings.workers,
        # Batch normalisation cannot train on one image.
        drop_last=len(images) % size == 1 and size > 1,
        smallest=min(2, size),
    )
    batches.worker_init_fn = leave_interrupts
    return batches


def held_out_batches(data: Data, settings: Settings, world: World = ALONE) -> dict[str, Loader]:
    """ "validation", where there are such images, and "test"."""
    size = max(_batch_size(data, settings), 256)
    parts = {"validation": data.validation, "test": data.test}
    return {
        name: loader(_part(part, world), size, shuffle=False, workers=settings.workers)
        for name, part in parts.items()
        if part is not None
    }


def plain_batches(data: Data, settings: Settings) -> Loader:
    """The training images as they are, without augmentation, in their order."""
    images: Any = data.train  # a data set of fastkd.data
    size = max(_batch_size(data, settings), 256)
    return loader(images.plain(), size, shuffle=False, workers=settings.workers)


def _batch_size(data: Data, settings: Settings) -> int:
    images: Any = data.train
    return min(settings.batch_size, len(images))


def _part(images: Any, world: World) -> Any:
    return images if world.size == 1 else RankPart(images, world.rank, world.size)
