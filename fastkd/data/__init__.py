"""Image data by name, ready for training on few cores, the same for every number of workers and after a resume."""

from .batches import EpochSampler, loader
from .catalog import Data, load, names
from .images import UnreadableImage
from .logits import LogitsCache

__all__ = ["Data", "EpochSampler", "LogitsCache", "UnreadableImage", "load", "loader", "names"]
