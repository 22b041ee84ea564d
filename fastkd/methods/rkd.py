"""RKD: Relational Knowledge Distillation (arXiv 1904.05068, CVPR 2019)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_network, check_weights
from fastkd.methods._features import outputs_of
from fastkd.methods._relations import rows_that_count, select
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy


class RKD(Method):
    """A student that keeps the distances and the angles between the embeddings that its teacher gives to a batch.

        ce_weight * CE + distance * rkd_distance(f, f_teacher) + angle * rkd_angle(f, f_teacher)

    f [B, D] are pooled embeddings. Distances are divided by the mean of the positive ones of their network, angles are
    cosines in all triplets, both are compared by the Huber loss (P, equations 4 to 7; `fastkd.functional.rkd_distance`,
    `rkd_angle`). Each default is marked (P) published, (S) from other people's code, (C) our choice.

    >>> student, teacher = [fastkd.models.create("plain2", 10, image_size=8) for _ in range(2)]
    >>> method = fastkd.methods.RKD(student, teacher)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> sorted(method.step(optimizer, torch.randn(4, 3, 8, 8), torch.arange(4)))
    ['angle', 'ce', 'distance']

    Args:
        student: the network to train; it gives logits and its pooled embedding (fastkd.models.with_features).
        teacher: the network to learn from, frozen in place; it gives its pooled embedding. Its width and its classes
            may differ from the student's.
        distance: weight of the distances, >= 0. 25 (S: what distillation benchmarks take for RKD-DA).
        angle: weight of the angles, >= 0. 50 (S).
        ce_weight: weight of the cross-entropy, >= 0. 1 (S). With 0 no labels are needed, and the student's classifier
            has no gradient, of which DistributedDataParallel must know (find_unused_parameters=True).
        process_group: a torch.distributed group; relations are then of the batch of all its processes, as in
            `fastkd.functional.rkd_distance`. None: of each process's own.

    With chunks > 1 relations are those within each chunk, weighted by its rows: not the relations of the whole batch,
    which has pairs and triplets across chunks. Rows of -100 are in no relation: for that, relations read on the host,
    once per chunk and before the networks run, which rows count. Nothing else waits for the device.

    Errors: ValueError or TypeError in one sentence, before training; at the first batch for a network without an
    embedding.
    """

    gives_outputs = True
    student: nn.Module
    teacher: nn.Module

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        ce_weight: float = 1.0,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        name = self._name()
        check_network(name, "student", student)
        check_network(name, "teacher", teacher)
        numbers = check_weights(name, distance=distance, angle=angle, ce_weight=ce_weight)
        if not any(numbers):
            raise wrong_value(name, "ce_weight", "> 0 where distance and angle are 0", ce_weight)
        super().__init__(learners={"student": student}, frozen={"teacher": teacher})
        self.distance, self.angle, self.ce_weight = numbers
        self.process_group = process_group
        self.gives_outputs = self.distance + self.angle > 0
        self.leaves_unused |= self.ce_weight == 0  # the classifier

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the student's step."""
        yield Phase([self.learner("student")], self._terms, batch)

    def deployable(self) -> nn.Module:
        """The student."""
        return self.student

    def _terms(self, inputs: Any, target: Any) -> Terms:
        terms: dict[str, Tensor] = {}
        if self.gives_outputs:
            rows = rows_that_count(target)
            run = partial(outputs_of, method_name=self._name(), argument="teacher")
            taught = select(self.teach(self.teacher, inputs, run).features, rows)  # [N, E]
            outputs = outputs_of(self.learner("student"), inputs, self._name(), "student")
            assert outputs.features is not None
            logits, features = outputs.logits, select(outputs.features, rows)  # [B, C], [N, D]
        else:
            logits = self.learned_logits("student", inputs)
        if self.ce_weight > 0:
            terms["ce"] = self.ce_weight * cross_entropy(logits, target)
        for name, relation, weight in (
            ("distance", functional.rkd_distance, self.distance),
            ("angle", functional.rkd_angle, self.angle),
        ):
            if weight > 0:
                terms[name] = weight * relation(features, taught, process_group=self.process_group)
        loss: Tensor = sum(terms.values())  # type: ignore[assignment]  # of one at least
        return loss, {name: term.detach() for name, term in terms.items()}, logits
