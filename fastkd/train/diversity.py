"""How alike the networks of a run are on images that none of them is trained on.

Of two networks with probabilities p_i, p_j [N, C] of the same N images (the papers' own protocols are not known, but
for the common errors; these are ours):

    distance      mean over the images of |p_i - p_j|, the Euclidean one: 0 .. sqrt(2)
    common        the share of network i's errors that network j makes, too (DGKD, Fig. 4): wrong at once, not the same
    homogeneity   Pearson's correlation over the images of what the two give the label: 1 where they are right, wrong,
                  sure and unsure on the same images
    collapse      1 - (H(mean p) - mean H(p)) / log C of one network: 1 where it says the same of every image
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from itertools import combinations, permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastkd._core.modes import eval_mode
from fastkd.functional import group_stats
from fastkd.methods import Method
from fastkd.models import Branched, call_network, logits_of
from fastkd.train.devices import batch_on
from fastkd.train.distributed import ALONE, World
from fastkd.train.metrics import Row

PREFIX = "diversity_"
MEAN_TEACHER = "mean_teacher"  # what the networks are called that are averages of others


class Diversity(NamedTuple):
    """The measures of M networks, float64 on the CPU; NaN where one is not defined, as common errors of none.

    names: M of them. distance, homogeneity: [M, M], symmetric. common: [M, M], of the row's errors those that the
    column makes. collapse: [M].
    """

    names: tuple[str, ...]
    distance: Tensor
    common: Tensor
    homogeneity: Tensor
    collapse: Tensor

    def row(self) -> Row:
        """The columns of metrics.csv: diversity_distance.A.B once a pair, diversity_common.A.B both ways, ..."""
        row = {f"{PREFIX}collapse.{name}": self.collapse[i].item() for i, name in enumerate(self.names)}
        for (i, a), (j, b) in combinations(enumerate(self.names), 2):
            row[f"{PREFIX}distance.{a}.{b}"] = self.distance[i, j].item()
            row[f"{PREFIX}homogeneity.{a}.{b}"] = self.homogeneity[i, j].item()
        for (i, a), (j, b) in permutations(enumerate(self.names), 2):
            row[f"{PREFIX}common.{a}.{b}"] = self.common[i, j].item()
        return row


def networks_of(
    method: Method, first: str, others: Mapping[str, nn.Module], guides: Mapping[str, nn.Module]
) -> dict[str, nn.Module]:
    """Every network of a method that says something of an image alone, by name.

    first: name of the wanted network. others, guides: those that learn with it, and the frozen ones.
    """
    student, teacher = (getattr(method, name, None) for name in ("student", "teacher"))
    if isinstance(student, Branched):
        found: dict[str, nn.Module] = {f"peer{i}": student.peer(i - 1) for i in range(1, len(student.peers) + 1)}
        if isinstance(teacher, Branched):
            found |= {f"{MEAN_TEACHER}{i}": teacher.peer(i - 1) for i in range(1, len(teacher.peers) + 1)}
        return found
    if teacher is not None and method.deployable() is teacher:
        return {first: method.get_submodule("student"), MEAN_TEACHER: teacher}
    return {first: method.deployable(), **others, **guides}


@torch.no_grad()
def measure(
    networks: Mapping[str, nn.Module],
    batches: Iterable[Any],
    device: torch.device,
    classes: int | None = None,
    world: World = ALONE,
) -> Diversity:
    """The measures on these images, in eval mode; modes are restored. The device is waited for once, at the end.

    With several processes each has its own part of the batches, and all get the result.
    """
    sums: list[Tensor] = []
    with eval_mode(*networks.values()):
        for batch in batches:
            inputs, target = batch_on(batch, device, classes)
            logits = torch.stack([logits_of(call_network(n, inputs)).float() for n in networks.values()])
            parts = _sums(logits, target)
            sums = parts if not sums else [total + part for total, part in zip(sums, parts, strict=True)]
    flat = world.sum(torch.cat([each.flatten() for each in sums])).cpu().split([each.numel() for each in sums])
    return _measures(tuple(networks), *(v.view(each.shape) for v, each in zip(flat, sums, strict=True)))


def _sums(logits: Tensor, target: Tensor) -> list[Tensor]:
    """What adds up over the images of logits [M, B, C] with labels [B], in float64; images without a label are out."""
    stats = group_stats(logits, target)
    counted = stats.labelled()[0].double()  # [B]
    p = logits.double().softmax(-1) * counted[:, None]  # [M, B, C]
    errors = stats.errors().double()  # [M, B]
    label = stats.ce.double().neg().exp().nan_to_num(0.0)  # [M, B], the label's probability
    apart = torch.stack([(p - other).norm(dim=-1).sum(1) for other in p])  # [M, M]
    entropy = (stats.entropy.double() * counted).sum(1)
    return [counted.sum(), apart, errors @ errors.T, label.sum(1), label @ label.T, p.sum(1), entropy]


def _measures(
    names: tuple[str, ...],
    count: Tensor,
    apart: Tensor,  # [M, M]
    both: Tensor,  # [M, M], errors
    label: Tensor,  # [M]
    products: Tensor,  # [M, M]
    p: Tensor,  # [M, C]
    entropy: Tensor,  # [M]
) -> Diversity:
    label, p = label / count, p / count
    covariance = products / count - label.outer(label)
    deviation = covariance.diagonal().clamp(min=0).sqrt()
    # Rounding leaves about 1e-16 of networks that say the same of every image.
    spread = torch.where(deviation > 1e-7, deviation, math.nan)
    told = torch.special.entr(p).sum(1) - entropy / count
    return Diversity(
        names,
        apart / count,
        both / both.diagonal()[:, None],
        covariance / spread.outer(spread),
        1 - told / math.log(p.shape[1]),
    )
