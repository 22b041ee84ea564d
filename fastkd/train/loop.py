"""The training loop: epochs of a method, with checkpoints, metrics and a clean end on Ctrl-C."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.data import Data, loader
from fastkd.methods import Method
from fastkd.models import logits_of
from fastkd.train import checkpoint
from fastkd.train.bad_images import BadImages
from fastkd.train.config import Settings, UserError
from fastkd.train.devices import batches_on, pick_device
from fastkd.train.interrupts import Interrupted, catch_interrupt, leave_interrupts
from fastkd.train.metrics import Divergence, Meter, Row, read_csv, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.progress import Progress, note
from fastkd.train.steps import SKIPS, Steps

FORMAT = 2


def train_epoch(
    method: Method,
    batches,
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    on_batch: Callable[[], None] = lambda: None,
    steps: Steps | None = None,
    classes: int | None = None,
) -> None:
    """One pass over `batches` of (inputs, target). `steps` takes the steps, `classes` is what labels must be below."""
    steps = steps or Steps(method, optimizer)
    method.train()
    for inputs, target in batches_on(batches, meter.device, classes):
        steps.start_batch()
        for phase in method.phases(inputs, target):
            steps.take(phase)
            if steps.in_row == SKIPS:
                place = meter.place(meter.batches + 1, phase.name, phase.networks)
                raise Divergence(f"{place}: the loss or its gradient was not finite in {SKIPS} steps in a row")
            meter.add(phase, len(target))
        meter.end_batch(target)
        on_batch()


@torch.no_grad()
def evaluate(network: nn.Module, batches, device: torch.device, classes: int | None = None) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1) in eval mode; the network's mode is restored."""
    was_training = network.training
    network.eval()
    loss = correct = torch.zeros((), dtype=torch.float64, device=device)
    images = 0
    for inputs, target in batches_on(batches, device, classes):
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
        self.steps = Steps(self.method, self.optimizer, self.settings.non_finite)
        self.epoch = self.step = 0  # finished ones
        self.rows: list[Row] = []
        self._unfinished: dict[str, Any] | None = None  # the state of an epoch that was interrupted
        workers = self.settings.workers
        batch_size = min(self.settings.batch_size, len(self.data.train))
        # Batch normalisation cannot train on a last batch of one image.
        alone = len(self.data.train) % batch_size == 1 and batch_size > 1
        self.train_batches = loader(
            self.data.train,
            batch_size,
            shuffle=True,
            seed=self.seed,
            workers=workers,
            drop_last=alone,
            smallest=min(2, batch_size),
        )
        self.train_batches.worker_init_fn = leave_interrupts
        held_out = {"validation": self.data.validation, "test": self.data.test}
        self.held_out = {
            name: loader(part, max(batch_size, 256), shuffle=False, workers=workers)
            for name, part in held_out.items()
            if part is not None
        }
        self.bad_images = BadImages(self.folder, [self.train_batches, *self.held_out.values()])

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
            batches = batches_on(self.train_batches, self.device, self.data.num_classes)
            self.method.initialise(batches, self.settings.lr)

    def _run_epoch(self, epoch: int, interrupted: Callable[[], bool]) -> None:
        self.method.start_epoch(epoch, self.epochs)
        started = time.perf_counter()
        meter = Meter(self.device, self.settings.log_every, self._describe)
        batches = self._batches(epoch, meter)
        resumed = meter.images  # of the part of the epoch that ran before an interruption
        with Progress(self.name, epoch, self.epochs, len(self.train_batches), self.settings.quiet) as progress:

            def on_batch() -> None:
                self.step += 1
                progress.update(meter)
                stop = interrupted()
                due = self.settings.save_every and self.step % self.settings.save_every == 0
                if (stop or due) and self.train_batches.taken < len(self.train_batches):
                    meter.look()  # no state behind a loss that is not finite is saved
                    self._save(meter)
                    if stop:
                        raise Interrupted

            try:
                with meter.watch(self.method.deployable()):
                    train_epoch(
                        self.method, batches, self.optimizer, meter, on_batch, self.steps, self.data.num_classes
                    )
                meter.look()
            except Divergence as error:
                skip = "" if self.settings.non_finite == "skip" else ", or --non-finite skip"
                raise Divergence(
                    f"{self.name} trained by {type(self.method).__name__}: epoch {epoch + 1}, {error}: "
                    f"try a smaller --lr or --warmup-epochs{skip}"
                ) from error
            row = self._row(epoch, meter, meter.images - resumed, time.perf_counter() - started)
            progress.finish(row)
        self._end_epoch(epoch, row)
        if interrupted():
            raise Interrupted

    def _batches(self, epoch: int, meter: Meter):
        """The batches of an epoch, without those that ran before an interruption."""
        state, self._unfinished = self._unfinished, None
        if state is None:
            meter.first_step = self.step
            return self.train_batches.go_on(epoch, 0)
        meter.load_state_dict(state["meter"])
        batches = self.train_batches.go_on(epoch, *state["batches"])
        checkpoint.set_random_state(state["random"])  # a data set of the user's may have drawn from it
        return batches

    def _describe(self, phase: str, networks: Sequence[nn.Module]) -> str:
        """Which phase of a method with several, and which networks it trains where they are several."""
        names = {id(module): name for name, module in self.method.named_modules()}
        trained = [names[id(network)] for network in networks if id(network) in names]
        if phase:
            return f"phase {phase} of {', '.join(trained)}"
        return f"networks {', '.join(trained)}" if len(trained) > 1 else ""

    def _row(self, epoch: int, meter: Meter, images: int, train_seconds: float) -> Row:
        started = time.perf_counter()
        row = {"epoch": epoch + 1, "lr": self.settings.lr * self.schedule.lr_lambdas[0](epoch)}
        row |= {f"train_{name}": value for name, value in meter.means().items()}
        row |= self._promotions()
        if self.settings.non_finite == "skip":
            row["train_skipped_steps"] = meter.skipped
        due = (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.epochs
        for name, batches in self.held_out.items():
            loss, accuracy = math.nan, math.nan
            if due:
                loss, accuracy = evaluate(self.method.deployable(), batches, self.device, self.data.num_classes)
            row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if self.settings.bad_images == "skip":
            row["train_bad_images"] = self.train_batches.lost
            row |= {f"{name}_bad_images": batches.lost if due else math.nan for name, batches in self.held_out.items()}
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
        self.bad_images.tell()
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
            "skips_in_row": self.steps.in_row,
            "facts": self.facts,
        }
        partial = self.checkpoints / checkpoint.PARTIAL
        if meter is not None:
            batches = self.train_batches.taken, self.train_batches.lost
            checkpoint.save(partial, state | {"meter": meter.state_dict(), "batches": batches})
            return
        checkpoint.save(checkpoint.path_of(self.checkpoints, self.epoch), state)
        partial.unlink(missing_ok=True)
        checkpoint.prune(self.checkpoints, self.settings.keep)

    def resume(self) -> None:
        """Go on from the last whole state in the folder, whose lock is held; does nothing where there is none."""
        for folder in (self.folder, self.checkpoints):
            checkpoint.sweep(folder)
        done = checkpoint.epochs(self.checkpoints)
        if done and done[-1] > self.epochs:
            raise UserError(f"{self.folder} has run {done[-1]} epochs already: give --epochs {done[-1]} or more")
        state = checkpoint.newest(self.checkpoints, note)
        if state is None:
            return
        checkpoint.prune(self.checkpoints, self.settings.keep)  # killed between writing the last one and this
        self._load(state)
        if "meter" in state:
            self._unfinished = state

    def _load(self, state: dict[str, Any]) -> None:
        if state.get("format") != FORMAT:
            raise UserError(f"{self.checkpoints} holds checkpoints of another version of fastkd: use a new --out")
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        # The number of epochs may have been raised since: the rate of this epoch under the present schedule.
        for group, rate in zip(self.optimizer.param_groups, self._rates(state["epoch"]), strict=True):
            group["lr"] = rate
        self.epoch, self.step, self.steps.in_row = state["epoch"], state["step"], state["skips_in_row"]
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
