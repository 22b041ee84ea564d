"""Several teachers in plain PyTorch, as training scripts write it: cross-entropy, and a loop of Hinton's loss.

Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531), equation 1 with the factor T^2.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def multi_teacher(
    student: Tensor,  # [B, C]
    teachers: Sequence[Tensor],  # K x [B, C]
    target: Tensor,  # [B]
    weights: Sequence[float],  # K
    temperature: float,
    ce_weight: float,
) -> Tensor:
    loss = ce_weight * F.cross_entropy(student, target)
    for teacher, weight in zip(teachers, weights, strict=True):
        log_q = F.log_softmax(student / temperature, dim=1)
        p = F.softmax(teacher / temperature, dim=1)
        loss = loss + weight * F.kl_div(log_q, p, reduction="batchmean") * temperature * temperature
    return loss


@torch.enable_grad()
def with_gradient(student: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """The loss and its gradient to the student, by autograd."""
    student = student.detach().requires_grad_()
    loss = multi_teacher(student, *rest)
    return loss.detach(), torch.autograd.grad(loss, student)[0]


def gradient_and_value(student: Tensor, *rest) -> tuple[Tensor, Tensor]:
    """The same as torch.compile takes it."""
    gradient, loss = torch.func.grad_and_value(multi_teacher)(student, *rest)
    return loss, gradient


def reverse(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    """KL(q || p) of each teacher, as TRL's generalised JSD at beta 1."""
    loss = ce_weight * F.cross_entropy(student, target)
    for teacher, weight in zip(teachers, weights, strict=True):
        log_q, log_p = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
        kl = F.kl_div(log_p, log_q, reduction="batchmean", log_target=True)
        loss = loss + weight * kl * temperature * temperature
    return loss


def jsd(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    """TRL's generalised Jensen-Shannon divergence at beta 0.5."""
    loss = ce_weight * F.cross_entropy(student, target)
    for teacher, weight in zip(teachers, weights, strict=True):
        log_q, log_p = (F.log_softmax(z / temperature, dim=1) for z in (student, teacher))
        mixture = torch.logsumexp(torch.stack([log_q, log_p]) - math.log(2), dim=0)
        of_p, of_q = (F.kl_div(mixture, z, reduction="batchmean", log_target=True) for z in (log_p, log_q))
        loss = loss + weight * (of_p + of_q) / 2 * temperature * temperature
    return loss
