"""flash-linear-attention's divergence of two linear heads: https://github.com/fla-org/flash-linear-attention"""

from __future__ import annotations

from torch import Tensor

DISTRIBUTION, MODULE, NEEDS_GPU = "flash-linear-attention", "fla.modules.fused_kl_div", True


def linear_kd(student: Tensor, teacher: Tensor, head: Tensor, teacher_head: Tensor) -> Tensor:
    from fla.modules.fused_kl_div import fused_kl_div_loss

    return fused_kl_div_loss(student, teacher, head, teacher_head)
