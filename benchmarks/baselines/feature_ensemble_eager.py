"""Pairs of feature maps in plain PyTorch: the L1 distance of the maps over their norms, summed over the pairs.

Park and Kwak, "Feature-level Ensemble Knowledge Distillation" (FEED, arXiv 1909.10754); one term is the loss
of Factor Transfer (arXiv 1802.04977).
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def feature_ensemble(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:  # K x [B, C, H, W] each
    total = 0
    for student, teacher in zip(students, teachers, strict=True):
        a, b = F.normalize(student.flatten(1), dim=1), F.normalize(teacher.flatten(1), dim=1)
        total = total + (a - b).abs().mean()
    return total
