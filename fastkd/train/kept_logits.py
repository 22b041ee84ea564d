"""--logits-cache: the frozen networks of a stage are asked once for each image, and their files from then on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastkd._core.files import FULL, StorageError
from fastkd._core.locks import UNWRITABLE, NotWritable
from fastkd._core.messages import note
from fastkd.data import LogitsCache
from fastkd.data.batches import Loader, image_set
from fastkd.data.logits import Taught, identify
from fastkd.methods import Method
from fastkd.ops.topk import TopK
from fastkd.train.task import Setup

_NOT_THERE = (
    "it does not hold all logits that this run needs: name a --cache that can be written, or leave out --logits-cache"
)


class KeptLogits:
    """The logits cache of one stage: tells what it takes, and hands out what the networks say of each batch.

    Args:
        folder: of the cache, where every process can write; one folder for all those of a machine.
        batches: the loader of the training images.
        variants: the augmentations of each image that the stage goes through (`ImageSet.variant`).
        who: the stage, for messages.
    """

    def __init__(
        self,
        folder: Path,
        method: Method,
        batches: Loader,
        setup: Setup,
        *,
        variants: Sequence[int],
        classes: int,
        who: str,
    ):
        self.folder, self.batches, self.who = folder, batches, who
        self.settings, self.world = settings, world = setup.settings, setup.world
        sampler: Any = batches.sampler
        images: Any = image_set(sampler.dataset)
        networks = {name: method.get_submodule(name) for name in method.frozen_names}
        self.cache = LogitsCache(
            folder,
            images,
            networks,
            classes=classes,
            dtype=settings.logits_dtype,
            topk=settings.logits_topk or None,
            device=setup.device,
            # The first process's: the times of files may differ between machines.
            identity=world.broadcast(lambda: identify(images, networks, amp=settings.amp)),
            note=note,
        )
        self.check_room(variants, len(images))

    def of_batch(self) -> Taught:
        """For `Method.phases(taught=)`: of the batch that the loader gave last."""
        rows: Any = self.batches.rows
        taught = self.cache.taught(rows)

        def logits(*arguments: Any) -> torch.Tensor | TopK:
            try:
                return taught(*arguments)
            except OSError as error:
                if error.errno in UNWRITABLE:
                    raise NotWritable(self.folder, str(error.strerror), _NOT_THERE) from error
                if error.errno not in FULL:
                    raise
                raise StorageError(
                    f"{error.filename} cannot be written, {FULL[error.errno]}: make room and repeat the command with "
                    "--resume, or leave --logits-cache out; what was saved before is whole"
                ) from error

        return logits

    def tell(self) -> None:
        """After training: how much was read."""
        counts = torch.tensor([self.cache.read, self.cache.computed])
        read, computed = self.world.sum(counts).tolist()
        if self.world.first and not self.settings.quiet and read + computed:
            share = f"{100 * read / (read + computed):.0f} % of {read + computed} rows"
            note(f"{self.who}: {share} of frozen logits were read from {self.folder}, the others computed")

    def check_room(self, variants: Sequence[int], images: int) -> None:
        """Say what the files take, and stop where there is no room for them."""
        whole, there = self.cache.size(variants)
        free = shutil.disk_usage(_existing(self.folder)).free
        if self.world.first and not self.settings.quiet:
            counts = {"network": len(self.cache.networks), "image": images, "augmentation": len(variants)}
            what = ", ".join(f"{count} {name}{'s' * (count != 1)}" for name, count in counts.items())
            kept = (
                f"the {top} likeliest classes of frozen logits"
                if (top := self.settings.logits_topk)
                else "frozen logits"
            )
            text = f"{self.who}: {kept} ({what}) take {size(whole)} in {self.folder}, {size(there)} are there"
            if len(variants) > 1 and not self.settings.variants:
                text += "; as each epoch has its own augmentation, only other stages and runs read them: see --variants"
            note(text)
        if self.world.any(whole - there > free):
            smaller = "a smaller --logits-topk" if self.settings.logits_topk else "--logits-dtype float16"
            raise StorageError(
                f"{self.who}: the frozen networks' logits need {size(whole - there)} more in {self.folder}, where "
                f"{size(free)} are free: make room, or take fewer --variants, "
                f"{smaller}, another --cache, or no --logits-cache"
            )


def _existing(folder: Path) -> Path:
    folder = folder.absolute()
    return next(each for each in (folder, *folder.parents) if each.exists())


def size(number: int) -> str:
    """Bytes in words: "812 bytes", "1.4 GB"."""
    for unit, scale in (("TB", 10**12), ("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if number >= scale:
            return f"{number / scale:.1f} {unit}"
    return f"{number} bytes"
