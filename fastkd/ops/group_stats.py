"""Statistics of a group of networks: how right, how sure and how far from right each is on each sample; their ranking.

Per network and row, with p = softmax(z) and the label y (kernels: csrc/group_stats/README.md):

    ce = -log p_y          correct = (argmax z == y)          label_rank = #{c : z_c > z_y}
    confidence = max p     entropy = -sum p log p             margin = max p - second largest p

From them, on the device and without waiting for it: the order of the networks, and the samples that each gets most
wrong.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastkd import _backend
from fastkd.ops import _common as common

OP = "group_stats"
BY = ("ce", "accuracy", "top5")
TOP = 5
SUPPORTED = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


class GroupStats(NamedTuple):
    """Statistics of M networks on R samples, each [M, R], detached; float32, or float64 for float64 logits.

    ce: cross-entropy with the label (NaN without one). correct: bool, argmax equals the label; of equal logits the
    first is the argmax, as in torch.argmax. label_rank: int64, the number of classes with a strictly larger logit than
    the label's (0 = right, -1 without a label). confidence: the largest probability. entropy: of softmax(logits), in
    nats. margin: largest minus second largest probability.

    Without a label is a row whose target is ignored, out of range or not given. A row whose softmax is NaN (NaN or +inf
    logits, every class masked) has NaN statistics, is not correct, and its label ranks after all C classes.
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


# --- reference ------------------------------------------------------------------------------------------------------


def reference_stats(networks: Sequence[Tensor], target: Tensor | None, ignore_index: int = -100) -> GroupStats:
    """GroupStats of logits M x [R, C] and labels [R] (or None), in plain PyTorch."""
    columns = [_network_stats(z.detach(), target, ignore_index) for z in networks]
    # Networks of several dtypes: stack wants one.
    return GroupStats(*(torch.stack(_promoted(column)) for column in zip(*columns, strict=True)))


def _network_stats(logits: Tensor, target: Tensor | None, ignore_index: int) -> tuple[Tensor, ...]:
    classes = logits.shape[-1]
    logits = logits.to(common.accumulate_dtype(logits.dtype))
    log_p = torch.log_softmax(logits, -1)  # [R, C]
    p = log_p.exp()
    entropy = -(p * log_p.masked_fill(log_p == -math.inf, 0)).sum(-1)
    top = p.topk(min(2, classes), -1).values  # [R, 2]
    margin = top[:, 0] - top[:, 1] if classes > 1 else top[:, 0]
    broken = entropy.isnan()
    if target is None:
        nothing = torch.full_like(entropy, math.nan)
        return nothing, broken & False, torch.full_like(broken, -1, dtype=torch.int64), top[:, 0], entropy, margin
    labelled = (target != ignore_index) & (target >= 0) & (target < classes)
    index = target.where(labelled, 0)[:, None]
    ce = (-log_p.gather(1, index)[:, 0]).masked_fill(~labelled, math.nan)
    correct = (logits.argmax(-1) == index[:, 0]) & labelled & ~broken
    rank = (logits > logits.gather(1, index)).sum(-1).masked_fill(broken, classes).masked_fill(~labelled, -1)
    return ce, correct, rank, top[:, 0], entropy, margin


