"""A vector of losses whose elements have graphs of their own: `losses[m].backward()` goes through network m alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from fastkd.ops._autograd import is_transformed


class Losses(Tensor):
    """Losses [M] or [M, ...], a Tensor like any other, but for `losses[m]`, `unbind` and iteration.

    What these give is the loss of one network, not a part of the sum of all: its backward reaches that network alone,
    leaves the others' `.grad` as it is, and does not free their graphs.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]  # every result is a plain Tensor
    _alone: Callable[[int], Tensor | None]
    _made: int

    def __getitem__(self, index: Any) -> Tensor:
        loss = self._of_one(index) if type(index) is int and -len(self) <= index < len(self) else None
        return super().__getitem__(index) if loss is None else loss

    def __iter__(self) -> Iterator[Tensor]:
        return iter(self.unbind())

    def unbind(self, dim: int = 0) -> tuple[Tensor, ...]:
        return tuple([self[m] for m in range(len(self))]) if dim in (0, -self.dim()) else super().unbind(dim)

    def __reduce_ex__(self, protocol: SupportsIndex) -> str | tuple[Any, ...]:
        plain = self.detach().requires_grad_(self.requires_grad)
        reduced: str | tuple[Any, ...] = plain.__reduce_ex__(protocol)
        return reduced

    def _of_one(self, index: int) -> Tensor | None:
        if not torch.is_grad_enabled() or self._version != self._made or is_transformed():
            return None
        return self._alone(index % len(self))


def with_graphs(losses: Tensor, alone: Callable[[int], Tensor | None]) -> Tensor:
    """The losses [M, ...], of which `alone(m)` gives the m-th with a graph of its own, or None for a part of `losses`.

    A compiled graph has one backward for all: there, and where nothing learns, they stay a plain Tensor.
    """
    if torch.compiler.is_compiling() or not losses.requires_grad or is_transformed():
        return losses
    losses.__class__ = Losses
    losses._alone, losses._made = alone, losses._version  # type: ignore[attr-defined]
    return losses


def mapped(losses: Tensor, whole: Callable[[Tensor], Tensor], one: Callable[[Tensor], Tensor]) -> Tensor:
    """whole(losses), whose m-th loss is one(losses[m])."""
    result = whole(losses)
    return with_graphs(result, lambda m: one(losses[m])) if type(losses) is Losses else result


def the_only(losses: Tensor) -> Tensor:
    """losses[0] of one loss [1] or [1, ...]."""
    return losses.squeeze(0)
