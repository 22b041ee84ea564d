"""What every operation needs: the shape of its arguments, their checks, the reductions.

A check raises one sentence that names operation, argument, what was expected and what came.
Shapes, dtypes, devices and options are always checked. Values (a target in its range, weights finite) are read
only where reading them does not wait for a device: on CPU tensors, or everywhere with FASTKD_CHECKS=1.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from numbers import Real

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

MOST_CLASSES = 2**31
LARGEST = sys.float_info.max
REDUCTIONS = ("none", "sum", "mean")
CHECK_VALUES_EVERYWHERE = os.environ.get("FASTKD_CHECKS", "0") == "1"


def wrong_value(op: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def wrong_type(op: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expected}, got {got}")


def may_read_values(tensor: Tensor) -> bool:
    """Whether looking at this tensor's numbers is free of a device wait and of a graph break."""
    if torch.compiler.is_compiling() or tensor.is_meta or isinstance(tensor, FakeTensor) or is_transformed():
        return False
    return tensor.device.type == "cpu" or CHECK_VALUES_EVERYWHERE


def is_transformed() -> bool:
    """Whether a torch.func transform (grad, vmap, jvp, ...) or forward-mode AD is active around this call."""
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def check_logits(op: str, name: str, value: object) -> Tensor:
    if not isinstance(value, Tensor):
        raise wrong_type(op, name, "a floating-point tensor [..., C]", type(value).__name__)
    if not value.is_floating_point():
        raise wrong_type(op, name, "a floating-point tensor (logits, not labels)", f"dtype {value.dtype}")
    if value.dim() == 0 or value.shape[-1] == 0:
        raise wrong_value(op, name, "of shape [..., C] with C >= 1", f"shape {list(value.shape)}")
    if value.shape[-1] >= MOST_CLASSES:
        raise wrong_value(op, name, "of fewer than 2**31 classes", value.shape[-1])
    return value


def check_like(op: str, name: str, value: object, student: Tensor, whose: str = "the student's") -> None:
    """`value` must be logits of the student's shape and device; messages call them `whose`."""
    check_logits(op, name, value)
    if value.shape != student.shape:
        raise wrong_value(op, name, f"of {whose} shape {list(student.shape)}", f"shape {list(value.shape)}")
    if value.device != student.device:
        raise wrong_value(op, name, f"on {whose} device {student.device}", f"device {value.device}")


def why_learning(name: str, learners: Sequence[Tensor]) -> str:
    """Why a teacher called `name` that requires grad keeps a call from the kernels, and what to do about it."""
    if any([z.requires_grad for z in learners]):
        return f"{name} requires grad, so it gets a gradient too (if it is not to learn: detach it, or torch.no_grad)"
    return f"{name} requires grad and no student does (are the arguments swapped? The student comes first)"


def check_number(
    op: str, name: str, value: object, expected: str, low: float = -LARGEST, high: float = LARGEST
) -> float:
    """A finite Python number within [low, high]; a tensor is refused, since its gradient would be lost."""
    if type(value) is not float and (isinstance(value, bool) or not isinstance(value, Real)):
        raise wrong_type(op, name, expected, type(value).__name__)
    if not low <= value <= high:  # comparisons only: NaN fails them, and torch.compile traces them for a dynamic float
        raise wrong_value(op, name, expected, value)
    return float(value)


def check_index(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(op, name, "an integer", type(value).__name__)


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise wrong_value(op, name, "one of " + ", ".join(repr(c) for c in choices), repr(value))


def check_target(op: str, target: object, student: Tensor, whose: str = "the student's") -> Tensor:
    """Class indices of the student's leading shape, returned as int64 [R]."""
    if not isinstance(target, Tensor):
        raise wrong_type(op, "target", "an integer tensor of class indices", type(target).__name__)
    if target.dtype != torch.int64 and (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    ):
        raise wrong_type(op, "target", "class indices of an integer dtype (int64)", f"dtype {target.dtype}")
    if target.shape != student.shape[:-1]:
        expected = f"of shape {list(student.shape[:-1])}, {whose} without its last dimension"
        raise wrong_value(op, "target", expected, f"shape {list(target.shape)}")
    if target.device != student.device:
        raise wrong_value(op, "target", f"on {whose} device {student.device}", f"device {target.device}")
    if target.dtype != torch.int64:
        target = target.long()
    return target if target.dim() == 1 else target.reshape(-1)


def out_of_range(op: str, target: Tensor, classes: int, ignore_index: int) -> ValueError:
    """The error for a target [R] that holds an index outside [0, classes); reads values."""
    bad = target[(target != ignore_index) & ((target < 0) | (target >= classes))]
    expected = f"class indices in [0, {classes}) or ignore_index={ignore_index}"
    return wrong_value(op, "target", expected, f"index {int(bad[0])}" if len(bad) else "an index outside")


def check_range(op: str, target: Tensor | None, classes: int, ignore_index: int) -> None:
    """Refuses a target [R] with an index outside [0, classes), where its values may be read."""
    if target is None or not may_read_values(target) or target.numel() == 0:
        return
    low, high = (int(x) for x in target.aminmax())  # the usual case in one operation: all labels are classes
    if low >= 0 and high < classes:
        return
    outside = (target != ignore_index) & ((target < 0) | (target >= classes))
    if bool(outside.any()):
        raise out_of_range(op, target, classes, ignore_index)


def rows_of(logits: Tensor) -> Tensor:
    """[..., C] as [R, C]."""
    return logits if logits.dim() == 2 else logits.reshape(-1, logits.shape[-1])


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that losses of logits of this dtype are computed and returned in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def reduce_rows(rows: Tensor, valid: Tensor | None, reduction: str, leading: Sequence[int]) -> Tensor:
    """Row losses [R] by "none" | "sum" | "mean"; the mean is over max(1, rows that count)."""
    if reduction == "none":
        return rows.reshape(leading)
    if reduction == "sum":
        return rows.sum()
    count = max(1, rows.shape[0]) if valid is None else valid.sum().clamp(min=1)
    return rows.sum() / count


def save_for_backward(ctx, tensors: Sequence[Tensor | None]) -> None:
    """ctx.save_for_backward, which refuses tensors made under torch.inference_mode(): ctx itself keeps these."""
    kept = None
    if not torch.compiler.is_compiling() and any([t is not None and t.is_inference() for t in tensors]):
        kept = {i: t for i, t in enumerate(tensors) if t is not None and t.is_inference()}
        tensors = [None if i in kept else t for i, t in enumerate(tensors)]
    ctx.kept = kept
    ctx.save_for_backward(*tensors)


def with_kept(ctx, saved: Sequence[Tensor | None]) -> Sequence[Tensor | None]:
    """The tensors that save_for_backward() was given, from ctx.saved_tensors."""
    return saved if ctx.kept is None else [ctx.kept.get(i, tensor) for i, tensor in enumerate(saved)]
