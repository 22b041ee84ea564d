"""The baselines of distillation by logits. Each is DGKD with another choice of guides or weights.

    KD     one teacher                            (1 - lam) * CE + lam * KD_T(z, z_1)
    AVER   K teachers, weight 1 / K each          (1 - lam) * CE + lam * mean_k KD_T(z, z_k)
    TAKD   DGKD's guides, only the last is used   (1 - lam) * CE + lam * KD_T(z, z_K)

KD_T is as in fastkd.methods.dgkd: T^2 times the KL divergence, a sum over classes and a mean over rows. The mean of
the divergences (AVER) is neither the divergence from the mean logits nor that from the mean probabilities.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_network, check_networks
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy
from fastkd.methods.dgkd import DGKD


class CE(Method):
    """The student alone, trained by cross-entropy with the labels.

    >>> method = fastkd.methods.CE(torch.nn.Linear(4, 3, bias=False))
    >>> round(method(torch.zeros(8, 4), torch.arange(8) % 3).item(), 4)  # of equal logits: log 3
    1.0986

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
    """

    student: nn.Module

    def __init__(self, student: nn.Module):
        super().__init__(learners={"student": check_network(self._name(), "student", student)})

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the student's step."""
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

    >>> student, teacher = torch.nn.Linear(4, 3, bias=False), torch.nn.Linear(4, 3, bias=False)
    >>> method = fastkd.methods.KD(student, teacher, lam=0.5)
    >>> parts = method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.zeros(8, 4), torch.arange(8) % 3)
    >>> {name: round(part.item(), 4) for name, part in sorted(parts.items())}  # equal logits: 0.5 * log 3
    {'ce': 0.5493, 'kd': 0.0}

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teacher: the network to learn from, with the same classes; frozen in place.
        temperature: T > 0; 4, common use.
        lam: weight of the divergence, in [0, 1]; 0.9, common use (called alpha elsewhere).
        ce_weight: weight of the cross-entropy, >= 0; None = 1 - lam.
        kd_weight: weight of the divergence, >= 0; None = lam.
        standardize: distil the z-scores of the logits, as in DGKD. The paper of that has KD(standardize=True,
            temperature=2, ce_weight=0.1, kd_weight=9).
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        lam: float = 0.9,
        ce_weight: float | None = None,
        kd_weight: float | None = None,
        standardize: bool = False,
    ):
        check_network(self._name(), "teacher", teacher)
        if ce_weight is not None:
            ce_weight = check_number(self._name(), "ce_weight", ce_weight, "a number >= 0, or None", 0)
        if kd_weight is not None:
            kd_weight = check_number(self._name(), "kd_weight", kd_weight, "a number >= 0, or None", 0)
        super().__init__(student, [teacher], temperature=temperature, lam=lam, standardize=standardize)
        self.ce_weight, self.kd_weight = ce_weight, kd_weight

    def weights(self, classes: int) -> tuple[float, float]:
        """The weights of KD and of CE; the latter is `ce_weight` where that is given."""
        kd_weight, ce_weight = super().weights(classes)
        kd_weight = kd_weight if self.kd_weight is None else self.kd_weight
        return kd_weight, ce_weight if self.ce_weight is None else self.ce_weight

    def _argument(self, guide: int) -> str:
        return "teacher"


