"""Logit standardisation: what is distilled are the logits' z-scores (arXiv 2403.01427, CVPR 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd.ops.shared import LossTerms

EPSILON = 1e-7  # beside the standard deviation (P, code)


def standardized(logits: Tensor) -> Tensor:
    """(z - mean) / (std + 1e-7) over the classes of logits [..., C], std unbiased; in float32 at least.

    The gradient goes through mean and deviation. A row of equal logits is 0.
    """
    z = logits.to(torch.promote_types(logits.dtype, torch.float32))
    apart = z - z.mean(-1, keepdim=True)
    square = apart.square().sum(-1, keepdim=True) / max(1, z.shape[-1] - 1)
    # The root of 0 has no finite derivative.
    return apart / (square.clamp(min=torch.finfo(z.dtype).tiny).sqrt() + EPSILON)


def distil_standardized(
    logits: Tensor, teachers: Sequence[Tensor], target: Tensor | None, *, ce_weight: float, **options: Any
) -> tuple[Tensor, LossTerms]:
    """multi_teacher_kd (return_terms=True) whose divergences see standardised logits, its cross-entropy raw ones."""
    teachers = [standardized(teacher) for teacher in teachers]
    loss, terms = functional.multi_teacher_kd(standardized(logits), teachers, target, **options)
    if ce_weight == 0 or target is None:  # which a method with a cross-entropy has refused
        return loss, terms
    ce = functional.cross_entropy(logits, target)
    return loss + ce_weight * ce, terms._replace(ce=ce.detach())
