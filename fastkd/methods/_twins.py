"""Frozen networks that are run through a faster copy of themselves."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

Mark = tuple[tuple[int | None, int], ...]


class Twin:
    """The copy of one frozen network, made when it is first needed and whenever the network is another than it was.

    Args:
        argument: what the method calls the network, for the note.
        prepare: network -> its copy.
        note: is told what the copy says in `left_out`.
    """

    def __init__(
        self, argument: str, prepare: Callable[[nn.Module], nn.Module], note: Callable[[str], None] | None = None
    ):
        self.argument, self.prepare, self.note = argument, prepare, note
        self._tensors: list[Tensor] = []
        self._mark: Mark | None = None
        self._copy: nn.Module | None = None

    def of(self, network: nn.Module) -> nn.Module:
        """The copy of `network` as it is now; the network itself where it cannot be copied."""
        if self._copy is None or _mark(self._tensors) != self._mark:
            self._tensors = [*network.parameters(), *network.buffers()]
            self._mark = _mark(self._tensors)
            first = self._copy is None
            self._copy = self._made(network, first)
        return self._copy

    def _made(self, network: nn.Module, first: bool) -> nn.Module:
        left_out: tuple[str, ...]
        try:
            made = self.prepare(network)
            left_out = getattr(made, "left_out", ())
        except TypeError as error:  # it cannot be copied
            made, left_out = network, (str(error),)
        if first and self.note is not None:
            for reason in left_out:
                self.note(f"{self.argument}: {reason}")
        return made


def _mark(tensors: list[Tensor]) -> Mark:
    """Changes with every write to one of them (load_state_dict), and where they move to other memory."""
    return tuple([(_version(tensor), tensor.data_ptr()) for tensor in tensors])


def _version(tensor: Tensor) -> int | None:
    return None if torch.is_inference(tensor) else tensor._version  # an inference tensor counts no writes
