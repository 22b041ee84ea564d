"""Networks: small ones, torchvision's with a first layer for small images, and the features of any network."""

from fastkd.models.base import Network, Outputs, call_network, logits_of, parameters_count
from fastkd.models.branched import Branched, branched
from fastkd.models.features import with_features
from fastkd.models.inference import prepared
from fastkd.models.registry import create, names

__all__ = [
    "Branched",
    "Network",
    "Outputs",
    "branched",
    "call_network",
    "create",
    "logits_of",
    "names",
    "parameters_count",
    "prepared",
    "with_features",
]
