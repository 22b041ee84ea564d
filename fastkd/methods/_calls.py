"""How the networks of a method are called, and what they may return."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from fastkd._core.messages import wrong_type
from fastkd.models import call_network, logits_of

__all__ = ["GivesLogits", "as_argument", "call_network", "has_auxiliary_heads", "logits_from", "logits_in"]

EXPECTED = "a network that returns logits [..., C], a floating-point tensor or an object or dict with one in `logits`"


def as_argument(name: str) -> str:
    """ "students.0", a network's name in the method, as its argument: "students[0]"."""
    key, dot, index = name.partition(".")
    return f"{key}[{index}]" if dot else key


def logits_in(output: Any, method: str, argument: str) -> Tensor:
    """The logits [..., C] in what the network `argument` of `method` returned; TypeError naming both for others."""
    try:
        logits = logits_of(output)
    except TypeError:
        raise wrong_type(method, argument, EXPECTED, _told(output)) from None
    if not logits.is_floating_point():
        raise wrong_type(method, argument, EXPECTED, f"dtype {logits.dtype}")
    return logits


def logits_from(network: Callable[..., Any], inputs: Any, method: str, argument: str) -> Tensor:
    """The logits [..., C] of the network `argument` of `method` for `inputs`."""
    return logits_in(call_network(network, inputs), method, argument)


def _told(output: Any) -> str:
    kind = type(output).__name__
    return f"a dict of {', '.join(map(str, output))}" if isinstance(output, dict) else kind


class GivesLogits(nn.Module):
    """A network whose call returns its logits alone: what `map_learners` wraps of one with auxiliary heads.

    DistributedDataParallel waits for gradients of everything that it hands out, and no loss here reads those heads.
    """

    def __init__(self, network: nn.Module):
        super().__init__()
        self.network = network
        self.training = network.training

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return logits_of(self.network(*args, **kwargs))


def has_auxiliary_heads(network: nn.Module) -> bool:
    """Whether it trains classifiers besides its own, as torchvision's GoogLeNet, Inception and segmentation say."""
    network = getattr(network, "source", network)  # of fastkd.models.with_features
    return getattr(network, "aux_logits", None) is True or isinstance(
        getattr(network, "aux_classifier", None), nn.Module
    )
