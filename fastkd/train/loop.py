"""The training loop: epochs of a method, with checkpoints, metrics and a clean end on Ctrl-C."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.data import Data, loader
from fastkd.methods import Method
from fastkd.models import logits_of
from fastkd.train import checkpoint
from fastkd.train.config import Settings, UserError
from fastkd.train.interrupts import Interrupted, catch_interrupt, leave_interrupts
from fastkd.train.metrics import Divergence, Meter, Row, read_csv, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.progress import Progress

FORMAT = 1


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N as a device that is there; UserError otherwise."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(f"--device {name} is not there ({torch.cuda.device_count()} GPUs): use --device cpu or auto")
    return device


@contextmanager
def cpu_threads(number: int | None) -> Iterator[None]:
    """PyTorch's number of threads on the CPU within the block; None leaves it as it is."""
    before = torch.get_num_threads()
    torch.set_num_threads(number or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def batches_on(batches, device: torch.device) -> Iterator[tuple[Any, torch.Tensor]]:
    """The (inputs, target) of a loader, on the device."""
    for inputs, target in batches:
        yield to_device(inputs, device), to_device(target, device)


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a list of them (several views of the images)."""
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    return batch.to(device, non_blocking=True)


def train_epoch(method, batches, optimizer, meter: Meter, on_batch: Callable[[], None] = lambda: None) -> None:
    """One pass over `batches` of (inputs, target)."""
    method.train()
    for inputs, target in batches_on(batches, meter.device):
        for phase in method.phases(inputs, target):
            optimizer.zero_grad(set_to_none=True)
            phase.loss.backward()
            optimizer.step()
            meter.add(phase, len(target))
        meter.end_batch(target)
        on_batch()


@torch.no_grad()
def evaluate(network: nn.Module, batches, device: torch.device) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1) in eval mode; the network's mode is restored."""
    was_training = network.training
    network.eval()
    loss = correct = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    for inputs, target in batches_on(batches, device):
        logits = logits_of(network(inputs)).float()  # [B, C]
        loss = loss + nn.functional.cross_entropy(logits, target, reduction="sum")
        correct = correct + (logits.argmax(1) == target).sum()
        images += len(target)
    network.train(was_training)
    return float(loss) / images, float(correct) / images


@dataclass
class Fit:
    """One training run in a folder: `folder`/checkpoints and `folder`/metrics.csv.

    Attributes:
        method: what is trained.
        data: what it is trained and evaluated on.
        settings: optimiser, batch size, device, ... .
        folder: where checkpoints and metrics go; None keeps nothing.
        epochs: passes over the training images.
        seed: of the order of the images and of PyTorch's generator.
        name: who trains, for messages: "teacher resnet14".
        facts: what is written into each checkpoint beside the state: plain values without paths or times. "learners"
            are the names of the networks that learn, the wanted one first.
        others: name -> the networks that learn together with the wanted one.
    """

    method: Method
    data: Data
    settings: Settings
    folder: Path | None
    epochs: int
    seed: int
    name: str
    facts: dict[str, Any]
    others: dict[str, nn.Module] = field(default_factory=dict)

    def __post_init__(self):
        self.device = pick_device(self.settings.device)
        self.method.to(self.device)
        self.optimizer = make_optimizer(self.method, self.settings)
        self.schedule = make_schedule(self.optimizer, self.settings, self.epochs)
        self.epoch = self.step = 0  # finished ones
        self.rows: list[Row] = []
        self._unfinished: dict[str, Any] | None = None  # the meter of an epoch that was interrupted
        workers = self.settings.workers
        batch_size = min(self.settings.batch_size, len(self.data.train))
        # Batch normalisation cannot train on a last batch of one image.
        alone = len(self.data.train) % batch_size == 1 and batch_size > 1
        self.train_batches = loader(
            self.data.train, batch_size, shuffle=True, seed=self.seed, workers=workers, drop_last=alone
        )
        self.train_batches.worker_init_fn = leave_interrupts
        held_out = {"validation": self.data.validation, "test": self.data.test}
        self.held_out = {
            name: loader(part, max(batch_size, 256), shuffle=False, workers=workers)
            for name, part in held_out.items()
            if part is not None
        }

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> list[Row]:
        """Train to the end from where `resume` left, and return one row of metrics an epoch.

        Raises Interrupted after Ctrl-C, once all is saved, and Divergence for a loss that is not finite.
        """
        if self.epoch == 0 and self._unfinished is None:
            checkpoint.seed_all(self.seed)
            self.initialise()
        with catch_interrupt() as interrupted:
            for epoch in range(self.epoch, self.epochs):
                self._run_epoch(epoch, interrupted)
        return self.rows

    def initialise(self) -> None:
        """Before the first epoch: what a method does with a few batches before it trains (DKEL)."""
        if hasattr(self.method, "initialise"):
            self.train_batches.sampler.set_epoch(0)
            self.method.initialise(batches_on(self.train_batches, self.device), self.settings.lr)

    def _run_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        self.method.start_epoch(epoch, self.epochs)
        started = time.perf_counter()
        meter = Meter(self.device, self.settings.log_every)
        batches = self._batches(epoch, meter)
        resumed = meter.images  # of the part of the epoch that ran before an interruption
        with Progress(self.name, epoch, self.epochs, len(self.train_batches), self.settings.quiet) as progress:

            def on_batch() -> None:
                self.step += 1
                progress.update(meter)
                if interrupted() and meter.batches < len(self.train_batches):
                    meter.look()
                    self._save(meter)
                    raise Interrupted

            try:
                with meter.watch(self.method.deployable()):
                    train_epoch(self.method, batches, self.optimizer, meter, on_batch)
                meter.look()
            except Divergence as error:
                raise Divergence(
                    f"{self.name} trained by {type(self.method).__name__}: epoch {epoch + 1}, {error}: "
                    "try a smaller --lr or --warmup-epochs"
                ) from error
            row = self._row(epoch, meter, meter.images - resumed, time.perf_counter() - started)
            progress.finish(row)
        self._end_epoch(epoch, row)
        if interrupted():
            raise Interrupted

    def _batches(self, epoch: int, meter: Meter):
        """The batches of an epoch, without those that ran before an interruption."""
        self.train_batches.sampler.set_epoch(epoch)
        batches = iter(self.train_batches)
        if self._unfinished is not None:
            state, self._unfinished = self._unfinished, None
            meter.load_state_dict(state["meter"])
            for _ in range(meter.batches):
                next(batches)
            checkpoint.set_random_state(state["random"])  # a data set of the user's may have drawn from it
        return batches

    def _row(self, epoch: int, meter: Meter, images: int, train_seconds: float) -> Row:
        started = time.perf_counter()
        row = {"epoch": epoch + 1, "lr": self.settings.lr * self.schedule.lr_lambdas[0](epoch)}
        row |= {f"train_{name}": value for name, value in meter.means().items()}
        row |= self._promotions()
        due = (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.epochs
        for name, batches in self.held_out.items():
            loss, accuracy = math.nan, math.nan
            if due:
                loss, accuracy = evaluate(self.method.deployable(), batches, self.device)
            row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        row["images_per_s"] = images / max(train_seconds, 1e-9)
        row["seconds"] = train_seconds + time.perf_counter() - started
        return row

    def _promotions(self) -> Row:
        """ORC: how often each network of the group was a temporary teacher since the start."""
        counts = getattr(self.method, "promotions", None)
        if counts is None:
            return {}
        return {f"promotions_{name}": n for name, n in zip(self.facts["learners"], counts.tolist(), strict=False)}

    def _end_epoch(self, epoch: int, row: Row) -> None:
        self.schedule.step()
        self.epoch = epoch + 1
        self.rows.append(row)
        if self.folder is not None:
            # Rows first: a row without a checkpoint is dropped when the run resumes, a missing row could not be.
            write_csv(self.folder / "metrics.csv", self.rows)
            self._save()

    def _save(self, meter: Meter | None = None) -> None:
        """The state after an epoch, or with `meter` the one in the middle of it."""
        if self.folder is None:
            return
        state = {
            "format": FORMAT,
            "epoch": self.epoch,
            "step": self.step,
            "method": dict(self.method.state_dict()),
            "network": dict(self.method.deployable().state_dict()),  # the same storages: takes no room
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": checkpoint.random_state(),
            "facts": self.facts,
        }
        partial = self.checkpoints / checkpoint.PARTIAL
        if meter is not None:
            checkpoint.save(partial, state | {"meter": meter.state_dict()})
            return
        checkpoint.save(checkpoint.path_of(self.checkpoints, self.epoch), state)
        partial.unlink(missing_ok=True)
        checkpoint.prune(self.checkpoints, self.settings.keep)

    def resume(self) -> None:
        """Go on from the last state in the folder; does nothing where there is none."""
        done = checkpoint.epochs(self.checkpoints)
        if done and done[-1] > self.epochs:
            raise UserError(f"{self.folder} has run {done[-1]} epochs already: give --epochs {done[-1]} or more")
        state = checkpoint.load(checkpoint.path_of(self.checkpoints, done[-1])) if done else None
        partial = self.checkpoints / checkpoint.PARTIAL
        if partial.exists():
            part = checkpoint.load(partial)
            if state is None or part["epoch"] == state["epoch"]:  # else an epoch was finished after it
                state = self._unfinished = part
        if state is not None:
            self._load(state)

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise UserError(f"{self.checkpoints} holds checkpoints of another version of fastkd: use a new --out")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        # The number of epochs may have been raised since: the rate of this epoch under the present schedule.
        for group, rate in zip(self.optimizer.param_groups, self._rates(state["epoch"]), strict=True):
            group["lr"] = rate
        self.epoch, self.step = state["epoch"], state["step"]
        self.rows = [row for row in read_csv(self.folder / "metrics.csv") if row["epoch"] <= self.epoch]
        checkpoint.set_random_state(state["random"])

    def on_schedule(self) -> bool:
        """Whether each epoch had the rate of this schedule: not where the number of epochs was raised in between."""
        factor = self.schedule.lr_lambdas[0]
        rates = [self.settings.lr * factor(int(row["epoch"]) - 1) for row in self.rows]
        return all(math.isclose(row["lr"], rate, rel_tol=1e-8) for row, rate in zip(self.rows, rates, strict=True))

    def _rates(self, epoch: int) -> list[float]:
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        return [base * factor(epoch) for base, factor in rates]
