"""Which divergence between a teacher p and the student q a loss takes: its names, its checks, its reference.

    forward        KL(p || q)                                     reverse       KL(q || p)
    jsd            beta KL(p || m) + (1 - beta) KL(q || m),       m = beta p + (1 - beta) q
    tvd            sum |p - q| / 2
    skew_forward   KL(p || beta p + (1 - beta) q)                 skew_reverse  KL(q || (1 - beta) p + beta q)

Kernels: csrc/multi_teacher/README.md.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._core.checks import check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import may_read_values
from fastkd.ops._formulas import accumulate_dtype, divergence, exact_divergence

NAMES = ("forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse")
PAIR = ("forward", "reverse")
OF_MIXTURES = ("forward", "reverse", "jsd")  # with combine="probs" and "logits", and between networks that all learn
KINDS = ("forward", "pair", "mixture", "tvd")  # csrc/multi_teacher/op.h
DEFAULT_BETA = {"jsd": 0.5, "skew_forward": 0.1, "skew_reverse": 0.1}


class Divergence(NamedTuple):
    """One of KINDS and its numbers.

    forward: none. pair: the weights of forward and reverse; (0, 0) beside a tensor of them, [2] or [2, R].
    mixture: (b, w_p, w_q), which is w_p KL(p || m) + w_q KL(q || m) with m = b p + (1 - b) q and 0 < b < 1. tvd: none.
    """

    kind: str
    numbers: tuple[float, ...] = ()


FORWARD, REVERSE = Divergence("forward"), Divergence("pair", (0.0, 1.0))


def check_divergence(
    op: str, name: object, beta: object, like: Tensor, combine: str = "losses"
) -> tuple[Divergence, Tensor | None]:
    """What `divergence` and `divergence_beta` say, and the weights of a pair where they differ from row to row."""
    if name == "forward" and beta is None:
        return FORWARD, None
    if isinstance(name, Mapping):
        if beta is not None:
            raise wrong_value(op, "divergence_beta", "None beside weights of forward and reverse", beta)
        return _check_pair(op, name, like)
    if not isinstance(name, str):
        raise wrong_type(op, "divergence", "a name or a dict of weights of forward and reverse", type(name).__name__)
    check_choice(op, "divergence", name, NAMES)
    if combine != "losses" and name not in OF_MIXTURES:
        expected = ", ".join(repr(n) for n in OF_MIXTURES) + f" or weights of the first two for combine={combine!r}"
        raise wrong_value(op, "divergence", expected, repr(name))
    if name not in DEFAULT_BETA:
        if beta is not None:
            raise wrong_value(op, "divergence_beta", f"None for divergence={name!r}", beta)
        return {"forward": FORWARD, "reverse": REVERSE, "tvd": Divergence("tvd")}[name], None
    return _with_beta(op, name, DEFAULT_BETA[name] if beta is None else beta), None


def check_mutual(op: str, name: object, beta: object, like: Tensor) -> Divergence:
    """check_divergence() between networks that all learn."""
    if not isinstance(name, str):
        raise wrong_type(op, "divergence", "a name", type(name).__name__)
    check_choice(op, "divergence", name, OF_MIXTURES)
    return check_divergence(op, name, beta, like)[0]


def _with_beta(op: str, name: str, beta: object) -> Divergence:
    beta = check_number(op, "divergence_beta", beta, "a number in [0, 1]", 0, 1)
    if name == "jsd":
        if beta in (0, 1):  # as in TRL, not the limits of jsd, which are 0
            return REVERSE if beta == 1 else FORWARD
        return Divergence("mixture", (beta, beta, 1 - beta))
    if beta == 1:
        raise wrong_value(op, "divergence_beta", f"below 1 for {name}, which is 0 there", beta)
    if beta == 0:
        return FORWARD if name == "skew_forward" else REVERSE
    return Divergence("mixture", (beta, 1.0, 0.0) if name == "skew_forward" else (1 - beta, 0.0, 1.0))


def _check_pair(op: str, weights: Mapping[str, object], like: Tensor) -> tuple[Divergence, Tensor | None]:
    if len(weights) == 0 or not set(weights) <= set(PAIR):
        expected = 'a dict with weights of "forward" and "reverse"'
        raise wrong_value(op, "divergence", expected, f"keys {[str(k) for k in weights]}")
    values = [_check_share(op, name, weights.get(name, 0.0), like) for name in PAIR]
    numbers = [value for value in values if not isinstance(value, Tensor)]
    if len(numbers) == len(values):
        return Divergence("pair", tuple(numbers)), None
    rows = [torch.as_tensor(v, device=like.device, dtype=accumulate_dtype(like.dtype)) for v in values]
    rows = [v.reshape(-1) if v.dim() else v for v in rows]  # [R], or [] of one for all rows
    return Divergence("pair", (0.0, 0.0)), torch.stack(torch.broadcast_tensors(*rows))


def _check_share(op: str, name: str, value: object, like: Tensor) -> float | Tensor:
    """The weight of forward or reverse: a number, or a tensor [] or [R]."""
    name, leading = f"divergence[{name!r}]", like.shape[:-1]
    if not isinstance(value, Tensor):
        return check_number(op, name, value, f"a finite number, or a tensor of shape {list(leading)}")
    if value.dtype == torch.bool or value.is_complex() or (value.dim() > 0 and value.shape != leading):
        expected = f"a finite number, or a tensor of shape {list(leading)}"
        raise wrong_value(op, name, expected, f"a tensor of {value.dtype} and shape {list(value.shape)}")
    if value.device != like.device and (value.dim() > 0 or value.device.type != "cpu"):
        raise wrong_value(op, name, f"on the student's device {like.device}", f"device {value.device}")
    if may_read_values(value) and not bool(value.isfinite().all()):
        raise wrong_value(op, name, "finite", "a NaN or infinite weight")
    return value


Term = tuple["float | Tensor", Tensor]


def terms(
    log_p: Tensor, log_q: Tensor, which: Divergence, shares: Tensor | None, normalised: bool = True
) -> list[Term]:
    """The divergence [R] of probabilities [R, C], in parts: (its weight, a number or [R] or [1], and the part)."""
    kl = exact_divergence if normalised else divergence
    if which.kind == "forward":
        return [(1.0, kl(log_p, log_q))]
    if which.kind == "tvd":
        return [(1.0, (log_p.exp() - log_q.exp()).abs().sum(-1) / 2)]
    if which.kind == "mixture":
        return [(1.0, _from_mixture(log_p, log_q, *which.numbers))]
    result: list[Term] = []
    for k, share in enumerate(which.numbers if shares is None else shares.to(log_q.dtype).reshape(2, -1)):
        p = log_p
        if isinstance(share, Tensor):  # an infinite divergence must not reach a gradient through a weight of 0
            p = p.masked_fill((share == 0)[:, None], 0)
        elif share == 0:
            continue
        result.append((share, kl(p, log_q) if k == 0 else kl(log_q, p)))
    return result


def _from_mixture(log_p: Tensor, log_q: Tensor, b: float, w_p: float, w_q: float) -> Tensor:
    """w_p KL(p || m) + w_q KL(q || m), m = b p + (1 - b) q: exactly 0 where p = q, finite where both underflow."""
    no_p, no_q = log_p == -math.inf, log_q == -math.inf
    gap = log_p - log_q
    of_p, of_q = gap.masked_fill(no_p, 0), gap.masked_fill(no_q, 0)  # where the other probability is 0: finite below
    total = torch.zeros_like(log_q[:, 0])
    if w_p != 0:
        total = total - w_p * (log_p.exp() * _log_mixture(-of_p, 1 - b)).sum(-1)
    if w_q != 0:
        total = total - w_q * (log_q.exp() * _log_mixture(of_q, b)).sum(-1)
    return total


def _log_mixture(x: Tensor, b: float) -> Tensor:
    """log((1 - b) + b exp(x)), 0 at x = 0: log(m / q) of x = log(p / q)."""
    above = x > 0
    small = torch.expm1(torch.where(above, -x, x))  # the derivative at x = 0 is b, by the second one
    return torch.where(above, x, 0) + torch.log1p(torch.where(above, (1 - b) * small, b * small))


def weighted(
    log_p: Tensor, log_q: Tensor, which: Divergence, shares: Tensor | None, weight: float | Tensor,
    scale: float | Tensor,
) -> Tensor:  # fmt: skip
    """weight * scale * divergence, [R], for a weight that is a number or [R]; no part of it is below 0."""
    total = log_q[:, :0].sum(-1)
    for share, value in terms(log_p, log_q, which, shares):
        factor = share * weight
        if isinstance(factor, Tensor) or factor == 0:
            value = value.masked_fill((factor == 0) & value.isinf(), 0)
        # Below zero is rounding. The gradient is kept, which clamp would drop.
        total = total + (factor * scale) * (value - value.detach().clamp(max=0))
    return total


def unweighted(
    log_p: Tensor, log_q: Tensor, which: Divergence, shares: Tensor | None, normalised: bool = True
) -> Tensor:
    """The divergence [R] from p, which need not sum to 1 unless it is `normalised`: then it may be below 0."""
    total = log_q[:, :0].sum(-1)
    for share, value in terms(log_p, log_q, which, shares, normalised):
        if isinstance(share, Tensor):
            value = value.masked_fill((share == 0) & value.isinf(), 0)
        total = total + share * value
    return total
