"""Statistics of a group of networks: how right, how sure and how far from right each is on each sample.

Per network and row, with p = softmax(z) and the label y (kernels: csrc/group_stats/README.md):

    ce = -log p_y          correct = (argmax z == y)          label_rank = #{c : z_c > z_y}
    confidence = max p     entropy = -sum p log p             margin = max p - second largest p

What follows from them, the order of the networks and the samples that they get most wrong, is in ranking.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _backend
from fastkd._core.checks import check_index
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import why_no_kernels
from fastkd.ops._formulas import accumulate_dtype, count_rows, flat_rows, rows_of
from fastkd.ops._inputs import (
    check_layout,
    check_logits,
    check_mask,
    check_not_probabilities,
    check_range,
    check_soft_target,
    check_target,
    classes_last,
    with_mask,
)

OP = "group_stats"
SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class GroupStats(NamedTuple):
    """Statistics of M networks on R samples, each [M, R], detached; float32, or float64 where a network is.

    ce: cross-entropy with the label (NaN without one). correct: bool, argmax equals the label; of equal logits the
    first is the argmax, as in torch.argmax. label_rank: int64, the number of classes with a strictly larger logit than
    the label's (0 = right, -1 without a label). confidence: the largest probability. entropy: of softmax(logits), in
    nats. margin: largest minus second largest probability. Where the labels were probabilities, ce is the cross-entropy
    with them, and the label their largest class.

    Without a label is a row whose target is ignored, outside the mask, out of range or not given. A row whose softmax
    is NaN (NaN or +inf logits, every class masked) has NaN statistics, is not correct, and its label ranks after all C
    classes.

    >>> logits = [torch.tensor([[2.0, 0.0], [0.0, 1.0]]), torch.tensor([[0.0, 1.0], [0.0, 3.0]])]  # of two networks
    >>> stats = fastkd.functional.group_stats(logits, torch.tensor([0, 1]))
    >>> stats.errors().tolist(), stats.network_order().tolist()
    ([[False, False], [True, False]], [[0, 1], [1, 0]])
    """

    ce: Tensor
    correct: Tensor
    label_rank: Tensor
    confidence: Tensor
    entropy: Tensor
    margin: Tensor

    def labelled(self) -> Tensor:
        """bool [M, R]: the rows that count, which have a label."""
        return self.label_rank >= 0

    def errors(self) -> Tensor:
        """bool [M, R]: the samples that a network gets wrong, of those with a label."""
        return self.labelled() & ~self.correct

    def network_order(self) -> Tensor:
        """int64 [M, R]: each network's place on each sample by cross-entropy, 0 = best; ties by index, NaN last."""
        return self.ce.sort(dim=0, stable=True).indices.argsort(0)


class Labels(NamedTuple):
    """The labels of R rows: classes, or probabilities. Without any, no row has a label."""

    target: Tensor | None  # int64 [R]: classes; beside probabilities, `ignore_index` where a row has no label
    soft: Tensor | None  # [R, C], as rows of rows_of()
    ignore_index: int


# --- public functions -----------------------------------------------------------------------------------------------


def group_stats(
    logits: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    *,
    ignore_index: int = -100,
    mask: Tensor | None = None,
    class_dim: int = -1,
) -> GroupStats:
    """Statistics of M networks on the same samples, in one read of their logits. Never differentiable.

    >>> logits = [torch.tensor([[2.0, 0.0, 1.0]]), torch.tensor([[0.0, 1.0, 1.0]])]
    >>> stats = fastkd.functional.group_stats(logits, torch.tensor([2]))
    >>> stats.label_rank.tolist(), stats.correct.tolist()
    ([[1], [0]], [[False], [False]])

    Args:
        logits: M tensors [..., C] of one shape, or stacked [M, ..., C]; float32, float64, float16 or bfloat16, each its
            own. Leading dimensions are rows, flattened to R. Never converted or concatenated, and copied only where the
            classes do not lie next to each other.
        target: the labels of all networks: class indices [...] of an integer dtype, or probabilities [..., C] of a
            floating dtype. None, or a row equal to `ignore_index`: no label.
        ignore_index: does nothing to probabilities.
        mask: bool [...]: rows where it is False have no label, whatever their target is.
        class_dim: which dimension of one network's logits (and of probabilities) has the classes; 1 for maps
            [B, C, H, W], whose labels are [B, H, W]. Those in channels_last are not copied.

    Returns:
        GroupStats, each [M, R], detached.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row has no
            label (FASTKD_CHECKS=1 makes it raise there too, without compile).
    """
    networks, labels = _check(logits, target, ignore_index, mask, class_dim)
    return statistics(networks, labels.target, labels.ignore_index, labels.soft)


