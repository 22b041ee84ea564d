"""Several teachers of a multi-label network in plain PyTorch: cross-entropy, and a loop of the binary divergences.

Yang et al., "Multi-Label Knowledge Distillation" (arXiv 2308.06453), the logits' part, from logits instead of clamped
probabilities, with a temperature.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_label(
    student: Tensor,  # [B, C]
    teachers: Sequence[Tensor],  # K x [B, C]
    target: Tensor,  # [B, C]
    weights: Sequence[float],  # K
    temperature: float,
    ce_weight: float,
) -> Tensor:
    rows = len(student)
    loss = ce_weight * F.binary_cross_entropy_with_logits(student, target, reduction="sum") / rows
    for teacher, weight in zip(teachers, weights, strict=True):
        z, y = student / temperature, teacher / temperature
        p = torch.sigmoid(y)
        kl = p * (F.logsigmoid(y) - F.logsigmoid(z)) + (1 - p) * (F.logsigmoid(-y) - F.logsigmoid(-z))
        loss = loss + weight * kl.sum() / rows * temperature * temperature
    return loss
