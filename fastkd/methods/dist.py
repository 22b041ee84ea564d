"""DIST: Knowledge Distillation from A Stronger Teacher (arXiv 2205.10536, NeurIPS 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_temperature
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_network, check_same_shape, check_weights
from fastkd.methods._relations import rows_that_count, select
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy


class DIST(Method):
    """A student whose probabilities correlate with its teacher's, over the classes of a sample and over the samples.

        ce_weight * CE + 2 * tau^2 * (beta * (1 - mean_b rho(p[b], q[b])) + gamma * (1 - mean_c rho(p[:, c], q[:, c])))

    with p, q the softmax of teacher and student at temperature tau and rho Pearson's correlation. Each default is (P)
    published in paper or code.

    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> _ = student.load_state_dict(teacher.state_dict())
    >>> method = fastkd.methods.DIST(student, teacher, ce_weight=0.0)
    >>> round(method(torch.randn(8, 4)).item(), 4)  # equal networks correlate wholly
    0.0

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teacher: the network to learn from, with the same classes; frozen in place.
        beta: weight of the relation between classes, within each sample, >= 0; 1 (P).
        gamma: weight of the relation within a class, between the samples of the batch, >= 0; 1 (P).
        temperature: tau > 0; 4 (P for CIFAR; 1 for ImageNet).
        ce_weight: weight of the cross-entropy, >= 0; 1 (P).

    1 - rho is half the squared distance of the centred and normalised rows, which `fastkd.functional.feature_ensemble`
    computes. With chunks > 1 the relation between samples is that within each chunk. Rows of -100 are in no
    relation: which ones count is read on the host, once per chunk.

    Errors: ValueError or TypeError in one sentence, before training; at the first batch for a teacher of other classes.
    """

    student: nn.Module
    teacher: nn.Module
    teaches_logits = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        beta: float = 1.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        ce_weight: float = 1.0,
    ):
        name = self._name()
        check_network(name, "student", student)
        check_network(name, "teacher", teacher)
        numbers = check_weights(name, beta=beta, gamma=gamma, ce_weight=ce_weight)
        if not any(numbers):
            raise wrong_value(name, "ce_weight", "> 0 where beta and gamma are 0", ce_weight)
        temperature = check_temperature(name, temperature)
        super().__init__(learners={"student": student}, frozen={"teacher": teacher})
        self.beta, self.gamma, self.ce_weight = numbers
        self.temperature = temperature

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase trains the student."""
        yield Phase([self.learner("student")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student."""
        return self.student

    def _terms(self, inputs: Any, target: Any) -> Terms:
        rows = rows_that_count(target)
        taught = self.taught_logits(self.teacher, inputs, "teacher")  # [B, C]
        logits = self.learned_logits("student", inputs)  # [B, C]
        check_same_shape(self._name(), "teacher", taught, logits)
        q, p = (self._probabilities(select(z, rows)) for z in (logits, taught))  # each [N, C]
        weight = 2 * self.temperature**2
        terms: dict[str, Tensor] = {}
        if self.ce_weight > 0:
            terms["ce"] = self.ce_weight * cross_entropy(logits, target)
        if self.beta > 0:
            terms["classes"] = weight * self.beta * decorrelation(q, p)
        if self.gamma > 0:
            terms["samples"] = weight * self.gamma * decorrelation(q.T, p.T)
        return torch.stack(list(terms.values())).sum(), {name: term.detach() for name, term in terms.items()}, logits

    def _probabilities(self, logits: Tensor) -> Tensor:
        z = logits.to(torch.promote_types(logits.dtype, torch.float32)).flatten(0, -2)
        return (z / self.temperature).softmax(-1)


def decorrelation(student: Tensor, teacher: Tensor) -> Tensor:
    """1 minus the mean over the rows [N, D] of Pearson's correlation; a scalar, 0 without rows."""
    if student.shape[0] == 0:
        return student.sum()
    centred = [(x - x.mean(1, keepdim=True))[..., None, None] for x in (student, teacher)]  # [N, D, 1, 1]
    return functional.feature_ensemble(centred[:1], centred[1:], p=2, norm="sample", elements="sum") / 2
