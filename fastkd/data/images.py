"""Images in memory or in files, and the dataset that augments and normalises them."""

import copy
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Dataset

from fastkd._core.extras import require
from fastkd.data.decoding import VERSION, UnreadableImage, open_image
from fastkd.data.seeding import AUGMENT, stream

BadImages = Literal["error", "skip"]
LARGE = 96  # from this image_size on, files are cropped as ImageNet's are


class InMemory:
    """Images as one tensor [N, C, H, W], uint8 in 0..255 or float32 in 0..1."""

    def __init__(self, images: Tensor):
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def fetch(self, rows: np.ndarray) -> Tensor:
        """The images of `rows`: [n, C, H, W]."""
        return self.images[torch.from_numpy(rows)]

    def render(self, raw: Any, keys: np.ndarray | None) -> Tensor:
        """What `fetch` gave: [n, C, H, W] as it is."""
        images: Tensor = raw
        return images

    def blocks(self, rows: np.ndarray, step: int = 4096) -> Iterator[bytes | np.ndarray]:
        """All that tells these images from others, piece by piece."""
        yield f"{self.images.dtype} {list(self.images.shape[1:])}".encode()
        for start in range(0, len(rows), step):
            yield self.fetch(rows[start : start + step]).numpy()

    def facts(self) -> dict[str, Any]:
        """What these images are, for the comparison with an earlier run's: type, shape, digest."""
        images = self.images.contiguous().numpy()
        digest = hashlib.sha256(images.reshape(-1).data).hexdigest()
        return {"images": f"{images.dtype} {list(images.shape)} {digest}"}


class Files:
    """Image files, decoded when asked for, always as RGB of `size` x `size` pixels."""

    def __init__(self, paths: Sequence[str], size: int):
        self.paths, self.size = list(paths), size

    def __len__(self) -> int:
        return len(self.paths)

    def fetch(self, rows: np.ndarray) -> Any:
        """PIL images, and an UnreadableImage in the place of each one that cannot be read."""
        return [_try_to_open(self.paths[row]) for row in rows]

    def render(self, raw: Any, keys: np.ndarray | None) -> Tensor:
        """uint8 [B, 3, size, size]: the centre, or where `keys` [B] in [0, 1) are given the random crop of each key."""
        cut = self._centre if keys is None else self._random_crop
        images = [cut(image, key) for image, key in zip(raw, [0.0] * len(raw) if keys is None else keys, strict=True)]
        return torch.from_numpy(np.stack([np.asarray(image) for image in images])).permute(0, 3, 1, 2)

    def facts(self) -> dict[str, Any]:
        """What these files are, for the comparison with an earlier run's: folder, count, digest of names and sizes."""
        folder = os.path.dirname(os.path.commonprefix(self.paths))  # noqa: RUF071  # letters, then folders
        found = hashlib.sha256()
        for path in self.paths:
            found.update(os.fsencode(f"{path[len(folder) :]}\0{_size_and_time(path)}\0"))
        facts = {"folder": os.path.realpath(folder), "images": f"{len(self)} files {found.hexdigest()}"}
        return facts | {"decoding": VERSION}

    def _centre(self, image: Any, key: float) -> Any:
        transforms = _transforms()
        side = round(self.size * 256 / 224) if self.size >= LARGE else self.size
        return transforms.center_crop(transforms.resize(image, side), [self.size, self.size])

    def _random_crop(self, image: Any, key: float) -> Any:
        # torchvision draws from the global generator: lend it a state of our own.
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(int(key * 2**53))
            crop = require("torchvision.transforms", "Images").RandomResizedCrop
            box = crop.get_params(image, scale=[0.08, 1.0], ratio=[3 / 4, 4 / 3])
        return _transforms().resized_crop(image, *box, size=[self.size, self.size])


def _size_and_time(path: str) -> str:
    try:
        found = os.stat(path)
    except OSError:  # reading it says what is wrong
        return "none"
    return f"{found.st_size} {found.st_mtime_ns}"


def _transforms() -> Any:
    return require("torchvision.transforms.functional", "Reading images")


def _try_to_open(path: str) -> Any:
    try:
        return open_image(path)
    except UnreadableImage as error:
        return error


@dataclass(frozen=True)
class Augmentation:
    """What may happen to a training image.

    padding       shifted by up to so many pixels each way, what comes in is 0 (black)
    flip          mirrored with probability 1/2
    resized_crop  files only: a random part of 8 % to 100 % of the area (torchvision's RandomResizedCrop)
    """

    padding: int = 0
    flip: bool = False
    resized_crop: bool = False