# --- checks ---------------------------------------------------------------------------------------------------------


def _check(
    logits: Tensor | Sequence[Tensor], target: Tensor | None, ignore_index: int, mask: object, class_dim: int
) -> tuple[Sequence[Tensor], Labels]:
    """The networks' rows as rows_of() gives them, and their labels."""
    check_index(OP, "ignore_index", ignore_index)
    networks, class_dim = _check_networks(logits, target, class_dim)
    check_not_probabilities(OP, "logits", networks)
    first, soft = networks[0], None
    mask = check_mask(OP, mask, first.shape[:-1], first.device)
    if isinstance(target, Tensor) and target.is_floating_point():
        soft = classes_last(target, class_dim) if target.dim() == first.dim() else target
        soft = check_soft_target(OP, soft, first, "one network's").detach()
        target = with_mask(None, mask, ignore_index)
    elif target is not None:
        target = with_mask(check_target(OP, target, first, "one network's"), mask, ignore_index)
        check_range(OP, target, first.shape[-1], ignore_index)
    return [rows_of(z) for z in networks], Labels(target, soft, ignore_index)


def _check_networks(
    logits: Tensor | Sequence[Tensor], target: Tensor | None, class_dim: int
) -> tuple[Sequence[Tensor], int]:
    """The networks with their classes last, and where those were."""
    if isinstance(logits, Tensor):
        logits = _unstacked(logits, target)
    elif not isinstance(logits, Sequence) or isinstance(logits, str):
        expected = "a sequence of logits tensors or one stacked tensor"
        raise wrong_type(OP, "logits", expected, type(logits).__name__)
    if len(logits) == 0:
        raise wrong_value(OP, "logits", "of at least one network", "none")
    for m, z in enumerate(logits):
        _check_network(m, z, logits[0])
    class_dim = check_layout(OP, logits[0], class_dim, target is not None, "logits[0]")
    networks = [classes_last(z, class_dim) for z in logits]
    check_logits(OP, "logits[0]", networks[0])
    return networks, class_dim


def _unstacked(logits: Tensor, target: Tensor | None) -> Sequence[Tensor]:
    networks = logits.dim() - 1
    if isinstance(target, Tensor) and networks > 0:
        networks -= target.dim() - (1 if target.is_floating_point() else 0)
    if networks < 1:
        expected = "M networks stacked, [M, ..., C], or a sequence of them (a single network goes into a list)"
        got = "" if target is None else f" for a target of {target.dim()} dimensions"
        raise wrong_value(OP, "logits", expected, f"shape {list(logits.shape)}{got}")
    return logits.unbind(0)


def _check_network(m: int, z: Tensor, first: Tensor) -> None:
    name = f"logits[{m}]"
    if not isinstance(z, Tensor) or not z.is_floating_point():
        check_logits(OP, name, z)  # which raises
    if z.shape != first.shape:
        raise wrong_value(OP, name, f"of logits[0]'s shape {list(first.shape)}", f"shape {list(z.shape)}")
    if z.device != first.device:
        raise wrong_value(OP, name, f"on logits[0]'s device {first.device}", f"device {z.device}")


# --- reference ------------------------------------------------------------------------------------------------------


