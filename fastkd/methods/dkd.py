"""DKD: Decoupled Knowledge Distillation (arXiv 2203.08679, CVPR 2022)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_temperature
from fastkd._core.labels import counted, is_soft
from fastkd._core.messages import wrong_type
from fastkd.methods._checks import check_network, check_same_shape, check_weights
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy


class DKD(Method):
    """A student that learns its teacher's probability of the label and, apart from it, those of the other classes.

        ce_weight * CE + r * (alpha * T^2 * KL(b_t || b_s) + beta * T^2 * KL(o_t || o_s))
        r = min((epoch + 1) / warmup, 1)

    with b = (p_y, 1 - p_y) of softmax(z / T) and label y, and o the softmax over the classes that are not y. The
    divergence of `KD` is the same sum with alpha = 1 and, row by row, beta = 1 - p_y of the teacher (P, equation 7): it
    silences the other classes where the teacher is sure. Each default is (P) published in paper or code.

    >>> student, teacher = torch.nn.Linear(4, 3), torch.nn.Linear(4, 3)
    >>> method = fastkd.methods.DKD(student, teacher, warmup=10)
    >>> [method.warmed_up(epoch) for epoch in (0, 4, 9, 20)]
    [0.1, 0.5, 1.0, 1.0]
    >>> sorted(method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.randn(8, 4), torch.arange(8) % 3))
    ['ce', 'label', 'others']

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teacher: the network to learn from, with the same classes; frozen in place.
        alpha: weight of the label's part, >= 0; 1 (P).
        beta: weight of the other classes' part, >= 0; 8 (P: for CIFAR-100; 0.5 to 10 elsewhere).
        temperature: T > 0; 4 (P).
        warmup: epochs over which both parts grow to their weights, >= 0; 20 (P). A loop of your own tells the epoch by
            `start_epoch`.
        ce_weight: weight of the cross-entropy, >= 0; 1 (P).

    Both parts are one pass of `fastkd.functional.multi_teacher_kd` each. Labels are needed, as class indices.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch for a
    teacher of other classes, a missing target, and probabilities as labels.
    """

    student: nn.Module
    teacher: nn.Module
    teaches_logits = True

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        warmup: float = 20,
        ce_weight: float = 1.0,
    ):
        name = self._name()
        check_network(name, "student", student)
        check_network(name, "teacher", teacher)
        numbers = check_weights(name, alpha=alpha, beta=beta, warmup=warmup, ce_weight=ce_weight)
        temperature = check_temperature(name, temperature)
        super().__init__(learners={"student": student}, frozen={"teacher": teacher})
        self.alpha, self.beta, self.warmup, self.ce_weight = numbers
        self.temperature = temperature

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase trains the student."""
        yield Phase([self.learner("student")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student."""
        return self.student

    def warmed_up(self, epoch: int) -> float:
        """r in epoch 0, 1, ..."""
        return 1.0 if self.warmup == 0 else min((epoch + 1) / self.warmup, 1.0)

    def _terms(self, inputs: Any, target: Any) -> Terms:
        if not isinstance(target, Tensor) or is_soft(target):
            got = "probabilities" if isinstance(target, Tensor) else type(target).__name__
            raise wrong_type(self._name(), "target", "class indices [B]: they part the classes", got)
        taught = self.taught_logits(self.teacher, inputs, "teacher")  # [B, C]
        logits = self.learned_logits("student", inputs)  # [B, C]
        check_same_shape(self._name(), "teacher", taught, logits)
        ce = self.ce_weight * cross_entropy(logits, target)
        r, counts = self.warmed_up(self.epoch), counted(target)
        kd = partial(functional.multi_teacher_kd, temperature=self.temperature, weights=[1.0], mask=counts)
        labels = target.long().masked_fill(~counts, 0)[..., None]  # [B, 1], class 0 in a row that counts nowhere
        others = [z.scatter(-1, labels, -torch.inf) for z in (logits, taught)]  # each [B, C]
        parts = zip((logits, taught), others, strict=True)
        pairs = [label_and_rest(z.gather(-1, labels), other, self.temperature) for z, other in parts]  # each [B, 2]
        label = kd(pairs[0], pairs[1:], kd_weight=r * self.alpha)
        rest = kd(others[0], others[1:], kd_weight=r * self.beta)
        return ce + label + rest, {"ce": ce.detach(), "label": label.detach(), "others": rest.detach()}, logits


def label_and_rest(label: Tensor, others: Tensor, temperature: float) -> Tensor:
    """[..., 2] of the label's logit [..., 1] and all logits [..., C] without it, which is -inf there.

    Their softmax at this temperature is (p_y, 1 - p_y); in float32 at least.
    """
    wide = torch.promote_types(label.dtype, torch.float32)
    rest = others.to(wide).div(temperature).logsumexp(-1, keepdim=True)
    return torch.cat([label.to(wide), temperature * rest], -1)
