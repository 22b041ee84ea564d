"""Cross-entropies of several networks on the same labels in plain PyTorch: a loop."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def cross_entropy(logits: Sequence[Tensor], target: Tensor) -> Tensor:  # M x [B, C], [B]
    return torch.stack([F.cross_entropy(own, target) for own in logits]).sum()
