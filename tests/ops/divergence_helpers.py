"""The divergences as TRL, DistiLLM and torchtune write them, typed again: rows [R] of log-probabilities [R, C]."""

import math

import torch
import torch.nn.functional as torch_functional

CASES = {
    "forward": dict(divergence="forward"),
    "reverse": dict(divergence="reverse"),
    "jsd": dict(divergence="jsd"),
    "jsd 0.1": dict(divergence="jsd", divergence_beta=0.1),
    "jsd 0.9": dict(divergence="jsd", divergence_beta=0.9),
    "jsd 0": dict(divergence="jsd", divergence_beta=0.0),
    "jsd 1": dict(divergence="jsd", divergence_beta=1.0),
    "tvd": dict(divergence="tvd"),
    "skew_forward": dict(divergence="skew_forward"),
    "skew_forward 0.7": dict(divergence="skew_forward", divergence_beta=0.7),
    "skew_reverse": dict(divergence="skew_reverse"),
    "skew_reverse 0.7": dict(divergence="skew_reverse", divergence_beta=0.7),
    "both": dict(divergence={"forward": 0.3, "reverse": 0.9}),
}
OF_MIXTURES = [name for name in CASES if "skew" not in name and name != "tvd"]


def kl(log_p, log_q):
    return torch_functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(-1)


def trl(log_p, log_q, beta):
    """trl.GKDTrainer.generalized_jsd_loss, a row."""
    if beta == 0:
        return kl(log_p, log_q)
    if beta == 1:
        return kl(log_q, log_p)
    mixture = torch.logsumexp(torch.stack([log_q + math.log1p(-beta), log_p + math.log(beta)]), 0)
    return beta * kl(log_p, mixture) + (1 - beta) * kl(log_q, mixture)


def distillm(name, log_p, log_q, lam):
    """distillm/losses.py: cross-entropies with a mixture; those of p lack the teacher's entropy."""
    p, q = log_p.exp(), log_q.exp()
    if name == "skew_forward":
        return -(p * (lam * p + (1 - lam) * q).log()).sum(-1)
    if name == "skew_reverse":
        mixed = ((1 - lam) * p + lam * q).log()
        return -((q * mixed).sum(-1) - (q * log_q).sum(-1))
    if name == "tvd":
        return 0.5 * (q - p).abs().sum(-1)
    mixed = ((1 - lam) * p + lam * q).log()  # js_distance: lam is the student's weight
    of_student, of_teacher = (q * mixed - q * log_q).sum(-1), (p * mixed - p * log_p).sum(-1)
    return -lam * of_student - (1 - lam) * of_teacher


def torchtune(log_p, log_q, ratio):
    """SymmetricKLLoss: ratio times forward, as a cross-entropy, and the rest times reverse."""
    p, q = log_p.exp(), log_q.exp()
    return ratio * -(p * log_q).sum(-1) + (1 - ratio) * -((q * log_p).sum(-1) - (q * log_q).sum(-1))


def plain(log_p, log_q, divergence="forward", divergence_beta=None):
    """By definition, the mixture's logarithm by logaddexp."""
    if isinstance(divergence, dict):
        return divergence["forward"] * kl(log_p, log_q) + divergence["reverse"] * kl(log_q, log_p)
    beta = divergence_beta if divergence_beta is not None else 0.5 if divergence == "jsd" else 0.1
    if divergence == "tvd":
        return (log_p.exp() - log_q.exp()).abs().sum(-1) / 2
    if divergence in ("forward", "reverse", "jsd"):
        return trl(log_p, log_q, {"forward": 0, "reverse": 1}.get(divergence, beta))
    one, other = (log_p, log_q) if divergence == "skew_forward" else (log_q, log_p)
    return kl(one, torch.logaddexp(one + math.log(beta), other + math.log1p(-beta)))


def exact(student, teachers, *, temperature=1.0, weights=None, **which):
    """sum_k w_k T^2 D(p_k, q), [R], and its gradient's rows, in float64."""
    z = student.detach().double().requires_grad_()
    total = 0
    for k, teacher in enumerate(teachers):
        log_p, log_q = (torch.log_softmax(x / temperature, -1) for x in (teacher.double(), z))
        total = total + (1 / len(teachers) if weights is None else weights[k]) * temperature**2 * plain(
            log_p, log_q, **which
        )
    (gradient,) = torch.autograd.grad(total.sum(), z)
    return total.detach(), gradient
