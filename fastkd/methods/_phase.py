"""One update of a method: the loss to go back through, and what it trains."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd.methods._batch import Batch

Terms = tuple[Tensor, dict[str, Tensor]] | tuple[Tensor, dict[str, Tensor], Tensor]


class Phase:
    """One update: the loss to go back through and what it trains.

    Made by a method, used by a loop. `loss_of(inputs, target)` returns the mean loss of these rows, a scalar with a
    graph, and its terms as detached scalars that add up to it; where this pass has them anyway, as a third item the
    logits of these rows [b, C] of the network to ship (`Method.deployable`). With one chunk it is called at once; with
    more, each time that `losses` is asked for the next one, so that only one chunk's activations are alive.

    >>> method = fastkd.methods.CE(torch.nn.Linear(4, 3, bias=False))
    >>> phase = next(method.phases(torch.zeros(8, 4), torch.arange(8) % 3, chunks=2))
    >>> [round(loss.item(), 4) for loss in phase.losses]  # each half of log 3
    [0.5493, 0.5493]
    >>> round(phase.parts["ce"].item(), 4)
    1.0986

    Attributes:
        networks: the networks that this phase trains, as `map_learners` wrapped them.
        name: what a method of several phases calls this one ("private"); "" where there is one.
        chunks: how many losses `losses` yields.
        losses: an iterator of `chunks` scalars; the sum of their gradients is the gradient of the whole batch's loss.
        parts: name -> detached 0-d tensor, the terms of the loss as they enter the sum; with several chunks, summed
            over the chunks that `losses` has yielded.
        outputs: the deployable network's logits of the batch, where the pass has them.
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
        self._outputs: list[Tensor] = []  # of each chunk so far, where all have them
        self.losses: Iterator[Tensor] = self._losses(loss_of, batch)
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

    @property
    def outputs(self) -> Tensor | None:
        """Logits [B, C], detached, of the network to ship in the mode in which this pass ran it.

        None where the pass has none, before the last chunk, and for logits of more dimensions: those of sequences
        [B, T, V] would be kept alive for the whole step.
        """
        if len(self._outputs) < self.chunks:
            return None
        return self._outputs[0] if self.chunks == 1 else torch.cat(self._outputs)

    def before_backward(self, check: Callable[[], None]) -> None:
        """Call check() whenever a backward pass through one of the losses begins."""

        if self.chunks > 1:
            self.losses = _watched(self.losses, check)
        elif self._loss.requires_grad:
            self._loss.register_hook(lambda grad: check())

    def _losses(self, loss_of: Callable[[Any, Any], Terms], batch: Batch) -> Iterator[Tensor]:
        for inputs, target, share in batch:
            loss, parts, *outputs = loss_of(inputs, target)
            self._outputs += [logits.detach() for logits in outputs if logits.dim() == 2]
            for name, part in parts.items():
                part = batch.weigh(part, share)
                self.parts[name] = self.parts[name] + part if name in self.parts else part
            yield batch.weigh(loss, share)


def _watched(losses: Iterator[Tensor], check: Callable[[], None]) -> Iterator[Tensor]:
    with contextlib.closing(losses):  # type: ignore[type-var]  # a generator
        for loss in losses:
            if loss.requires_grad:
                loss.register_hook(lambda grad: check())
            yield loss
