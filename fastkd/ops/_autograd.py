"""What autograd functions keep between forward and backward, and when values may be read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from fastkd import _backend


def may_read_values(tensor: Tensor) -> bool:
    """Whether looking at this tensor's numbers is free of a device wait and of a graph break."""
    if not _backend.machine.values_readable:
        return False
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor) or is_transformed():
        return False
    return tensor.device.type == "cpu" or _backend.machine.check_everywhere


def is_transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is active around this call."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def why_no_kernels(tensor: Tensor) -> str | None:
    """Why no operation's native kernels take a call on this tensor, or None."""
    reason = _backend.why_not_native(tensor)
    if reason is None and is_transformed():
        reason = "a torch.func transform or forward-mode AD is active"
    return reason


def on_host(scalars: Sequence[float | Tensor]) -> bool:
    """Whether native kernels of any device can take these: numbers, or 0-d tensors on the CPU that need no gradient.

    Inside a compiled graph a CPU tensor is an input like any other, so that a schedule needs no second graph.
    """
    return all(
        [
            not isinstance(s, Tensor) or (s.device.type == "cpu" and not (s.requires_grad and torch.is_grad_enabled()))
            for s in scalars
        ]
    )


def host_scalars(scalars: Sequence[float | Tensor]) -> Tensor | None:
    """None where all are numbers; else float64 [n] on the CPU, in their order, for the kernels to read."""
    if not any([isinstance(s, Tensor) for s in scalars]):
        return None
    tensors = [s if isinstance(s, Tensor) else torch.tensor(s, dtype=torch.float64) for s in scalars]
    return torch.stack([t.detach().to(torch.float64) for t in tensors])


# --- what autograd functions keep between forward and backward ------------------------------------------------------


def save_for_backward(ctx: Any, tensors: Sequence[Tensor | None]) -> None:
    """ctx.save_for_backward, which refuses tensors made under torch.inference_mode(): ctx itself keeps these."""
    kept = None
    if not torch.compiler.is_compiling() and any([t is not None and t.is_inference() for t in tensors]):
        kept = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        tensors = [None if i in kept else t for i, t in enumerate(tensors)]
    ctx.kept = kept
    ctx.save_for_backward(*tensors)


def with_kept(ctx: Any, saved: Sequence[Tensor | None]) -> Sequence[Any]:
    """The tensors that save_for_backward() was given, from ctx.saved_tensors."""
    return saved if ctx.kept is None else [ctx.kept.get(i, tensor) for i, tensor in enumerate(saved)]


class Inputs:
    """The inputs of an operation whose first derivative does not read them: only a second one does.

    They may be changed in place between the loss and its backward, which tensors of save_for_backward may not.
    """

    def __init__(self, tensors: Sequence[Tensor | None]):
        self._tensors = tuple(tensors)
        try:  # not by calls of _version: this runs in every step
            self._versions = [0 if t is None else t._version for t in tensors]
        except RuntimeError:  # an inference tensor has none
            self._versions = [_version(t) for t in tensors]

    def unchanged(self, op: str) -> tuple[Any, ...]:
        for tensor, version in zip(self._tensors, self._versions, strict=True):
            if _version(tensor) != version:
                raise RuntimeError(
                    f"{op}: a second derivative (create_graph=True) needs the inputs as they were, but one of them was "
                    "changed in place after the loss was computed; give the operation a clone of it"
                )
        return self._tensors


def _version(tensor: Tensor | None) -> int:
    return 0 if tensor is None or tensor.is_inference() else tensor._version


def graph_is_kept() -> bool:
    """Inside a backward: whether the graph will be gone through again (retain_graph or create_graph)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def hand_out(ctx: Any, name: str) -> Tensor:
    """The stored gradient `ctx.<name>` as the caller's own tensor: given away with the last pass, else copied.

    Read ctx.saved_tensors before: it raises where the graph was freed already.
    """
    gradient: Tensor = getattr(ctx, name)
    if graph_is_kept():
        return gradient.clone()
    setattr(ctx, name, None)
    return gradient