class TAKD(DGKD):
    """Mirzadeh et al., "Improved Knowledge Distillation via Teacher Assistant" (arXiv 1902.03393).

    DGKD with only the last guide: in a chain T, A_1 .. A_n, S each network learns from the one before it.

    >>> teacher, assistant, student = [torch.nn.Linear(4, 3) for _ in range(3)]
    >>> method = fastkd.methods.TAKD(student, [teacher, assistant])
    >>> [guide is assistant for guide in method.guides]
    [True]

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
    """The average of the distillation losses to K teachers: DGKD's loss divided by K; or weighted row by row.

        weights="equal"        (1 - lam) * CE + lam * mean_k KD_T(z, z_k)
        weights="confidence"   CE + lam * mean_b sum_k w_kb KL_T / K,  w = (1 - softmax_k(CE(z_k, y))) / (K - 1)
        weights="entropy"      the same with w = 1 - H_k / sum_k H_k, H the entropy of the teacher's softmax

    "confidence" is the loss of logits of CA-MKD (fastkd.methods.CAMKD has its term of feature maps, too), "entropy" is
    EBKD's (Kwon et al., ICASSP 2020), as CA-MKD's authors have it. With equal confidences they weigh as "equal",
    divided by K.

    >>> student, teachers = torch.nn.Linear(4, 3), [torch.nn.Linear(4, 3) for _ in range(4)]
    >>> method = fastkd.methods.AVER(student, teachers, lam=0.5)
    >>> method.weights(classes=3)  # of each divergence, of the cross-entropy
    (0.125, 0.5)

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teachers: K networks with the same classes; frozen in place. K >= 2 for other weights than "equal".
        weights: as above; "equal".
        temperature: T > 0; 4 (P for "confidence"; as in KD, our choice, else).
        lam: weight of the divergences, in [0, 1]. None: 0.9 as in KD, our choice, for "equal"; 1 for the others (P).
        standardize: distil the z-scores of the logits, as in DGKD.
    """

    kept_as: ClassVar = {"weights": "weighting"}

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        weights: Literal["equal", "confidence", "entropy"] = "equal",
        temperature: float = 4.0,
        lam: float | None = None,
        standardize: bool = False,
    ):
        name = self._name()
        teachers = check_networks(name, "teachers", teachers)
        check_choice(name, "weights", weights, ("equal", "confidence", "entropy"))
        if weights != "equal" and len(teachers) < 2:
            raise wrong_value(name, "teachers", f"at least two networks where weights is {weights!r}", "one")
        lam = (0.9 if weights == "equal" else 1.0) if lam is None else lam
        super().__init__(student, teachers, temperature=temperature, lam=lam, standardize=standardize)
        self.weighting = weights

    def weights(self, classes: int) -> tuple[float, float]:
        """The weight of the teachers' divergences, each times its own of them, and that of the cross-entropy."""
        count = len(self.guides)
        return self.lam / count, 1 - self.lam if self.weighting == "equal" else 1.0

    def teachers_weights(self, logits: Tensor, taught: list[Tensor], target: Tensor | None) -> Tensor | list[float]:
        """[K], or [K, B] by the teachers' cross-entropies or entropies."""
        if self.weighting == "equal":
            return super().teachers_weights(logits, taught, target)
        if target is None:
            raise wrong_value(self._name(), "target", f"class indices where weights is {self.weighting!r}", None)
        stats = functional.group_stats([t.flatten(0, -2) for t in taught], target.flatten(0, taught[0].dim() - 2))
        if self.weighting == "entropy":
            weights = 1 - stats.entropy / stats.entropy.sum(0).clamp(min=torch.finfo(stats.entropy.dtype).tiny)
        else:
            weights = confidence_weights(stats.ce)
        return weights.nan_to_num(0.0).reshape(len(taught), *taught[0].shape[:-1])  # a row that does not count is NaN

    @property
    def no_topk(self) -> str:
        """Why the teachers' k likeliest classes are not enough for this loss; "" where they are."""
        if self.weighting != "equal":
            return f"weights={self.weighting!r} reads the teachers' logits of all classes"
        return super().no_topk

    def _argument(self, guide: int) -> str:
        return f"teachers[{guide}]"


def confidence_weights(ce: Tensor) -> Tensor:
    """[K, B]: (1 - softmax over the K teachers of their cross-entropies [K, B]) / (K - 1); a column's sum is 1."""
    return (1 - ce.softmax(0)) / (len(ce) - 1)
