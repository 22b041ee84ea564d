"""What every method shares: the protocol between a method and the loop that trains it.

    for inputs, target in loader:
        for phase in method.phases(inputs, target):
            optimizer.zero_grad(set_to_none=True)
            phase.loss.backward()
            optimizer.step()

A method owns its networks, its random choices and its counters; the loop owns optimiser, data, device and autocast.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd.methods._batch import Batch, Taught
from fastkd.methods._checks import check_apart, check_integer, check_network, check_networks, is_sequence
from fastkd.methods._features import giving_outputs
from fastkd.models import logits_of
from fastkd.ops import _common as common

__all__ = ["Batch", "Method", "Phase", "cross_entropy"]

Terms = tuple[Tensor, dict[str, Tensor]]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Mean cross-entropy of logits [..., C] and class indices [...]: a scalar in float32 (float64 for float64).

    By the rules of multi_teacher_kd for ignored rows, labels out of range and probabilities as labels.
    """
    return functional.cross_entropy(logits, target)


class Phase:
    """One update: the loss to go back through and what it trains.

    Made by a method, used by a loop. `loss_of(inputs, target)` returns the mean loss of these rows, a scalar with a
    graph, and its terms as detached scalars that add up to it. With one chunk it is called at once; with more, each
    time that `losses` is asked for the next one, so that only one chunk's activations are alive.

    Attributes:
        networks: the networks that this phase trains, as `map_learners` wrapped them.
        name: what a method of several phases calls this one ("private"); "" where there is one.
        chunks: how many losses `losses` yields.
        losses: an iterator of `chunks` scalars; the sum of their gradients is the gradient of the whole batch's loss.
        parts: name -> detached 0-d tensor, the terms of the loss as they enter the sum; with several chunks, summed
            over the chunks that `losses` has yielded.
        skipped: False; a loop that takes no optimiser step (a GradScaler that found an infinity) sets it True before
            it goes on to the next phase, and what follows a step (a moving average of the weights) is left out.
    """

    def __init__(
        self, networks: Iterable[nn.Module], loss_of: Callable[[Any, Any], Terms], batch: Batch, name: str = ""
    ):
        self.networks = tuple(networks)
        self.name = name
        self.chunks = batch.chunks
        self.parts: dict[str, Tensor] = {}
        self.skipped = False
        self.losses = self._losses(loss_of, batch)
        if self.chunks == 1:
            self._loss = next(self.losses)
            self.losses = iter((self._loss,))

    @property
    def loss(self) -> Tensor:
        """The loss of the whole batch: a scalar with a graph. ValueError where the batch was cut into chunks."""
        if self.chunks > 1:
            raise ValueError(
                f"Phase: loss must be asked for with chunks=1, got chunks={self.chunks}: "
                "call backward() on each of phase.losses instead"
            )
        return self._loss

    def _losses(self, loss_of: Callable[[Any, Any], Terms], batch: Batch) -> Iterator[Tensor]:
        for inputs, target, share in batch:
            loss, parts = loss_of(inputs, target)
            for name, part in parts.items():
                part = batch.weigh(part, share)
                self.parts[name] = self.parts[name] + part if name in self.parts else part
            yield batch.weigh(loss, share)


