"""Loss and gradient of multi_teacher_kd at once, for loops that hand the gradient to the logits themselves."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import Unpack

from fastkd import _backend
from fastkd.ops import _multi_teacher_inputs as inputs
from fastkd.ops import _multi_teacher_usual as usual
from fastkd.ops._keywords import DistillationCall
from fastkd.ops.multi_teacher import USUAL, multi_teacher_kd, why_reference

OP = "multi_teacher_kd_with_gradient"
_WHOLE = inspect.signature(multi_teacher_kd)
_SIGNATURE = _WHOLE.replace(
    parameters=[p for p in _WHOLE.parameters.values() if not p.name.startswith("return_")],
    return_annotation=tuple[Tensor, Tensor],
)
_DEFAULTS = {name: _WHOLE.parameters[name].default for name in USUAL}
_USUAL_OPTIONS = frozenset(USUAL) - {"return_terms"} | {"weights"}


def multi_teacher_kd_with_gradient(
    student: Tensor,
    teachers: Tensor | Sequence[Tensor],
    target: Tensor | None = None,
    **options: Unpack[DistillationCall],
) -> tuple[Tensor, Tensor]:
    """The loss of `multi_teacher_kd`, and its gradient to the student's logits, for `student.backward(gradient)`.

    A step of small batches spends more time on autograd's account of a loss than on the loss: this makes none.

    >>> network, images = torch.nn.Linear(4, 3), torch.randn(8, 4)
    >>> logits = network(images)
    >>> loss, gradient = fastkd.functional.multi_teacher_kd_with_gradient(logits, [torch.randn(8, 3)], temperature=2.0)
    >>> logits.backward(gradient)
    >>> network.weight.grad.shape
    torch.Size([3, 4])

    Args:
        student: logits [..., C], as in `multi_teacher_kd`; a graph behind them is left as it is.
        teachers, target: as in `multi_teacher_kd`. They get no gradient, nor do weights or temperatures.
        options: those of `multi_teacher_kd`, but for return_terms and return_stats.

    Returns:
        (loss, gradient), without a graph: the loss as `multi_teacher_kd` gives it, and what `loss.sum().backward()`
        would give to `student`, in the student's shape and dtype. A loss scale is the caller's: gradient * scale.

    Raises:
        ValueError, TypeError: as `multi_teacher_kd`, by its name.
    """
    if options.keys() <= _USUAL_OPTIONS:
        values = tuple([options.get(name, default) for name, default in _DEFAULTS.items()])
        weights = options.get("weights")
        found = usual.loss_and_gradient((inputs.check, student, teachers, target, weights, USUAL, values))
        if found is not None:
            return found
    given = _SIGNATURE.bind(student, teachers, target, **options).arguments
    return _by_autograd(given)


@torch.enable_grad()
def _by_autograd(given: dict[str, Any]) -> tuple[Tensor, Tensor]:
    student, teachers = given["student"], given["teachers"]
    if isinstance(student, Tensor) and student.is_floating_point():
        student = student.detach().requires_grad_()
    if isinstance(teachers, Sequence) and not isinstance(teachers, str):
        teachers = [t.detach() if isinstance(t, Tensor) else t for t in teachers]
    elif isinstance(teachers, Tensor):
        teachers = teachers.detach()
    loss = multi_teacher_kd(**given | {"student": student, "teachers": teachers})
    (gradient,) = torch.autograd.grad(loss.sum(), student)
    return loss.detach(), gradient


def _why_reference(arguments: dict[str, Any]) -> str | None:
    bound = _WHOLE.bind(arguments["student"], arguments["teachers"], arguments["target"], **arguments["options"])
    bound.apply_defaults()
    with torch.no_grad():
        return why_reference(bound.arguments)


_backend.register(multi_teacher_kd_with_gradient, OP, _why_reference, lambda namespace: None)
