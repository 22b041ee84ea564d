"""The baselines of distillation by logits. Each is DGKD with another choice of guides or weights.

    KD     one teacher                            (1 - lam) * CE + lam * KD_T(z, z_1)
    AVER   K teachers, weight 1 / K each          (1 - lam) * CE + lam * mean_k KD_T(z, z_k)
    TAKD   DGKD's guides, only the last is used   (1 - lam) * CE + lam * KD_T(z, z_K)

KD_T is as in fastkd.methods.dgkd: T^2 times the KL divergence, a sum over classes and a mean over rows. The mean of
the divergences (AVER) is neither the divergence from the mean logits nor that from the mean probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from fastkd._core.checks import check_number
from fastkd.methods._checks import check_network, check_networks
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy
from fastkd.methods.dgkd import DGKD


class CE(Method):
    """The student alone, trained by cross-entropy with the labels.

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
    """

    def __init__(self, student: nn.Module):
        super().__init__(learners={"student": check_network(self._name(), "student", student)})

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        yield Phase([self.learner("student")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student."""
        return self.student

    def _terms(self, inputs: Any, target: Any) -> Terms:
        logits = self.learned_logits("student", inputs)
        loss = cross_entropy(logits, target)
        return loss, {"ce": loss.detach()}, logits


class KD(DGKD):
    """Hinton et al., "Distilling the Knowledge in a Neural Network" (arXiv 1503.02531): DGKD with one guide.

        (1 - lam) * CE + lam * KD_T(z, z_teacher)

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teacher: the network to learn from, with the same classes; frozen in place.
        temperature: T > 0; 4, common use.
        lam: weight of the divergence, in [0, 1]; 0.9, common use (called alpha elsewhere).
        ce_weight: weight of the cross-entropy, >= 0; None = 1 - lam.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        lam: float = 0.9,
        ce_weight: float | None = None,
    ):
        check_network(self._name(), "teacher", teacher)
        if ce_weight is not None:
            ce_weight = check_number(self._name(), "ce_weight", ce_weight, "a number >= 0, or None", 0)
        super().__init__(student, [teacher], temperature=temperature, lam=lam)
        self.ce_weight = ce_weight

    def weights(self, classes: int) -> tuple[float, float]:
        kd_weight, ce_weight = super().weights(classes)
        return kd_weight, ce_weight if self.ce_weight is None else self.ce_weight

    def _argument(self, guide: int) -> str:
        return "teacher"


class TAKD(DGKD):
    """Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (arXiv 1902.03393).

    DGKD with only the last guide: in a chain T, A_1 .. A_n, S each network learns from the one before it.

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        guides: the chain above it, by decreasing size; only the last one is used, kept and frozen.
        temperature: T > 0; 5 as in DGKD, our choice.
        lam: weight of the divergence, in [0, 1]; 0.9 as in KD, our choice.
    """

    def __init__(self, student: nn.Module, guides: Sequence[nn.Module], *, temperature: float = 5.0, lam: float = 0.9):
        last = check_networks(self._name(), "guides", guides)[-1:]
        super().__init__(student, last, temperature=temperature, lam=lam)

    def _argument(self, guide: int) -> str:
        return "guides[-1]"


class AVER(DGKD):
    """The average of the distillation losses to K teachers: DGKD's loss divided by K.

        (1 - lam) * CE + lam * mean_k KD_T(z, z_k)

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teachers: K networks with the same classes; frozen in place.
        temperature: T > 0; 4 as in KD, our choice.
        lam: weight of the mean divergence, in [0, 1]; 0.9 as in KD, our choice.
    """

    def __init__(
        self, student: nn.Module, teachers: Sequence[nn.Module], *, temperature: float = 4.0, lam: float = 0.9
    ):
        teachers = check_networks(self._name(), "teachers", teachers)
        super().__init__(student, teachers, temperature=temperature, lam=lam)

    def weights(self, classes: int) -> tuple[float, float]:
        kd_weight, ce_weight = super().weights(classes)
        return kd_weight / len(self.guides), ce_weight / len(self.guides)

    def _argument(self, guide: int) -> str:
        return f"teachers[{guide}]"
