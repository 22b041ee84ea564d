"""Checks of what methods are given: each raises one sentence with method, argument, what was expected, what came."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

from torch import Tensor, nn

from fastkd._core.checks import check_number
from fastkd._core.messages import wrong_type, wrong_value


def check_network(method: str, argument: str, value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}: call it first" if isinstance(value, type) else type(value).__name__
        raise wrong_type(method, argument, "a network (torch.nn.Module)", got)
    return value


def check_boolean(method: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(method, argument, "True or False", type(value).__name__)
    return value


def check_weights(method: str, **weights: float) -> list[float]:
    """The weights of a loss's terms, each a number of at least 0, in their order."""
    return [check_number(method, name, value, "a number >= 0", 0) for name, value in weights.items()]


def check_same_shape(method: str, argument: str, taught: Tensor, logits: Tensor) -> None:
    """The logits of the network `argument`, beside the student's."""
    if taught.shape != logits.shape:
        expected = f"a network whose logits have the student's shape {list(logits.shape)}"
        raise wrong_value(method, argument, expected, f"logits of shape {list(taught.shape)}")


def is_sequence(value: object) -> TypeGuard[Sequence[Any]]:
    """Whether this is several networks: nn.Sequential and its like are one."""
    return isinstance(value, (list, tuple, nn.ModuleList)) or (
        isinstance(value, Sequence) and not isinstance(value, (str, bytes, nn.Module))
    )


def check_networks(method: str, argument: str, value: object) -> list[nn.Module]:
    """A sequence of at least one network."""
    if not is_sequence(value):
        got = f"one {type(value).__name__}" + (": put it in a list" if isinstance(value, nn.Module) else "")
        raise wrong_type(method, argument, "a sequence of networks (torch.nn.Module)", got)
    if len(value) == 0:
        raise wrong_value(method, argument, "a sequence of at least one network", "an empty one")
    return [check_network(method, f"{argument}[{i}]", network) for i, network in enumerate(value)]


def check_apart(
    method: str, learners: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module], tied: bool = True
) -> None:
    """Every learner learns, and shares no parameter that does with another network; no two networks are one module.

    tied: whether networks may share parameters that do not learn, as those of a frozen base.
    """
    for name, network in learners.items():
        if not any(p.requires_grad for p in network.parameters()):
            got = "none: it was frozen before, or it is no network that learns"
            raise wrong_value(method, name, "a network with a parameter that requires grad", got)
    owner: dict[int, str] = {}  # id of a network, or of a learner's parameter that learns -> the network's name
    for name, network in (*learners.items(), *frozen.items()):
        shared = [owner[id(x)] for x in (network, *network.parameters()) if id(x) in owner]
        if shared:
            got = f"one that shares parameters with {shared[0]}: copy.deepcopy makes one of its own"
            if tied:
                got += "; parameters without requires_grad may be shared"
            raise wrong_value(method, name, "a network of its own", got)
        owner[id(network)] = name
        if name in learners:
            owner.update((id(p), name) for p in network.parameters() if p.requires_grad or not tied)
