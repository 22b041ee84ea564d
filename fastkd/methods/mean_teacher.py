"""Mean teacher: "Mean teachers are better role models" (arXiv 1703.01780, NeurIPS 2017)."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._calls import logits_from
from fastkd.methods._checks import check_boolean, check_network
from fastkd.methods._mean_teacher import Averaging, check_precision, ramp_up
from fastkd.methods.base import Batch, Phase, Terms, cross_entropy

Consistency = Literal["mse", "kl"]
CONSISTENCIES = get_args(Consistency)


class MeanTeacher(Averaging):
    """A student that agrees with the moving average of its own weights on another view of the same images.

        CE(z) + w * consistency(z, t);  w(epoch) = weight * exp(-5 * (1 - epoch / R)^2) up to epoch R, then weight

    with z the student's logits of the first view, t the teacher's of the second. After each step the teacher's
    parameters become a * teacher + (1 - a) * student, a = min(1 - 1 / (g + 1), momentum) in step g (P); its batch
    statistics are those of its own forward passes in train mode. Where the loop took no step (`phase.skipped`) it
    stays. Rows of -100 have no cross-entropy, but they have a consistency: images without labels are what it is for.
    (With chunks > 1 a chunk's consistency weighs as its labelled rows do.)

    Each default is marked (P) published in paper or code, (C) our choice.

    >>> method = fastkd.methods.MeanTeacher(torch.nn.Linear(4, 3))
    >>> views, labels = [torch.randn(8, 4), torch.randn(8, 4)], torch.tensor([0, 1, 2] + [-100] * 5)
    >>> sorted(method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), views, labels))
    ['ce', 'consistency']

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`. float32 or float64 parameters.
        consistency: "mse", the mean squared difference of the probabilities (P) | "kl", KL(teacher || student).
        weight: of the consistency after the ramp-up, >= 0; 100 (P, code) fits "mse".
        ramp: R, epochs of the ramp-up, >= 0; 5 (P, code).
        momentum: in [0, 1]. None: by the length of the run (C), as in DKEL, or 0.999 where no loop has told it.
        views: True: the inputs are a tuple of two views, the student's and the teacher's (P); False: one for both.

    `deployable()` is the teacher (P). Errors: ValueError or TypeError in one sentence, before training; at the first
    batch for inputs that are not two views.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        consistency: Consistency = "mse",
        weight: float = 100.0,
        ramp: float = 5,
        momentum: float | None = None,
        views: bool = True,
    ):
        name = self._name()
        check_network(name, "student", student)
        check_choice(name, "consistency", consistency, CONSISTENCIES)
        weight = check_number(name, "weight", weight, "a finite number >= 0", 0)
        ramp = check_number(name, "ramp", ramp, "a finite number >= 0", 0)
        momentum = None if momentum is None else check_number(name, "momentum", momentum, "a number in [0, 1]", 0, 1)
        check_boolean(name, "views", views)
        super().__init__(learners={"student": student})
        self.teacher = copy.deepcopy(student).requires_grad_(False)
        self.consistency, self.weight, self.ramp, self.momentum, self.views = consistency, weight, ramp, momentum, views
        self.steps = 0

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase trains the student."""
        check_precision(self._name(), self.teacher)
        phase = Phase([self.learner("student")], partial(self._terms, self.consistency_weight(self.epoch)), batch)
        yield phase
        self.follow(phase)

    def deployable(self) -> nn.Module:
        """The teacher. Its parameters do not require grad."""
        return self.teacher

    def consistency_weight(self, epoch: int) -> float:
        """w in epoch 0, 1, ..."""
        return self.weight * ramp_up(epoch, self.ramp)

    def _terms(self, weight: float, inputs: Any, target: Any) -> Terms:
        if target is None:
            raise wrong_value(self._name(), "target", "class indices [B], -100 for an image without a label", None)
        first, second = self._two(inputs)
        with torch.no_grad():
            running, _ = self._teaching.get(self.teacher, (self.teacher, None))
            taught = logits_from(running, second, self._name(), "teacher")  # [B, C]
        logits = self.learned_logits("student", first)
        ce = cross_entropy(logits, target)
        if self.consistency == "kl":
            agreement = functional.multi_teacher_kd(logits, [taught], weights=[1.0], temperature=1.0)
        else:
            agreement = (logits.softmax(-1) - taught.softmax(-1)).square().mean()
        agreement = weight * agreement
        return ce + agreement, {"ce": ce.detach(), "consistency": agreement.detach()}, taught

    def _two(self, inputs: Any) -> tuple[Any, Any]:
        if not self.views:
            return inputs, inputs
        expected = "two views of the images, a tuple or list of 2 tensors (fastkd.data.load(..., views=2))"
        if not isinstance(inputs, (tuple, list)):
            raise wrong_type(self._name(), "inputs", expected, type(inputs).__name__)
        if len(inputs) != 2:
            raise wrong_value(self._name(), "inputs", expected, f"{len(inputs)} views")
        return inputs[0], inputs[1]
