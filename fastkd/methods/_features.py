"""What a network gives beside its logits: the pooled embedding and the feature maps, for methods that teach by them."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._calls import call_network
from fastkd.models import Network, Outputs, logits_of

_NEEDS = {"features": "its pooled embedding", "maps": "its feature maps"}


def outputs_of(
    network: Callable[..., Any], inputs: Any, method_name: str, argument: str, need: str = "features"
) -> Outputs:
    """The outputs of a network for `inputs`, with what the method needs of them.

    Runs `network.forward_features(inputs)` where the network has it and it gives such outputs (timm's gives a tensor:
    such a network is called), else `network(inputs)`; a dict goes in as keywords. A network that
    `map_learners` wrapped is called, so that the wrapper sees it (DistributedDataParallel synchronises gradients in
    its own call): `Method.gives_outputs` lets the wrapped module return `Outputs` there.

    Args:
        network: a learner as `Method.learner` gives it, or a frozen network.
        inputs: as the network takes them.
        method_name, argument: who asks and which network this is, for the errors.
        need: "features": [B, D] | "maps": one [B, c, h, w] or more. What is not needed may be None.

    Errors: one sentence that names fastkd.models.with_features. TypeError where the network returns no `Outputs` (or
    other object with `.logits` and what is needed), ValueError where what is needed is None or of another shape.
    """
    output = call_network(partial(full_output, network), inputs)
    expected = f"a network that gives {_NEEDS[need]} (fastkd.models.with_features makes one of any network)"
    if isinstance(output, Tensor) or not isinstance(getattr(output, "logits", None), Tensor):
        raise wrong_type(method_name, argument, expected, f"{type(output).__name__} instead of Outputs")
    outputs = Outputs(logits_of(output), getattr(output, "features", None), getattr(output, "maps", None))
    if getattr(outputs, need) is None:
        raise wrong_value(method_name, argument, expected, f"Outputs whose {need} are None")
    if need == "features":
        _check_shape(method_name, argument, outputs.features, "[B, D]", 2)
    else:
        maps = outputs.maps or ()
        if len(maps) == 0:
            raise wrong_value(method_name, argument, expected, "Outputs without a map")
        for feature_map in maps:
            _check_shape(method_name, argument, feature_map, "[B, c, h, w]", 4)
    return outputs


_gives: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()  # as `_ask` found


def full_output(network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """What a network returns, with its features where it has them: by `forward_features`, or by its call."""
    return _full_output(_ask, network, *args, **kwargs)


def _full_output(ask: Callable[..., Any], network: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    method = getattr(network, "forward_features", None)
    if method is None:
        return network(*args, **kwargs)
    if isinstance(network, Network):
        return method(*args, **kwargs)
    known = _gives.get(network)  # type: ignore[call-overload]  # a module: it has forward_features
    if known is None:
        return ask(network, *args, **kwargs)
    return method(*args, **kwargs) if known else network(*args, **kwargs)


def _ask(network: Any, *args: Any, **kwargs: Any) -> Any:
    """The output of a network of which is not known yet whether its `forward_features` is of our kind."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    output = network.forward_features(*args, **kwargs)
    _gives[network] = isinstance(getattr(output, "logits", None), Tensor)
    if _gives[network]:
        return output
    with torch.no_grad():
        for buffer, before in buffers:  # batch statistics are of one pass
            buffer.copy_(before)
    return network(*args, **kwargs)


class GivesOutputs(nn.Module):
    """A network whose call is `forward_features`: what `map_learners` wraps of a network that has it.

    Wrappers only see calls; a method of what they wrap, called from outside, passes them by.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.training = network.training
        # What is found out once must not be a part of what is compiled.
        self._ask = _ask if isinstance(network, Network) else torch.compiler.disable(_ask, recursive=False)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return _full_output(self._ask, self.network, *args, **kwargs)


def giving_outputs(network: nn.Module) -> nn.Module:
    """A module whose call returns `Outputs` where the network has `forward_features`; else the network itself."""
    return GivesOutputs(network) if hasattr(network, "forward_features") else network


def _check_shape(method_name: str, argument: str, value: object, shape: str, dims: int) -> None:
    if not isinstance(value, Tensor) or value.dim() != dims:
        got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
        kind = "features" if dims == 2 else "maps"
        raise wrong_value(method_name, argument, f"a network whose {kind} have shape {shape}", got)
