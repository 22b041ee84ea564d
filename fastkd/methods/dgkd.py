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
from typing import Any

import torch
from torch import nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number, check_temperature
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_network, check_networks
from fastkd.methods.base import Batch, Method, Phase, Terms


class DGKD(Method):
    """A student taught by every one of its guides, of which some are dropped at random in each iteration.

    With z the student's logits [B, C], z_g those of guide g, K = n + 1 guides (teacher and n assistants), and
    KD_T(z, z_g) = T^2 * mean_b sum_c p_T(z_g) * (log p_T(z_g) - log p_T(z)):

        scale="paper"   (n + 1) * (1 - lam) * CE + lam * sum_g KD_T(z, z_g)
        scale="code"    (1 - lam) * CE + lam * sum_g KD_T(z, z_g) / C     (the authors' `KLDivLoss()`: mean over B * C)

    The sum is over the guides kept in this iteration; n + 1 stays the number of all guides. Each default is marked
    (P) published in paper or code, (S) from a summary of the paper, (C) our choice.

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        guides: the teacher, then the assistants by decreasing size; with the student's number of classes. They are
            frozen in place.
        temperature: T > 0. 5 (P, code).
        lam: weight of the guides, in [0, 1]. 1 (P, code): no cross-entropy, labels are not needed.
        scale: "paper" (S) | "code" (P). "paper" by default (C).
        drop: "none" | "bernoulli": each guide survives with probability `survival` | "fixed": exactly `drop_num`
            guides, chosen at random, are dropped. At least one guide is always kept (C): where none survives, one
            drawn uniformly. A dropped guide is not run. "none" by default (C); the paper drops only for the final
            student (S).
        survival: in [0, 1]; 0.75 (S).
        drop_num: 0 .. number of guides - 1; 1 (P, code).
        seed: of the drops.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch that a
    guide takes part in where its logits and the student's differ in shape.
    """

    teaches_logits = True

    def __init__(
        self,
        student: nn.Module,
        guides: Sequence[nn.Module],
        *,
        temperature: float = 5.0,
        lam: float = 1.0,
        scale: str = "paper",
        drop: str = "none",
        survival: float = 0.75,
        drop_num: int = 1,
        seed: int = 0,
    ):
        name = self._name()
        check_network(name, "student", student)
        guides = check_networks(name, "guides", guides)
        check_choice(name, "scale", scale, ("paper", "code"))
        check_choice(name, "drop", drop, ("none", "bernoulli", "fixed"))
        drop_num = check_integer(name, "drop_num", drop_num, 0)
        if drop == "fixed" and drop_num >= len(guides):
            expected = f"less than the number of guides, {len(guides)} (one is always kept)"
            raise wrong_value(name, "drop_num", expected, drop_num)
        temperature = check_temperature(name, temperature)
        lam = check_number(name, "lam", lam, "a number in [0, 1]", 0, 1)
        survival = check_number(name, "survival", survival, "a number in [0, 1]", 0, 1)
        super().__init__(learners={"student": student}, frozen={"guides": guides}, seed=seed)
        self.temperature, self.lam, self.scale = temperature, lam, scale
        self.drop, self.survival, self.drop_num = drop, survival, drop_num

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
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

    def _argument(self, guide: int) -> str:
        """What the caller gave this guide as, for errors."""
        return f"guides[{guide}]"

    def _terms(self, kept: list[int], inputs: Any, target: Any) -> Terms:
        targets = [self.taught_logits(self.guides[g], inputs, self._argument(g)) for g in kept]  # each [..., C]
        logits = self.learned_logits("student", inputs)  # [..., C]
        for g, guide in zip(kept, targets, strict=True):
            if guide.shape != logits.shape:
                expected = f"a network whose logits have the student's shape {list(logits.shape)}"
                got = f"logits of shape {list(guide.shape)}"
                raise wrong_value(self._name(), self._argument(g), expected, got)
        weight, ce_weight = self.weights(logits.shape[-1])
        loss, terms = functional.multi_teacher_kd(
            logits,
            targets,
            target,
            weights=[1.0] * len(targets),
            kd_weight=weight,
            temperature=self.temperature,
            ce_weight=ce_weight,
            return_terms=True,
        )
        parts = {} if ce_weight == 0 else {"ce": ce_weight * terms.ce}
        return loss, parts | {"kd": weight * terms.kd}, logits
