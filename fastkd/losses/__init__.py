"""One nn.Module per operation: hyper-parameters in the constructor, tensors in the call, no mathematics.

Logits may come as what a network returned: a tensor, or an object or dict with one in `logits`.
"""

from __future__ import annotations

from fastkd.losses.embeddings import FeatureEnsemble, RKDAngle, RKDDistance
from fastkd.losses.linear import LinearMultiTeacherKD
from fastkd.losses.logits import MultiTeacherKD, MutualKD
from fastkd.losses.multi_label import MultiLabelKD
from fastkd.ops.multi_teacher import DistillationStats
from fastkd.ops.shared import LossTerms

__all__ = [
    "DistillationStats",
    "FeatureEnsemble",
    "LinearMultiTeacherKD",
    "LossTerms",
    "MultiLabelKD",
    "MultiTeacherKD",
    "MutualKD",
    "RKDAngle",
    "RKDDistance",
]