def _promoted(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    dtype = tensors[0].dtype
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return [tensor.to(dtype) for tensor in tensors]


# --- native ---------------------------------------------------------------------------------------------------------

# csrc/group_stats/op.cpp registers group_stats(networks, target, ignore_index) -> ce, correct, label_rank, confidence,
# entropy, margin, in torch.ops.<namespace>: fastkd, or the test build that runs the CUDA kernels on the host.


def register_fakes(namespace: str) -> None:
    def fake(networks, target, ignore_index):
        first, shape = networks[0], (len(networks), networks[0].shape[0])
        dtype = common.accumulate_dtype(first.dtype)
        dtypes = (dtype, torch.bool, torch.int64, dtype, dtype, dtype)
        return tuple([first.new_empty(shape, dtype=d) for d in dtypes])

    torch.library.register_fake(f"{namespace}::group_stats", fake)


def statistics(networks: Sequence[Tensor], target: Tensor | None, ignore_index: int) -> GroupStats:
    """GroupStats of checked logits M x [R, C] and labels int64 [R], by the kernels where they can take them."""
    networks = [z.detach() if z.requires_grad else z for z in networks]
    if (reason := why_reference(networks)) is not None:
        _backend.note_fallback(OP, reason, networks[0])
        with forward_ad._set_fwd_grad_enabled(False):  # a detached tensor would keep its tangent
            return reference_stats(networks, target, ignore_index)
    return GroupStats(*_backend.native_ops(networks[0]).group_stats(networks, target, ignore_index))


def why_reference(networks: Sequence[Tensor]) -> str | None:
    """Why these logits go to plain PyTorch, or None where the native kernels take them."""
    reason = _backend.why_not_native(networks[0])
    if reason is not None:
        return reason
    if common.is_transformed():
        return "a torch.func transform or forward-mode AD is active"
    if any([z.dtype != networks[0].dtype for z in networks]):
        return "the networks' dtypes differ"
    if networks[0].dtype not in SUPPORTED:
        return f"there are no native kernels for {networks[0].dtype}"
    return None


# --- public functions -----------------------------------------------------------------------------------------------


def group_stats(
    logits: Tensor | Sequence[Tensor], target: Tensor | None = None, *, ignore_index: int = -100
) -> GroupStats:
    """Statistics of M networks on the same samples, in one read of their logits. Never differentiable.

    Args:
        logits: M tensors [..., C] of one shape, or stacked [M, ..., C]; float32, float64, float16 or bfloat16. Leading
            dimensions are rows, flattened to R. Never copied or concatenated.
        target: class indices [...], an integer dtype, the same for all networks; None, or a row equal to
            `ignore_index`: no label.

    Returns:
        GroupStats, each [M, R], detached.

    Raises:
        ValueError, TypeError: one sentence with argument, what was expected, what came. A target out of range raises
            on the CPU; on a GPU, where reading it would wait for the device, and under torch.compile, its row has no
            label (FASTKD_CHECKS=1 makes it raise there too, without compile).
    """
    networks, target = _check(logits, target, ignore_index)
    return statistics(networks, target, ignore_index)


def network_scores(stats: GroupStats, by: str = "ce", process_group=None) -> Tensor:
    """Mean cross-entropy, accuracy or top-5 accuracy of each network over the samples with a label, float64 [M].

    Args:
        stats: of M networks.
        by: "ce" | "accuracy" | "top5".
        process_group: a torch.distributed group: over the samples of all its ranks, which may have different numbers
            of them (sums and counts are all-reduced). Every rank of it must call.

    Returns:
        float64 [M] on the device of the statistics. NaN for a network that gave NaN on a sample that counts, whatever
        `by`, and for all where no sample counts.
    """
    _check_stats("network_scores", stats)
    common.check_choice("network_scores", "by", by, BY)
    return _scores(stats, by, process_group)


def rank_networks(stats: GroupStats, by: str = "ce", process_group=None) -> Tensor:
    """The order of the networks, best first, by `network_scores`: lowest mean CE, highest accuracy or top-5 accuracy.

    Ties are broken by index, networks that gave NaN come last, samples without a label do not count. `order[:k]` are
    the k best. Nothing waits for the device. For the arguments see `network_scores`.

    Returns:
        int64 [M] on the device of the statistics, the same on every rank of `process_group`.
    """
    _check_stats("rank_networks", stats)
    common.check_choice("rank_networks", "by", by, BY)
    scores = _scores(stats, by, process_group)
    return (scores if by == "ce" else -scores).sort(stable=True).indices  # NaN sorts last


def _scores(stats: GroupStats, by: str, process_group) -> Tensor:
    counted = stats.labelled()
    value = stats.ce if by == "ce" else stats.correct if by == "accuracy" else stats.label_rank < TOP
    value = value.double().masked_fill(stats.ce.isnan(), math.nan).masked_fill(~counted, 0)
    # One sum of 2M rows: torch splits a row of its own among threads, and then their number changes the last bits.
    totals = torch.stack([value, counted.double()]).sum(-1)  # [2, M]
    if process_group is not None:
        torch.distributed.all_reduce(totals, group=process_group)
    return totals[0] / totals[1]


def hard_samples(stats: GroupStats, proportions: Tensor | Sequence[float], n: int) -> Tensor:
    """Indices of the n samples that the networks get most wrong, each network contributing its proportion.

    Network m contributes n * proportions[m] / sum(proportions) samples, rounded so that the counts sum to n (largest
    remainder, ties by index): its highest cross-entropies, highest first, equal ones by index. The networks' parts
    follow each other in their order; a sample hard for two networks appears twice. Samples without a label or with a
    NaN cross-entropy are left out: where a network's part is larger than what is left, it starts again with its
    hardest sample. A network left without any takes those that gave NaN, or else those without a label, by index.

    Args:
        stats: of M networks on R >= 1 samples.
        proportions: [M], numbers or a tensor, at least 0 and finite, not all 0; need not sum to 1. A tensor on a GPU is
            not read by the host: there a negative or NaN proportion counts as 0, and M zeros as equal proportions.
        n: how many.

    Returns:
        int64 [n] on the device of the statistics: indices of rows, in [0, R). Nothing waits for the device.
    """
    op = "hard_samples"
    _check_stats(op, stats)
    if isinstance(n, bool) or not isinstance(n, int):
        raise common.wrong_type(op, "n", "an integer", type(n).__name__)
    if n < 0:
        raise common.wrong_value(op, "n", "at least 0", n)
    networks, rows = stats.ce.shape
    proportions = _check_proportions(op, proportions, networks, stats.ce.device)
    if n > 0 and rows == 0:
        raise common.wrong_value(op, "n", "0 where there are no samples", n)
    ends = _largest_remainder(proportions, n).cumsum(0)  # [M]
    slot = torch.arange(n, device=stats.ce.device)
    before = slot[:, None] >= ends  # [n, M]: the networks whose part ends before the slot
    network = before.sum(1)
    position = slot - (ends * before).amax(1)  # within the network's part
    order, available = _hardest(stats)
    return order[network, position % available[network]]


def _largest_remainder(proportions: Tensor, n: int) -> Tensor:
    """int64 [M] that sums to n, nearest to n * proportions / sum(proportions)."""
    weight = proportions.double().nan_to_num(nan=0, posinf=0).clamp(min=0)
    top = weight.amax()
    # By a power of two, which rounds nothing: the sum of large ones would be infinite.
    weight = torch.ldexp(weight, -torch.frexp(top).exponent.clamp(-1000, 1000)).where(top > 0, 1)
    total = weight.sum()
    # fmod is exact where a quotient would be rounded, so that equal remainders are a tie.
    remainder = torch.fmod(weight * n, total)
    counts = ((weight * n - remainder) / total).round()
    place = (-remainder).sort(stable=True).indices.argsort()  # 0 = largest remainder
    return (counts + (place < n - counts.sum())).long()


def _hardest(stats: GroupStats) -> tuple[Tensor, Tensor]:
    """Each network's samples by falling cross-entropy [M, R], and how many to take before starting again [M]."""
    labelled, usable = stats.labelled(), ~stats.ce.isnan()
    lowest = torch.finfo(stats.ce.dtype).min
    key = stats.ce.masked_fill(~usable, lowest).masked_fill(~labelled, -math.inf)
    order = key.sort(dim=1, descending=True, stable=True).indices
    available = order.new_full(order.shape[:1], order.shape[1])
    for kept in (labelled.sum(1), (labelled & usable).sum(1)):
        available = kept.where(kept > 0, available)
    return order, available


# --- checks -----------------------------------------------------------------------------------------------------------


def _check(logits: object, target: object, ignore_index: object) -> tuple[Sequence[Tensor], Tensor | None]:
    """The networks' rows M x [R, C] and the target int64 [R]."""
    networks = _check_networks(logits, target)
    common.check_not_probabilities(OP, "logits", networks)
    common.check_index(OP, "ignore_index", ignore_index)
    if target is not None:
        target = common.check_target(OP, target, networks[0], "one network's")
        common.check_range(OP, target, networks[0].shape[-1], ignore_index)
    return [common.flat_rows(z) for z in networks], target


def _check_networks(logits: object, target: object) -> Sequence[Tensor]:
    if isinstance(logits, Tensor):
        if logits.dim() < 2 or (isinstance(target, Tensor) and target.dim() == logits.dim() - 1):
            expected = "M networks stacked, [M, ..., C], or a sequence of them (a single network goes into a list)"
            got = "" if target is None else f" for a target of {target.dim()} dimensions"
            raise common.wrong_value(OP, "logits", expected, f"shape {list(logits.shape)}{got}")
        logits = logits.unbind(0)
    elif not isinstance(logits, Sequence) or isinstance(logits, str):
        expected = "a sequence of logits tensors or one stacked tensor"
        raise common.wrong_type(OP, "logits", expected, type(logits).__name__)
    if len(logits) == 0:
        raise common.wrong_value(OP, "logits", "of at least one network", "none")
    first = common.check_logits(OP, "logits[0]", logits[0])
    shape, device = first.shape, first.device
    for m, z in enumerate(logits):
        common.check_logits(OP, f"logits[{m}]", z)
        if z.shape != shape:
            raise common.wrong_value(
                OP, f"logits[{m}]", f"of logits[0]'s shape {list(shape)}", f"shape {list(z.shape)}"
            )
        if z.device != device:
            raise common.wrong_value(OP, f"logits[{m}]", f"on logits[0]'s device {device}", f"device {z.device}")
    return logits


def _check_stats(op: str, stats: object) -> None:
    if not isinstance(stats, GroupStats):
        raise common.wrong_type(op, "stats", "the GroupStats that group_stats returns", type(stats).__name__)


def _check_proportions(op: str, proportions: object, networks: int, device: torch.device) -> Tensor:
    """float64 [M] on the device."""
    expected = f"{networks} numbers, one per network"
    if isinstance(proportions, Tensor):
        if proportions.dtype == torch.bool or proportions.is_complex():
            raise common.wrong_type(op, "proportions", "real numbers", f"dtype {proportions.dtype}")
        if list(proportions.shape) != [networks]:
            raise common.wrong_value(op, "proportions", f"of shape [{networks}]", f"shape {list(proportions.shape)}")
        if common.may_read_values(proportions):
            _check_shares(op, proportions.tolist())
        if proportions.device != device and proportions.device.type != "cpu":
            raise common.wrong_value(op, "proportions", f"on the device {device}", f"device {proportions.device}")
        return proportions.detach().to(device, torch.float64, non_blocking=True)
    if not isinstance(proportions, Sequence) or isinstance(proportions, str):
        raise common.wrong_type(op, "proportions", "a sequence of numbers or a tensor", type(proportions).__name__)
    if len(proportions) != networks:
        raise common.wrong_value(op, "proportions", expected, f"{len(proportions)} numbers")
    values = [common.check_number(op, "proportions", p, "finite numbers") for p in proportions]
    _check_shares(op, values)
    # Filled on the device: a copy from the host would be wrong in a replayed CUDA graph, and may wait.
    return torch.stack([torch.full((), p, dtype=torch.float64, device=device) for p in values])


def _check_shares(op: str, values: Sequence[float]) -> None:
    if not all([0 <= p <= common.LARGEST for p in values]):
        raise common.wrong_value(op, "proportions", "finite and at least 0", values)
    if not any([p > 0 for p in values]):
        raise common.wrong_value(op, "proportions", "larger than 0 for one network at least", values)


_backend.register(group_stats, OP, lambda arguments: why_reference(_check(**arguments)[0]), register_fakes)
