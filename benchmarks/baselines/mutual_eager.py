"""Networks that teach each other in plain PyTorch, as deep mutual learning's codes write it: two nested loops.

Zhang et al., "Deep Mutual Learning" (arXiv 1706.00384), equation 8, with a temperature and the factor T^2.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def mutual(
    logits: Sequence[Tensor],  # M x [B, C]
    target: Tensor,  # [B]
    temperature: float,
    ce_weight: float,
) -> Tensor:
    total = 0
    for m, own in enumerate(logits):
        loss = ce_weight * F.cross_entropy(own, target)
        for n, peer in enumerate(logits):
            if n != m:
                log_q = F.log_softmax(own / temperature, dim=1)
                p = F.softmax(peer.detach() / temperature, dim=1)
                divergence = F.kl_div(log_q, p, reduction="batchmean") * temperature * temperature
                loss = loss + divergence / (len(logits) - 1)
        total = total + loss
    return total
