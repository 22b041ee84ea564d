"""What follows from the statistics of a group of networks: their order, and the samples that each gets most wrong.

A few operations of PyTorch on small tensors, on the device and without waiting for it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd._core.checks import LARGEST, check_choice, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import may_read_values
from fastkd.ops.group_stats import GroupStats

By = Literal["ce", "accuracy", "top5"]
BY = get_args(By)
TOP = 5


def network_scores(
    stats: GroupStats, by: By = "ce", process_group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """Mean cross-entropy, accuracy or top-5 accuracy of each network over the samples with a label, float64 [M].

    >>> stats = fastkd.functional.group_stats([torch.eye(4), torch.zeros(4, 4)], torch.arange(4))
    >>> fastkd.functional.network_scores(stats, "accuracy").tolist()  # of equal logits the first is the argmax
    [1.0, 0.25]

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
    check_choice("network_scores", "by", by, BY)
    return _scores(stats, by, process_group)


def rank_networks(
    stats: GroupStats, by: By = "ce", process_group: torch.distributed.ProcessGroup | None = None
) -> Tensor:
    """The order of the networks, best first, by `network_scores`: lowest mean CE, highest accuracy or top-5 accuracy.

    Ties are broken by index, networks that gave NaN come last, samples without a label do not count. `order[:k]` are
    the k best. Nothing waits for the device. For the arguments see `network_scores`.

    >>> stats = fastkd.functional.group_stats([torch.zeros(4, 4), torch.eye(4)], torch.arange(4))
    >>> fastkd.functional.rank_networks(stats).tolist()
    [1, 0]

    Returns:
        int64 [M] on the device of the statistics, the same on every rank of `process_group`.
    """
    _check_stats("rank_networks", stats)
    check_choice("rank_networks", "by", by, BY)
    scores = _scores(stats, by, process_group)
    return (scores if by == "ce" else -scores).sort(stable=True).indices  # NaN sorts last


def _scores(stats: GroupStats, by: By, process_group: torch.distributed.ProcessGroup | None) -> Tensor:
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

    >>> logits = torch.tensor([[3.0, 0.0], [0.0, 2.0], [0.0, 0.0]])  # right, wrong, undecided
    >>> stats = fastkd.functional.group_stats([logits, logits.flip(1)], torch.tensor([0, 0, 0]))
    >>> fastkd.functional.hard_samples(stats, [2, 1], n=3).tolist()  # two of the first network's, one of the second's
    [1, 2, 0]

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
        raise wrong_type(op, "n", "an integer", type(n).__name__)
    if n < 0:
        raise wrong_value(op, "n", "at least 0", n)
    networks, rows = stats.ce.shape
    proportions = _check_proportions(op, proportions, networks, stats.ce.device)
    if n > 0 and rows == 0:
        raise wrong_value(op, "n", "0 where there are no samples", n)
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


# --- checks ---------------------------------------------------------------------------------------------------------


def _check_stats(op: str, stats: object) -> None:
    if not isinstance(stats, GroupStats):
        raise wrong_type(op, "stats", "the GroupStats that group_stats returns", type(stats).__name__)


def _check_proportions(op: str, proportions: object, networks: int, device: torch.device) -> Tensor:
    """float64 [M] on the device."""
    expected = f"{networks} numbers, one per network"
    if isinstance(proportions, Tensor):
        if proportions.dtype == torch.bool or proportions.is_complex():
            raise wrong_type(op, "proportions", "real numbers", f"dtype {proportions.dtype}")
        if list(proportions.shape) != [networks]:
            raise wrong_value(op, "proportions", f"of shape [{networks}]", f"shape {list(proportions.shape)}")
        if may_read_values(proportions):
            _check_shares(op, proportions.tolist())
        if proportions.device != device and proportions.device.type != "cpu":
            raise wrong_value(op, "proportions", f"on the device {device}", f"device {proportions.device}")
        return proportions.detach().to(device, torch.float64, non_blocking=True)
    if not isinstance(proportions, Sequence) or isinstance(proportions, str):
        raise wrong_type(op, "proportions", "a sequence of numbers or a tensor", type(proportions).__name__)
    if len(proportions) != networks:
        raise wrong_value(op, "proportions", expected, f"{len(proportions)} numbers")
    values = [check_number(op, "proportions", p, "finite numbers") for p in proportions]
    _check_shares(op, values)
    # Filled on the device: a copy from the host would be wrong in a replayed CUDA graph, and may wait.
    return torch.stack([torch.full((), p, dtype=torch.float64, device=device) for p in values])


def _check_shares(op: str, values: Sequence[float]) -> None:
    if not all([0 <= p <= LARGEST for p in values]):
        raise wrong_value(op, "proportions", "finite and at least 0", values)
    if not any([p > 0 for p in values]):
        raise wrong_value(op, "proportions", "larger than 0 for one network at least", values)