class Method(nn.Module):
    """A way to train networks: a module that turns a batch into the losses of one iteration.

    A subclass hands its networks to this constructor and overrides `iteration` and `deployable`.

    Args:
        learners: attribute name -> network or sequence of networks that train.
        frozen: attribute name -> network or sequence of networks that only teach. They are changed in place: their
            parameters stop to require grad, and they stay in eval mode, also after `train()`.
        seed: of the method's own random choices, which are made on the CPU. Take the same on every rank.

    Errors: TypeError for what is no network; ValueError for an empty sequence, for the same network twice, for a
    learner that shares a parameter with another network, and for a learner without a parameter that requires grad.

    Attributes:
        gives_outputs: for subclasses that need features or maps (`fastkd.methods._features.outputs_of`): True lets
            `map_learners` wrap, of each learner with `forward_features`, a module whose call returns `Outputs`.
        leaves_unused: for subclasses: True where parameters of a network that a phase trains get no gradient, of which
            DistributedDataParallel must know (find_unused_parameters).
        teaches_logits: for subclasses: True where all that the losses take of the frozen networks is their logits of
            `inputs` as they are, by `teach(network, inputs)`. They may then be known beforehand: `phases(taught=...)`.
    """

    gives_outputs = False
    leaves_unused = False
    teaches_logits = False

    def __init__(
        self,
        *,
        learners: Mapping[str, nn.Module | Sequence[nn.Module]],
        frozen: Mapping[str, nn.Module | Sequence[nn.Module]] | None = None,
        seed: int = 0,
    ):
        super().__init__()
        check_integer(self._name(), "seed", seed)
        learning = self._adopt(learners)
        teaching = self._adopt(frozen or {})
        check_apart(self._name(), learning, teaching)
        self._learner_names, self._teaching_names = tuple(learning), tuple(teaching)
        self._frozen_names = tuple(frozen or ())
        self._wrapped: dict[str, Any] = {}  # learner's name -> what map_learners made of it; not in the state dict
        self._teaching: dict[nn.Module, tuple[Any, Any]] = {}  # what map_teachers made of it, and of its features
        self._random = torch.Generator().manual_seed(seed).get_state()  # uint8 on the CPU, whatever the device
        self._unfinished = 0
        self._known: Batch | None = None  # the batch whose part is at hand, where it knows what networks say
        self.iterations = 0
        self.epoch, self.epochs = 0, 1
        for name in self._frozen_names:
            self.get_submodule(name).requires_grad_(False).eval()

    def phases(
        self, inputs: Any, target: Any = None, *, chunks: int = 1, taught: Mapping[str, Tensor] | Taught | None = None
    ) -> Iterator[Phase]:
        """The updates of one iteration, in order. Go through all of them: what follows the last one runs then.

        Args:
            inputs: the batch, as the networks take it: a tensor [B, ...], or a tuple, list or dict of them.
            target: class indices [B] (or [B, T]); rows of -100 count nowhere. None where the method needs no labels.
            chunks: cut the batch into this many parts (fewer where it has fewer rows) for gradient accumulation.
                Choices are made once for the whole batch. `phase.losses` then yields one loss per part, weighted by
                its rows. Batch normalisation sees one part at a time, as in any accumulation.
            taught: what the frozen networks say of this batch, so that they need not run: name ("guides.0", see
                `frozen_names`) -> logits [B, C] on the device of the student's; those that are not in it are run. Or a
                function (name, rows, run) -> logits of these rows, a slice of the batch's; run() runs the network on
                them (`fastkd.data.LogitsCache.taught` gives one). Only where `teaches_logits`, else ValueError.

        The method's code runs inside this iterator and inside `phase.losses`, under the autocast that holds there. An
        iterator that is left half-way changes neither counters nor random state: the same choices are made again.
        """
        known = {}
        if taught is not None:
            known = {"taught": self._check_taught(taught), "tell": self._note_part}
        return self._run(Batch(inputs, target, chunks, name=self._name(), **known))

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """For subclasses: yield the phases of one batch; draw random numbers from `generator` only.

        Code after a yield runs when the loop has taken its step. State that must not survive an iteration that was
        left half-way is local, or restored in a `finally`.
        """
        raise NotImplementedError(f"{self._name()} must define iteration(batch, generator)")

    def deployable(self) -> nn.Module:
        """The network to ship, unwrapped, without what only training needs."""
        raise NotImplementedError(f"{self._name()} must define deployable()")

    def start_epoch(self, epoch: int, epochs: int) -> None:
        """Tell the method where the run is: epoch 0 .. epochs - 1. For weights that change with it; saved."""
        check_integer(self._name(), "epochs", epochs, 1)
        check_integer(self._name(), "epoch", epoch, 0, epochs - 1)
        self.epoch, self.epochs = epoch, epochs

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The optimiser's groups for a base learning rate: everything that requires grad, frozen networks left out.

        Call it after `map_learners` where the wrapper replaces parameters.
        """
        return [{"params": [p for p in self.parameters() if p.requires_grad], "lr": lr}]

    def map_learners(self, wrap: Callable[[nn.Module], Callable]) -> Method:
        """Run each learning network through wrap(network): DistributedDataParallel, torch.compile. Returns the method.

        A second call wraps the first one's result. State dicts and `deployable()` bear the networks themselves. A
        method that needs features hands `wrap` a module that holds the network and returns its `Outputs`.
        """
        self._wrapped = {name: self._wrap(wrap, name, self._to_wrap(name)) for name in self._learner_names}
        return self

    def map_teachers(self, wrap: Callable[[nn.Module], Callable]) -> Method:
        """Run each network that only teaches through wrap(network), as `map_learners` does. Returns the method.

        Of one with `forward_features`, `wrap` is handed a second module, whose call returns its `Outputs`. A second
        call replaces the first one's wrappers.
        """
        found = {}
        for name in self.teacher_names:
            network = self.get_submodule(name)
            found[network] = self._wrap(wrap, name, network), self._wrap(wrap, name, giving_outputs(network))
        self._teaching = found
        return self

    @property
    def learner_names(self) -> tuple[str, ...]:
        """Of the learning networks: "student", "students.0", ..."""
        return self._learner_names

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """Of the networks that never change: "teacher", "guides.0", ..."""
        return self._teaching_names

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """Of the networks that teach without learning by gradients: the frozen ones, and a subclass's mean teachers."""
        return self.frozen_names

    def learner(self, name: str) -> Any:
        """A learning network ("student", "students.0", ...) as it is run: wrapped by `map_learners`."""
        return self._wrapped[name] if name in self._wrapped else self.get_submodule(name)

    @torch.no_grad()
    def teach(self, network: nn.Module, inputs: Any, run: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """The output of a frozen network for `inputs`, or `run(network, inputs)`: in eval mode and without a graph.

        Where `phases` was told what it says of them (`taught`), its logits.
        """
        if network.training:  # an evaluation elsewhere may have put it back to train mode: its statistics would move
            network.eval()
        plain, full = self._teaching.get(network, (network, network))
        if self._known is not None and run is None:
            of_part, rows = self._known.part
            name = next((name for name in self.frozen_names if self.get_submodule(name) is network), None)
            if inputs is of_part and name is not None:  # other inputs than the batch's are not known
                return self._known.taught(name, rows, lambda: logits_of(plain(inputs)))
        return plain(inputs) if run is None else run(full, inputs)

    def train(self, mode: bool = True) -> Method:
        """As in nn.Module; frozen networks stay in eval mode."""
        super().train(mode)
        for network in self._wrapped.values():
            if isinstance(network, nn.Module):
                network.train(mode)
        for name in self._frozen_names:
            self.get_submodule(name).eval()
        return self

    def get_extra_state(self) -> dict[str, Any]:
        state = {"random": self._random, "iterations": self.iterations}
        return state | {"epoch": self.epoch, "epochs": self.epochs}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        self._random = state["random"].cpu()  # torch.load's map_location may have moved it
        self.iterations, self.epoch, self.epochs = state["iterations"], state["epoch"], state["epochs"]

    def _wrap(self, wrap: Callable[[nn.Module], Callable], name: str, network: nn.Module) -> Any:
        wrapped = wrap(network)
        if not callable(wrapped):
            expected = f"a function that returns a callable network for {name}"
            raise common.wrong_type(self._name(), "wrap", expected, type(wrapped).__name__)
        return wrapped

    def _to_wrap(self, name: str) -> Any:
        network = self.learner(name)
        return giving_outputs(network) if self.gives_outputs and name not in self._wrapped else network

    def _run(self, batch: Batch) -> Iterator[Phase]:
        # Choices come from a copy of the random state, kept only when the iteration is over.
        generator = torch.Generator()
        generator.set_state(self._random)
        self._note_start()
        # Autocast keeps the low-precision weights that it made. Where the caller's autocast spans an optimiser step,
        # they would be the ones from before the step.
        torch.clear_autocast_cache()
        with contextlib.closing(self.iteration(batch, generator)) as phases:
            for phase in phases:
                yield phase
                torch.clear_autocast_cache()
        self._random = generator.get_state()
        self._unfinished = 0
        self.iterations += 1

    def _note_part(self, batch: Batch, at_hand: bool) -> None:
        if at_hand:
            self._known = batch
        elif self._known is batch:  # not a later one: a loop may leave the last chunk's iterator to the collector
            self._known = None

    def _check_taught(self, taught: Mapping[str, Tensor] | Taught) -> Taught:
        if not self.teaches_logits:
            expected = "None: this method takes more of its frozen networks than their logits of a batch, or has none"
            raise common.wrong_value(self._name(), "taught", expected, type(taught).__name__)
        if callable(taught):
            return taught
        if not isinstance(taught, Mapping):
            expected = "a dict of logits by the frozen networks' names, or a function (name, rows, run)"
            raise common.wrong_type(self._name(), "taught", expected, type(taught).__name__)
        for name in taught:
            if name not in self.frozen_names:
                expected = f"a dict whose keys are among {', '.join(self.frozen_names)}"
                raise common.wrong_value(self._name(), "taught", expected, name)
        return lambda name, rows, run: taught[name][rows] if name in taught else run()

    def _note_start(self) -> None:
        self._unfinished += 1
        if self._unfinished == 3:
            warnings.warn(
                f"{self._name()}: two iterations in a row were left before their end, so that random choices repeat "
                "and what follows the last step never runs; loop over method.phases(...) to its end",
                RuntimeWarning,
                stacklevel=3,
            )

    def _adopt(self, networks: Mapping[str, nn.Module | Sequence[nn.Module]]) -> dict[str, nn.Module]:
        """Register the networks under their attribute names; returns them flat: "guides.0" for one of a sequence."""
        flat = {}
        for key, value in networks.items():
            if is_sequence(value):
                several = check_networks(self._name(), key, value)
                flat |= {f"{key}.{i}": network for i, network in enumerate(several)}
                self.add_module(key, nn.ModuleList(several))
            else:
                flat[key] = check_network(self._name(), key, value)
                self.add_module(key, value)
        return flat

    @classmethod
    def _name(cls) -> str:
        return cls.__name__
