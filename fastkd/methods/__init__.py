"""Distillation methods: networks in, losses out. One paper, one file; the protocol is in fastkd.methods.base."""

from fastkd.methods.base import Batch, Method, Phase
from fastkd.methods.baselines import AVER, CE, KD, TAKD
from fastkd.methods.dgkd import DGKD
from fastkd.methods.orc import ORC

__all__ = ["AVER", "CE", "DGKD", "KD", "ORC", "TAKD", "Batch", "Method", "Phase"]
