"""The optimiser's steps of a run: precision, accumulation, several processes, losses that are not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from fastkd._core.labels import counted
from fastkd._core.messages import UserError
from fastkd._core.modes import data_parallel
from fastkd.methods import Method, Phase
from fastkd.train.distributed import ALONE, World
from fastkd.train.settings import Settings

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
SKIPS = 10  # so many steps in a row that were left out end the run


def check_amp(amp: str, device: torch.device) -> None:
    """UserError for float16 on a CPU, which has no fast arithmetic for it and would skip steps for nothing."""
    if amp == "fp16" and device.type == "cpu":
        raise UserError("--amp fp16 needs a GPU: use --amp bf16 on a CPU")


class Steps:
    """Takes the steps of one optimiser for the phases of a method.

    Forward passes and losses run under autocast, backward passes outside of it. With a gradient scaler (float16) each
    phase has a scaled backward pass, a step and an update of the scale of its own; where a gradient is infinite the
    step is left out and `phase.skipped` is True.

    With several processes each loss is the mean over this process's rows, and DistributedDataParallel averages the
    gradients with equal weights. So each loss is multiplied by (rows here that count) * processes / (rows that count in
    all): what the optimiser sees is the gradient of the mean over the global batch, however uneven the parts are.

    With non_finite="stop" it looks at nothing: the meter does, and ends the run. With "skip" a phase whose loss or
    gradient is not finite, in one process at least, gets no step, and floating-point buffers (statistics of batch
    normalisation) that became NaN or infinite in this batch are put back to what they held before it. The loss is read
    after each phase, so that a GPU is waited for. A loop ends the run at `SKIPS`.

    Args:
        amp: "none" | "bf16" | "fp16".
        accumulate: parts into which each process cuts its rows (`Method.phases`, chunks); gradients are exchanged with
            the last one. Fewer where a part would have less than 2 rows.
        scaler: None makes one for "fp16".

    Attributes:
        in_row: phases that non_finite="skip" left out since the last step; part of a run's state.
        tolerant: whether a phase that was left out may have a loss that is not finite.
    """

    def __init__(
        self,
        method: Method,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        non_finite: str = "stop",
        *,
        amp: str = "none",
        accumulate: int = 1,
        world: World = ALONE,
        scaler: torch.amp.GradScaler | None = None,
    ):
        self.method, self.optimizer, self.device = method, optimizer, device
        self.dtype, self.accumulate, self.world = DTYPES.get(amp), accumulate, world
        self.scaler = torch.amp.GradScaler(device.type) if scaler is None and amp == "fp16" else scaler
        self.tolerant = non_finite == "skip"
        self.in_row = 0
        self._buffers: dict[str, Tensor] = {}

    @classmethod
    def of(
        cls,
        method: Method,
        optimizer: torch.optim.Optimizer,
        device: torch.device,
        settings: Settings,
        world: World = ALONE,
    ) -> Steps:
        """The steps that `settings` describe."""
        amp, accumulate = settings.amp, settings.accumulate
        return cls(method, optimizer, device, settings.non_finite, amp=amp, accumulate=accumulate, world=world)

    def take(self, inputs: Any, target: Tensor, taught: Any = None) -> Iterator[tuple[Phase, Tensor]]:
        """(phase, its loss) of one batch, each after its step. The loss is detached, of this process's rows.

        `taught`: what frozen networks say of the batch, as `Method.phases` takes it; None runs them.
        """
        chunks, weight = self._chunks(len(target)), self._weight(target)
        if self.tolerant:
            self._buffers = {n: b.clone() for n, b in self.method.named_buffers() if b.is_floating_point()}
        known = {} if taught is None else {"taught": taught}
        phases = self.method.phases(inputs, target, chunks=chunks, **known)
        while (phase := self._run(phases)) is not None:
            self.optimizer.zero_grad(set_to_none=True)
            loss = self._backward(phase, weight)
            if self.tolerant and not self._finite(loss):
                phase.skipped = True
                self.optimizer.zero_grad(set_to_none=True)
                self._restore()
                self.in_row += 1
            else:
                phase.skipped = not self._step()
                self.in_row = 0
            yield phase, loss

    def state_dict(self) -> dict[str, Any]:
        """The state of the gradient scaler and the steps skipped in a row."""
        return {"in_row": self.in_row, "scaler": {} if self.scaler is None else self.scaler.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The way back of `state_dict`."""
        self.in_row = state["in_row"]
        if self.scaler is not None and state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])

    def autocast(self) -> torch.autocast:
        """The context in which losses are computed."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype is not None)

    def _run(self, iterator: Iterator[Any]) -> Any:
        with self.autocast():
            return next(iterator, None)

    def _chunks(self, rows: int) -> int:
        if self.accumulate == 1:
            return 1
        # The same number in every process: relations over the group must be asked for equally often.
        return max(1, min(self.accumulate, self.world.minimum(rows) // 2))

    def _weight(self, target: Tensor) -> Tensor | None:
        """This process's loss in the sum of all, times the processes: a 0-d tensor; None where there is one."""
        if self.world.size == 1:
            return None
        counts = counted(target).sum(dtype=torch.float64)
        total = self.world.sum(counts.clone())
        return counts * self.world.size / total.clamp(min=1)

    def _backward(self, phase: Phase, weight: Tensor | None) -> Tensor:
        total: Tensor | None = None
        for chunk in range(phase.chunks):
            with ExitStack() as stack:
                if chunk + 1 < phase.chunks:
                    for network in filter(None, map(data_parallel, phase.networks)):
                        stack.enter_context(network.no_sync())  # around the forward pass, too
                loss = phase.loss if phase.chunks == 1 else self._run(phase.losses)
                total = loss.detach() if total is None else total + loss.detach()
                if weight is not None:
                    loss = loss * weight.to(loss.dtype)
                (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        assert total is not None  # a phase has one chunk at least
        return total

    def _step(self) -> bool:
        """Whether a step was taken."""
        if self.scaler is None:
            self.optimizer.step()
            return True
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        return self.scaler.get_scale() >= before

    def _finite(self, loss: Tensor) -> bool:
        """In all processes: each sees its own loss."""
        good = math.isfinite(float(loss))
        if good and self.scaler is None:  # which looks at the gradients itself, and expects infinite ones
            gradients = [p.grad for group in self.optimizer.param_groups for p in group["params"] if p.grad is not None]
            # The largest entry, not the 2-norm: squares of finite gradients may overflow.
            good = not gradients or math.isfinite(float(torch.nn.utils.get_total_norm(gradients, math.inf)))
        return not self.world.any(not good)

    @torch.no_grad()
    def _restore(self) -> None:
        for name, buffer in self.method.named_buffers():
            before = self._buffers.get(name)
            if before is not None and before.shape == buffer.shape and not bool(torch.isfinite(buffer).all()):
                buffer.copy_(before)
