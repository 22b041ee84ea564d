"""What a run measures: running means of an epoch, and metrics.csv with one row an epoch."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._core.files import write_atomic
from fastkd._core.messages import UserError
from fastkd.methods import Phase
from fastkd.train.distributed import ALONE, World


class Divergence(UserError):
    """A loss that is NaN or infinite."""

    def __init__(self, message: str):
        super().__init__(message, status=1)


_ROWS = ("images", "judged", "measured")  # of this process; the others are the same in all
_COUNTS = ("batches", "images", "judged", "measured", "skipped", "first_step")


class Meter:
    """Means over the images of an epoch of the loss, its parts and the accuracy, without waiting for a GPU.

    Where a phase was left out (`phase.skipped`), its batch enters no mean but the accuracy's. `describe(name,
    networks)` says which phase it is that has this name and trains these networks, "" where there is only one.

    The accuracy is that of `phase.outputs`, of the last phase of a batch that has them: it costs no forward pass of its
    own. Where none has, it is NaN. The parts of a phase that has a name bear it: "private_ce".

    With several processes (`world`) it holds those of this process; `total()` those of all.
    """

    def __init__(
        self,
        device: torch.device,
        read_every: int,
        describe: Callable[..., str] = lambda name, networks: name,
        world: World = ALONE,
    ):
        self.device, self.describe, self.world = device, describe, world
        self.read_every = 1 if device.type == "cpu" else read_every
        self.on_read: Callable[[Meter], None] = lambda meter: None  # after each reading that found finite losses
        self.batches = 0
        self.images = 0
        self.first_step = 0  # steps before this epoch
        self.skipped = 0  # phases that got no step
        self.measured = 0  # images of the batches in which every phase got its step
        self.sums: dict[str, Tensor] = {}  # name -> 0-d float64, summed over images
        self.judged = 0  # images whose output was seen
        # (batch, phase, loss) that nobody has read yet
        self._losses: list[tuple[int, tuple[str, Sequence[nn.Module]], Tensor]] = []
        self._batch: dict[str, Tensor] = {}  # sums of the current batch
        self._whole = True  # no phase of it was left out
        self._outputs: Tensor | None = None  # logits [B, C] of the current batch

    def add(self, phase: Phase, rows: int, loss: Tensor | None = None, tolerant: bool = True) -> None:
        """One update of the current batch, of `rows` images; `loss` where the phase has it in chunks.

        The loss of a phase that was left out is read where not `tolerant`.
        """
        loss = phase.loss.detach() if loss is None else loss
        outputs = phase.outputs
        self._outputs = self._outputs if outputs is None else outputs
        if not (phase.skipped and tolerant):
            # Not the phase itself: it holds the graph.
            self._losses.append((self.batches + 1, (phase.name, phase.networks), loss))
        if phase.skipped:
            self.skipped += 1
            self._whole = False
            return
        _accumulate(self._batch, "loss", loss * rows)
        for name, part in phase.parts.items():
            _accumulate(self._batch, name if name.startswith(phase.name) else f"{phase.name}_{name}", part * rows)

    def end_batch(self, target: Tensor, rows: int | None = None) -> None:
        """Counts the batch, of `rows` that count (all); Divergence if a reading is due and a loss was not finite."""
        rows = len(target) if rows is None else rows
        outputs, self._outputs = self._outputs, None
        if outputs is not None and len(outputs) == len(target):
            _accumulate(self.sums, "accuracy", (outputs.argmax(1) == target).sum())
            self.judged += rows
        if self._whole:
            for name, total in self._batch.items():
                _accumulate(self.sums, name, total)
            self.measured += rows
        self._batch, self._whole = {}, True
        self.batches += 1
        self.images += rows
        if self.batches % self.read_every == 0:
            self.read_losses()

    def read_losses(self) -> None:
        """Reads the losses since the last reading: a GPU is waited for here."""
        if not self._losses:
            return
        finite = torch.isfinite(torch.stack([loss for *_, loss in self._losses])).tolist()
        elsewhere = self.world.any(not all(finite))
        for (batch, phase, loss), good in zip(self._losses, finite, strict=True):
            if not good:
                raise Divergence(f"{self.place(batch, *phase)}: the loss is {float(loss)}")
        if elsewhere:
            raise Divergence(f"batch {self.batches}: the loss is not finite in another process")
        self._losses.clear()
        self.on_read(self)

    def total(self) -> Meter:
        """A meter of all processes; every one of them must call."""
        if self.world.size == 1:
            return self
        names = list(self.sums)  # in the same order in every process
        counts = torch.tensor([getattr(self, name) for name in _ROWS], dtype=torch.float64, device=self.device)
        sums = self.world.sum(torch.stack([*(self.sums[name] for name in names), *counts]))
        total = Meter(self.device, self.read_every, self.describe)
        state = {name: getattr(self, name) for name in _COUNTS}
        state |= dict(zip(_ROWS, map(int, sums[len(names) :].tolist()), strict=True))
        total.load_state_dict(state | {"sums": dict(zip(names, sums, strict=False))})
        return total

    def place(self, batch: int, name: str, networks: Sequence[nn.Module]) -> str:
        """Where in the run a phase is, for messages."""
        phase = self.describe(name, networks)
        return f"batch {batch} (step {self.first_step + batch})" + (f", {phase}" if phase else "")

    def means(self) -> dict[str, float]:
        """{"loss": ..., part: ..., "accuracy": ...} over the images so far."""
        means = {name: float(total) / max(1, self.measured) for name, total in self.sums.items() if name != "accuracy"}
        means = {"loss": math.nan} | means  # where not one batch got all its steps
        seen = self.judged and "accuracy" in self.sums
        return means | {"accuracy": float(self.sums["accuracy"]) / self.judged if seen else math.nan}

    def state_dict(self) -> dict[str, Any]:
        """The sums of the epoch so far, on the CPU."""
        sums = {name: total.cpu() for name, total in self.sums.items()}
        return {name: getattr(self, name) for name in _COUNTS} | {"sums": sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The way back of `state_dict`; of several processes the first alone goes on from the sums."""
        first = self.world.first  # of several processes one goes on from the sums of all
        for name in _COUNTS:
            setattr(self, name, state[name] if first or name not in _ROWS else 0)
        self.sums = {name: total.to(self.device) * first for name, total in state["sums"].items()}


def _accumulate(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    value = value.to(torch.float64)
    sums[name] = sums[name] + value if name in sums else value


Row = dict[str, float]


def read_csv(path: str | Path) -> list[Row]:
    """The rows of a metrics.csv; [] where there is none. An empty cell, a value that was not measured, is NaN."""
    path = Path(path)
    if not path.is_file():
        return []
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    try:
        return [{k: float(v) if v else math.nan for k, v in row.items()} for row in rows]
    except (TypeError, ValueError) as error:
        raise UserError(f"{path} is not a metrics file of fastkd ({error}): move it away") from error


def write_csv(path: str | Path, rows: list[Row]) -> None:
    """Replace the file by these rows at once, so that a reader never sees half a row."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow({name: _cell(row.get(name, math.nan)) for name in names})
    write_atomic(path, buffer.getvalue().encode())


def _cell(value: Any) -> Any:
    if not isinstance(value, float):
        return value
    return "" if math.isnan(value) else f"{value:.10g}"