def reference_stats(
    networks: Sequence[Tensor], target: Tensor | None, ignore_index: int = -100, soft: Tensor | None = None
) -> GroupStats:
    """GroupStats of logits M x [R, C] with labels [R], or soft ones [R, C], or None, in plain PyTorch."""
    soft = None if soft is None else flat_rows(soft)
    columns = [_network_stats(flat_rows(z).detach(), target, ignore_index, soft) for z in networks]
    # Networks of several dtypes: stack wants one.
    return GroupStats(*(torch.stack(_promoted(column)) for column in zip(*columns, strict=True)))


def _network_stats(logits: Tensor, target: Tensor | None, ignore_index: int, soft: Tensor | None) -> tuple[Tensor, ...]:
    classes = logits.shape[-1]
    logits = logits.to(accumulate_dtype(logits.dtype))
    log_p = torch.log_softmax(logits, -1)  # [R, C]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    top = p.topk(2, -1).values  # [R, 2]
    margin = top[:, 0] - top[:, 1]
    broken = entropy.isnan()
    if target is None and soft is None:
        nothing = torch.full_like(entropy, math.nan)
        return nothing, broken & False, torch.full_like(broken, -1, dtype=torch.int64), top[:, 0], entropy, margin
    labelled = torch.ones_like(broken) if target is None else target != ignore_index
    if soft is None:
        assert target is not None
        labelled = labelled & (target >= 0) & (target < classes)
        index = target.where(labelled, 0)[:, None]
        ce = -log_p.gather(1, index)[:, 0]
    else:
        index = soft.argmax(-1, keepdim=True)
        ce = (soft.to(log_p.dtype) * -log_p).masked_fill(soft == 0, 0).sum(-1).masked_fill(broken, math.nan)
    correct = (logits.argmax(-1) == index[:, 0]) & labelled & ~broken
    rank = (logits > logits.gather(1, index)).sum(-1).masked_fill(broken, classes).masked_fill(~labelled, -1)
    return ce.masked_fill(~labelled, math.nan), correct, rank, top[:, 0], entropy, margin


def _promoted(tensors: Sequence[Tensor]) -> list[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


# --- native ---------------------------------------------------------------------------------------------------------

# csrc/group_stats/op.cpp registers group_stats(networks, target, soft, ignore_index) -> ce, correct, label_rank,
# confidence, entropy, margin. `namespace` is fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    """The shapes that the raw operation of `namespace` returns, for torch.compile and torch.export."""

    def fake(
        networks: Sequence[Tensor], target: Tensor | None, soft: Tensor | None, ignore_index: int
    ) -> tuple[Tensor, ...]:
        first, shape = networks[0], (len(networks), count_rows(networks[0]))
        dtype = torch.float64 if any([z.dtype == torch.float64 for z in networks]) else torch.float32
        dtypes = (dtype, torch.bool, torch.int64, dtype, dtype, dtype)
        return tuple([first.new_empty(shape, dtype=d) for d in dtypes])

    torch.library.register_fake(f"{namespace}::group_stats", fake)


def statistics(
    networks: Sequence[Tensor], target: Tensor | None, ignore_index: int, soft: Tensor | None = None
) -> GroupStats:
    """GroupStats of checked logits M x [R, C] and Labels, by the kernels where they can take them."""
    networks = [z.detach() if z.requires_grad else z for z in networks]
    if (reason := why_reference(networks, soft)) is not None:
        _backend.note_fallback(OP, reason, networks[0])
        with forward_ad._set_fwd_grad_enabled(False):  # a detached tensor would keep its tangent
            return reference_stats(networks, target, ignore_index, soft)
    return GroupStats(*_backend.native_ops(networks[0]).group_stats(networks, target, soft, ignore_index))


def why_reference(networks: Sequence[Tensor], soft: Tensor | None = None) -> str | None:
    """Why these logits go to plain PyTorch, or None where the native kernels take them."""
    reason = why_no_kernels(networks[0])
    if reason is not None:
        return reason
    for tensor in networks if soft is None else (*networks, soft):
        if tensor.dtype not in SUPPORTED:
            return f"there are no native kernels for {tensor.dtype}"
    return None


def _why(arguments: dict[str, Any]) -> str | None:
    networks, labels = _check(**arguments)
    return why_reference(networks, labels.soft)


_backend.register(group_stats, OP, _why, register_fakes)
