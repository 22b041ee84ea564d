"""The optimiser's steps of a run, and what happens where a loss is NaN or infinite."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastkd.methods import Method, Phase

SKIPS = 10  # so many steps in a row that were left out end the run


class Steps:
    """Goes back through the loss of each phase and takes the optimiser's step.

    With non_finite="stop" it looks at nothing: the meter does, and ends the run. With "skip" a phase whose loss or
    gradient is not finite gets no step (`phase.skipped` is True), and floating-point buffers (statistics of batch
    normalisation) that became NaN or infinite in this batch are put back to what they held before it. The loss is
    read after each phase, so that a GPU is waited for.

    Attributes:
        in_row: phases that were left out since the last step; part of a run's state. A loop ends the run at `SKIPS`.
    """

    def __init__(self, method: Method, optimizer: torch.optim.Optimizer, non_finite: str = "stop"):
        self.method, self.optimizer, self.non_finite = method, optimizer, non_finite
        self.in_row = 0
        self._buffers: dict[str, Tensor] = {}

    def start_batch(self) -> None:
        if self.non_finite == "skip":
            self._buffers = {
                name: buffer.clone() for name, buffer in self.method.named_buffers() if buffer.is_floating_point()
            }

    def take(self, phase: Phase) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        phase.skipped = self.non_finite == "skip" and not self._finite(phase)
        if not phase.skipped:
            self.in_row = 0
            self.optimizer.step()
            return
        self.optimizer.zero_grad(set_to_none=True)
        self._restore()
        self.in_row += 1

    def _finite(self, phase: Phase) -> bool:
        if not math.isfinite(float(phase.loss.detach())):
            return False
        gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
        # The largest entry, not the 2-norm: squares of finite gradients may overflow.
        return not gradients or math.isfinite(float(torch.nn.utils.get_total_norm(gradients, math.inf)))

    @torch.no_grad()
    def _restore(self) -> None:
        for name, buffer in self.method.named_buffers():
            before = self._buffers.get(name)
            if before is not None and before.shape == buffer.shape and not bool(torch.isfinite(buffer).all()):
                buffer.copy_(before)
