"""What a run shows while it works: a bar on a terminal, and a line for an epoch."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TypeVar

from fastkd._core.extras import require
from fastkd.train.metrics import Meter, Row
from fastkd.train.time_left import duration

LAST = 5  # epochs whose time says how long the others take: more of them would remember a busier machine
INTERVAL = 0.2  # seconds between two redraws: reading the means waits for a GPU


BAR = "{desc} {percentage:3.0f}%|{bar}| {n}/{total}{postfix}"


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
    """The progress of one epoch, as a context manager. Shows nothing if `quiet`.

    before: the rows of the epochs before it; their seconds say how long the others will take.
    """

    printed = 0.0  # when the last line was

    def __init__(self, name: str, epoch: int, epochs: int, batches: int, quiet: bool, before: Sequence[Row] = ()):
        self.title = f"{name}  epoch {epoch + 1}/{epochs}"
        self.quiet, self.batches = quiet, batches
        self.epochs_left, self.before = epochs - epoch - 1, before
        self.bar = None
        self.last, self.batches_before = 0.0, 0

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
            self.batches_before = meter.batches
        self.bar.n = meter.batches
        if now - self.last < INTERVAL:
            return
        self.last = now
        means = meter.means()
        speed = (meter.images - self.images_before) / max(now - self.started, 1e-9)
        accuracy = f"accuracy {100 * means['accuracy']:.1f} %, " if means["accuracy"] >= 0 else ""
        left = f"about {duration(self._left(meter.batches, now))} left"
        self.bar.set_postfix_str(f"{left}, loss {means['loss']:.3f}, {accuracy}{speed:.0f} images/s", refresh=False)
        self.bar.refresh()

    def _left(self, batches: int, now: float) -> float:
        """Seconds to the end of the last epoch, from those of this epoch's batches and of the last epochs."""
        a_batch = (now - self.started) / max(1, batches - self.batches_before)
        epoch = statistics.fmean(self._seconds()) if self.before else a_batch * self.batches
        return a_batch * (self.batches - batches) + epoch * self.epochs_left

    def _seconds(self, *more: Row) -> list[float]:
        """Of the last epochs."""
        return [row["seconds"] for row in [*self.before, *more][-LAST:]]

    def finish(self, row: Row) -> None:
        """After the epoch: a line, for the last epoch always, else where the line before is old."""
        now = time.perf_counter()
        if self.quiet or (now - Progress.printed < LINES and self.epochs_left):
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
        if self.epochs_left:
            text += f"  about {duration(statistics.fmean(self._seconds(row)) * self.epochs_left)} left"
        if self.bar is not None:
            self.bar.clear()
        print(text, file=sys.stderr, flush=True)
