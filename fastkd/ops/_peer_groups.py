"""Networks of several dtypes, and more of them than one launch takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _losses
from fastkd.ops import _peer_kernels as kernels
from fastkd.ops._formulas import rows_of
from fastkd.ops._peer_losses import Options, Tensors, block_of, is_read

# The most that one CUDA launch takes (csrc/mutual/op.h); more networks go in groups.
LAUNCH_LEARNERS, LAUNCH_NETWORKS = 16, 32


def losses(op: str, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """As reference(): the losses and their terms, from one launch, or from several where one does not take all."""
    first = tensors.logits[0]
    if any([z.dtype != first.dtype for z in tensors.logits]) or _exceeds_a_launch(tensors):
        return _of_groups(op, tensors, options)
    return kernels.run(op, tensors, options)


def _exceeds_a_launch(tensors: Tensors) -> bool:
    m, total = len(tensors.logits), len(tensors.logits) + len(tensors.teachers)
    return (m > LAUNCH_LEARNERS or total > LAUNCH_NETWORKS) and _backend.device_kind(tensors.logits[0]) != "cpu"


def _of_groups(op: str, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """Learners of one dtype, and no more than a launch takes, learn together; the others are teachers to them."""
    if tensors.stacked is not None:
        rows = [rows_of(z) for z in tensors.stacked.unbind(0)]
        tensors = tensors._replace(logits=tuple(rows), stacked=None)
    limited = _backend.device_kind(tensors.logits[0]) != "cpu"
    by_dtype: dict[torch.dtype, list[int]] = {}
    for m, z in enumerate(tensors.logits):
        by_dtype.setdefault(z.dtype, []).append(m)
    size = LAUNCH_LEARNERS if limited else len(tensors.logits)
    groups = [group[k : k + size] for group in by_dtype.values() for k in range(0, len(group), size)]
    results = [_of_group(op, tensors, options, group, limited) for group in groups]
    places = {m: (g, k) for g, group in enumerate(groups) for k, m in enumerate(group)}
    order = [list(places).index(m) for m in range(len(tensors.logits))]
    loss = torch.cat([loss for loss, _ in results])[order]
    parts = [terms for _, terms in results if terms is not None]
    terms = torch.cat(parts, 1)[:, order] if parts else None
    return _losses.with_graphs(loss, lambda m: results[places[m][0]][0][places[m][1]]), terms


def _of_group(
    op: str, tensors: Tensors, options: Options, group: list[int], limited: bool
) -> tuple[Tensor, Tensor | None]:
    """More teachers than a launch takes: their terms add up; the group's own and its labels go with the first."""
    networks = (*tensors.logits, *tensors.teachers)
    others = [n for n in range(len(networks)) if n not in group and is_read(tensors, options, group, n)]
    size = LAUNCH_NETWORKS - len(group) if limited else max(1, len(others))
    results = []
    for k in range(0, max(1, len(others)), size):
        chunk = others[k : k + size]
        weights, own = block_of(tensors, options, group, group) if k == 0 else (None, [[0.0] * len(group)] * len(group))
        teacher_weights, frozen = block_of(tensors, options, group, chunk)
        part = tensors._replace(
            logits=tuple([networks[m] for m in group]), teachers=tuple([networks[n].detach() for n in chunk]),
            weights=weights, teacher_weights=teacher_weights,
        )  # fmt: skip
        numbers = tuple([w for rows in zip(own, frozen, strict=True) for row in rows for w in row])
        chosen = options._replace(host_weights=numbers, cross_entropy=options.cross_entropy and k == 0)
        results.append(losses(op, part, chosen))
    if len(results) == 1:
        return results[0]
    terms = [terms for _, terms in results if terms is not None]
    loss = _losses.with_graphs(
        _total([loss for loss, _ in results]), lambda m: _total([loss[m] for loss, _ in results])
    )
    return loss, _total(terms) if terms else None


def _total(tensors: Sequence[Tensor]) -> Tensor:
    total = tensors[0]
    for tensor in tensors[1:]:
        total = total + tensor
    return total
