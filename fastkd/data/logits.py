"""What frozen networks say of the images of a data set, kept on disk: each image is shown to each network once.

    FOLDER/<key>/meta.json          what the key was made of, and the form of the logits
    FOLDER/<key>/v0003.npy          logits [N, C] of the images in augmentation 3, float32 or float16; or rows [N] of
                                    the k likeliest classes: ids, log_probs, log_tail
    FOLDER/<key>/v0003.check.npy    uint32 [N]: the check of each row, 0 for one that is not there

The key changes with the network's weights and with all that the pixels depend on, so that runs share a folder.

A row is there if it has the check that its bytes give. So it does not matter in which order they reach the disk, or
where a process was killed: a row half-written is one that is not there, and it is written again. Rows are read from
the mapped file and written by plain writes, since a store into a mapped file on a full disk would kill the process. A
row that is there is never written again: whoever comes second, in this run or in another one at the same time, takes
what the first one wrote.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import math
import os
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from fastkd.data._logit_rows import FLOATS, DType, Form, form_of
from fastkd.data.images import ImageSet
from fastkd.ops.topk import TopK

FORMAT = 1
# (name of a network, rows of the batch, what runs it on them) -> its logits of these rows, or what is kept of them
Taught = Callable[[str, slice, Callable[[], Tensor]], Tensor | TopK]
META = "meta.json"


def identify(images: ImageSet, networks: Mapping[str, nn.Module], **more: Any) -> dict[str, dict[str, Any]]:
    """What the logits of each network depend on, by its name: JSON-like facts of its weights and of the images.

    `more` are facts of the caller's: the precision of the forward pass. Names of networks and labels of images do not
    enter. Reads all weights, all images in memory, and of image files the sizes and times.
    """
    shared = {"format": FORMAT, "data": images.facts()} | more
    return {name: shared | _facts_of(network) for name, network in networks.items()}


def _facts_of(network: nn.Module) -> dict[str, Any]:
    found = hashlib.sha256()
    # The modules too: equal weights in another architecture are another network. Without addresses in memory.
    found.update(re.sub(r"0x[0-9a-f]+", "", f"{type(network).__module__} {network!r}").encode())
    values = dict(network.named_buffers()) | network.state_dict()
    for name, value in values.items():
        if isinstance(value, Tensor):
            value = value.detach().cpu().contiguous()
            found.update(f"\0{name} {value.dtype} {list(value.shape)}\0".encode())
            found.update(value.reshape(-1).view(torch.uint8).numpy().data)
        else:
            found.update(f"\0{name} {value!r}\0".encode())
    parameters = sum(p.numel() for p in network.parameters())
    return {"network": type(network).__name__, "parameters": parameters, "weights": found.hexdigest()}


class LogitsCache:
    """The logits of frozen networks for the images of one data set.

    >>> import tempfile
    >>> data = fastkd.data.load("fake", image_size=8, train_images=8, test_images=4, augment=False)
    >>> student, teacher = [torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 10)) for _ in range(2)]
    >>> method = fastkd.methods.KD(student, teacher)
    >>> frozen = {name: method.get_submodule(name) for name in method.frozen_names}
    >>> batches = fastkd.data.loader(data.train, 4, shuffle=True)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     cache = fastkd.data.LogitsCache(folder, data.train, frozen, classes=10)
    ...     for epoch in range(2):
    ...         for inputs, target in batches:
    ...             for phase in method.phases(inputs, target, taught=cache.taught(batches.rows)):
    ...                 phase.loss.backward()
    ...     cache.computed, cache.read
    (8, 8)

    Rows are filled in as batches come: the first time that an image comes in an augmentation, `taught` runs the
    network and keeps what it says. With random augmentation this pays where epochs share augmentations
    (`load(variants=K)`), or for the next run. Several processes may use one folder at the same time.

    Args:
        folder: where the files are; made if it is not there.
        images: what `Data.train` is: one view of each image.
        networks: name -> network in eval mode whose logits are float [B, C]; they are not run here and must not change.
        classes: C.
        dtype: "float32", exact for all but float64, or "float16" for half the room: 11 bits, up to 65504.
        topk: k, to keep of each row its k likeliest classes alone, 6 k + 4 bytes: int32 ids, float16 log-probabilities,
            and in float32 that of all other classes together, by their sum. `taught` then gives `fastkd.TopK` of mode
            "tail", for methods whose `no_topk` is "". None: all logits.
        device: of the logits that are given.
        identity: what `identify(images, networks)` gave; given by the first of several processes to the others.
        note: told in a sentence of files that cannot be used and are made anew.

    Errors: ValueError for images of several views, a data set that is not from `fastkd.data`, another dtype, a topk
    that is not in 1 .. C or beside float16; for logits that are not [B, C] or that float16 cannot hold; for a folder of
    other networks or images under this key. OSError where a file cannot be written, as on a full disk: what was written
    before is whole.

    Attributes:
        read, computed: rows (of all networks) that were read, and that networks were run for.
    """

    def __init__(
        self,
        folder: str | Path,
        images: ImageSet,
        networks: Mapping[str, nn.Module],
        *,
        classes: int,
        dtype: DType = "float32",
        topk: int | None = None,
        device: torch.device | str = "cpu",
        identity: Mapping[str, Mapping[str, Any]] | None = None,
        note: Callable[[str], None] = lambda text: None,
    ):
        if not isinstance(images, ImageSet):
            got = type(images).__name__
            raise ValueError(f"LogitsCache: images must be a data set of fastkd.data, whose pixels it knows, got {got}")
        if images.views > 1:
            raise ValueError(f"LogitsCache: images must have one view each, got {images.views} views")
        self.images, self.device = images, torch.device(device)
        self.form = form_of(classes, dtype, topk)
        facts = {"shape": [len(images), classes], **self.form.facts}
        identity = identify(images, networks) if identity is None else identity
        self.networks = {
            name: _Network(Path(folder), {**facts, **identity[name]}, len(images), self.form, note) for name in networks
        }
        self.read = self.computed = 0

    def taught(self, rows: np.ndarray, variant: int | None = None) -> Taught:
        """For `Method.phases(..., taught=)`: what hands out the logits of a batch, and runs networks for what is new.

        Args:
            rows: int64 [B], the images of the batch, `Loader.rows`; -1 counts nowhere and gets zeros, or no entry.
            variant: their augmentation; None for the present one of the images, as while a loader goes over them.
        """
        variant = self.images.variant if variant is None else variant

        def logits(name: str, part: slice, run: Callable[[], Tensor]) -> Tensor | TopK:
            network, wanted = self.networks[name], rows[part]
            values, there = network.get(variant, wanted)
            new = int((~there).sum())
            if new:
                values = network.put(variant, wanted, run().detach())
            self.computed += new
            self.read += int((wanted >= 0).sum()) - new
            return self.form.given(values, wanted >= 0, self.device, network.given)

        return logits

    def size(self, variants: Sequence[int]) -> tuple[int, int]:
        """Bytes that so many augmentations take when all rows are there, and how many of them are on the disk."""
        sizes = [network.size(variants) for network in {n.folder: n for n in self.networks.values()}.values()]
        return sum(whole for whole, _ in sizes), sum(there for _, there in sizes)


class _Network:
    """The files of one network."""

    def __init__(
        self,
        folder: Path,
        facts: dict[str, Any],
        count: int,
        form: Form,
        note: Callable[[str], None],
    ):
        self.facts, self.form, self.note = facts, form, note
        self.shape, self.dtype = (count, *form.shape), form.dtype  # of the file
        self.key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]
        self.folder = folder / self.key
        self.given: torch.dtype | None = None  # of what the network gives; None while nothing is kept
        self._open: tuple[int, np.memmap, np.memmap] | None = None  # variant, logits [N, C], checks [N]
        self._find()

    def get(self, variant: int, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What is kept of these rows, and bool [B]: which of them are there. Rows of -1 are, and are 0."""
        counts = rows >= 0
        if not self._map(variant):
            return np.zeros((len(rows), *self.form.shape), self.dtype), ~counts
        assert self._open is not None
        data, checks = (np.asarray(mapped) for mapped in self._open[1:])  # plain arrays are faster
        values = data[rows]  # a copy
        there = (checks[rows] == _checks(values, rows)) | ~counts
        values[~counts] = 0
        return values, there

    def put(self, variant: int, rows: np.ndarray, logits: Tensor) -> np.ndarray:
        """Keep what the network says of these rows, those that are there excepted; what is kept of all B."""
        given, values = logits.dtype, self.form.kept(logits, len(rows))
        with self._lock():
            self._keep_meta(given)
            if not self._map(variant):
                self._make(variant)
            assert self._open is not None
            kept, there = self.get(variant, rows)  # another process may have written some meanwhile
            new = np.flatnonzero(~there)
            write_rows(self._path(variant), self._open[1], rows[new], values[new])
            write_rows(self._path(variant, ".check"), self._open[2], rows[new], _checks(values[new], rows[new]))
        kept[new] = values[new]
        return kept

    def size(self, variants: Sequence[int]) -> tuple[int, int]:
        count = self.shape[0]
        whole = len(variants) * count * (math.prod(self.form.shape) * self.dtype.itemsize + 4)
        there = 0
        for path in (self._path(variant, suffix) for variant in variants for suffix in ("", ".check")):
            with contextlib.suppress(OSError):
                found = os.stat(path)
                there += min(found.st_size, 512 * getattr(found, "st_blocks", found.st_size))  # they have holes
        return whole, min(whole, there)

    def _path(self, variant: int, suffix: str = "") -> Path:
        return self.folder / f"v{variant:04d}{suffix}.npy"

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            import fcntl
        except ImportError:  # not a POSIX system: do without
            yield
            return
        # Not flock: a loader's worker, forked in between, would hold it on after this process was killed.
        with open(self.folder / ".lock", "w") as file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            yield

    def _find(self) -> None:
        """Look whether something is kept already."""
        path = self.folder / META
        try:
            meta = json.loads(path.read_text())
            facts, given = meta["facts"], FLOATS[meta["given"]]
        except FileNotFoundError:
            return
        except (ValueError, KeyError, TypeError):
            self.note(f"{path} is damaged: the logits in its folder are made anew")
            with self._lock():
                for old in [*self.folder.glob("v*.npy"), path]:
                    old.unlink(missing_ok=True)
            return
        if facts != self.facts:
            raise ValueError(f"{path} is of other networks or images than its folder's name says: delete the folder")
        self.given = given

    def _keep_meta(self, given: torch.dtype) -> None:
        if self.given is None:
            self._find()  # another process may have kept some
        if self.given is None:
            content = json.dumps({"given": str(given), "facts": self.facts}, indent=2)
            _replace(self.folder / META, lambda file: file.write(content.encode() + b"\n"))
            self.given = given

    def _map(self, variant: int) -> bool:
        """Whether the files of this augmentation are there; they are mapped then."""
        if self._open is not None and self._open[0] == variant:
            return True
        self._open = None
        if self.given is None:
            self._find()
        if self.given is None:
            return False
        logits, checks = (self._mapped(*file) for file in self._files(variant))
        if logits is None or checks is None:
            return False
        self._open = variant, logits, checks
        return True

    def _files(self, variant: int) -> list[tuple[Path, tuple[int, ...], np.dtype]]:
        logits = self._path(variant), self.shape, self.dtype
        return [logits, (self._path(variant, ".check"), self.shape[:1], np.dtype(np.uint32))]

    def _mapped(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> np.memmap | None:
        try:
            mapped: np.memmap = np.load(path, mmap_mode="r")
            if mapped.shape == shape and mapped.dtype == dtype and mapped.offset + mapped.nbytes == path.stat().st_size:
                return mapped
        except FileNotFoundError:
            return None
        except (ValueError, EOFError):  # a header that is none, or promises more than there is
            pass
        self.note(f"{path} is truncated or damaged: it is made anew")
        path.unlink(missing_ok=True)
        return None

    def _make(self, variant: int) -> None:
        """Files without a row, for the one that is missing or for both; they take no room before rows are written."""
        for path, shape, dtype in self._files(variant):
            if not path.exists():
                _replace(path, functools.partial(_holes, shape=shape, dtype=dtype))
        if not self._map(variant):
            raise OSError(f"{self._path(variant)} cannot be read back")


def _checks(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """uint32 [B]: of each row's bytes and number, never 0, which is what a hole of a file holds."""
    pairs = zip(values, (rows & 0xFFFFFFFF).tolist(), strict=True)
    return np.array([zlib.crc32(value, row) | 1 for value, row in pairs], dtype=np.uint32)


def _holes(file: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> None:
    """An .npy file of zeros that takes no room."""
    np.lib.format.write_array_header_1_0(
        file, {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    )
    file.truncate(file.tell() + math.prod(shape) * dtype.itemsize)


def write_rows(path: Path, mapped: np.memmap, rows: np.ndarray, values: np.ndarray) -> None:
    """Put rows into a mapped file; an OSError names it."""
    width = mapped.itemsize * math.prod(mapped.shape[1:])
    try:
        with open(path, "r+b", buffering=0) as file:
            for row, value in zip(rows.tolist(), values, strict=True):
                file.seek(mapped.offset + row * width)
                left = memoryview(value.tobytes())
                while left:  # a disk that gets full takes a part, and refuses the rest
                    left = left[file.write(left) :]
    except OSError as error:
        error.filename = error.filename or str(path)
        raise


def _replace(path: Path, fill: Callable[[Any], Any]) -> None:
    """Make a file that is either whole or not there."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            fill(file)
        os.replace(temporary, path)
    except OSError as error:
        error.filename = error.filename or str(path)
        raise
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink()
