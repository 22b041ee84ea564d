"""Online distillation of peers by their logits.

    DML    each peer learns from every other one      CE + mean_k' KD_T(z_k, sg z_k')
    KDCL   all learn from one ensemble of them        CE + lam * KD_T(z_k, sg ensemble)

KD_T(z, t) = T^2 * mean_b KL(p_T(t) || p_T(z)) as in fastkd.methods.dgkd.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number, check_temperature
from fastkd._core.labels import counted, is_soft
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._peers import Peers, check_peers, per_peer
from fastkd.methods.base import Batch, Phase, Terms
from fastkd.methods.ctsl_mkt import CTSLMKT
from fastkd.ops.shared import accumulate_dtype, check_soft_target, check_target

Ensemble = Literal["naive", "linear", "minlogit"]
ENSEMBLES = get_args(Ensemble)


class DML(CTSLMKT):
    """Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384): CTSL-MKT without relations and self-learning.

        sum_k [ CE(z_k) + mean_k' KD_T(z_k, sg z_k') ]

    The paper updates its peers one after another, each against the others' newest predictions (S); here all take one
    step from the predictions of the same moment (C).

    >>> method = fastkd.methods.DML([torch.nn.Linear(4, 3, bias=False) for _ in range(2)])
    >>> round(method(torch.zeros(8, 4), torch.arange(8) % 3).item(), 4)  # two peers of equal logits: 2 * log 3
    2.1972

    Args:
        peers: M >= 2 networks with the same classes; logits [B, C] or an object with `.logits`.
        temperature: T > 0; 1 (P: the equations have none).
        deploy: which peer `deployable()` gives.
        views: True: the inputs are a tuple of M views of the batch, one per peer (C).

    One phase trains all peers; its parts are "peers.K.ce" and "peers.K.mutual". Errors: as CTSLMKT.
    """

    def __init__(self, peers: Sequence[nn.Module], *, temperature: float = 1.0, deploy: int = 0, views: bool = False):
        temperature = check_temperature(self._name(), temperature)
        super().__init__(
            peers,
            mutual_relation=False,
            self_learning=False,
            temperature=temperature,
            mutual_temperature=temperature,
            deploy=deploy,
            views=views,
        )


class KDCL(Peers):
    """Guo et al., "Online Knowledge Distillation via Collaborative Learning" (CVPR 2020).

        sum_k [ CE(z_k) + lam * KD_T(z_k, sg z_e) ]

    with one ensemble z_e [B, C] of the M peers' logits z_k, per row with label y:

        ensemble="naive"      z_e = the logits of the peer with the smallest cross-entropy on this row
        ensemble="linear"     z_e = sum_k a_k z_k; the weights a, >= 0 and of sum 1, minimise the batch's CE(z_e)
        ensemble="minlogit"   z_e[i] = min_k (z_k[i] - z_k[y]); z_e[y] = 0, and no peer is surer of y than the ensemble

    Each default is marked (P) published, (S) second-hand, (C) our choice. That soft targets are ensembles of the peers'
    predictions and that images are distorted is (P), the loss and the three ensembles are (S). The paper's fourth one,
    weights found on validation images ("general"), is not here.

    >>> method = fastkd.methods.KDCL([torch.nn.Linear(4, 3) for _ in range(2)], ensemble="minlogit")
    >>> parts = method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.randn(8, 4), torch.arange(8) % 3)
    >>> sorted(parts)
    ['peers.0.ce', 'peers.0.kd', 'peers.1.ce', 'peers.1.kd']

    Args:
        peers: M >= 2 networks with the same classes; logits [B, C] or an object with `.logits`.
        ensemble: "naive" | "linear" | "minlogit". "naive" (C).
        temperature: T > 0; 2 (C).
        lam: weight of the divergence, >= 0; a number, or M of them, one per peer. 1 (C).
        deploy: which peer `deployable()` gives.
        views: True: the inputs are a tuple of M differently distorted views of the batch, one per peer (P). False: all
            see the same images (C).
        linear_steps: of the search of `linear_weights`. 20 (C).

    One phase trains all peers; its parts are "peers.K.ce" and "peers.K.kd". Labels are needed. With chunks > 1, and
    under data parallelism, the weights of "linear" are those of each chunk and of each process's rows; the others are
    choices per row, and the same as without. Nothing waits for the device.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch for logits
    of different shapes, missing labels, and views that are not M.
    """

    def __init__(
        self,
        peers: Sequence[nn.Module],
        *,
        ensemble: Ensemble = "naive",
        temperature: float = 2.0,
        lam: float | Sequence[float] = 1.0,
        deploy: int = 0,
        views: bool = False,
        linear_steps: int = 20,
    ):
        name, count = self._name(), len(check_peers(self._name(), peers))
        check_choice(name, "ensemble", ensemble, ENSEMBLES)
        temperature = check_temperature(name, temperature)
        lam = per_peer(name, "lam", lam, count, partial(_check_weight, name))
        linear_steps = check_integer(name, "linear_steps", linear_steps, 0)
        super().__init__(peers, deploy=deploy, views=views)
        self.ensemble, self.temperature, self.lam, self.linear_steps = ensemble, temperature, lam, linear_steps

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the step of all peers that learn."""
        yield Phase(self.running(), self._terms, batch)

    def _terms(self, inputs: Any, target: Any) -> Terms:
        if target is None:
            raise wrong_value(self._name(), "target", "class indices: they choose the ensemble", None)
        views = self.view_of_each(inputs)
        logits = [self.learned_logits(f"peers.{k}", view) for k, view in enumerate(views)]  # each [..., C]
        self.check_classes("peers", logits, logits[0].shape)
        self._check_labels(target, logits[0])
        ensemble = self.ensemble_of(logits, target)  # without a graph
        alone = [[0.0] * len(logits)] * len(logits)  # no peer learns from another one
        losses, terms = functional.mutual_kd(
            logits,
            target,
            weights=alone,
            teachers=[ensemble],
            teacher_weights=[[weight] for weight in self.lam],
            temperature=self.temperature,
            ce_weight=1.0,
            return_terms=True,
        )  # each [M]
        return losses.sum(), self.parts_of({"ce": terms.ce, "kd": terms.kd}), logits[self.deploy]

    def _check_labels(self, target: Tensor, logits: Tensor) -> None:
        if not is_soft(target):
            check_target(self._name(), target, logits, "the peers' logits'")
        elif self.ensemble != "naive":
            expected = f"class indices for ensemble={self.ensemble!r}, which is relative to the label's logit"
            raise wrong_type(self._name(), "target", expected, "probabilities")
        else:
            check_soft_target(self._name(), target, logits, "the peers' logits'")

    @torch.no_grad()
    def ensemble_of(self, logits: Sequence[Tensor], target: Tensor) -> Tensor:
        """z_e [..., C] in the logits' dtype, or float32 where that has fewer bits. Rows of -100 hold anything."""
        if self.ensemble == "naive":
            ce = functional.group_stats(logits, target).ce  # [M, R]
            best = ce.argmin(0).reshape(logits[0].shape[:-1])[..., None]
            chosen = logits[0]
            for k, z in enumerate(logits[1:], 1):
                chosen = torch.where(best == k, z, chosen)
            return chosen
        relative = relative_logits(logits, target)  # [M, ..., C]
        if self.ensemble == "minlogit":
            return relative.amin(0)
        weights = linear_weights(relative.flatten(1, -2), target.reshape(-1), self.linear_steps)
        return mixture(weights, relative)


