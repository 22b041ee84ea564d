"""The module of linear_multi_teacher_kd, a part of fastkd.losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import functional
from fastkd.losses._fixed import Fixed
from fastkd.ops.shared import Combine, Reduction


class LinearMultiTeacherKD(Fixed):
    """`fastkd.functional.linear_multi_teacher_kd` with its hyper-parameters fixed; see there for what they mean.

    >>> loss = fastkd.LinearMultiTeacherKD(temperature=2.0, softcap=30.0)
    >>> head = torch.nn.Linear(8, 100, bias=False)
    >>> loss(torch.randn(4, 8), head.weight, [(torch.randn(4, 16), torch.randn(100, 16))]).shape
    torch.Size([])

    The student's head (weight, bias) and the teachers go into the call: they belong to the networks. A tensor of
    weights or temperatures is a buffer: it moves with the module and is in its state dict. Raises what the function
    raises, at the call.
    """

    _tensors = ("weights", "temperature")
    _shown = (
        "softcap", "logit_scale", "chunk_rows", "weights", "temperature", "combine", "divergence", "divergence_beta",
        "kd_weight", "ce_weight", "label_smoothing", "ignore_index", "vocab_size", "scale_by_t2", "reduction",
        "return_terms",
    )  # fmt: skip

    def __init__(
        self,
        *,
        softcap: float | None = None,
        logit_scale: float = 1.0,
        chunk_rows: int | None = None,
        weights: Tensor | Sequence[float] | None = None,
        kd_weight: float | Tensor = 1.0,
        temperature: float | Tensor | Sequence[float] = 1.0,
        combine: Combine = "losses",
        divergence: str | Mapping[str, float | Tensor] = "forward",
        divergence_beta: float | None = None,
        ce_weight: float | Tensor = 0.0,
        label_smoothing: float = 0.0,
        ignore_index: int = -100,
        vocab_size: int | None = None,
        scale_by_t2: bool = True,
        reduction: Reduction = "mean",
        return_terms: bool = False,
        process_group: torch.distributed.ProcessGroup | None = None,
    ) -> None:
        super().__init__(reduction=reduction)
        self.softcap, self.logit_scale, self.chunk_rows = softcap, logit_scale, chunk_rows
        self.weights, self.temperature, self.combine = weights, temperature, combine
        self.divergence, self.divergence_beta = divergence, divergence_beta
        self.kd_weight, self.ce_weight, self.label_smoothing = kd_weight, ce_weight, label_smoothing
        self.ignore_index, self.vocab_size, self.scale_by_t2 = ignore_index, vocab_size, scale_by_t2
        self.return_terms, self.process_group = return_terms, process_group

    def forward(
        self,
        hidden: Tensor,  # [..., H]
        weight: Tensor,  # [V, H]
        teachers: Any,  # K of: Tensor [..., V], (hidden [..., H_k], weight [V, H_k]), fastkd.Head, fastkd.TopK
        target: Tensor | None = None,  # [...]
        weights: Tensor | Sequence[float] | None = None,
        *,
        bias: Tensor | None = None,  # [V]
        mask: Tensor | None = None,  # bool [...]
        num_items: float | Tensor | None = None,
    ) -> Any:
        """The loss, a Tensor; with return_terms=True the loss and `LossTerms`."""
        fixed: dict[str, Any] = {name: getattr(self, name) for name in self._shown if name != "weights"}
        weights = self.weights if weights is None else weights
        call: dict[str, Any] = {"bias": bias, "weights": weights, "mask": mask, "num_items": num_items}
        return functional.linear_multi_teacher_kd(
            hidden, weight, teachers, target, **call, **fixed, process_group=self.process_group
        )
