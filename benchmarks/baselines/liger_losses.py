"""Liger-Kernel's Triton losses: https://github.com/linkedin/Liger-Kernel

Its divergence takes probabilities, so that the softmaxes stay PyTorch's. Its cross-entropy writes the gradient over the
logits, which a distillation loss still needs: the cross-entropy is PyTorch's too.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

DISTRIBUTION, MODULE, NEEDS_GPU = "liger-kernel", "liger_kernel.transformers.functional", True


def _divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    from liger_kernel.transformers.functional import liger_kl_div

    log_q, p = F.log_softmax(student / temperature, dim=1), F.softmax(teacher / temperature, dim=1)
    return liger_kl_div(log_q, p, reduction="batchmean") * temperature * temperature


def multi_teacher(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    loss = ce_weight * F.cross_entropy(student, target)
    for teacher, weight in zip(teachers, weights, strict=True):
        loss = loss + weight * _divergence(student, teacher, temperature)
    return loss


def mutual(logits, target, temperature, ce_weight) -> Tensor:
    total = 0
    for m, own in enumerate(logits):
        total = total + ce_weight * F.cross_entropy(own, target)
        for n, peer in enumerate(logits):
            if n != m:
                total = total + _divergence(own, peer.detach(), temperature) / (len(logits) - 1)
    return total
