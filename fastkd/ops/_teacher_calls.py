"""What the checked calls of multi_teacher_kd and multi_label_kd share: teachers, their weights and temperatures."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops._autograd import host_scalars, on_host, why_no_kernels
from fastkd.ops._formulas import LossTerms
from fastkd.ops._inputs import why_learning

LAUNCH_TEACHERS = 16  # teachers of one CUDA launch; more go in groups


class TeacherTensors(Protocol):
    """The tensors of a checked call, a NamedTuple."""

    @property
    def student(self) -> Tensor: ...
    @property
    def teachers(self) -> tuple[Tensor, ...]: ...
    @property
    def weights(self) -> Tensor | None: ...
    @property
    def _replace(self) -> Callable[..., Any]: ...


class TeacherOptions(Protocol):
    """What else it says, a NamedTuple."""

    @property
    def operation(self) -> str: ...
    @property
    def host_weights(self) -> tuple[float, ...]: ...
    @property
    def temperatures(self) -> tuple[float | Tensor, ...]: ...
    @property
    def combine(self) -> Any: ...
    @property
    def kd_weight(self) -> float | Tensor: ...
    @property
    def ce_weight(self) -> float | Tensor: ...
    @property
    def reduction(self) -> Any: ...
    @property
    def num_items(self) -> float | Tensor | None: ...
    @property
    def _replace(self) -> Callable[..., Any]: ...


TensorsT = TypeVar("TensorsT", bound=TeacherTensors)
OptionsT = TypeVar("OptionsT", bound=TeacherOptions)


def is_number(scalar: object, value: object) -> bool:
    """Whether an option is known to be this; a tensor never is."""
    return not isinstance(scalar, Tensor) and bool(scalar == value)


def is_uniform(weights: Sequence[float]) -> bool:
    """Whether all weights are 1/K: the mixture of equal networks is then exactly each of them."""
    return len(set(weights)) == 1 and weights[0] == 1.0 / len(weights)


def promoted(tensors: TeacherTensors) -> torch.dtype:
    dtype = tensors.student.dtype
    for teacher in tensors.teachers:
        dtype = torch.promote_types(dtype, teacher.dtype)
    return dtype


def of_weight(tensors: TeacherTensors, options: TeacherOptions) -> list[int] | None:
    """The teachers whose weight is not known to be 0; None: all of them."""
    if is_number(options.kd_weight, 0):
        return []
    weights = options.host_weights
    if tensors.weights is None and 0.0 in weights:
        return [k for k, weight in enumerate(weights) if weight != 0]
    return None


def only(tensors: TensorsT, options: OptionsT, keep: Sequence[int]) -> tuple[TensorsT, OptionsT]:
    """The call with these of its teachers alone; where the weights are a tensor, with none or with neighbours."""
    weights, temperatures = options.host_weights, options.temperatures
    if len(temperatures) > 1:
        temperatures = tuple([temperatures[k] for k in keep]) or temperatures[:1]
    teachers = tuple([tensors.teachers[k] for k in keep])
    rows = tensors.weights
    if rows is not None:
        rows = rows[keep[0] : keep[-1] + 1] if keep else None
    weights = tuple([weights[k] for k in keep]) if weights else ()
    return (
        tensors._replace(teachers=teachers, weights=rows),
        options._replace(host_weights=weights, temperatures=temperatures),
    )


def too_many(tensors: TeacherTensors) -> bool:
    """Whether one launch does not take all teachers."""
    return len(tensors.teachers) > LAUNCH_TEACHERS and _backend.device_kind(tensors.student) != "cpu"


def in_groups(count: int, run: Callable[[range], Sequence[Tensor]]) -> Sequence[Tensor]:
    """The losses of `count` teachers, from `run` of some of them at a time, of which the first has the labels."""
    total: Sequence[Tensor] = []
    for k in range(0, count, LAUNCH_TEACHERS):
        losses = run(range(k, min(k + LAUNCH_TEACHERS, count)))
        # The loss and KD add up; CE is the first group's.
        total = [*(a + b for a, b in zip(total[:2], losses, strict=False)), *total[2:]] if total else losses
    return total


def why_reference(
    tensors: TeacherTensors, options: TeacherOptions, others: Iterable[tuple[str, Tensor | None]]
) -> str | None:
    """Why a call goes to plain PyTorch, whatever its kernels are.

    others: what else must not require grad, with the subject of the sentence: ("the target requires", target).
    """
    reason = why_no_kernels(tensors.student)
    if reason is not None:
        return reason
    if torch.is_grad_enabled():
        for k, teacher in enumerate(tensors.teachers):
            if teacher.requires_grad:
                return why_learning(f"teachers[{k}]", (tensors.student,))
        for subject, tensor in (("the weights require", tensors.weights), *others):
            if tensor is not None and tensor.requires_grad:
                return f"{subject} grad"
    for name, scalar in (("kd_weight", options.kd_weight), ("ce_weight", options.ce_weight)):
        if not on_host((scalar,)):
            return f"{name} is a tensor that requires grad or whose value is not known on the host"
    if not on_host(options.temperatures):
        return "the temperature is a tensor that requires grad or whose value is not known on the host"
    if options.combine != "losses" and too_many(tensors):
        return f"combine={options.combine!r} with more than {LAUNCH_TEACHERS} teachers"
    return None


def split(options: OptionsT) -> tuple[OptionsT, Tensor | None]:
    """The options without tensors, and the numbers that the kernels read from `scalars` in their place."""
    items = 0.0 if options.num_items is None else options.num_items
    scalars = host_scalars((options.kd_weight, options.ce_weight, items, *options.temperatures))
    if scalars is None:
        return options, None
    ones = (1.0,) * len(options.temperatures)
    weight = 1.0 if isinstance(options.ce_weight, Tensor) else options.ce_weight
    return options._replace(kd_weight=1.0, ce_weight=weight, num_items=None, temperatures=ones), scalars


def joined(options: OptionsT, scalars: Tensor | None) -> OptionsT:
    """What split() took apart."""
    if scalars is None:
        return options
    kd_weight, ce_weight, items, *temperatures = scalars.tolist()
    result: OptionsT = options._replace(
        kd_weight=kd_weight, ce_weight=ce_weight, num_items=items or None, temperatures=tuple(temperatures)
    )
    return result


def divided(options: OptionsT, leading: torch.Size, compute: Callable[[OptionsT], Sequence[Tensor]]) -> list[Any]:
    """[loss], or [loss, LossTerms], from what `compute` makes of the options; rows get their shape `leading`.

    A `num_items` on a GPU, or one that is differentiated, divides here.
    """
    divisor = options.num_items
    if divisor is not None and not on_host((divisor,)):
        options = options._replace(reduction="sum", num_items=None)
    else:
        divisor = None
    losses = compute(options)
    if divisor is not None:
        losses = [loss / divisor for loss in losses]
    if options.reduction == "none":
        losses = [loss.reshape(leading) for loss in losses]
    terms = [term.detach() for term in losses[1:]]
    return [losses[0], LossTerms(*terms)] if terms else [losses[0]]
