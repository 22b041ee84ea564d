"""Checks of what operations take: logits, labels, masks, divisors, layouts.

Shapes, dtypes, devices and options are always checked. Values (a target in its range, weights finite) are read
only where reading them does not wait for a device: on CPU tensors, or everywhere with FASTKD_CHECKS=1.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from torch import Tensor

from fastkd import _backend
from fastkd._core.checks import LARGEST, check_index, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import is_transformed, may_read_values
from fastkd.ops._formulas import Reduction, rows_of

MOST_CLASSES = 2**31
REDUCTIONS = get_args(Reduction)
ONE_LOGIT = "of shape [..., C] with C >= 2 classes (a network of one logit has a sigmoid: multi_label_kd)"


def check_logits(op: str, name: str, value: object, least: int = 2) -> Tensor:
    """Logits of at least `least` classes: 1 where each has a sigmoid of its own."""
    if not isinstance(value, Tensor):
        kind = type(value).__name__
        got = f"the network {kind}: call it first" if isinstance(value, torch.nn.Module) else kind
        raise wrong_type(op, name, "a floating-point tensor [..., C]", got)
    if not value.is_floating_point():
        raise wrong_type(op, name, "a floating-point tensor (logits, not labels)", f"dtype {value.dtype}")
    if value.dim() == 0 or value.shape[-1] < least:
        expected = ONE_LOGIT if least == 2 else f"of shape [..., C] with C >= {least} classes"
        raise wrong_value(op, name, expected, f"shape {list(value.shape)}")
    if value.shape[-1] >= MOST_CLASSES:
        raise wrong_value(op, name, "of fewer than 2**31 classes", value.shape[-1])
    return value


def check_like(
    op: str, name: str, value: object, student: Tensor, whose: str = "the student's", least: int = 2
) -> None:
    """`value` must be logits of the student's shape and device; messages call them `whose`."""
    value = check_logits(op, name, value, least)
    if value.shape != student.shape:
        raise wrong_value(op, name, f"of {whose} shape {list(student.shape)}", f"shape {list(value.shape)}")
    if value.device != student.device:
        raise wrong_value(op, name, f"on {whose} device {student.device}", f"device {value.device}")


def check_not_probabilities(op: str, name: str, logits: Tensor | Sequence[Tensor]) -> None:
    """With FASTKD_CHECKS=1: refuses logits [..., C], one tensor or several, whose rows all are probabilities."""
    if not _backend.machine.check_everywhere:
        return
    for k, z in enumerate([logits] if isinstance(logits, Tensor) else logits):
        if may_read_values(z) and z.numel() > 0 and _are_probabilities(z.detach()):
            name = name if isinstance(logits, Tensor) else f"{name}[{k}]"
            raise wrong_value(op, name, "logits", "probabilities (rows >= 0 that sum to 1): take their logarithm")


def _are_probabilities(logits: Tensor) -> bool:
    rounding = 1e-2 if logits.dtype.itemsize == 2 else 1e-4
    sums = logits.sum(-1, dtype=torch.float64)
    return bool((logits >= 0).all() & ((sums - 1).abs() <= rounding).all())


def why_learning(name: str, learners: Sequence[Tensor]) -> str:
    """Why a teacher called `name` that requires grad keeps a call from the kernels, and what to do about it."""
    if any([z.requires_grad for z in learners]):
        return f"{name} requires grad, so it gets a gradient too (if it is not to learn: detach it, or torch.no_grad)"
    return f"{name} requires grad and no student does (are the arguments swapped? The student comes first)"


def check_scalar(
    op: str, name: str, value: object, expected: str, low: float = -LARGEST, high: float = LARGEST
) -> float | Tensor:
    """A finite number within [low, high]; a 0-d tensor where its value may not be read or must be differentiated."""
    if not isinstance(value, Tensor):
        return check_number(op, name, value, expected, low, high)
    if value.numel() != 1 or value.dim() > 1 or value.dtype == torch.bool or value.is_complex():
        raise wrong_value(op, name, expected, f"a tensor of {value.dtype} and shape {list(value.shape)}")
    if not may_read_values(value):
        return value.reshape(())
    number = check_number(op, name, value.item(), expected, low, high)
    return value.reshape(()) if value.requires_grad and torch.is_grad_enabled() else number


def check_class_dim(op: str, class_dim: int, dims: int) -> int:
    """The dimension of the classes of logits of `dims` dimensions, counted from the end: -1 is the last one."""
    check_index(op, "class_dim", class_dim)
    if not -dims <= class_dim < dims:
        raise wrong_value(op, "class_dim", f"a dimension of the logits, in [{-dims}, {dims})", class_dim)
    return class_dim - dims if class_dim >= 0 else class_dim


_warned_of_maps: set[str] = set()


def check_layout(op: str, logits: Tensor, class_dim: int, labelled: bool, name: str = "logits") -> int:
    """check_class_dim() for one network's logits, and what can only be a mistake where no labels tell the layout.

    Without labels, a vector is refused, and maps whose classes are taken from the last dimension are warned of, once.
    """
    dims = logits.dim()
    if dims == 0:
        raise wrong_value(op, name, ONE_LOGIT, "shape []")
    class_dim = check_class_dim(op, class_dim, dims)
    if labelled or dims not in (1, 4) or is_transformed():  # inside vmap a vector is one sample of a batch
        return class_dim
    if dims == 1:
        expected = "of shape [..., C] with samples before the classes, or come with labels (one sample is logits[None])"
        raise wrong_value(op, name, expected, f"shape {list(logits.shape)}")
    if class_dim == -1 and not torch.compiler.is_compiling() and op not in _warned_of_maps:
        _warned_of_maps.add(op)
        warnings.warn(
            f"{op}: the classes of {name} {list(logits.shape)} were taken from the last dimension; "
            "class_dim=1 is for maps [B, C, H, W]",
            UserWarning,
            stacklevel=_backend.users_level(),
        )
    return class_dim


