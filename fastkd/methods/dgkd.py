"""DGKD: Densely Guided Knowledge Distillation using Multiple Teacher Assistants (arXiv 2009.08825, ICCV 2021).

Networks of decreasing size, the teacher T and its assistants A_1 .. A_n, are trained one after another, and then the
student: each is guided by T and by all assistants that were trained before it. One `DGKD` trains one of them:

    guides = [T]
    for network in (A_1, ..., A_n, S):
        train(DGKD(network, guides))
        guides.append(network)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number, check_temperature
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_boolean, check_network, check_networks, check_same_shape
from fastkd.methods._standardize import distil_standardized
from fastkd.methods.base import Batch, Method, Phase, Terms

Scale = Literal["paper", "code"]
Drop = Literal["none", "bernoulli", "fixed"]


class DGKD(Method):
    """A student taught by every one of its guides, of which some are dropped at random in each iteration.

    With z the student's logits [B, C], z_g those of guide g, K = n + 1 guides (teacher and n assistants), and
    KD_T(z, z_g) = T^2 * mean_b sum_c p_T(z_g) * (log p_T(z_g) - log p_T(z)):

        scale="paper"   (n + 1) * (1 - lam) * CE + lam * sum_g KD_T(z, z_g)
        scale="code"    (1 - lam) * CE + lam * sum_g KD_T(z, z_g) / C     (the authors' `KLDivLoss()`: mean over B * C)

    The sum is over the guides kept in this iteration; n + 1 stays the number of all guides. Each default is marked
    (P) published in paper or code, (S) from a summary of the paper, (C) our choice.

    >>> student, guides = torch.nn.Linear(4, 3), [torch.nn.Linear(4, 3) for _ in range(3)]
    >>> method = fastkd.methods.DGKD(student, guides, lam=0.5, drop="fixed")
    >>> method.weights(classes=3)  # of each divergence; of the cross-entropy, 3 guides * 0.5
    (0.5, 1.5)
    >>> parts = method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.randn(8, 4), torch.arange(8) % 3)
    >>> sorted(parts)
    ['ce', 'kd']

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        guides: the teacher, then the assistants by decreasing size; with the student's number of classes. They are
            frozen in place.
        temperature: T > 0. 5 (P, code).
        lam: weight of the guides, in [0, 1]. None follows `scale`: 1 with "code" (P, code), which has no cross-entropy
            and needs no labels; 0.5 (C) with "paper", whose text has one: no source pairs the text's loss with 1.
        scale: "paper" (S) | "code" (P). "paper" by default (C).
        drop: "none" | "bernoulli": each guide survives with probability `survival` | "fixed": exactly `drop_num`
            guides, chosen at random, are dropped. At least one guide is always kept (C): where none survives, one
            drawn uniformly. A dropped guide is not run. "none" by default (C); the paper drops only for the final
            student (P).
        survival: in [0, 1]; 0.75 (S).
        drop_num: 0 .. number of guides - 1; 1 (P, code).
        standardize: distil the z-scores of the logits, (z - mean) / std over the classes (arXiv 2403.01427), the
            cross-entropy stays on the logits. False.
        seed: of the drops.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch that a
    guide takes part in where its logits and the student's differ in shape.
    """

    teaches_logits = True
    student: nn.Module
    guides: nn.ModuleList
    last_only = ("drop", "survival", "drop_num")  # the paper drops guides of the last student only (P)

    def __init__(
        self,
        student: nn.Module,
        guides: Sequence[nn.Module],
        *,
        temperature: float = 5.0,
        lam: float | None = None,
        scale: Scale = "paper",
        drop: Drop = "none",
        survival: float = 0.75,
        drop_num: int = 1,
        standardize: bool = False,
        seed: int = 0,
    ):
        name = self._name()
        check_network(name, "student", student)
        guides = check_networks(name, "guides", guides)
        check_choice(name, "scale", scale, get_args(Scale))
        check_choice(name, "drop", drop, get_args(Drop))
        drop_num = check_integer(name, "drop_num", drop_num, 0)
        if drop == "fixed" and drop_num >= len(guides):
            expected = f"less than the number of guides, {len(guides)} (one is always kept)"
            raise wrong_value(name, "drop_num", expected, drop_num)
        temperature = check_temperature(name, temperature)
        lam = {"paper": 0.5, "code": 1.0}[scale] if lam is None else lam
        lam = check_number(name, "lam", lam, "a number in [0, 1]", 0, 1)
        survival = check_number(name, "survival", survival, "a number in [0, 1]", 0, 1)
        standardize = check_boolean(name, "standardize", standardize)
        super().__init__(learners={"student": student}, frozen={"guides": guides}, seed=seed)
        self.temperature, self.lam, self.scale = temperature, lam, scale
        self.drop, self.survival, self.drop_num, self.standardize = drop, survival, drop_num, standardize

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the student's step, taught by the guides that are kept in this iteration."""
        yield Phase([self.learner("student")], partial(self._terms, self._kept(generator)), batch)

    def deployable(self) -> nn.Module:
        """The student."""
        return self.student

    def weights(self, classes: int) -> tuple[float, float]:
        """The weight of KD_T to each guide and that of the cross-entropy, for logits of this many classes."""
        if self.scale == "code":
            return self.lam / classes, 1 - self.lam
        return self.lam, len(self.guides) * (1 - self.lam)

    def _kept(self, generator: torch.Generator) -> list[int]:
        """The guides of this iteration, in order. Drawn on the host, also where the default device is another."""
        count = len(self.guides)
        if self.drop == "bernoulli":
            draws = torch.rand(count, generator=generator, device="cpu").tolist()
            return [g for g in range(count) if draws[g] < self.survival] or [draws.index(min(draws))]
        if self.drop == "fixed":
            return sorted(torch.randperm(count, generator=generator, device="cpu")[self.drop_num :].tolist())
        return list(range(count))

    @property
    def no_topk(self) -> str:
        """Why the guides' k likeliest classes are not enough for this loss; "" where they are."""
        if self.standardize:
            return "standardize takes mean and deviation of the logits of all classes"
        if self.temperature != 1:
            return f"at temperature {self.temperature:g}, other than 1, the probabilities of all classes are needed"
        return ""

    def _argument(self, guide: int) -> str:
        """What the caller gave this guide as, for errors."""
        return f"guides[{guide}]"

    def teachers_weights(self, logits: Tensor, taught: list[Tensor], target: Tensor | None) -> Tensor | list[float]:
        """[K] or, per row, [K, B]: the weights of the kept guides' divergences among each other."""
        return [1.0] * len(taught)

    def _terms(self, kept: list[int], inputs: Any, target: Any) -> Terms:
        guides = [(self.guides[g], self._argument(g)) for g in kept]
        taught: list[Any] = [self.taught_logits_or_topk(guide, inputs, name) for guide, name in guides]  # each [..., C]
        logits = self.learned_logits("student", inputs)  # [..., C]
        for (_, name), known in zip(guides, taught, strict=True):
            if isinstance(known, Tensor):  # multi_teacher_kd checks a TopK
                check_same_shape(self._name(), name, known, logits)
        weight, ce_weight = self.weights(logits.shape[-1])
        distil = distil_standardized if self.standardize else functional.multi_teacher_kd
        loss, terms = distil(
            logits,
            taught,
            target,
            weights=self.teachers_weights(logits, taught, target),
            kd_weight=weight,
            temperature=self.temperature,
            ce_weight=ce_weight,
            return_terms=True,
        )
        parts = {} if ce_weight == 0 else {"ce": ce_weight * terms.ce}
        return loss, parts | {"kd": weight * terms.kd}, logits
