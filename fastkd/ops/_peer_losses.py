"""The losses of M networks that learn together: what a checked call of mutual_kd holds, and the reference."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.ops import _divergences as divergences
from fastkd.ops import _formulas as formulas
from fastkd.ops import _losses
from fastkd.ops._divergences import Divergence
from fastkd.ops._formulas import Reduction, accumulate_dtype, flat_rows, reduce_rows
from fastkd.ops._teachers import label_losses


class Tensors(NamedTuple):
    """The tensors of a checked call. Networks are rows_of(): [R, C], or [..., C] whose rows do not merge."""

    logits: tuple[Tensor, ...]  # M networks
    teachers: tuple[Tensor, ...] = ()  # N networks
    stacked: Tensor | None = None  # [M, ..., C], where the networks are its parts: what gets the gradient
    target: Tensor | None = None  # int64 [R]
    soft: Tensor | None = None  # probabilities; `target` then only ignores rows
    weights: Tensor | None = None  # [M, M] or [M, M, R] on the device, where they are not known on the host
    teacher_weights: Tensor | None = None  # the same, [M, N] or [M, N, R]
    scalars: Tensor | None = None  # float64 [4] on the CPU: the options' SCALARS, where one of them is a tensor


class Options(NamedTuple):
    """The options of a checked call. A scalar is a 0-d tensor where it requires grad or cannot be read."""

    host_weights: tuple[float, ...]  # M * (M + N) numbers; 0 on the diagonal and where a tensor holds them
    temperature: float | Tensor = 1.0
    kd_weight: float | Tensor = 1.0
    ce_weight: float | Tensor = 0.0
    num_items: float | Tensor = 0.0  # 0: the reduction's own
    cross_entropy: bool = False  # whether rows have one: for the loss, or for the terms
    label_smoothing: float = 0.0
    ignore_index: int = -100
    scale_by_t2: bool = True
    reduction: Reduction = "mean"
    return_terms: bool = False
    divergence: Divergence = divergences.FORWARD


SCALARS = ("temperature", "kd_weight", "ce_weight", "num_items")


def weight_of(tensors: Tensors, options: Options, m: int, n: int) -> float | Tensor:
    """w[m, n], a number or [R] or [1]; n >= M is a teacher."""
    count, total = len(tensors.logits), len(tensors.logits) + len(tensors.teachers)
    tensor, at = (tensors.weights, n) if n < count else (tensors.teacher_weights, n - count)
    return options.host_weights[m * total + n] if tensor is None else tensor[m, at].reshape(-1)


def is_read(tensors: Tensors, options: Options, group: list[int], n: int) -> bool:
    """Whether one of the learners `group` reads network n, as far as the host knows."""
    weights = [weight_of(tensors, options, m, n) for m in group]
    return any([isinstance(w, Tensor) or w != 0 for w in weights])


def block_of(
    tensors: Tensors, options: Options, group: list[int], columns: list[int]
) -> tuple[Tensor | None, list[list[float]]]:
    """w[group, columns]: (None, rows of numbers), or (a tensor [m, n] or [m, n, R], rows of 0)."""
    rows = [[0.0 if m == n else weight_of(tensors, options, m, n) for n in columns] for m in group]
    known = [w for row in rows for w in row if isinstance(w, Tensor)]
    if not known:
        return None, rows  # type: ignore[return-value]  # numbers, all of them
    like = max(known, key=len).to(accumulate_dtype(tensors.logits[group[0]].dtype))  # [1] or [R]
    filled = [[torch.zeros_like(like) + w for w in row] for row in rows]
    block = torch.stack([torch.stack(row) for row in filled]).to(like.dtype)
    return (block if len(like) > 1 else block[..., 0]), [[0.0] * len(columns)] * len(group)


def reference(tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """The specification in plain PyTorch: losses and terms, differentiable in all inputs but peers.

    ([M] or [M, R]; with return_terms [2, M] or [2, M, R], detached).
    """
    dtype, result_dtype = _widest(tensors.logits + tensors.teachers), _widest(tensors.logits)
    if tensors.scalars is not None:
        temperature, kd_weight, ce_weight, num_items = tensors.scalars.unbind(0)  # SCALARS
        options = options._replace(
            temperature=temperature, kd_weight=kd_weight, ce_weight=ce_weight, num_items=num_items
        )
    learners = tensors.logits if tensors.stacked is None else tensors.stacked.unbind(0)
    zs = [flat_rows(z).to(dtype) for z in (*learners, *tensors.teachers)]
    target, items = tensors.target, options.num_items
    valid: Tensor | None = None
    outside: Tensor | None = None
    if target is not None:
        valid = target != options.ignore_index  # [R]
        outside = valid & ((target < 0) | (target >= zs[0].shape[1]))
        # Rows that do not count leave before any arithmetic: what they hold (NaN, say) must not reach a gradient.
        zs = [z.masked_fill(~valid[:, None], 0) for z in zs]

    def reduced(rows: Tensor) -> Tensor:
        if valid is not None and outside is not None:
            rows = rows * torch.ones_like(rows).masked_fill(outside, math.nan)  # NaN in the gradient as well
            rows = rows.masked_fill(~valid, 0)
        divisor = None if items is None or (not isinstance(items, Tensor) and items == 0) else items
        return reduce_rows(rows, valid, options.reduction, (-1,), divisor).to(result_dtype)

    losses, kds, ces = [], [], []
    for m, kd in enumerate(_divergences(zs, tensors, options)):
        ce = _cross_entropy(zs[m], tensors, options) if options.cross_entropy else torch.zeros_like(kd)
        weighted = isinstance(options.ce_weight, Tensor) or options.ce_weight != 0
        losses.append(reduced(options.kd_weight * kd + options.ce_weight * ce if weighted else options.kd_weight * kd))
        if options.return_terms:
            kds.append(reduced(kd.detach()))
            ces.append(reduced(ce.detach()))
    loss = torch.stack(losses)
    terms = torch.stack([torch.stack(kds), torch.stack(ces)]) if options.return_terms else None
    return _losses.with_graphs(loss, losses.__getitem__), terms


def _widest(zs: Sequence[Tensor]) -> torch.dtype:
    dtype = zs[0].dtype
    for z in zs:
        dtype = torch.promote_types(dtype, z.dtype)
    return accumulate_dtype(dtype)


def _divergences(zs: Sequence[Tensor], tensors: Tensors, options: Options) -> list[Tensor]:
    """T^2 * sum_n w[m, n] D(p_n, p_m) of each learner, M x [R]. A weight of 0 reads nothing."""
    count, t = len(tensors.logits), options.temperature
    scale = t**2 if options.scale_by_t2 else 1.0
    weights = [[_as_rows(tensors, options, m, n, zs[0]) for n in range(len(zs))] for m in range(count)]
    unread = [[_is_zero(w) for w in row] for row in weights]  # bool, or bool [R] or [1] of weights on the device
    log_p: dict[int, Tensor] = {}

    def log_softmax(n: int) -> Tensor:
        if n not in log_p:
            pairs = [row[n] for row in unread] + (unread[n] if n < count else [])
            nobody = None if any([p is False for p in pairs]) else _all([p for p in pairs if isinstance(p, Tensor)])
            z = zs[n] if nobody is None else zs[n].masked_fill(nobody[:, None], 0)
            log_p[n] = formulas.log_softmax(z, t)
        return log_p[n]

    def teaches(n: int) -> Tensor:
        if n >= count:
            return log_softmax(n)
        # Constant in the peer, not in a temperature that learns.
        return formulas.log_softmax(zs[n].detach(), t) if isinstance(t, Tensor) else log_softmax(n).detach()

    result = []
    for m in range(count):
        rows = zs[m][:, :0].sum(-1)  # 0 with a gradient of 0
        for n, (weight, nothing) in enumerate(zip(weights[m], unread[m], strict=True)):
            if nothing is True:
                continue
            p, q = teaches(n), log_softmax(m)
            if nothing is not False:
                p, q = (x.masked_fill(nothing[:, None], 0) for x in (p, q))
            rows = rows + divergences.weighted(p, q, options.divergence, None, weight, scale)
        result.append(rows)
    return result


def _as_rows(tensors: Tensors, options: Options, m: int, n: int, like: Tensor) -> float | Tensor:
    weight = 0.0 if m == n else weight_of(tensors, options, m, n)
    return weight.to(like.dtype) if isinstance(weight, Tensor) else weight


def _is_zero(weight: float | Tensor) -> bool | Tensor:
    """bool; a tensor of them for weights on the device, or False where these learn: their derivative reads all."""
    if not isinstance(weight, Tensor):
        return weight == 0
    return False if weight.requires_grad and torch.is_grad_enabled() else weight == 0


def _all(conditions: Sequence[Tensor]) -> Tensor | None:
    result = None
    for condition in conditions:
        result = condition if result is None else result & condition
    return result


def _cross_entropy(z: Tensor, tensors: Tensors, options: Options) -> Tensor:
    soft, labels = tensors.soft, tensors.target
    if soft is None:
        assert labels is not None
        labels = labels.where((labels >= 0) & (labels < z.shape[1]), 0)
    return label_losses(z, labels, soft if soft is None else flat_rows(soft), options.label_smoothing)
