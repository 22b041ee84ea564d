"""What every method shares: the protocol between a method and the loop that trains it.

    for inputs, target in loader:
        for phase in method.phases(inputs, target):
            optimizer.zero_grad(set_to_none=True)
            phase.loss.backward()
            optimizer.step()

`method.step(optimizer, inputs, target)` is the inner loop in one line. A method owns its networks, its random choices
and its counters; the loop owns optimiser, data, device and autocast.
"""

from __future__ import annotations

import contextlib
import inspect
import warnings
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_integer
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._batch import Batch, Taught, rows_of
from fastkd.methods._calls import as_argument
from fastkd.methods._networks import Networks
from fastkd.methods._phase import Phase, Terms
from fastkd.methods._state import pack, unpack
from fastkd.ops.topk import TopK

__all__ = ["Batch", "Method", "Phase", "Terms", "cross_entropy"]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., C] and class indices [...]: a scalar in float32 (float64 for float64).

    By the rules of multi_teacher_kd for ignored rows, labels out of range and probabilities as labels.
    """
    return functional.cross_entropy(logits, target)


class Method(Networks):
    """A way to train networks: a module that turns a batch into the losses of one iteration.

    A subclass hands its networks to this constructor and overrides `iteration` and `deployable`.

    >>> class Own(fastkd.methods.Method):
    ...     def __init__(self, student):
    ...         super().__init__(learners={"student": student})
    ...     def iteration(self, batch, generator):
    ...         yield fastkd.methods.Phase([self.student], self._terms, batch)
    ...     def deployable(self):
    ...         return self.student
    ...     def _terms(self, inputs, target):
    ...         loss = self.student(inputs).square().mean()
    ...         return loss, {"square": loss.detach()}
    >>> method = Own(torch.nn.Linear(1, 1, bias=False))
    >>> _ = torch.nn.init.ones_(method.student.weight)
    >>> method.step(torch.optim.SGD(method.parameter_groups(lr=0.05)), torch.tensor([[1.0], [3.0]]))
    {'square': tensor(5.)}
    >>> round(method.student.weight.item(), 4)  # 1 - 0.05 * 10
    0.5

    Args:
        learners: attribute name -> network or sequence of networks that train.
        frozen: attribute name -> network or sequence of networks that only teach. They are changed in place: their
            parameters stop to require grad, and all their modules stay in eval mode, also after `train()`.
        seed: of the method's own random choices, which are made on the CPU. Take the same on every rank.

    Networks may share parameters that do not learn (a frozen base below adapters); modules that a frozen network shares
    are in eval mode in the learner, too. A network with auxiliary heads (GoogLeNet) learns by its own logits alone.

    Errors: TypeError for what is no network; ValueError for an empty sequence, for the same network twice, for a
    learner that shares a parameter that learns with another network, and for a learner without a parameter that
    requires grad. RuntimeError in a backward pass where networks that its phase does not train hold gradients.

    Attributes:
        gives_outputs: for subclasses that need features or maps (`fastkd.methods._features.outputs_of`): True lets
            `map_learners` wrap, of each learner with `forward_features`, a module whose call returns `Outputs`.
        leaves_unused: for subclasses: True where parameters of a network that a phase trains get no gradient, of which
            DistributedDataParallel must know (find_unused_parameters).
        teaches_logits: for subclasses: True where all that the losses take of the frozen networks is their logits of
            `inputs` as they are, by `teach(network, inputs)`. They may then be known beforehand: `phases(taught=...)`.
        one_loss: for subclasses: False where an iteration has several phases or something follows the optimiser's step,
            so that `forward`, which only returns a loss, cannot be it.
        last_only: for subclasses: arguments that hold for the last network of a chain, the student, not for the
            assistants that are trained by the same method before it.
        kept_as: for subclasses: arguments whose attribute has another name, since a method has theirs.
        counted: for subclasses: what `counts` counts, in words: {"promotions": "Steps in which ..."}.
    """

    teaches_logits = False
    one_loss = True
    last_only: tuple[str, ...] = ()
    counted: ClassVar[Mapping[str, str]] = {}
    kept_as: ClassVar[Mapping[str, str]] = {}

    def __init__(
        self,
        *,
        learners: Mapping[str, nn.Module | Sequence[nn.Module]],
        frozen: Mapping[str, nn.Module | Sequence[nn.Module]] | None = None,
        seed: int = 0,
    ):
        seed = check_integer(self._name(), "seed", seed)
        super().__init__(learners, frozen or {})
        self._random = torch.Generator().manual_seed(seed).get_state()  # uint8 on the CPU, whatever the device
        self._unfinished = 0
        self.iterations = 0
        self.epoch, self.epochs = 0, 1
        self.epoch_steps: int | None = None

    def phases(
        self,
        inputs: Any,
        target: Any = None,
        *,
        chunks: int = 1,
        taught: Mapping[str, Tensor | TopK] | Taught | None = None,
    ) -> Generator[Phase, None, None]:
        """The updates of one iteration, in order. Go through all of them: what follows the last one runs then.

        Args:
            inputs: the batch, as the networks take it: a tensor [B, ...], or a tuple or list of them, as one argument;
                a dict of them (Hugging Face's batches), as keywords.
            target: class indices [B] (or [B, T]); rows of -100 count nowhere. None where the method needs no labels.
            chunks: cut the batch into this many parts (fewer where it has fewer rows) for gradient accumulation.
                Choices are made once for the whole batch. `phase.losses` then yields one loss per part, weighted by
                its rows. Batch normalisation sees one part at a time, as in any accumulation.
            taught: what the frozen networks say of this batch, so that they need not run: name ("guides.0", see
                `frozen_names`) -> logits [B, C] on the device of the student's; those that are not in it are run. Or a
                function (name, rows, run) -> logits of these rows, a slice of the batch's; run() runs the network on
                them (`fastkd.data.LogitsCache.taught` gives one). Only where `teaches_logits`, else ValueError. In the
                place of logits `fastkd.TopK` of mode "tail", where `no_topk` is "", else ValueError.

        The method's code runs inside this iterator and inside `phase.losses`, under the autocast that holds there. An
        iterator that is left half-way changes neither counters nor random state: the same choices are made again.
        """
        known = None if taught is None else self._check_taught(taught)
        return self._run(Batch(inputs, target, chunks, name=self._name(), taught=known, tell=self._note_part))

    def step(
        self,
        optimizer: torch.optim.Optimizer,
        inputs: Any,
        target: Any = None,
        backward: Callable[[Tensor], Any] | None = None,
        *,
        chunks: int = 1,
        taught: Mapping[str, Tensor | TopK] | Taught | None = None,
    ) -> dict[str, Tensor]:
        """One iteration: of each phase the gradients, by zero_grad(set_to_none=True) and a backward pass, and a step.

        Args:
            optimizer: of `parameter_groups`, or what a framework made of it.
            inputs, target, chunks, taught: as in `phases`.
            backward: goes back through a loss, in the place of `loss.backward()`: accelerate's `accelerator.backward`,
                Lightning's `self.manual_backward`.

        Returns the parts of all phases, name -> detached 0-d tensor. A step that the optimiser left out
        (`optimizer.step_was_skipped`, as accelerate has it) is told to the phase.
        """
        if not (hasattr(optimizer, "zero_grad") and hasattr(optimizer, "step")):
            expected = "an optimizer (the order is optimizer, inputs, target)"
            raise wrong_type(type(self).__name__, "step: optimizer", expected, type(optimizer).__name__)
        parts: dict[str, Tensor] = {}
        for phase in self.phases(inputs, target, chunks=chunks, taught=taught):
            optimizer.zero_grad(set_to_none=True)
            for loss in phase.losses:
                loss.backward() if backward is None else backward(loss)
            optimizer.step()
            phase.skipped = bool(getattr(optimizer, "step_was_skipped", False))
            parts |= phase.parts
        return parts

    def forward(self, inputs: Any, target: Any = None) -> Tensor:
        """The loss of a batch, a scalar with a graph, for methods of one phase (`one_loss`), else ValueError.

        In train mode this is an iteration: counters and random choices go on. In eval mode it leaves no trace.
        """
        if self.one_loss:
            unfinished, phases = self._unfinished, self.phases(inputs, target)
            phase = next(phases)
            if not self.training:
                phases.close()
                self._unfinished = unfinished
            if not self.training or next(phases, None) is None:
                return phase.loss
            phases.close()
        raise ValueError(
            f"{self._name()}: forward must be a method's of one phase that ends with its loss, got one with more: call "
            "step(optimizer, inputs, target), or go through phases(inputs, target)"
        )

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """For subclasses: yield the phases of one batch; draw random numbers from `generator` only.

        Code after a yield runs when the loop has taken its step. State that must not survive an iteration that was
        left half-way is local, or restored in a `finally`.
        """
        raise NotImplementedError(f"{self._name()} must define iteration(batch, generator)")

    def deployable(self) -> nn.Module:
        """The network to ship, unwrapped, without what only training needs."""
        raise NotImplementedError(f"{self._name()} must define deployable()")

    def extra_repr(self) -> str:
        """The keyword arguments that the method keeps, for `repr`; its networks stand below them."""
        names = [p.name for p in inspect.signature(type(self)).parameters.values() if p.kind is p.KEYWORD_ONLY]
        held = {name: self.kept_as.get(name, name) for name in names}
        kept = {name: getattr(self, own) for name, own in held.items() if hasattr(self, own)}
        return ", ".join(f"{k}={v!r}" for k, v in kept.items() if not isinstance(v, nn.Module))

    def start_epoch(self, epoch: int, epochs: int, steps: int | None = None) -> None:
        """Tell the method where the run is: epoch 0 .. epochs - 1, each of `steps` iterations where that is known.

        For weights that change with it, and for averages that follow over the length of the run; saved.
        """
        self.epochs = check_integer(self._name(), "epochs", epochs, 1)
        self.epoch = check_integer(self._name(), "epoch", epoch, 0, epochs - 1)
        self.epoch_steps = None if steps is None else check_integer(self._name(), "steps", steps, 1)

    @property
    def run_steps(self) -> int | None:
        """Iterations of the whole run, as far as the loop told them."""
        return None if self.epoch_steps is None else self.epoch_steps * self.epochs

    def initialise(self, batches: Iterable[tuple[Any, Any]], lr: float, *, chunks: int = 1) -> None:
        """For subclasses: what is done with a few (inputs, target) before the first epoch, at the base learning rate.

        Called once, by the loop. A method that needs nothing takes no batch. `chunks` as in `phases`.
        """

    def counts(self) -> dict[str, dict[str, int]]:
        """For subclasses: what was counted since the start, for the log: name -> {a learner's name: how often}.

        Each name is a key of `counted`.
        """
        return {}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimiser's groups for a base learning rate: everything that requires grad, frozen networks left out.

        Call it after `map_learners` where the wrapper replaces parameters.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def extra(self) -> dict[str, Any]:
        """For subclasses: what the state dict keeps beside tensors and random state: numbers, strings, lists, dicts."""
        where = {"epoch": self.epoch, "epochs": self.epochs, "epoch_steps": self.epoch_steps or 0}
        return {"iterations": self.iterations} | where

    def set_extra(self, extra: dict[str, Any]) -> None:
        """For subclasses: the way back of `extra`."""
        self.iterations, self.epoch, self.epochs = extra["iterations"], extra["epoch"], extra["epochs"]
        self.epoch_steps = extra.get("epoch_steps") or None  # an earlier version's state has none

    def get_extra_state(self) -> Tensor:
        """uint8 [n], so that what stores tensors (safetensors) takes it; n does not change from step to step."""
        return pack(self.extra(), self._random)

    def set_extra_state(self, state: Tensor | dict[str, Any]) -> None:
        """The way back of `get_extra_state`; also takes the dict that earlier versions saved."""
        extra, self._random = unpack(self._name(), state)
        self.set_extra(extra)

    def _run(self, batch: Batch) -> Generator[Phase, None, None]:
        # Choices come from a copy of the random state, kept only when the iteration is over.
        generator = torch.Generator()
        generator.set_state(self._random)
        self._note_start()
        # Autocast keeps the low-precision weights that it made. Where the caller's autocast spans an optimiser step,
        # they would be the ones from before the step.
        torch.clear_autocast_cache()
        phases = self.iteration(batch, generator)
        with contextlib.closing(phases):  # type: ignore[type-var]  # a generator
            for phase in phases:
                self._watch(phase)
                yield phase
                torch.clear_autocast_cache()
        self._random = generator.get_state()
        self._unfinished = 0
        self.iterations += 1

    def _watch(self, phase: Phase) -> None:
        """A step moves whatever holds a gradient, if only by momentum and weight decay: zeros are one, too."""
        trained = {id(network) for network in phase.networks}
        others = [n for n in self._learner_names if not {id(self.learner(n)), id(self.get_submodule(n))} & trained]
        if not others:
            return
        own = {id(p) for network in phase.networks if isinstance(network, nn.Module) for p in network.parameters()}

        which = f"phase {phase.name}" if phase.name else "this phase"

        def check() -> None:
            for name in others:
                if any(p.grad is not None for p in self.get_submodule(name).parameters() if id(p) not in own):
                    raise RuntimeError(
                        f"{self._name()}: {as_argument(name)} must have no gradient where {which} trains others, got "
                        "one, by which an optimiser would move it: call optimizer.zero_grad(set_to_none=True) before "
                        "each backward pass"
                    )

        phase.before_backward(check)

    def _note_part(self, batch: Batch, at_hand: bool) -> None:
        if at_hand:
            self._known = batch
        elif self._known is batch:  # not a later one: a loop may leave the last chunk's iterator to the collector
            self._known = None

    def _check_taught(self, taught: Mapping[str, Tensor | TopK] | Taught) -> Taught:
        if not self.teaches_logits:
            expected = "None: this method takes more of its frozen networks than their logits of a batch, or has none"
            raise wrong_value(self._name(), "taught", expected, type(taught).__name__)
        if callable(taught):
            return taught
        if not isinstance(taught, Mapping):
            expected = "a dict of logits by the frozen networks' names, or a function (name, rows, run)"
            raise wrong_type(self._name(), "taught", expected, type(taught).__name__)
        for name in taught:
            if name not in self.frozen_names:
                expected = f"a dict whose keys are among {', '.join(self.frozen_names)}"
                raise wrong_value(self._name(), "taught", expected, name)
        return lambda name, rows, run: rows_of(taught[name], rows) if name in taught else run()

    def _note_start(self) -> None:
        self._unfinished += 1
        if self._unfinished == 3:
            warnings.warn(
                f"{self._name()}: two iterations in a row were left before their end, so that random choices repeat "
                "and what follows the last step never runs; loop over method.phases(...) to its end",
                RuntimeWarning,
                stacklevel=3,
            )
