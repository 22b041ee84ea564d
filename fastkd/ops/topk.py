"""A sparse teacher: k classes a row with their log-probabilities, instead of all logits; its checks."""

from __future__ import annotations

import math
from dataclasses import KW_ONLY, dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from fastkd._core.checks import check_choice
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import may_read_values

Mode = Literal["tail", "truncate", "teacher", "both", "sampled"]
MODES = get_args(Mode)
RETEMPERED = ("teacher", "both")  # the others need the teacher's normaliser, which is not known at another temperature
ABSENT = -1e3  # a log-probability of at most this, or a negative id, is no entry
ROUNDING = 1e-2  # by which a log-probability in half precision may be above 0
ROUNDING_OF_SUMS = 0.1  # by which the log of a row's sum may be: values in bfloat16 are 2^-9 of their size off
INTEGERS = (torch.int64, torch.int32)


@dataclass(frozen=True, eq=False)
class TopK:
    """A teacher that gives k classes a row: what servers, caches and data sets of language models hold.

    >>> teacher = fastkd.TopK(torch.tensor([[2, 0]]), torch.tensor([[0.9, 0.06]]).log())
    >>> round(fastkd.functional.multi_teacher_kd(torch.zeros(1, 4), teacher, temperature=1.0).item(), 4)
    0.9662

    With S the classes of a row, p the teacher, q the student, p~ and q~ renormalised on S, and p_t, q_t what is left
    for all other classes together, the divergence of `mode` is

        "tail"      sum_S p log(p/q) + p_t log(p_t/q_t)    the others as one class
        "truncate"  sum_S p log(p/q)                       may be negative
        "teacher"   sum_S p~ log(p~/q)
        "both"      sum_S p~ log(p~/q~)                    0 for k = 1
        "sampled"   -sum_S p log q                         ids drawn from p: their weights, or how often each was drawn

    Args:
        ids: [..., k], int64 or int32: classes, in any order. An entry with a negative id, or a log-probability of at
            most -1000, is absent. Ids that repeat in a row add up.
        log_probs: [..., k], float32, float64, float16 or bfloat16. "teacher" and "both" renormalise, so they also take
            logits. None for "sampled": each of a row's entries counts 1 / (entries of the row).
        mode: the divergence, see above.
        tail_log_prob: [...], log p_t of "tail", for values that were rounded; None: log(1 - sum_S p), in float64.

    The student's q_t is the sum of the classes outside S, never 1 - sum_S q. At a temperature other than 1, "teacher"
    and "both" take p^(1/T); the other modes are refused, since p's normaliser at T is not known.
    """

    ids: Tensor
    log_probs: Tensor | None = None
    _: KW_ONLY
    mode: Mode = "tail"
    tail_log_prob: Tensor | None = None


