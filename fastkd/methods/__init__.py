"""Distillation methods: networks in, losses out. One paper, one file; the protocol is in fastkd.methods.base."""

from fastkd.methods.ae_kd import AEKD
from fastkd.methods.base import Batch, Method, Phase
from fastkd.methods.baselines import AVER, CE, KD, TAKD
from fastkd.methods.born_again import BAN
from fastkd.methods.ca_mkd import CAMKD
from fastkd.methods.ctsl_mkt import CTSLMKT
from fastkd.methods.dgkd import DGKD
from fastkd.methods.dist import DIST
from fastkd.methods.dkd import DKD
from fastkd.methods.dkel import DKEL
from fastkd.methods.feed import FEED, FT
from fastkd.methods.mean_teacher import MeanTeacher
from fastkd.methods.one import ONE, OKDDip
from fastkd.methods.online import DML, KDCL
from fastkd.methods.orc import ORC
from fastkd.methods.pcl import PCL
from fastkd.methods.rkd import RKD

__all__ = [
    "AEKD",
    "AVER",
    "BAN",
    "CAMKD",
    "CE",
    "CTSLMKT",
    "DGKD",
    "DIST",
    "DKD",
    "DKEL",
    "DML",
    "FEED",
    "FT",
    "KD",
    "KDCL",
    "ONE",
    "ORC",
    "PCL",
    "RKD",
    "TAKD",
    "Batch",
    "MeanTeacher",
    "Method",
    "OKDDip",
    "Phase",
]
