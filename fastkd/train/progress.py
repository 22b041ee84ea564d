"""What a run shows while it works: a bar on a terminal, and a line for an epoch."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from fastkd._core.extras import require
from fastkd.train.metrics import Meter, Row

INTERVAL = 0.2  # seconds between two redraws: reading the means waits for a GPU


BAR = "{desc} {percentage:3.0f}%|{bar}| {n}/{total}, {remaining} left{postfix}"


LINES = 2.0  # seconds between two lines, so that a thousand short epochs do not print a thousand

Item = TypeVar("Item")


def each(items: Sequence[Item], title: str) -> Iterator[Item]:
    """Goes through `items` with a bar on a terminal, else with a line where the line before is old."""
    if sys.stderr.isatty():
        yield from require("tqdm", "The progress bar").tqdm(items, desc=title, leave=False, dynamic_ncols=True)
        return
    printed = time.perf_counter()
    for number, item in enumerate(items, 1):
        yield item
        if time.perf_counter() - printed >= LINES:
            printed = time.perf_counter()
            print(f"{title}  {number}/{len(items)}", file=sys.stderr, flush=True)


class Progress:
    """The progress of one epoch, as a context manager. Shows nothing if `quiet`."""

    printed = 0.0  # when the last line was

    def __init__(self, name: str, epoch: int, epochs: int, batches: int, quiet: bool):
        self.title = f"{name}  epoch {epoch + 1}/{epochs}"
        self.quiet, self.batches = quiet, batches
        self.is_last = epoch + 1 == epochs
        self.bar = None
        self.last = 0.0

    def __enter__(self) -> Progress:
        self.started, self.images_before = time.perf_counter(), None
        if not self.quiet and sys.stderr.isatty():
            tqdm = require("tqdm", "The progress bar").tqdm
            self.bar = tqdm(total=self.batches, desc=self.title, leave=False, dynamic_ncols=True, bar_format=BAR)
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()

    def update(self, meter: Meter) -> None:
        """After each batch."""
        if self.bar is None:
            return
        now = time.perf_counter()
        if self.images_before is None:
            self.images_before, self.started, self.last = meter.images, now, now
        self.bar.n = meter.batches
        if now - self.last < INTERVAL:
            return
        self.last = now
        means = meter.means()
        speed = (meter.images - self.images_before) / max(now - self.started, 1e-9)
        accuracy = f"accuracy {100 * means['accuracy']:.1f} %, " if means["accuracy"] >= 0 else ""
        self.bar.set_postfix_str(f"loss {means['loss']:.3f}, {accuracy}{speed:.0f} images/s", refresh=False)
        self.bar.refresh()

    def finish(self, row: Row) -> None:
        """After the epoch: a line, for the last epoch always, else where the line before is old."""
        now = time.perf_counter()
        if self.quiet or (now - Progress.printed < LINES and not self.is_last):
            return
        Progress.printed = now
        text = f"{self.title}  loss {row['train_loss']:.3f}"
        for name, label in (("train", "accuracy"), ("validation", "validation"), ("test", "test")):
            if row.get(f"{name}_accuracy", float("nan")) >= 0:  # false for NaN: not measured in this epoch
                text += f"  {label} {100 * row[f'{name}_accuracy']:.1f} %"
        for name, label in (("skipped_steps", "steps skipped"), ("bad_images", "images left out")):
            if row.get(f"train_{name}", 0) > 0:
                text += f"  {int(row[f'train_{name}'])} {label}"
        text += f"  {row['images_per_s']:.0f} images/s"
        if self.bar is not None:
            self.bar.clear()
        print(text, file=sys.stderr, flush=True)
