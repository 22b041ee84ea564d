"""The training loop: epochs of a method, with checkpoints, metrics and a clean end on Ctrl-C."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd._core.messages import UserError
from fastkd.data import Data
from fastkd.data.batches import image_set
from fastkd.methods import Method
from fastkd.train import batch_norm, checkpoint, diversity, state
from fastkd.train.bad_images import BadImages
from fastkd.train.board import TensorBoard
from fastkd.train.devices import batch_on, batches_on, prepare, rows_of
from fastkd.train.distributed import own_seed
from fastkd.train.evaluation import evaluate
from fastkd.train.interrupts import Interrupted, catch_interrupt
from fastkd.train.kept_logits import KeptLogits
from fastkd.train.loaders import held_out_batches, training_batches
from fastkd.train.metrics import Divergence, Meter, Row, write_csv
from fastkd.train.optim import make_optimizer, make_schedule
from fastkd.train.progress import Progress
from fastkd.train.steps import SKIPS, Steps
from fastkd.train.task import Setup, Task


def train_epoch(
    method: Method,
    batches: Iterable[Any],
    optimizer: torch.optim.Optimizer,
    meter: Meter,
    on_batch: Callable[[], None] = lambda: None,
    steps: Steps | None = None,
    classes: int | None = None,
    taught: Callable[[], Any] = lambda: None,
) -> None:
    """One pass over `batches` of (inputs, target). `steps` takes the steps, `classes` is what labels must be below.

    `taught()` is asked after each batch was given: what frozen networks say of it (`Method.phases`).
    """
    steps = steps or Steps(method, optimizer, meter.device)
    method.train()
    for batch in batches:
        rows = rows_of(batch[1], meter.world)
        inputs, target = batch_on(batch, meter.device, classes)
        for phase, loss in steps.take(inputs, target, taught()):
            if steps.in_row == SKIPS:
                place = meter.place(meter.batches + 1, phase.name, phase.networks)
                raise Divergence(f"{place}: the loss or its gradient was not finite in {SKIPS} steps in a row")
            meter.add(phase, rows, loss, steps.tolerant)
        meter.end_batch(target, rows)
        on_batch()


class Fit:
    """One training run in a folder: `task.folder`/checkpoints and `task.folder`/metrics.csv.

    >>> data = fastkd.data.load("fake", image_size=8, train_images=8, test_images=4)
    >>> method = fastkd.methods.CE(fastkd.models.create("plain2", 10, image_size=8))
    >>> setup = fastkd.train.Setup.here(fastkd.train.TrainConfig(batch_size=4, device="cpu", quiet=True))
    >>> fit = fastkd.train.Fit(method, data, setup, fastkd.train.Task("student", epochs=2))
    >>> [row["epoch"] for row in fit.run()], fit.step
    ([1, 2], 4)

    Args:
        method: what is trained. It is moved to the device, and wrapped as the options say.
        data: what it is trained and evaluated on.
        setup: the run's options, its device, its processes.
        task: whose training it is, for how long, and where it is kept.
    """

    def __init__(self, method: Method, data: Data, setup: Setup, task: Task):
        self.method, self.data, self.setup, self.task = method, data, setup, task
        self.settings, self.device, self.world = setup.settings, setup.device, setup.world
        self.folder, self.epochs, self.facts, self.others = task.folder, task.epochs, task.facts, task.others
        self._learners: list[str] = self.facts.get("learners", ["student"])
        self.board = TensorBoard(task.curves, self.world)
        prepare(method, self.settings, self.device, self.world)
        self.optimizer = make_optimizer(method, self.settings)
        self.schedule = make_schedule(self.optimizer, self.settings, self.epochs)
        self.steps = Steps.of(method, self.optimizer, self.device, self.settings, self.world)
        self.epoch = self.step = 0  # finished ones
        self.rows: list[Row] = []
        self._unfinished: dict[str, Any] | None = None  # the state of an epoch that was interrupted
        self.train_batches = training_batches(data, self.settings, task.seed, self.world)
        self.held_out = held_out_batches(data, self.settings, self.world)
        self.bad_images = BadImages(self.folder, {"train": self.train_batches} | self.held_out, self.world)

    @property
    def out(self) -> Path:
        """The folder of a run that keeps something."""
        assert self.folder is not None
        return self.folder

    @property
    def checkpoints(self) -> Path:
        """The folder of the checkpoints."""
        return self.out / "checkpoints"

    def run(self) -> list[Row]:
        """Train to the end from where `resume` left, and return one row of metrics an epoch.

        Raises Interrupted after Ctrl-C, once all is saved, and Divergence for a loss that is not finite.
        """
        if self.epoch < self.epochs:
            if self.epoch == 0 and self._unfinished is None:
                checkpoint.seed_all(own_seed(self.task.seed, self.world.rank))
                self.initialise()
            kept = None if self.task.logits is None else self._keep_logits(self.task.logits)
            with catch_interrupt() as interrupted, self.board.opened(self.step + 1):
                for epoch in range(self.epoch, self.epochs):
                    self._run_epoch(epoch, interrupted, kept)
            if kept is not None:
                kept.tell()
        batch_norm.restore(self.method)
        return self.rows

    def initialise(self) -> None:
        """Before the first epoch: what the method does with a few batches before it trains."""
        sampler: Any = self.train_batches.sampler
        sampler.set_epoch(0)
        batches = batches_on(self.train_batches, self.device, self.data.num_classes)
        self.method.initialise(batches, self.settings.lr, chunks=self.settings.accumulate)

    def _keep_logits(self, folder: Path) -> KeptLogits:
        images: Any = image_set(self.data.train)
        epochs = range(self.epoch, self.epochs)
        return KeptLogits(
            folder,
            self.method,
            self.train_batches,
            self.setup,
            variants=sorted({images.variant_of(epoch) for epoch in epochs}),
            classes=self.data.num_classes,
            who=self.task.name,
        )

    def _run_epoch(self, epoch: int, interrupted: Callable[[], bool], kept: KeptLogits | None = None) -> None:
        self.method.start_epoch(epoch, self.epochs, len(self.train_batches))
        started, worked = time.perf_counter(), time.process_time()
        meter = Meter(self.device, self.settings.log_every, self._describe, self.world)
        batches = self._batches(epoch, meter)
        self.board.watch(meter)
        resumed = meter.images  # of the part of the epoch that ran before an interruption
        many = self.epochs, len(self.train_batches), self.settings.quiet
        with Progress(self.task.name, epoch, *many, before=self.rows) as progress:

            def on_batch() -> None:
                self.step += 1
                progress.update(meter)
                # All processes stop after the same batch: they ask each other when they look at their losses.
                asked = self.world.size == 1 or meter.batches % meter.read_every == 0
                stop = asked and self.world.any(interrupted())
                due = self.settings.save_every and self.step % self.settings.save_every == 0
                if (stop or due) and self.train_batches.taken < len(self.train_batches):
                    meter.read_losses()  # no state behind a loss that is not finite is saved
                    self._save(meter)
                    if stop:
                        raise Interrupted

            try:
                classes, taught = self.data.num_classes, (lambda: None) if kept is None else kept.of_batch
                train_epoch(self.method, batches, self.optimizer, meter, on_batch, self.steps, classes, taught)
                meter.read_losses()
                meter = meter.total()
                if meter.images == 0:
                    raise UserError(f"{self.task.name}: not one image of epoch {epoch + 1} could be used")
            except Divergence as error:
                skip = "" if self.settings.non_finite == "skip" else ", or --non-finite skip"
                raise Divergence(
                    f"{self.task.name} trained by {type(self.method).__name__}: epoch {epoch + 1}, {error}: "
                    f"try a smaller --lr or --warmup-epochs{skip}"
                ) from error
            row = self._row(epoch, meter, meter.images - resumed, time.perf_counter() - started)
            row["cpu_seconds"] = time.process_time() - worked  # of all threads; other processes do not change it
            progress.finish(row)
        self._end_epoch(epoch, row)
        if self.world.any(interrupted()):
            raise Interrupted

    def _batches(self, epoch: int, meter: Meter) -> Iterable[Any]:
        """The batches of an epoch, without those that ran before an interruption."""
        before, self._unfinished = self._unfinished, None
        if before is None:
            meter.first_step = self.step
            return self.train_batches.go_on(epoch, 0)
        meter.load_state_dict(before["meter"])
        taken, lost = before["batches"]
        batches = self.train_batches.go_on(epoch, taken, lost if self.world.first else 0)
        state.set_random_state(self, before)  # a data set of the user's may have drawn from it
        return batches

    def _describe(self, phase: str, networks: Sequence[nn.Module]) -> str:
        """Which phase of a method with several, and which networks it trains where they are several."""
        names = {id(self.method.learner(name)): name for name in self.method.learner_names}
        trained = [names[id(network)] for network in networks if id(network) in names]
        if phase:
            return f"phase {phase} of {', '.join(trained)}"
        return f"networks {', '.join(trained)}" if len(trained) > 1 else ""

    def _row(self, epoch: int, meter: Meter, images: int, train_seconds: float) -> Row:
        started = time.perf_counter()
        self.world.share_buffers(self.method)
        row = {"epoch": epoch + 1, "lr": self.settings.lr * self.schedule.lr_lambdas[0](epoch)}
        row |= {f"train_{name}": value for name, value in meter.means().items()}
        row |= self.counts()
        if self.settings.non_finite == "skip" or self.settings.amp == "fp16":
            row["train_skipped_steps"] = meter.skipped
        due = (epoch + 1) % self.settings.eval_every == 0 or epoch + 1 == self.epochs
        for name, batches in self.held_out.items():
            loss, accuracy = math.nan, math.nan
            if due:
                classes = self.data.num_classes
                loss, accuracy = evaluate(self.method.deployable(), batches, self.device, classes, self.world)
            row |= {f"{name}_loss": loss, f"{name}_accuracy": accuracy}
        if due and self.settings.diversity:
            row |= self.diversity().row()
        if self.settings.bad_images == "skip":
            row |= self.bad_images.row(lambda name: due or name == "train")
        row["images_per_s"] = images / max(train_seconds, 1e-9)
        row["seconds"] = train_seconds + time.perf_counter() - started
        return row

    def diversity(self) -> diversity.Diversity:
        """How alike the networks are on the test images."""
        networks = diversity.networks_of(self.method, self._learners[0], self.others, self.task.guides)
        return diversity.measure(networks, self.held_out["test"], self.device, self.data.num_classes, self.world)

    def counts(self) -> Row:
        """What the method has counted since the start, by the run's names of its networks."""
        names = {id(self.method.deployable()): self._learners[0]} | {id(net): name for name, net in self.others.items()}
        return {
            f"{what}_{names.get(id(self.method.get_submodule(name)), name)}": count
            for what, each in self.method.counts().items()
            for name, count in each.items()
        }

    def _end_epoch(self, epoch: int, row: Row) -> None:
        self.schedule.step()
        self.epoch = epoch + 1
        self.rows.append(row)
        self.board.row(self.step, row)
        if self.folder is not None:
            # Rows first: a row without a checkpoint is dropped when the run resumes, a missing row could not be.
            self.world.broadcast(lambda: write_csv(self.out / "metrics.csv", self.rows))
            self._save()

    def _save(self, meter: Meter | None = None) -> None:
        """The state after an epoch, or with `meter` the one in the middle of it."""
        self.bad_images.tell()
        self.board.flush()
        if self.folder is None:
            return
        self.world.share_buffers(self.method)
        lost = self.bad_images.lost("train")
        total = None if meter is None else meter.total()
        random = self.world.gather(checkpoint.random_state())
        # A full disk in the first process ends them all.
        self.world.broadcast(lambda: state.write(self, random, None if total is None else (total, lost)))

    def resume(self, file: Path | None = None) -> None:
        """Go on from the last whole state in the folder, whose lock is held; does nothing where there is none.

        With `file` from that one, and nothing is written: the folder need not be locked.
        """
        found, rows = self.world.broadcast(lambda: state.last(self) if file is None else state.read(self, file))
        if found is not None:
            state.load(self, found, rows)
            self._unfinished = found if "meter" in found else None

    def on_schedule(self) -> bool:
        """Whether each epoch had the rate of this schedule: not where the number of epochs was raised in between."""
        factor = self.schedule.lr_lambdas[0]
        rates = [self.settings.lr * factor(int(row["epoch"]) - 1) for row in self.rows]
        return all(math.isclose(row["lr"], rate, rel_tol=1e-8) for row, rate in zip(self.rows, rates, strict=True))
