"""The training loop: epochs of a method, with checkpoints, metrics and a clean end on Ctrl-C."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.data import Data, loader
from fastkd.data.parts import IGNORED, Part
from fastkd.methods import Method
from fastkd.models import logits_of
from fastkd.train import checkpoint
from fastkd.train.config import Settings, UserError
from fastkd.train.distributed import ALONE, World, launched, world
from fastkd.train.interrupts import Interrupted, catch_interrupt, leave_interrupts
from fastkd.train.metrics import Divergence, Meter, Row, read_csv, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.progress import Progress
from fastkd.train.steps import Steps

FORMAT = 1


def pick_device(name: str) -> torch.device:
    """auto | cpu | cuda | cuda:N as a device that is there; UserError otherwise.

    Of several processes each takes the GPU of its number on its machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"--device must be cpu, cuda, cuda:N or auto, got {name!r}") from error
    if device.type == "cuda" and launched() > 1:
        if device.index is not None:
            raise UserError(f"--device {name} is one GPU for {launched()} processes: use --device cuda, one GPU each")
        device, found = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))), torch.cuda.device_count()
        if device.index >= found:
            raise UserError(f"there is no GPU for process {device.index} of this machine ({found} GPUs): start fewer")
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


def prepare(method: Method, settings: Settings, device: torch.device, world: World = ALONE) -> Method:
    """The method with its learning networks as they are to be run: in parallel, compiled, in channels-last order."""
    if settings.channels_last:
        method.to(memory_format=torch.channels_last)
    if world.size > 1:
        method.map_learners(lambda network: world.wrap(method, network, device))
    if settings.compile:  # around DistributedDataParallel, whose exchange then overlaps with the backward pass
        method.map_learners(torch.compile)
    return method


def own_seed(seed: int, rank: int) -> int:
    """Of a process's global generators, from which dropout draws: the run's own seed in the first one."""
    return (seed + 0x9E3779B1 * rank) % 2**32


def to_device(batch: Any, device: torch.device) -> Any:
    """A tensor, or a list of them (several views of the images)."""
    if isinstance(batch, (list, tuple)):
        return [to_device(item, device) for item in batch]
    return batch.to(device, non_blocking=True)


def rows_of(target: torch.Tensor, world: World) -> int:
    """How many images count. Asked before they go to a GPU."""
    return len(target) if world.size == 1 else int((target != IGNORED).sum())


def train_epoch(
    method,
    batches,
    optimizer,
    meter: Meter,
    on_batch: Callable[[], None] = lambda: None,
    steps: Steps | None = None,
) -> None:
    """One pass over `batches` of (inputs, target), by `steps` or in full precision and one process."""
    steps = Steps(method, optimizer, meter.device) if steps is None else steps
    method.train()
    for inputs, target in batches:
        rows = rows_of(target, meter.world)
        inputs, target = to_device(inputs, meter.device), to_device(target, meter.device)
        for phase, loss in steps.take(inputs, target):
            meter.add(phase, rows, loss)
        meter.end_batch(target, rows)
        on_batch()


