"""Distillation methods: networks in, losses out. One paper, one file; the protocol is in fastkd.methods.base."""

from fastkd.methods.base import Batch, Method, Phase
from fastkd.methods.baselines import AVER, CE, KD, TAKD
from fastkd.methods.born_again import BAN
from fastkd.methods.dgkd import DGKD
from fastkd.methods.feed import FEED, FT

__all__ = ["AVER", "BAN", "CE", "DGKD", "FEED", "FT", "KD", "TAKD", "Batch", "Method", "Phase"]
