"""What methods of several networks that train together share: their set-up, their views of a batch, their logits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from fastkd._core.checks import check_integer
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._checks import check_boolean, check_networks
from fastkd.methods.base import Method

Value = TypeVar("Value")


class Peers(Method):
    """M >= 2 networks that train together.

    Args:
        peers: the networks.
        frozen: as in `Method`.
        deploy: which of them `deployable()` gives.
        views: False: every peer sees the whole `inputs`; True: `inputs` is a tuple or list of M views, one per peer.
    """

    peers: nn.ModuleList

    def __init__(
        self,
        peers: Sequence[nn.Module],
        *,
        frozen: Mapping[str, Sequence[nn.Module]] | None = None,
        deploy: int = 0,
        views: bool = False,
    ):
        deploy = check_integer(self._name(), "deploy", deploy, 0, len(check_peers(self._name(), peers)) - 1)
        check_boolean(self._name(), "views", views)
        super().__init__(learners={"peers": peers}, frozen=frozen)
        self.deploy, self.views = deploy, views

    def deployable(self) -> nn.Module:
        """Peer number `deploy`."""
        return self.peers[self.deploy]

    def running(self) -> list[Any]:
        """The peers as they are run: wrapped by `map_learners`."""
        return [self.learner(f"peers.{k}") for k in range(len(self.peers))]

    def view_of_each(self, inputs: Any) -> Sequence[Any]:
        """The input of each peer."""
        count = len(self.peers)
        if not self.views:
            return [inputs] * count
        expected = f"a tuple or list of {count} views, one per peer (views=True)"
        if not isinstance(inputs, (tuple, list)):
            raise wrong_type(self._name(), "inputs", expected, type(inputs).__name__)
        if len(inputs) != count:
            raise wrong_value(self._name(), "inputs", expected, f"{len(inputs)} of them")
        return inputs

    def check_classes(self, argument: str, logits: Sequence[Tensor | None], shape: torch.Size) -> None:
        """All logits must have the first peer's shape; None is no network."""
        for k, z in enumerate(logits):
            if z is not None and z.shape != shape:
                expected = f"a network whose logits have the shape {list(shape)} of the first peer's"
                raise wrong_value(self._name(), f"{argument}[{k}]", expected, f"logits of shape {list(z.shape)}")

    def parts_of(self, terms: Mapping[str, Tensor | Sequence[Tensor]]) -> dict[str, Tensor]:
        """Terms [M] by name as the parts of a phase: "peers.0.ce", ... ."""
        return {
            f"peers.{k}.{name}": values[k].detach() for k in range(len(self.peers)) for name, values in terms.items()
        }


def check_peers(method: str, peers: object) -> list[nn.Module]:
    networks = check_networks(method, "peers", peers)
    if len(networks) < 2:
        raise wrong_value(method, "peers", "a sequence of at least two networks", len(networks))
    return networks


def per_peer(
    method: str, argument: str, value: object, count: int, check: Callable[[str, object], Value]
) -> list[Value]:
    """A value for each of `count` peers, from one value or a sequence; check(argument, value) refuses wrong ones."""
    if isinstance(value, (tuple, list)):
        if len(value) != count:
            raise wrong_value(method, argument, f"one value, or {count}, one per peer", f"{len(value)} values")
        return [check(f"{argument}[{k}]", one) for k, one in enumerate(value)]
    return [check(argument, value)] * count