def classes_last(logits: Tensor, class_dim: int) -> Tensor:
    """Logits with their classes in the last dimension: a view. `class_dim` < 0, as check_class_dim() gives it."""
    return logits if class_dim == -1 else logits.movedim(class_dim, -1)


def check_mask(op: str, mask: object, leading: Sequence[int], device: torch.device) -> Tensor | None:
    """bool [R], or None: which rows count."""
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = f"dtype {mask.dtype}" if isinstance(mask, Tensor) else type(mask).__name__
        raise wrong_type(op, "mask", "a bool tensor, True where a row counts", got)
    if mask.shape != torch.Size(leading):
        raise wrong_value(op, "mask", f"of shape {list(leading)}, one value per row", f"shape {list(mask.shape)}")
    if mask.device != device:
        raise wrong_value(op, "mask", f"on the device {device}", f"device {mask.device}")
    return mask.reshape(-1)


def with_mask(target: Tensor | None, mask: Tensor | None, ignore_index: int) -> Tensor | None:
    """The target [R] with rows outside the mask [R] ignored; without labels, one of zeros and `ignore_index`."""
    if mask is None:
        return target
    if target is None:
        target = torch.zeros_like(mask, dtype=torch.int64)
        if ignore_index == 0:
            target = target + 1
    return target.masked_fill(~mask, ignore_index)


def check_num_items(op: str, num_items: object, reduction: Reduction) -> float | Tensor | None:
    """What the sum of the rows is divided by: None for the reduction's own; a number or a 0-d tensor."""
    if num_items is None:
        return None
    if reduction == "none":
        raise wrong_value(op, "num_items", "None for reduction='none', which divides nothing", num_items)
    expected = "a finite number > 0 (or a 0-d tensor)"
    items = check_scalar(op, "num_items", num_items, expected)
    if not isinstance(items, Tensor) and items <= 0:
        raise wrong_value(op, "num_items", expected, items)
    return items


def check_target(op: str, target: object, student: Tensor, whose: str = "the student's") -> Tensor:
    """Class indices of the student's leading shape, returned as int64 [R]."""
    if not isinstance(target, Tensor):
        raise wrong_type(op, "target", "an integer tensor of class indices", type(target).__name__)
    if target.dtype != torch.int64 and (
        target.is_floating_point() or target.is_complex() or target.dtype == torch.bool
    ):
        raise wrong_type(op, "target", "class indices of an integer dtype (int64)", f"dtype {target.dtype}")
    if target.shape != student.shape[:-1]:
        raise wrong_value(op, "target", _target_shape(target, student, whose), f"shape {list(target.shape)}")
    if target.device != student.device:
        raise wrong_value(op, "target", f"on {whose} device {student.device}", f"device {target.device}")
    if target.dtype != torch.int64:
        target = target.long()
    return target if target.dim() == 1 else target.reshape(-1)


def _target_shape(target: Tensor, student: Tensor, whose: str) -> str:
    expected = f"of shape {list(student.shape[:-1])}, {whose} without its last dimension"
    if student.dim() > 2 and target.shape == student.shape[:1] + student.shape[2:]:
        expected += " (classes must be last, or say class_dim=1)"
    return expected


def check_soft_target(op: str, target: Tensor, student: Tensor, whose: str = "the student's") -> Tensor:
    """Probabilities of the student's shape, of a floating dtype, as rows of rows_of()."""
    if target.shape != student.shape:
        expected = f"class indices {list(student.shape[:-1])}, or probabilities of {whose} shape {list(student.shape)}"
        raise wrong_value(op, "target", expected, f"shape {list(target.shape)} of {target.dtype}")
    if target.device != student.device:
        raise wrong_value(op, "target", f"on {whose} device {student.device}", f"device {target.device}")
    if may_read_values(target) and target.numel() and not float(target.detach().min()) >= 0:
        raise wrong_value(op, "target", "probabilities, at least 0", "a negative one or NaN")
    return rows_of(target)


def check_labels(
    op: str,
    target: object,
    mask: object,
    ignore_index: int,
    student: Tensor,
    class_dim: int = -1,
    whose: str = "the student's",
) -> tuple[Tensor | None, Tensor | None]:
    """(int64 [R] or None, probabilities as rows_of() or None) of a target, whose rows outside the mask are ignored.

    Beside probabilities the first one only says which rows count. `student` has its classes last; in the target of
    probabilities they still stand at `class_dim`, as check_class_dim() gives it.
    """
    check_index(op, "ignore_index", ignore_index)
    mask = check_mask(op, mask, student.shape[:-1], student.device)
    if isinstance(target, Tensor) and target.is_floating_point() and target.shape != student.shape[:-1]:
        moved = classes_last(target, class_dim) if target.dim() == student.dim() else target
        return with_mask(None, mask, ignore_index), check_soft_target(op, moved, student, whose)
    if target is not None:
        target = check_target(op, target, student, whose)
    return with_mask(target, mask, ignore_index), None


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