@torch.no_grad()
def evaluate(network: nn.Module, batches, device: torch.device, world: World = ALONE) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1) in eval mode; the network's mode is restored.

    With several processes each has its own part of the batches, and all get the result.
    """
    was_training = network.training
    network.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, correct ones, images
    for inputs, target in batches:
        rows = rows_of(target, world)
        inputs, target = to_device(inputs, device), to_device(target, device)
        logits = logits_of(network(inputs)).float()  # [B, C]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        total += torch.stack([loss.double(), (logits.argmax(1) == target).sum().double(), total.new_tensor(rows)])
    network.train(was_training)
    loss, correct, images = world.sum(total).tolist()
    return loss / images, correct / images


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
        self.world = world()
        self.device = pick_device(self.settings.device)
        self.method.to(self.device)
        self.method = prepare(self.method, self.settings, self.device, self.world)
        self.optimizer = make_optimizer(self.method, self.settings)
        amp, accumulate = self.settings.amp, self.settings.accumulate
        options = {"amp": amp, "accumulate": accumulate, "world": self.world}
        self.steps = Steps(self.method, self.optimizer, self.device, **options)
        self.schedule = make_schedule(self.optimizer, self.settings, self.epochs)
        self.epoch = self.step = 0  # finished ones
        self.rows: list[Row] = []
        self._unfinished: dict[str, Any] | None = None  # the meter of an epoch that was interrupted
        workers = self.settings.workers
        batch_size = min(self.settings.batch_size, len(self.data.train))
        # Batch normalisation cannot train on a last batch of one image.
        alone = len(self.data.train) % batch_size == 1 and batch_size > 1
        self.train_batches = loader(
            self._part(self.data.train), batch_size, shuffle=True, seed=self.seed, workers=workers, drop_last=alone
        )
        self.train_batches.worker_init_fn = leave_interrupts
        held_out = {"validation": self.data.validation, "test": self.data.test}
        self.held_out = {
            name: loader(self._part(part), max(batch_size, 256), shuffle=False, workers=workers)
            for name, part in held_out.items()
            if part is not None
        }

    def _part(self, data):
        return data if self.world.size == 1 else Part(data, self.world.rank, self.world.size)

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def run(self) -> list[Row]:
        """Train to the end from where `resume` left, and return one row of metrics an epoch.

        Raises Interrupted after Ctrl-C, once all is saved, and Divergence for a loss that is not finite.
        """
        if self.epoch == 0 and self._unfinished is None:
            checkpoint.seed_all(own_seed(self.seed, self.world.rank))
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
        meter = Meter(self.device, self.settings.log_every, self.world)
        batches = self._batches(epoch, meter)
        resumed = meter.images  # of the part of the epoch that ran before an interruption
        with Progress(self.name, epoch, self.epochs, len(self.train_batches), self.settings.quiet) as progress:

            def on_batch() -> None:
                self.step += 1
                progress.update(meter)
                # All processes stop after the same batch: they ask each other when they look at their losses.
                due = self.world.size == 1 or meter.batches % meter.look_every == 0
                if due and meter.batches < len(self.train_batches) and self.world.any(interrupted()):
                    meter.look()
                    self._save(meter)
                    raise Interrupted

            try:
                with meter.watch(*self._watched()):
                    train_epoch(self.method, batches, self.optimizer, meter, on_batch, self.steps)
                meter.look()
                meter = meter.total()
            except Divergence as error:
                raise Divergence(
                    f"{self.name} trained by {type(self.method).__name__}: epoch {epoch + 1}, {error}: "
                    "try a smaller --lr or --warmup-epochs"
                ) from error
            row = self._row(epoch, meter, meter.images - resumed, time.perf_counter() - started)
            progress.finish(row)
        self._end_epoch(epoch, row)
        if self.world.any(interrupted()):
            raise Interrupted

    def _watched(self) -> tuple[nn.Module, Any]:
        """The network whose accuracy is measured while it trains, and as what it is run."""
        network = self.method.deployable()
        for name in self.method.learner_names:
            if self.method.get_submodule(name) is network and self.method.learner(name) is not network:
                return network, self.method.learner(name)
        return network, None

    def _batches(self, epoch: int, meter: Meter):
        """The batches of an epoch, without those that ran before an interruption."""
        self.train_batches.sampler.set_epoch(epoch)
        batches = iter(self.train_batches)
        if self._unfinished is not None:
            state, self._unfinished = self._unfinished, None
            meter.load_state_dict(state["meter"])
            for _ in range(meter.batches):
                next(batches)
            self._set_random_state(state)  # a data set of the user's may have drawn from it
        return batches

    def _row(self, epoch: int, meter: Meter, images: int, train_seconds: float) -> Row:
        started = time.perf_counter()
        self.world.share_buffers(self.method)
        row = {"epoch": epoch + 1, "lr": self.settings.lr * self.schedule.lr_lambdas[0](epoch)}
        row |= {f"train_{name}": value for name, value in meter.means().items()}
        row |= self._promotions()
        due = (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.epochs
        for name, batches in self.held_out.items():
            loss, accuracy = math.nan, math.nan
            if due:
                loss, accuracy = evaluate(self.method.deployable(), batches, self.device, self.world)
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
            if self.world.first:
                write_csv(self.folder / "metrics.csv", self.rows)
            self._save()

    def _save(self, meter: Meter | None = None) -> None:
        """The state after an epoch, or with `meter` the one in the middle of it."""
        if self.folder is None:
            return
        self.world.share_buffers(self.method)
        total = None if meter is None else meter.total()
        random, *others = self.world.collect(checkpoint.random_state()) or [None]
        if not self.world.first:
            return
        state = {
            "format": FORMAT,
            "epoch": self.epoch,
            "step": self.step,
            "method": dict(self.method.state_dict()),
            "network": dict(self.method.deployable().state_dict()),  # the same storages: takes no room
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "random": random,
            "random_of_others": others,
            "scaler": self.steps.state_dict(),
            "facts": self.facts,
        }
        partial = self.checkpoints / checkpoint.PARTIAL
        if meter is not None:
            checkpoint.save(partial, state | {"meter": total.state_dict()})
            return
        checkpoint.save(checkpoint.path_of(self.checkpoints, self.epoch), state)
        partial.unlink(missing_ok=True)
        checkpoint.prune(self.checkpoints, self.settings.keep)

    def resume(self) -> None:
        """Go on from the last state in the folder; does nothing where there is none."""
        state, is_partial, rows = self.world.from_first(self._last)
        if state is not None:
            self._load(state, rows)
            self._unfinished = state if is_partial else None

    def _last(self) -> tuple[dict[str, Any] | None, bool, list[Row]]:
        """The last state, whether it is of the middle of an epoch, and the rows of metrics."""
        done = checkpoint.epochs(self.checkpoints)
        if done and done[-1] > self.epochs:
            raise UserError(f"{self.folder} has run {done[-1]} epochs already: give --epochs {done[-1]} or more")
        state, is_partial = checkpoint.load(checkpoint.path_of(self.checkpoints, done[-1])) if done else None, False
        partial = self.checkpoints / checkpoint.PARTIAL
        if partial.exists():
            part = checkpoint.load(partial)
            if state is None or part["epoch"] == state["epoch"]:  # else an epoch was finished after it
                state, is_partial = part, True
        if state is not None and state.get("format") != FORMAT:
            raise UserError(f"{self.checkpoints} holds checkpoints of another version of fastkd: use a new --out")
        return state, is_partial, read_csv(self.folder / "metrics.csv") if state is not None else []

    def _load(self, state: dict[str, Any], rows: list[Row]) -> None:
        self.method.load_state_dict(state["method"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        # The number of epochs may have been raised since: the rate of this epoch under the present schedule.
        for group, rate in zip(self.optimizer.param_groups, self._rates(state["epoch"]), strict=True):
            group["lr"] = rate
        self.epoch, self.step = state["epoch"], state["step"]
        self.rows = [row for row in rows if row["epoch"] <= self.epoch]
        self.steps.load_state_dict(state.get("scaler", {}))
        self._set_random_state(state)

    def _set_random_state(self, state: dict[str, Any]) -> None:
        """This process's own, or a fresh one where the run was of another number of processes."""
        states = [state["random"], *state.get("random_of_others", [])]
        if self.world.first or len(states) == self.world.size:
            checkpoint.set_random_state(states[self.world.rank])
        else:
            checkpoint.seed_all(own_seed(self.seed + state["step"], self.world.rank))

    def on_schedule(self) -> bool:
        """Whether each epoch had the rate of this schedule: not where the number of epochs was raised in between."""
        factor = self.schedule.lr_lambdas[0]
        rates = [self.settings.lr * factor(int(row["epoch"]) - 1) for row in self.rows]
        return all(math.isclose(row["lr"], rate, rel_tol=1e-8) for row, rate in zip(self.rows, rates, strict=True))

    def _rates(self, epoch: int) -> list[float]:
        rates = zip(self.schedule.base_lrs, self.schedule.lr_lambdas, strict=True)
        return [base * factor(epoch) for base, factor in rates]
