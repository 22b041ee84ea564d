"""How right and how sure each of several networks is on each sample, in plain PyTorch: a loop over the networks."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def group_stats(logits: Sequence[Tensor], target: Tensor) -> tuple[Tensor, ...]:
    """Cross-entropy, correct, rank of the label, confidence, entropy, margin: each [M, B], of M x [B, C]."""
    columns = []
    for own in logits:
        ce = F.cross_entropy(own, target, reduction="none")
        correct = own.argmax(dim=1) == target
        label_rank = (own > own.gather(1, target[:, None])).sum(dim=1)
        log_p = F.log_softmax(own, dim=1)
        p = log_p.exp()
        entropy = -(p * log_p).sum(dim=1)
        first, second = p.topk(2, dim=1).values.unbind(dim=1)
        columns.append((ce, correct, label_rank, first, entropy, first - second))
    return tuple(torch.stack(column) for column in zip(*columns, strict=True))
