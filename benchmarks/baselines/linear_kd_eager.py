"""A student's and a teacher's language-model heads and the divergence of their logits, in plain PyTorch."""

import torch.nn.functional as F
from torch import Tensor


def linear_kd(
    student: Tensor,  # [N, H]
    teacher: Tensor,  # [N, H]
    head: Tensor,  # [V, H]
    teacher_head: Tensor,  # [V, H]
) -> Tensor:
    log_q = F.log_softmax(F.linear(student, head), dim=1)
    return F.kl_div(log_q, F.softmax(F.linear(teacher, teacher_head), dim=1), reduction="batchmean")