def relative_logits(logits: Sequence[Tensor], target: Tensor) -> Tensor:
    """z - z[y] of M networks, [M, ..., C], in float32 or the logits' wider dtype: each row's label has 0.

    The softmax, and with it every loss of these logits, is that of z. Rows of -100, and labels out of range, for which
    the losses themselves raise or give NaN, take another class instead.
    """
    dtype = accumulate_dtype(logits[0].dtype)
    labels = target.long().clamp(0, logits[0].shape[-1] - 1)[..., None]  # [..., 1]
    return torch.stack([z.to(dtype) - z.gather(-1, labels).to(dtype) for z in logits])


def mixture(weights: Tensor, relative: Tensor) -> Tensor:
    """sum_k a_k z_k of [M] and [M, ..., C]; a class that is -inf in a network stays so."""
    return (weights.reshape(-1, *[1] * (relative.dim() - 1)) * relative).sum(0)


def linear_weights(relative: Tensor, target: Tensor, steps: int) -> Tensor:
    """Weights a [M] on the simplex that nearly minimise the mean cross-entropy of sum_k a_k z_k: a convex problem.

    20 steps found 95 % and more of what can be gained over equal weights, for up to four networks.

    `steps` exponentiated-gradient steps from equal weights, a <- a * exp(-s * slope) / sum, the slope being
    mean_b sum_c p_c (z_k[c] - z_k[y]). A step that does not lower the loss is not taken, and s divided by 4; after any
    other one s is doubled. s starts at 1 / L, L the bound of the curvature, with which every step lowers it:
    max_k mean_b (range over c of z_k - mean_j z_j)^2 / 4. The same steps on every device, without reading a value.

    Args:
        relative: `relative_logits`, [M, R, C].
        target: [R]; rows of -100 do not count.
    """
    valid = counted(target)[:, None]  # [R, 1]
    least = torch.finfo(relative.dtype).min / 16  # 0 * -inf is NaN
    z = relative.masked_fill(~valid, 0).clamp(min=least)
    share = valid[:, 0].to(z.dtype) / valid.sum().clamp(min=1)  # [R]
    apart = z - z.mean(0)
    bound = ((apart.amax(-1) - apart.amin(-1)).square() * share).sum(-1).amax() / 4
    rate = 1 / bound.clamp(min=1e-3, max=1e6)  # networks that agree have no slope either
    log_a = z.new_full((len(z),), 1 / len(z)).log()
    loss, slope = _loss_and_slope(log_a.exp(), z, share)
    for _ in range(steps):
        trial = (log_a - rate * (slope - slope.mean())).log_softmax(0)
        trial_loss, trial_slope = _loss_and_slope(trial.exp(), z, share)
        lower = trial_loss < loss
        log_a, loss, slope = (
            torch.where(lower, new, old) for new, old in ((trial, log_a), (trial_loss, loss), (trial_slope, slope))
        )
        rate = torch.where(lower, 2 * rate, rate / 4)
    return log_a.exp().clamp(min=torch.finfo(z.dtype).tiny)


def _loss_and_slope(a: Tensor, z: Tensor, share: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of the mixture and its gradient [M]. Sums, not products of matrices: autocast leaves them."""
    mixed = mixture(a, z)  # [R, C]
    log_total = mixed.logsumexp(1)  # the cross-entropy, since the label's logit is 0
    p = (mixed - log_total[:, None]).exp() * share[:, None]
    return (log_total * share).sum(), (p * z).sum((1, 2))


def _check_weight(method: str, argument: str, value: object) -> float:
    return check_number(method, argument, value, "a number >= 0, or one of them per peer", 0)
