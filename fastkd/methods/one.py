"""Branches that teach each other: ONE (arXiv 1806.04606, NeurIPS 2018) and OKDDip (arXiv 1912.00350, AAAI 2020)."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_integer, check_number, check_temperature
from fastkd._core.labels import mean_over_counted
from fastkd._core.messages import wrong_type, wrong_value
from fastkd._core.modes import eval_mode
from fastkd.methods._fresh import beside, weights_from
from fastkd.methods._map_channels import black_image
from fastkd.methods._mean_teacher import ramp_up
from fastkd.methods.base import Batch, Method, Phase, Terms
from fastkd.models import Branched, Outputs


class _Branches(Method):
    """What ONE and OKDDip share: the set-up of m branches on one stem, one image for all, and the ramp-up."""

    student: Branched
    helper: nn.Module

    def _set(
        self, student: Branched, helper: nn.Module, temperature: float, ramp: float, of: float | None, seed: int
    ) -> None:
        super().__init__(learners={"student": student, "helper": beside(student, helper)}, seed=seed)
        self.temperature, self.ramp, self.of = temperature, ramp, of

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        networks = [self.learner("student"), self.learner("helper")]
        yield Phase(networks, partial(self._terms, self.distillation_weight(self.epoch, self.epochs)), batch)

    def distillation_weight(self, epoch: int, epochs: int) -> float:
        """r in epoch 0, 1, ... of a run of `epochs`."""
        length = self.ramp if self.of is None else self.ramp * epochs / self.of
        return ramp_up(epoch, length)

    def _terms(self, weight: float, inputs: Any, target: Any) -> Terms:
        raise NotImplementedError

    def _outputs(self, inputs: Any, target: Any) -> tuple[Outputs, ...]:
        if target is None:
            raise wrong_value(self._name(), "target", "class indices [B]", None)
        if not isinstance(inputs, Tensor):
            raise wrong_type(self._name(), "inputs", "one image for all branches, a tensor", type(inputs).__name__)
        outputs: tuple[Outputs, ...] = self.learner("student")(inputs)
        return outputs


class ONE(_Branches):
    """Lan et al., "Knowledge Distillation by On-the-Fly Native Ensemble": branches taught by a gated ensemble of all.

        sum_i CE(z_i) + CE(z_e) + r * sum_i KD_T(z_i, sg z_e);  z_e = sum_i g_i z_i
        g = softmax(ReLU(BN(Linear(pooled stem)))) [B, m]
        r(epoch) = exp(-5 * (1 - epoch / R)^2) up to epoch R = ramp * epochs / of, then 1

    KD_T as in fastkd.methods.dgkd. All of it is one pass of `fastkd.functional.mutual_kd` with m + 1 learners. Each
    default is marked (P) published in paper or code, (C) our choice.

    >>> method = fastkd.methods.ONE(fastkd.models.branched("plain4", 10, image_size=8, width=0.25))
    >>> method.distillation_weight(80, 300), round(method.distillation_weight(0, 300), 4)
    (1.0, 0.0067)

    Args:
        student: a fastkd.models.Branched of m branches; 3 (P).
        temperature: T > 0; 3 (P).
        ramp: epochs of the ramp-up, >= 0, in a run of `of` epochs; 80 (P, code).
        of: 300 (P, CIFAR's schedule); a shorter run ramps up in the same fraction of its epochs (C). None: `ramp` is in
            epochs of any run.
        seed: of the gate's random weights. Take the same on every rank.

    `deployable()` is the first branch (P: any one). Errors: ValueError or TypeError in one sentence.
    """

    def __init__(
        self,
        student: Branched,
        *,
        temperature: float = 3.0,
        ramp: float = 80,
        of: float | None = 300,
        seed: int = 0,
    ):
        name = self._name()
        temperature, ramp, of, seed = _check(name, student, temperature, ramp, of, seed)
        with weights_from(seed):
            m = len(student.peers)
            gate = nn.Sequential(nn.Linear(_stem_channels(name, student), m), nn.BatchNorm1d(m), nn.ReLU())
        self._set(student, gate, temperature, ramp, of, seed)

    def deployable(self) -> nn.Module:
        """The first branch: an ordinary network, image -> logits."""
        return self.student.peer(0)

    def _terms(self, weight: float, inputs: Any, target: Any) -> Terms:
        outputs = self._outputs(inputs, target)
        peers = [o.logits for o in outputs]  # m x [B, C]
        maps = outputs[0].maps or ()
        m, stem = len(peers), maps[-2].mean((2, 3))  # [B, c]
        shares = self.learned_logits("helper", stem).softmax(1)  # [B, m]
        joint = torch.stack([share[:, None] * z for share, z in zip(shares.unbind(1), peers, strict=True)]).sum(0)
        losses, terms = functional.mutual_kd(
            [*(z.to(joint.dtype) for z in peers), joint],
            target,
            weights=[*([0.0] * m + [weight] for _ in range(m)), [0.0] * (m + 1)],
            temperature=self.temperature,
            ce_weight=1.0,
            return_terms=True,
        )  # each [m + 1]
        parts = {"ce": terms.ce[:m].sum(), "ensemble_ce": terms.ce[m], "kd": terms.kd.sum()}
        return losses.sum(), parts, peers[0]


class OKDDip(_Branches):
    """Chen et al., "Online Knowledge Distillation with Diverse Peers": peers with a target each, and a leader.

        sum_a [CE(z_a) + r KD_T(z_a, t_a)] + CE(z_L) + r KD_T(z_L, sg mean_a z_a)
        t_a = sum_b A_ab z_b;  A_ab = softmax over b of <L f_a, E f_b>

    over the m - 1 auxiliary peers a, b, with pooled embeddings f, learned linear maps L and E, and the leader the first
    branch. The gradient goes through t_a (P): it teaches L and E, and the peers. r and KD_T as in `ONE`. Each default
    is marked (P) published in paper or code, (C) our choice.

    >>> method = fastkd.methods.OKDDip(fastkd.models.branched("plain4", 10, image_size=8, width=0.25))
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> sorted(method.step(optimizer, torch.randn(4, 3, 8, 8), torch.arange(4)))
    ['ce', 'kd']

    Args:
        student: a fastkd.models.Branched of m >= 3 branches; the first is the leader.
        temperature: T > 0; 3 (P).
        width: of L f and E f; None: an eighth of the embedding's (S), at least 1.
        ramp, of, seed: as in `ONE`.

    The divergences to t_a run in plain PyTorch, since targets learn there; all else is fused.
    `deployable()` is the leader (P). Errors: ValueError or TypeError in one sentence.
    """

    def __init__(
        self,
        student: Branched,
        *,
        temperature: float = 3.0,
        width: int | None = None,
        ramp: float = 80,
        of: float | None = 300,
        seed: int = 0,
    ):
        name = self._name()
        temperature, ramp, of, seed = _check(name, student, temperature, ramp, of, seed)
        if len(student.peers) < 3:
            raise wrong_value(name, "student", "of at least 3 branches: a leader and 2 peers", len(student.peers))
        embedding = student.peer(0).features_width
        width = max(1, embedding // 8) if width is None else check_integer(name, "width", width, 1)
        with weights_from(seed):
            maps = nn.Linear(embedding, 2 * width, bias=False)
        self._set(student, maps, temperature, ramp, of, seed)

    def deployable(self) -> nn.Module:
        """The leader, the first branch: an ordinary network, image -> logits."""
        return self.student.peer(0)

    def _terms(self, weight: float, inputs: Any, target: Any) -> Terms:
        leader, *peers = self._outputs(inputs, target)
        z = torch.stack([o.logits for o in peers], 1)  # [B, m - 1, C]
        asks, answers = self.learned_logits(
            "helper", torch.stack([o.features for o in peers if o.features is not None], 1)
        ).chunk(2, -1)
        targets = (asks @ answers.mT).softmax(-1).to(z.dtype) @ z  # [B, m - 1, C]
        ce = functional.cross_entropy(list(z.unbind(1)), target).sum()
        apart = mean_over_counted(_divergence(z, targets, self.temperature).sum(1), target)
        loss, terms = functional.multi_teacher_kd(
            leader.logits,
            [z.detach().mean(1)],
            target,
            weights=[1.0],
            kd_weight=weight,
            temperature=self.temperature,
            ce_weight=1.0,
            return_terms=True,
        )
        parts = {"ce": ce.detach() + terms.ce, "kd": weight * (apart.detach() + terms.kd)}
        return ce + weight * apart + loss, parts, leader.logits


def _divergence(z: Tensor, target: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(p_T(target) || p_T(z)) [...] of logits [..., C], with a gradient for both."""
    wide = torch.promote_types(z.dtype, torch.float32)
    log_q, log_p = ((x.to(wide) / temperature).log_softmax(-1) for x in (z, target))
    return temperature**2 * (log_p.exp() * (log_p - log_q)).sum(-1)


def _check(
    name: str, student: object, temperature: float, ramp: float, of: float | None, seed: int
) -> tuple[float, float, float | None, int]:
    if not isinstance(student, Branched):
        expected = "branches on a shared stem, a fastkd.models.Branched (fastkd.models.branched makes one)"
        raise wrong_type(name, "student", expected, type(student).__name__)
    return (
        check_temperature(name, temperature),
        check_number(name, "ramp", ramp, "a finite number >= 0", 0),
        None if of is None else check_number(name, "of", of, "a number >= 1, or None", 1),
        check_integer(name, "seed", seed),
    )


def _stem_channels(name: str, student: Branched) -> int:
    peer = student.peer(0)
    image = black_image(peer)
    with eval_mode(peer), torch.no_grad():
        maps = None if image is None else peer.forward_features(image).maps
    if maps is None or len(maps) < 2:
        raise wrong_value(name, "student", "branches whose stem gives a feature map [B, c, h, w]", "none")
    return maps[-2].shape[1]
