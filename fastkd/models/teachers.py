"""`Teachers`: several networks that only teach, as the one teacher that frameworks have a place for."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from fastkd._core.messages import wrong_type
from fastkd._core.typed import like

if TYPE_CHECKING:
    from typing_extensions import Self


class Teachers(nn.ModuleList):
    """K networks that only teach, as one module: a call gives the list of what each returns, without a graph.

    For frameworks that have a place for one teacher (torchdistill, ModelOpt, timm), and where a module holds teachers
    beside a student: it moves them with it, and their batch norms stay in eval mode, whatever `train()` says.
    `fastkd.MultiTeacherKD` takes the list as it is.

    >>> teachers = fastkd.models.Teachers([torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)]).train()
    >>> [tuple(logits.shape) for logits in teachers(torch.zeros(2, 4))], teachers[0].training
    ([(2, 3), (2, 3)], False)

    Args:
        networks: a sequence of at least one nn.Module. They are changed in place: their parameters stop to require
            grad, and all their modules stay in eval mode.

    Raises TypeError for anything else.
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__(_checked(networks))
        self.requires_grad_(False).eval()

    @torch.no_grad()
    def forward(self, *args: Any, **kwargs: Any) -> list[Any]:
        """What each network returns for these arguments: K of them."""
        return [network(*args, **kwargs) for network in self]

    if TYPE_CHECKING:

        @like(forward)
        def __call__(self, *arguments: Any, **options: Any) -> Any:
            """As `forward`."""

    def train(self, mode: bool = True) -> Self:
        """Eval mode, whatever `mode` says; returns the module."""
        return super().train(False)


def _checked(networks: object) -> Sequence[nn.Module]:
    expected = "a sequence of one network (nn.Module) or more"
    if not isinstance(networks, (Sequence, nn.ModuleList)):
        raise wrong_type("Teachers", "networks", expected, type(networks).__name__)
    wrong = [type(network).__name__ for network in networks if not isinstance(network, nn.Module)]
    if wrong or len(networks) == 0:
        raise wrong_type("Teachers", "networks", expected, f"one of type {wrong[0]}" if wrong else "an empty one")
    return networks  # type: ignore[return-value]  # a ModuleList is a sequence of modules, not a Sequence
