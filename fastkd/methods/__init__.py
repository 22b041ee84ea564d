"""Distillation methods: networks in, losses out. One paper, one file; the protocol is in fastkd.methods.base."""

from fastkd.methods.base import Batch, Method, Phase
from fastkd.methods.baselines import AVER, CE, KD, TAKD
from fastkd.methods.dgkd import DGKD
from fastkd.methods.dkel import DKEL, PCL

__all__ = ["AVER", "CE", "DGKD", "DKEL", "KD", "PCL", "TAKD", "Batch", "Method", "Phase"]