def check_topk(op: str, name: str, teacher: TopK, like: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """(ids [R, k], log_probs [R, k], tail_log_prob [R]) of a sparse teacher beside logits `like` [..., C]."""
    check_choice(op, f"{name}.mode", teacher.mode, MODES)
    ids, values, tail = teacher.ids, teacher.log_probs, teacher.tail_log_prob
    leading = list(like.shape[:-1])
    if not isinstance(ids, Tensor) or ids.dtype not in INTEGERS:
        got = ids.dtype if isinstance(ids, Tensor) else type(ids).__name__
        raise wrong_type(op, f"{name}.ids", "a tensor of int64 or int32", got)
    if list(ids.shape[:-1]) != leading or ids.dim() == 0 or ids.shape[-1] == 0:
        expected = f"of shape [{', '.join(map(str, [*leading, 'k']))}], k >= 1"
        raise wrong_value(op, f"{name}.ids", expected, f"shape {list(ids.shape)}")
    if values is not None or teacher.mode != "sampled":
        values = _check_floats(op, f"{name}.log_probs", values, ids.shape)
        _check_values(op, f"{name}.log_probs", values, teacher.mode)
        _check_sums(op, f"{name}.log_probs", ids, values, teacher.mode)
        values = values.reshape(-1, ids.shape[-1])
    if tail is not None:
        if teacher.mode != "tail":
            raise wrong_value(op, f"{name}.tail_log_prob", f"None for mode={teacher.mode!r}", "a tensor")
        _check_floats(op, f"{name}.tail_log_prob", tail, ids.shape[:-1])
        _check_values(op, f"{name}.tail_log_prob", tail, "tail")
        tail = tail.reshape(-1)
    for tensor in (ids, values, tail):
        if tensor is not None and tensor.device != like.device:
            raise wrong_value(op, name, f"on the student's device {like.device}", f"device {tensor.device}")
        if tensor is not None and tensor.requires_grad and torch.is_grad_enabled():
            raise wrong_value(op, name, "of tensors that do not require grad (a TopK gets none)", "one that does")
    ids, values = _checked_ids(op, name, ids.reshape(-1, ids.shape[-1]), values, like.shape[-1])
    return ids, values, tail


def check_temperature(op: str, name: str, mode: Mode, temperature: float | Tensor) -> None:
    """The divergence of `mode` at this temperature, a number or a 0-d tensor on the host."""
    if mode in RETEMPERED:
        return
    if isinstance(temperature, Tensor):
        if not may_read_values(temperature):
            raise wrong_value(op, "temperature", f"the number 1 for {name} with mode={mode!r}", "a tensor")
        temperature = float(temperature.detach())
    if temperature != 1:
        expected = f"1 for {name} with mode={mode!r}, whose probabilities at another one are not known"
        raise wrong_value(op, "temperature", expected, temperature)


def _check_floats(op: str, name: str, value: object, shape: torch.Size) -> Tensor:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = value.dtype if isinstance(value, Tensor) else type(value).__name__
        raise wrong_type(op, name, "a floating-point tensor of log-probabilities", got)
    if value.shape != shape:
        raise wrong_value(op, name, f"of shape {list(shape)}", f"shape {list(value.shape)}")
    return value


def _checked_ids(op: str, name: str, ids: Tensor, values: Tensor | None, classes: int) -> tuple[Tensor, Tensor | None]:
    """ids and log_probs [R, k]; where they cannot be read, an id that is no class makes its row NaN."""
    if may_read_values(ids):
        if ids.numel() and int(ids.max()) >= classes:
            raise wrong_value(op, f"{name}.ids", f"below {classes}, the number of classes", int(ids.max()))
        return ids, values
    outside = ids >= classes
    if values is None:  # of "sampled": each entry counts alike
        values = -(ids >= 0).sum(-1, keepdim=True).clamp(min=1).double().log().expand(ids.shape)
    return ids.masked_fill(outside, 0), values.masked_fill(outside, math.nan)


def _check_sums(op: str, name: str, ids: Tensor, values: Tensor, mode: Mode) -> None:
    """Of what is not renormalised, the entries of a row are parts of 1."""
    if mode not in ("tail", "truncate") or not may_read_values(values) or values.numel() == 0:
        return
    sums = values.detach().float().masked_fill(ids < 0, -math.inf).logsumexp(-1)
    if (most := float(sums.max())) > ROUNDING_OF_SUMS:
        expected = f"log-probabilities whose probabilities add up to at most 1 in a row, for mode={mode!r}"
        raise wrong_value(op, name, expected, f"{math.exp(most):.3g}")


def _check_values(op: str, name: str, values: Tensor, mode: Mode) -> None:
    if not may_read_values(values) or values.numel() == 0:
        return
    top = float(values.detach().max())  # NaN where one value is
    if top != top or top == math.inf:
        raise wrong_value(op, name, "log-probabilities", "NaN" if top != top else "infinity")
    if mode not in RETEMPERED and top > ROUNDING:
        raise wrong_value(op, name, f"log-probabilities, at most 0, for mode={mode!r}", top)
