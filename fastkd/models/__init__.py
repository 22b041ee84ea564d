"""Networks: small ones, torchvision's for small images, the features of any network, several teachers as one."""

from fastkd.models.base import Network, Outputs, call_network, logits_of, parameters_count
from fastkd.models.branched import Branched, branched
from fastkd.models.features import with_features
from fastkd.models.inference import prepared
from fastkd.models.registry import create, names
from fastkd.models.teachers import Teachers

__all__ = [
    "Branched",
    "Network",
    "Outputs",
    "Teachers",
    "branched",
    "call_network",
    "create",
    "logits_of",
    "names",
    "parameters_count",
    "prepared",
    "with_features",
]