class ImageSet(Dataset[tuple[Any, int]]):
    """A map-style dataset of (image, label): float32 [C, size, size] normalised, int.

    With `views` > 1 the image is a tuple of so many tensors, each augmented on its own. What happens to an image
    depends on seed, epoch, image and view only, so that batches are the same for any number of workers
    and after a resume; `set_epoch` says which epoch it is (`fastkd.data.loader` calls it).

    store      `InMemory` or `Files`
    labels     int64 [N], one for each image of the store
    rows       int64 [n], the images of the store that this set holds; None for all
    mean, std  one number a channel, for pixels in 0..1
    variants   0: each epoch has an augmentation of its own; K: epoch e has that of epoch e % K
    bad_images "error" or "skip": what `fastkd.data.loader` does where a file cannot be read
    """

    def __init__(
        self,
        store: InMemory | Files,
        labels: np.ndarray,
        rows: np.ndarray | None,
        size: int,
        mean: Sequence[float],
        std: Sequence[float],
        *,
        augmentation: Augmentation | None = None,
        views: int = 1,
        seed: int = 0,
        bad_images: BadImages = "error",
        variants: int = 0,
    ):
        self.store, self.size, self.augmentation, self.views, self.seed = store, size, augmentation, views, seed
        self.bad_images, self.variants = bad_images, variants
        self.rows = np.arange(len(store)) if rows is None else rows
        self.store_labels, self.labels = labels, labels[self.rows]  # [N], [n]
        self.mean = torch.tensor(mean, dtype=torch.float32).view(-1, 1, 1)
        self.std = torch.tensor(std, dtype=torch.float32).view(-1, 1, 1)
        self.set_epoch(0)

    def __len__(self) -> int:
        return len(self.rows)

    def with_views(self, views: int) -> "ImageSet":
        """The same images, with another number of views; the first ones stay as they are."""
        other = copy.copy(self)
        other.views = views
        other.set_epoch(self.epoch)
        return other

    def plain(self) -> "ImageSet":
        """The same images as they are: without augmentation, one view."""
        other = self.with_views(1)
        other.augmentation = None
        return other

    def with_labels(self, labels: np.ndarray) -> "ImageSet":
        """The same images with other labels [n]."""
        other = copy.copy(self)
        other.labels = labels
        return other

    def set_epoch(self, epoch: int) -> None:
        """The augmentation draws anew for `epoch`."""
        self.epoch = epoch
        self._draws: list[np.ndarray] | None = None

    @property
    def variant(self) -> int:
        """Which augmentation the images have at present: those of one variant are the same, in every epoch and run."""
        return self.variant_of(self.epoch)

    def variant_of(self, epoch: int) -> int:
        """Which variant of each image `epoch` shows: an epoch's own, one of `variants` in turns, or always 0."""
        if self.augmentation is None:
            return 0
        return epoch % self.variants if self.variants else epoch

    def facts(self) -> dict[str, Any]:
        """All that the pixels of each variant depend on, as JSON-like values.

        Images in memory enter by their bytes, files by their names, sizes and times: they are not opened.
        """
        change = None if self.augmentation is None else asdict(self.augmentation) | {"seed": self.seed}
        facts: dict[str, Any]
        facts = {"count": len(self), "image_size": self.size, "channels": len(self.mean), "augmentation": change}
        facts |= {"mean": self.mean.flatten().tolist(), "std": self.std.flatten().tolist()}
        facts |= {"rows": hashlib.sha256(np.ascontiguousarray(self.rows, dtype=np.int64).data).hexdigest()}
        return facts | self.store.facts()

    def __getitem__(self, index: int) -> tuple[Any, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(f"index {index} of a set of {len(self)} images")
        item: tuple[Any, int] = self.__getitems__([index])[0]
        return item

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """A batch at once, which is much faster than image by image; DataLoader knows this method."""
        items = self.read(indices)
        for item in items:
            if isinstance(item, UnreadableImage):
                raise item
        return items

    def blank(self) -> Tensor | tuple[Tensor, ...]:
        """A black image, in the shape of the others."""
        image = torch.zeros(len(self.mean), self.size, self.size)
        return image if self.views == 1 else (image,) * self.views

    def read(self, indices: Sequence[int]) -> list[Any]:
        """The (image, label) of a batch; in the place of one that cannot be read an UnreadableImage."""
        asked = np.asarray(indices)
        raw = self.store.fetch(self.rows[asked])
        if isinstance(raw, Tensor) or not any(isinstance(image, UnreadableImage) for image in raw):
            return self._items(raw, asked)
        good = [i for i, image in enumerate(raw) if not isinstance(image, UnreadableImage)]
        items = iter(self._items([raw[i] for i in good], asked[good]) if good else [])
        return [image if isinstance(image, UnreadableImage) else next(items) for image in raw]

    def _items(self, raw: Tensor | list[Any], indices: np.ndarray) -> list[Any]:
        rows, labels = self.rows[indices], self.labels[indices].tolist()
        views = [self._view(raw, rows, view) for view in range(self.views)]
        images = views[0] if self.views == 1 else zip(*views, strict=True)
        return list(zip(images, labels, strict=True))

    def _view(self, raw: Tensor | list[Any], rows: np.ndarray, view: int) -> Tensor:
        change = self.augmentation
        if change is None:
            x = self.store.render(raw, None)
        else:
            draws = self._numbers(view)[rows]  # [B, 4]
            x = self.store.render(raw, draws[:, 3] if change.resized_crop else None)
            x = shift_and_flip(x, draws, change.padding, change.flip)
        x = x.float() / 255 if x.dtype == torch.uint8 else x
        if x.shape[-1] != self.size:
            x = F.interpolate(x, (self.size, self.size), mode="bilinear", align_corners=False, antialias=True)
        return (x - self.mean) / self.std

    def _numbers(self, view: int) -> np.ndarray:
        # The numbers of the whole store at once: seeding a generator for each image would take longer than the image.
        if self._draws is None:
            n = len(self.store)
            self._draws = [stream(self.seed, AUGMENT, self.variant, v).random((n, 4)) for v in range(self.views)]
        return self._draws[view]


def shift_and_flip(x: Tensor, draws: np.ndarray, padding: int, flip: bool) -> Tensor:
    """Crops x [B, C, H, W], padded by zeros, at random and mirrors it if `flip`; `draws` [B, 3 or more] in [0, 1)."""
    height, width = x.shape[-2:]
    corners = (draws[:, :2] * (2 * padding + 1)).astype(int).tolist()
    padded = F.pad(x, (padding,) * 4)
    x = torch.stack(
        [im[:, top : top + height, left : left + width] for im, (top, left) in zip(padded, corners, strict=True)]
    )
    if flip:
        mirrored = torch.from_numpy(draws[:, 2] < 0.5)[:, None, None, None]  # [B, 1, 1, 1]
        x = torch.where(mirrored, x.flip(-1), x)
    return x
