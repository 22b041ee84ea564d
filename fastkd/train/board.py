"""Curves for TensorBoard: every row of metrics.csv, and the losses within an epoch, as scalars in event files."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from fastkd._core.extras import require
from fastkd._core.messages import note
from fastkd.train.distributed import ALONE, World
from fastkd.train.metrics import Meter, Row


def writer_type() -> Any:
    """torch.utils.tensorboard.SummaryWriter; ImportError in one sentence where the package is missing."""
    return require("torch.utils.tensorboard", "--tensorboard", "tensorboard").SummaryWriter


class TensorBoard:
    """The scalars of one stage, in event files in `folder`. With folder=None it does nothing.

    Tags: "epoch/NAME" for the columns of metrics.csv, "step/NAME" for what the meter holds when it reads its losses:
    the mean over the images since the last reading. Both stand at the run's step, also those of an epoch, so that one
    number says what a resumed run must drop. What is not finite is left out, as in metrics.csv.

    Only the first of several processes writes. All of them must call: what is written are means over all.

    A writer that fails (a full disk) is named once and written to no more; the run goes on, since metrics.csv and the
    checkpoints have all that counts.
    """

    def __init__(self, folder: Path | None, world: World = ALONE):
        self.folder, self.world = folder, world
        self._writer: Any = None
        self._before: dict[str, float] = {}  # sums at the last reading

    @contextmanager
    def opened(self, step: int) -> Iterator[None]:
        """Within the block, scalars are written; those of `step` and later that were written before are dropped."""
        if self.folder is None or not self.world.first:
            yield
            return
        with _errors_of_its_thread_left_to_us():
            self._try(lambda: self._open(step))
            try:
                yield
            finally:
                self._ask(lambda writer: writer.close())
                self._writer = None

    def watch(self, meter: Meter) -> None:
        """Write what this epoch's meter holds, at each of its readings."""
        if self.folder is not None:
            self._before = _sums(meter.total())  # not zero where the epoch goes on after an interruption
            meter.on_read = self.step

    def row(self, step: int, row: Row) -> None:
        """A row of metrics.csv."""
        self._scalars("epoch", step, row)

    def step(self, meter: Meter) -> None:
        """The means over the images since the last reading."""
        total = meter.total()
        before, self._before = self._before, _sums(total)
        since = {name: value - before.get(name, 0.0) for name, value in self._before.items()}
        images = {name: since[_JUDGED if name == "accuracy" else _MEASURED] for name in total.sums}
        means = {name: since[name] / count for name, count in images.items() if count > 0}
        self._scalars("step", total.first_step + total.batches, means)

    def flush(self) -> None:
        """All that was written so far into the file."""
        self._ask(lambda writer: writer.flush())

    def _scalars(self, kind: str, step: int, values: dict[str, float]) -> None:
        def write(writer: Any) -> None:
            for name, value in values.items():
                if math.isfinite(value):
                    writer.add_scalar(f"{kind}/{name}", value, step)

        self._ask(write)

    def _open(self, step: int) -> None:
        self._writer = writer_type()(log_dir=str(self.folder), purge_step=step)

    def _ask(self, action: Callable[[Any], None]) -> None:
        if self._writer is not None:
            self._try(lambda: action(self._writer))

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        except Exception as error:
            self._writer = None
            reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:160] or type(error).__name__
            note(f"{self.folder} is written no more ({reason}): the run goes on without curves for TensorBoard")


_MEASURED, _JUDGED = "images measured", "images judged"


def _sums(meter: Meter) -> dict[str, float]:
    """What a meter has summed up, read at once: a GPU is waited for."""
    values = torch.stack(list(meter.sums.values())).tolist() if meter.sums else []
    return dict(zip(meter.sums, values, strict=True)) | {_MEASURED: meter.measured, _JUDGED: meter.judged}


@contextmanager
def _errors_of_its_thread_left_to_us() -> Iterator[None]:
    """The writer's thread gives its error to whoever calls next, and a traceback on stderr, which is left out here."""
    before = threading.excepthook

    def hook(args: Any) -> None:
        if not type(args.thread).__module__.startswith("tensorboard."):
            before(args)

    threading.excepthook = hook
    try:
        yield
    finally:
        threading.excepthook = before
