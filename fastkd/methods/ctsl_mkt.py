"""CTSL-MKT: Collaborative Teacher-Student Learning via Multiple Knowledge Transfer (arXiv 2101.08471).

Stage 1 trains each peer alone; stage 2 trains fresh peers together, each with its own result of stage 1 at its side:

    self_teachers = [train(CE(network())) for network in families]
    peers = [network() for network in families]
    train(CTSLMKT(peers, self_teachers))
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_number, check_temperature
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._checks import check_boolean, check_networks
from fastkd.methods._features import outputs_of
from fastkd.methods._peers import Peers, check_peers, per_peer
from fastkd.methods._relations import rows_that_count, select
from fastkd.methods.base import Batch, Phase
from fastkd.models import Outputs

PeerTerms = dict[str, Tensor | list[Tensor]]  # name of a term -> one scalar per peer


class CTSLMKT(Peers):
    """M peers that learn from the labels, from each other's responses and relations, and from their former selves.

    The loss is sum_k L_k. With z_k, f_k logits [B, C] and pooled embedding [B, D_k] of peer k, k' its M - 1 partners,
    zbar_k its frozen self-teacher, sg the stop of the gradient, and KD_T(z, t) = T^2 * mean_b KL(p_T(t) || p_T(z)):

        L_k = alpha * CE(z_k) + beta * mean_k' L_kk' + gamma * KD_t(z_k, zbar_k)
        L_kk' = rkd_distance(f_k, sg f_k') + beta1 * rkd_angle(f_k, sg f_k') + beta2 * KD_1(z_k, sg z_k')

    Each default is marked (P) published, (S) from a summary of the paper, (C) our choice; the loss is (S), relations on
    the penultimate pooled embedding, the mean over the partners and the stop of their gradients are (C).

    >>> peers, teachers = [[fastkd.models.create("plain2", 10, image_size=8) for _ in range(2)] for _ in range(2)]
    >>> method = fastkd.methods.CTSLMKT(peers, teachers, gamma=1.0)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> parts = method.step(optimizer, torch.randn(4, 3, 8, 8), torch.arange(4))
    >>> sorted(name for name in parts if name.startswith("peers.0."))
    ['peers.0.angle', 'peers.0.ce', 'peers.0.distance', 'peers.0.mutual', 'peers.0.self']

    Args:
        peers: M >= 2 networks of any families that give logits and, for relations, their pooled embedding
            (fastkd.models.with_features); the same classes, but D_k may differ. Freshly initialised (C).
        self_teachers: M networks in the order of the peers: each peer's family trained alone by cross-entropy. Frozen
            in place. Not used, not kept and not touched where no peer has self-learning.
        alpha: weight of the cross-entropy, >= 0. 1 (C). With 0 no labels are needed.
        beta: weight of all that comes from the partners, >= 0. 1 (C).
        beta1, beta2: weights of the angles and of the response beside the distances, >= 0. 2 and 1 (C).
        gamma: weight of self-learning, >= 0. 0.5 (C).
        temperature: t > 0 of self-learning. 4 (C).
        scale_by_t2: multiply self-learning by t^2. True (C): with t = 4 it then weighs 16 times what it weighs in the
            printed loss, which is without.
        mutual_response, mutual_relation, self_learning: the switches of the three transfers (S), True or False for all
            peers, or a sequence of M of them. A peer with none learns by alpha * CE alone, but still teaches.
        deploy: which peer `deployable()` gives.
        mutual_temperature: T > 0 of the mutual response. 1 (S).
        views: True: the inputs are a tuple of M views of the batch, one per peer and its self-teacher (C).
        process_group: a torch.distributed group; relations are then of the batch of all its processes, as in
            `fastkd.functional.rkd_distance`. None: of each process's own.

    One phase trains all peers. Its parts are "peers.K.ce", ".mutual", ".distance", ".angle" and ".self" of each peer K,
    as they enter the sum.

    Relations compare the rows of what is run at once. With chunks > 1 they are those within each chunk, weighted by its
    rows: not the relations of the whole batch, which has pairs and triplets across chunks; the other terms are the
    whole batch's. Rows of -100 are in no relation: for that, relations read on the host, once per chunk and before the
    networks run, which rows count. Nothing else waits for the device.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch for logits
    of different shapes, a network without an embedding, and views that are not M.
    """

    teaches_logits = True
    self_teachers: nn.ModuleList

    def __init__(
        self,
        peers: Sequence[nn.Module],
        self_teachers: Sequence[nn.Module] = (),
        *,
        alpha: float = 1.0,
        beta: float = 1.0,
        beta1: float = 2.0,
        beta2: float = 1.0,
        gamma: float = 0.5,
        temperature: float = 4.0,
        scale_by_t2: bool = True,
        mutual_response: bool | Sequence[bool] = True,
        mutual_relation: bool | Sequence[bool] = True,
        self_learning: bool | Sequence[bool] = True,
        deploy: int = 0,
        mutual_temperature: float = 1.0,
        views: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ):
        name, count = self._name(), len(check_peers(self._name(), peers))
        numbers = {"alpha": alpha, "beta": beta, "beta1": beta1, "beta2": beta2, "gamma": gamma}
        numbers = {key: check_number(name, key, value, "a number >= 0", 0) for key, value in numbers.items()}
        switch = partial(_check_switch, name)
        response = per_peer(name, "mutual_response", mutual_response, count, switch)
        relation = per_peer(name, "mutual_relation", mutual_relation, count, switch)
        own_self = per_peer(name, "self_learning", self_learning, count, switch)
        temperature = check_temperature(name, temperature)
        mutual_temperature = check_temperature(name, mutual_temperature, "mutual_temperature")
        own = any(own_self)
        if own:
            self_teachers = _check_self_teachers(name, self_teachers, count)
        super().__init__(peers, frozen={"self_teachers": self_teachers} if own else None, deploy=deploy, views=views)
        self.alpha, self.beta, self.beta1, self.beta2, self.gamma = numbers.values()
        self.mutual_response, self.mutual_relation, self.self_learning = response, relation, own_self
        self.temperature, self.mutual_temperature = temperature, mutual_temperature
        self.scale_by_t2 = check_boolean(name, "scale_by_t2", scale_by_t2)
        self.process_group = process_group
        self.teaches_logits = own and not views  # with views each self-teacher sees one of its own
        self.gives_outputs = self.beta > 0 and any(self.mutual_relation)
        self._check_that_all_learn()

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the step of all peers that learn."""
        yield Phase(self.running(), self._terms, batch)

    def _terms(self, inputs: Any, target: Any) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        views = self.view_of_each(inputs)
        rows = rows_that_count(target) if self.gives_outputs else None
        former = [  # each [B, C], or None
            self.taught_logits(self.self_teachers[k], views[k], f"self_teachers[{k}]") if on else None
            for k, on in enumerate(self.self_learning)
        ]
        outputs = [self._run_peer(k, view) for k, view in enumerate(views)]
        logits = [output.logits for output in outputs]  # each [B, C]
        features = [output.features for output in outputs]  # each [B, D_k]
        self.check_classes("peers", logits, logits[0].shape)
        self.check_classes("self_teachers", former, logits[0].shape)
        loss, terms = self._responses(logits, target)
        for more in (
            self._relations([f for f in features if f is not None], rows) if self.gives_outputs else {},
            self._own(logits, former, target),
        ):
            for name, values in more.items():
                loss = loss + sum(values)
                terms[name] = values
        return loss, self.parts_of(terms), logits[self.deploy]

    def _run_peer(self, k: int, view: Any) -> Outputs:
        if self.gives_outputs:  # also of a peer without the switch: the others learn from its embedding
            return outputs_of(self.learner(f"peers.{k}"), view, self._name(), f"peers[{k}]")
        return Outputs(self.learned_logits(f"peers.{k}", view))

    def _responses(self, logits: Sequence[Tensor], target: Tensor | None) -> tuple[Tensor, PeerTerms]:
        """Cross-entropy and mutual response of all peers, in one pass."""
        weight = self.beta * self.beta2 / (len(logits) - 1)
        weights = [[weight if on else 0.0] * len(logits) for on in self.mutual_response]  # the diagonal is never read
        losses, terms = functional.mutual_kd(
            logits,
            target,
            weights=weights,
            temperature=self.mutual_temperature,
            ce_weight=self.alpha,
            return_terms=True,
        )  # each [M]
        parts: PeerTerms = {"ce": self.alpha * terms.ce} if self.alpha > 0 else {}
        if weight > 0 and any(self.mutual_response):
            parts["mutual"] = terms.kd
        return losses.sum(), parts

    def _relations(self, features: Sequence[Tensor], rows: Tensor | None) -> PeerTerms:
        features = [select(f, rows) for f in features]  # each [N, D_k]
        weight, zero = self.beta / (len(features) - 1), features[0].new_zeros((), dtype=torch.float32)
        terms: PeerTerms = {}
        for name, relation, scale in (
            ("distance", functional.rkd_distance, weight),
            ("angle", functional.rkd_angle, weight * self.beta1),
        ):
            if scale == 0:  # without angles
                continue
            values = [zero] * len(features)
            for k, own in enumerate(features):
                if self.mutual_relation[k]:
                    partners = [f.detach() for i, f in enumerate(features) if i != k]
                    losses = [relation(own, partner, process_group=self.process_group) for partner in partners]
                    values[k] = scale * sum(losses[1:], losses[0])
            terms[name] = values
        return terms

    def _own(self, logits: Sequence[Tensor], former: Sequence[Tensor | None], target: Tensor | None) -> PeerTerms:
        """Self-learning: each peer from its former self. Apart from the responses, since its temperature differs."""
        if self.gamma == 0 or not any(self.self_learning):
            return {}
        zero = logits[0].new_zeros((), dtype=torch.float32)
        distil = partial(
            functional.multi_teacher_kd,
            weights=[self.gamma],
            temperature=self.temperature,
            scale_by_t2=self.scale_by_t2,
        )
        pairs = zip(logits, former, strict=True)
        return {"self": [zero if t is None else distil(z, [t], target) for z, t in pairs]}

    def _check_that_all_learn(self) -> None:
        response, relation = self.beta * self.beta2 > 0, self.beta > 0
        for k, (a, b, c) in enumerate(zip(self.mutual_response, self.mutual_relation, self.self_learning, strict=True)):
            if not (self.alpha > 0 or (a and response) or (b and relation) or (c and self.gamma > 0)):
                expected = f"> 0 where nothing else teaches peers[{k}]"
                raise wrong_value(self._name(), "alpha", expected, self.alpha)


def _check_switch(method: str, argument: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise wrong_type(method, argument, "True or False, or one of them per peer", type(value).__name__)
    return value


def _check_self_teachers(method: str, networks: object, count: int) -> list[nn.Module]:
    expected = f"{count} networks, each peer's own frozen self in the peers' order (self_learning is on)"
    if isinstance(networks, (tuple, list)) and len(networks) == 0:
        raise wrong_value(method, "self_teachers", expected, "none")
    teachers = check_networks(method, "self_teachers", networks)
    if len(teachers) != count:
        raise wrong_value(method, "self_teachers", expected, f"{len(teachers)} networks")
    return teachers
