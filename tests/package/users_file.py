"""A user's file with every public call, of which test_types.py holds that it runs, and that type checkers take it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import fastkd
from fastkd import functional, losses, methods, models
from fastkd.functional import GroupStats
from fastkd.losses import DistillationStats, LossTerms
from fastkd.methods import Batch, Method, Phase

Z = torch.randn(4, 3)  # [B, C]
Y = torch.tensor([0, 1, 2, -100])
X = torch.randn(4, 3, 8, 8)
MASK = torch.tensor([True, True, False, True])


def calls() -> None:
    assert_type(functional.cross_entropy(Z, Y, label_smoothing=0.1, mask=MASK, reduction="sum", num_items=4.0), Tensor)
    teachers = [Z, Z + 1]
    loss = functional.multi_teacher_kd(
        Z, teachers, Y, weights=[0.5, 0.5], kd_weight=0.9, temperature=[2.0, 4.0], combine="losses", ce_weight=0.1,
        label_smoothing=0.1, ignore_index=-100, mask=MASK, class_dim=-1, scale_by_t2=False, reduction="mean",
        num_items=torch.tensor(3.0),
    )  # fmt: skip
    assert_type(loss, Tensor)
    assert_type(functional.multi_teacher_kd(Z, Z, return_terms=True), tuple[Tensor, LossTerms])
    assert_type(functional.multi_teacher_kd(Z, Z, return_stats=True), tuple[Tensor, DistillationStats])
    both = functional.multi_teacher_kd(Z, Z, return_terms=True, return_stats=True)
    assert_type(both, tuple[Tensor, LossTerms, DistillationStats])
    assert_type(functional.multi_teacher_kd_with_gradient(Z, teachers, temperature=2.0), tuple[Tensor, Tensor])
    binary = functional.multi_label_kd(
        Z, teachers, MASK[:, None].expand(4, 3), pos_weight=2.0, classes="mean", mask=Z > 0
    )
    assert_type(binary, Tensor)
    assert_type(functional.multi_label_kd(Z, teachers, return_terms=True), tuple[Tensor, LossTerms])
    functional.multi_teacher_kd(Z, teachers, activation="sigmoid")
    losses_of_all, terms = functional.mutual_kd(
        teachers, Y, weights=[[0.0, 1.0], [1.0, 0.0]], teachers=[Z], teacher_weights=[[0.5], [0.5]], kd_weight=1.0,
        temperature=2.0, ce_weight=1.0, label_smoothing=0.0, reduction="none", return_terms=True,
    )  # fmt: skip
    assert_type(losses_of_all[0], Tensor)
    assert_type(terms, LossTerms)
    assert_type(functional.rkd_distance(Z, Z, mask=MASK, reduction="none"), Tensor)
    assert_type(functional.rkd_angle(Z, Z, eps=1e-6, num_items=2, process_group=None), Tensor)
    assert_type(functional.feature_ensemble([X], [X], p=2, norm="channel", elements="sum"), Tensor)
    hidden, head = torch.randn(4, 5), torch.randn(3, 5)
    linear = functional.linear_multi_teacher_kd(
        hidden, head, [(hidden, head), fastkd.Head(hidden, head, softcap=30.0)], Y, bias=torch.zeros(3), chunk_rows=2,
        combine="losses", ce_weight=1.0, reduction="mean",
    )  # fmt: skip
    assert isinstance(linear, Tensor)
    stats = functional.group_stats(teachers, Y, mask=MASK)
    assert_type(stats, GroupStats)
    assert_type(functional.network_scores(stats, "accuracy"), Tensor)
    assert_type(functional.rank_networks(stats, by="top5"), Tensor)
    assert_type(functional.hard_samples(stats, [0.5, 0.5], 2), Tensor)
    sparse = fastkd.TopK(torch.tensor([[0, 1]] * 4), torch.full((4, 2), -1.0), mode="tail")
    functional.multi_teacher_kd(Z, [sparse], temperature=1.0)
    with fastkd.use_backend("reference"):
        assert_type(str(fastkd.explain(functional.rkd_distance, Z, Z)), str)


def modules() -> None:
    one = losses.MultiTeacherKD(temperature=2.0, combine="probs", ce_weight=0.5)
    assert_type(one(Z, [Z], Y), Tensor)
    assert_type(losses.MultiTeacherKD(return_terms=True)(Z, Z), tuple[Tensor, LossTerms])
    assert_type(losses.MutualKD(ce_weight=1.0, reduction="sum")([Z, Z], Y), Tensor)
    assert_type(losses.MutualKD(return_terms=True)([Z, Z], Y), tuple[Tensor, LossTerms])
    assert_type(losses.MultiLabelKD(pos_weight=torch.ones(3), classes="mean")(Z, [Z]), Tensor)
    assert_type(losses.MultiLabelKD(return_terms=True)(Z, [Z]), tuple[Tensor, LossTerms])
    assert_type(losses.RKDDistance(reduction="mean")(Z, Z, mask=MASK), Tensor)
    assert_type(losses.RKDAngle(eps=1e-6)(Z, Z), Tensor)
    assert_type(losses.FeatureEnsemble(p=1, norm="sample", elements="mean")([X], [X]), Tensor)
    hidden, head = torch.randn(4, 5), torch.randn(3, 5)
    assert isinstance(losses.LinearMultiTeacherKD(softcap=30.0)(hidden, head, [(hidden, head)]), Tensor)
    transforms = fastkd.nn.FeatureTransforms(3, [4, 4], form="loop", norm=nn.BatchNorm2d)
    assert_type(transforms(X), list[Tensor])
    assert fastkd.nn.chosen_form(X, [4, 4]) in ("loop", "grouped")


def network(name: str = "plain2", **options: Any) -> nn.Module:
    return models.create(name, 3, image_size=8, width=0.1, **options)


def branches(count: int = 2) -> models.Branched:
    return models.branched("plain4", 3, branches=count, image_size=8, width=0.1)


def networks() -> None:
    assert "plain2" in models.names()
    outputs = models.with_features(network())(X)
    assert_type(models.logits_of(outputs), Tensor)
    assert_type(models.parameters_count(network(), trainable=True), int)
    models.call_network(network(), X)
    models.Teachers([network(), network()])(X)
    models.prepared(network(), fold=True, channels_last=True, compile=False, dtype=None)(X)
    methods.CAMKD(network(), [network(), network()], feature_weight=50.0)
    several = branches()
    assert_type(several.peer(0), models.Network)
    assert_type(several([X, X]), tuple[models.Outputs, ...])


class Mine(Method):
    def __init__(self, student: nn.Module) -> None:
        super().__init__(learners={"student": student})

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        def terms(inputs: Any, target: Any) -> tuple[Tensor, dict[str, Tensor]]:
            loss = functional.cross_entropy(self.learned_logits("student", inputs), target)
            return loss, {"ce": loss.detach()}

        yield Phase([self.learner("student")], terms, batch)

    def deployable(self) -> nn.Module:
        return self.get_submodule("student")


def all_methods() -> dict[str, Method]:
    return {
        "CE": methods.CE(network()),
        "KD": methods.KD(network(), network(), temperature=4.0, lam=0.9, ce_weight=0.5),
        "BAN": methods.BAN(network(), network()),
        "TAKD": methods.TAKD(network(), [network()]),
        "AVER": methods.AVER(network(), [network(), network()]),
        "DGKD": methods.DGKD(network(), [network()], scale="code", drop="bernoulli", survival=0.5, seed=1),
        "DML": methods.DML([network(), network()]),
        "KDCL": methods.KDCL([network(), network()], ensemble="linear", lam=[1.0, 0.5]),
        "CTSLMKT": methods.CTSLMKT([network(), network()], [network(), network()], self_learning=[True, False]),
        "ORC": methods.ORC(network(), [network(), network()], rank_by="accuracy", intensive="group"),
        "FEED": methods.FEED(network(), [network()], mode="sequential", reduction="mean", norm="sample"),
        "FT": methods.FT(network(), network(), beta=100.0),
        "RKD": methods.RKD(network(), network(), distance=25.0, angle=50.0),
        "AEKD": methods.AEKD(network(), [network(), network()], cap=0.9),
        "DIST": methods.DIST(network(), network(), gamma=2.0),
        "DKD": methods.DKD(network(), network(), warmup=2.0),
        "MeanTeacher": methods.MeanTeacher(network(), consistency="kl", views=False),
        "ONE": methods.ONE(branches(), temperature=3.0),
        "OKDDip": methods.OKDDip(branches(3), width=8),
        "DKEL": methods.DKEL(branches(), variant="intended", init=None),
        "PCL": methods.PCL(branches(), c=0.5),
    }


def training(method: Method, inputs: Any) -> None:
    optimizer = torch.optim.SGD(method.parameter_groups(0.01))
    for phase in method.phases(inputs, Y.clamp(min=0), chunks=1):
        optimizer.zero_grad()
        phase.loss.backward()
        optimizer.step()
        assert_type(phase.parts, dict[str, Tensor])
    assert_type(method.step(optimizer, inputs, Y.clamp(min=0)), dict[str, Tensor])
    assert_type(method.deployable(), nn.Module)


if __name__ == "__main__":
    torch.manual_seed(0)
    calls()
    modules()
    networks()
    training(Mine(network()), X)
    for name, each in all_methods().items():
        training(each, (X, X) if name in ("DKEL", "PCL") else X)
