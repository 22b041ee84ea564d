"""Image data by name, ready for training on few cores, the same for every number of workers and after a resume."""

from fastkd.data.batches import EpochSampler, loader
from fastkd.data.catalog import Data, load, names
from fastkd.data.decoding import UnreadableImage
from fastkd.data.logits import LogitsCache

__all__ = ["Data", "EpochSampler", "LogitsCache", "UnreadableImage", "load", "loader", "names"]
