"""Checks of what methods are given: each raises one sentence with method, argument, what was expected, what came."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from numbers import Integral, Real

from torch import nn

from fastkd.ops import _common as common


def check_network(method: str, argument: str, value: object) -> nn.Module:
    if not isinstance(value, nn.Module):
        got = f"the class {value.__name__}: call it first" if isinstance(value, type) else type(value).__name__
        raise common.wrong_type(method, argument, "a network (torch.nn.Module)", got)
    return value


def is_sequence(value: object) -> bool:
    """Whether this is several networks: nn.Sequential and its like are one."""
    return isinstance(value, (list, tuple, nn.ModuleList)) or (
        isinstance(value, Sequence) and not isinstance(value, (str, bytes, nn.Module))
    )


def check_networks(method: str, argument: str, value: object) -> list[nn.Module]:
    """A sequence of at least one network."""
    if not is_sequence(value):
        got = f"one {type(value).__name__}" + (": put it in a list" if isinstance(value, nn.Module) else "")
        raise common.wrong_type(method, argument, "a sequence of networks (torch.nn.Module)", got)
    if len(value) == 0:
        raise common.wrong_value(method, argument, "a sequence of at least one network", "an empty one")
    return [check_network(method, f"{argument}[{i}]", network) for i, network in enumerate(value)]


def check_integer(method: str, argument: str, value: object, low: int | None = None, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise common.wrong_type(method, argument, "an integer", type(value).__name__)
    value = int(value)
    if (low is not None and value < low) or (high is not None and value > high):
        expected = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise common.wrong_value(method, argument, expected, value)
    return value


def check_temperature(method: str, value: object, argument: str = "temperature") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise common.wrong_type(method, argument, "a finite number > 0", type(value).__name__)
    if not (math.isfinite(value) and value > 0):
        raise common.wrong_value(method, argument, "a finite number > 0", value)
    return float(value)


def check_apart(
    method: str, learners: Mapping[str, nn.Module], frozen: Mapping[str, nn.Module], tied: bool = True
) -> None:
    """Every learner learns, and shares no parameter that does with another network; no two networks are one module.

    tied: whether networks may share parameters that do not learn, as those of a frozen base.
    """
    for name, network in learners.items():
        if not any(p.requires_grad for p in network.parameters()):
            got = "none: it was frozen before, or it is no network that learns"
            raise common.wrong_value(method, name, "a network with a parameter that requires grad", got)
    owner: dict[int, str] = {}  # id of a network, or of a learner's parameter that learns -> the network's name
    for name, network in (*learners.items(), *frozen.items()):
        shared = [owner[id(x)] for x in (network, *network.parameters()) if id(x) in owner]
        if shared:
            got = f"one that shares parameters with {shared[0]}: copy.deepcopy makes one of its own"
            if tied:
                got += "; parameters without requires_grad may be shared"
            raise common.wrong_value(method, name, "a network of its own", got)
        owner[id(network)] = name
        if name in learners:
            owner.update((id(p), name) for p in network.parameters() if p.requires_grad or not tied)
