"""What one call of linear_multi_teacher_kd says, checked and flat: student, teachers, labels, options."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd._core.checks import check_choice, check_index, check_integer, check_number
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops._autograd import may_read_values
from fastkd.ops._divergences import FORWARD, Divergence, check_divergence
from fastkd.ops._formulas import Reduction, accumulate_dtype, flat_rows
from fastkd.ops._inputs import REDUCTIONS, check_labels, check_like, check_num_items, check_scalar
from fastkd.ops._multi_teacher_formula import Combine, Options
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.ops._teachers import check_temperature, check_weights
from fastkd.ops.topk import MODES, Mode, TopK, check_topk
from fastkd.ops.topk import check_temperature as check_sparse_temperature

OP = "linear_multi_teacher_kd"
LOGITS, HEAD, SPARSE = 0, 1, 2  # kinds of teachers; of a sparse one, SPARSE + the index of its mode
TEACHER = "logits [..., V], (hidden, weight), fastkd.Head or fastkd.TopK"


@dataclass(frozen=True, eq=False)
class Head:
    """A network as its last hidden states and its head: logits = softcap * tanh(z / softcap), without softcap z itself,
    with z = logit_scale * (hidden @ weight.T + bias).

    hidden: [..., H_k], or [N_k, H_k] with `rows`. weight: [V, H_k]. bias: [V]. Any floating dtypes.
    softcap: a number > 0 (Gemma's 30). logit_scale: a finite number (Cohere's).
    rows: int64 [N_k], for a teacher of some rows: which of the student's flattened rows it speaks about, each once.

    >>> head = fastkd.Head(torch.zeros(2, 4), torch.zeros(3, 4), softcap=30.0)
    >>> fastkd.functional.linear_multi_teacher_kd(torch.zeros(2, 5), torch.zeros(3, 5), [head]).item()  # equal logits
    0.0
    """

    hidden: Tensor
    weight: Tensor
    _: KW_ONLY
    bias: Tensor | None = None
    softcap: float | None = None
    logit_scale: float = 1.0
    rows: Tensor | None = None


class Projection(NamedTuple):
    """How hidden states become logits. softcap 0: none."""

    weight: Tensor  # [V or more, H]
    bias: Tensor | None  # [V or more]
    softcap: float
    scale: float


class Teacher(NamedTuple):
    """LOGITS: first = logits [R, V]. HEAD: hidden [R or N_k, H_k], weight, bias, rows. Sparse: log_probs, ids, tail."""

    kind: int
    first: Tensor | None
    second: Tensor | None = None
    third: Tensor | None = None
    rows: Tensor | None = None  # int64 [N_k]
    softcap: float = 0.0
    scale: float = 1.0

    @property
    def mode(self) -> Mode | None:
        return MODES[self.kind - SPARSE] if self.kind >= SPARSE else None

    @property
    def projection(self) -> Projection:
        return Projection(given(self.second), self.third, self.softcap, self.scale)


def given(tensor: Tensor | None) -> Tensor:
    """A tensor that teachers of this kind have, or calls with labels."""
    assert tensor is not None
    return tensor


class Call(NamedTuple):
    """A checked call. R rows, V classes."""

    hidden: Tensor  # [R, H]
    projection: Projection
    teachers: tuple[Teacher, ...]
    target: Tensor | None  # int64 [R]: classes, or only which rows are ignored
    soft: Tensor | None  # [R, V]
    weights: Tensor | None  # [K] or [K, R], where options.host_weights do not hold them
    options: Options
    classes: int  # V, at most the rows of each weight
    chunk_rows: int  # 0: chosen by memory
    shares: Tensor | None = None  # [2] or [2, R]: weights of the forward and the reverse divergence, where not numbers

    @property
    def dtype(self) -> torch.dtype:
        return accumulate_dtype(torch.promote_types(self.hidden.dtype, self.projection.weight.dtype))


def check_call(
    hidden: Tensor, weight: Tensor, teachers: object, target: Tensor | None, bias: Tensor | None,
    softcap: float | None, logit_scale: float, chunk_rows: object, temperature: object, weights: object,
    kd_weight: object, ce_weight: object, label_smoothing: object, ignore_index: int, mask: object, combine: Combine,
    vocab_size: int | None, scale_by_t2: object, reduction: Reduction, num_items: object, return_terms: object,
    divergence: object = "forward", divergence_beta: object = None,
) -> Call:  # fmt: skip
    cap, scale = _check_projection("", hidden, weight, bias, softcap, logit_scale)
    classes = _check_vocabulary(weight, vocab_size)
    # Stands for the student's logits, with one number in memory.
    dtype = accumulate_dtype(torch.promote_types(hidden.dtype, weight.dtype))
    like = hidden.new_zeros((), dtype=dtype).expand(*hidden.shape[:-1], classes)
    known = [_check_teacher(k, t, like, vocab_size) for k, t in enumerate(_listed(teachers, like, vocab_size))]
    check_choice(OP, "combine", combine, COMBINE)
    check_choice(OP, "reduction", reduction, REDUCTIONS)
    _check_combine(combine, known)
    which, shares = _check_divergence(divergence, divergence_beta, like, combine, known)
    target, soft, labels = _check_labels(target, mask, ignore_index, like)
    label_smoothing = check_number(OP, "label_smoothing", label_smoothing, "a number in [0, 1]", 0, 1)
    ce_weight = check_scalar(OP, "ce_weight", ce_weight, "a finite number")
    if not labels and soft is None and (isinstance(ce_weight, Tensor) or ce_weight != 0):
        raise wrong_value(OP, "target", f"given where ce_weight is {ce_weight}", None)
    temperatures = check_temperature(OP, temperature, len(known))
    if len(temperatures) > 1 and combine != "losses":
        raise wrong_value(OP, "temperature", f"one number for combine={combine!r}", f"{len(temperatures)} numbers")
    for k, teacher in enumerate(known):
        if teacher.mode is not None:
            check_sparse_temperature(OP, f"teachers[{k}]", teacher.mode, temperatures[k % len(temperatures)])
    wanted = _default_weights(known) if weights is None else weights
    weights, host_weights = check_weights(OP, wanted, len(known), like, combine == "probs")
    chunk = 0 if chunk_rows is None else check_integer(OP, "chunk_rows", chunk_rows, 1)
    options = Options(
        operation=OP, host_weights=host_weights, temperatures=temperatures, combine=combine,
        kd_weight=check_scalar(OP, "kd_weight", kd_weight, "a finite number"), ce_weight=ce_weight,
        label_smoothing=label_smoothing, ignore_index=ignore_index, scale_by_t2=bool(scale_by_t2),
        reduction=reduction, num_items=check_num_items(OP, num_items, reduction), labels=labels,
        terms=bool(return_terms), divergence=which,
    )  # fmt: skip
    projection = Projection(weight, bias, cap, scale)
    return Call(flat_rows(hidden), projection, tuple(known), target, soft, weights, options, classes, chunk, shares)


def _check_floats(name: str, value: object, expected: str) -> None:
    if not isinstance(value, Tensor) or not value.is_floating_point():
        got = f"dtype {value.dtype}" if isinstance(value, Tensor) else type(value).__name__
        raise wrong_type(OP, name, f"a floating-point tensor {expected}", got)


def _check_projection(
    prefix: str, hidden: Tensor, weight: Tensor, bias: Tensor | None, softcap: float | None, logit_scale: float
) -> tuple[float, float]:
    """The arguments of one head, whose names begin with `prefix`; softcap (0: none) and scale."""
    _check_floats(f"{prefix}hidden", hidden, "[..., H]")
    _check_floats(f"{prefix}weight", weight, "[V, H]")
    if hidden.dim() == 0:
        raise wrong_value(OP, f"{prefix}hidden", "of shape [..., H]", "shape []")
    if weight.dim() != 2 or weight.shape[1] != hidden.shape[-1] or weight.shape[0] < 2:
        expected = f"of shape [V, {hidden.shape[-1]}], V >= 2 classes by the width of {prefix}hidden"
        raise wrong_value(OP, f"{prefix}weight", expected, f"shape {list(weight.shape)}")
    if bias is not None:
        _check_floats(f"{prefix}bias", bias, "[V]")
        if bias.shape != weight.shape[:1]:
            raise wrong_value(OP, f"{prefix}bias", f"of shape {[weight.shape[0]]}", f"shape {list(bias.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.device != hidden.device:
            raise wrong_value(OP, f"{prefix}{name}", f"on the device {hidden.device}", f"device {tensor.device}")
    logit_scale = check_number(OP, f"{prefix}logit_scale", logit_scale, "a finite number")
    if softcap is None:
        return 0.0, logit_scale
    softcap = check_number(OP, f"{prefix}softcap", softcap, "a finite number > 0, or None")
    if softcap <= 0:
        raise wrong_value(OP, f"{prefix}softcap", "a finite number > 0, or None", softcap)
    return softcap, logit_scale


def _check_vocabulary(weight: Tensor, vocab_size: object) -> int:
    if vocab_size is None:
        return weight.shape[0]
    return check_integer(OP, "vocab_size", vocab_size, 2, weight.shape[0])


def _listed(teachers: object, like: Tensor, vocab_size: object) -> Sequence[object]:
    if isinstance(teachers, (Head, TopK)):
        return (teachers,)
    if isinstance(teachers, Tensor):
        return teachers.unbind(0) if teachers.dim() == like.dim() + 1 else (teachers,)
    if not isinstance(teachers, Sequence) or isinstance(teachers, str):
        raise wrong_type(OP, "teachers", f"a sequence of teachers ({TEACHER})", type(teachers).__name__)
    if len(teachers) == 0:
        raise wrong_value(OP, "teachers", f"at least one of {TEACHER}", "none")
    return teachers


def _check_teacher(k: int, teacher: object, like: Tensor, vocab_size: int | None) -> Teacher:
    name = f"teachers[{k}]"
    if isinstance(teacher, TopK):
        ids, values, tail = check_topk(OP, name, teacher, like)
        return Teacher(SPARSE + MODES.index(teacher.mode), values, ids, tail)
    if isinstance(teacher, (tuple, list)) and len(teacher) == 2:
        teacher = Head(*teacher)
    if isinstance(teacher, Head):
        return _check_head(name, teacher, like, vocab_size)
    if not isinstance(teacher, Tensor):
        raise wrong_type(OP, name, TEACHER, type(teacher).__name__)
    if vocab_size is not None and teacher.dim() > 0 and teacher.shape[-1] > vocab_size:
        teacher = teacher[..., :vocab_size]
    check_like(OP, name, teacher, like, "the student's logits'")
    return Teacher(LOGITS, flat_rows(teacher))


def _check_head(name: str, head: Head, like: Tensor, vocab_size: int | None) -> Teacher:
    softcap, scale = _check_projection(
        f"{name}.", head.hidden, head.weight, head.bias, head.softcap, head.logit_scale
    )  # fmt: skip
    hidden, weight, classes = head.hidden, head.weight, like.shape[-1]
    if weight.shape[0] < classes or (vocab_size is None and weight.shape[0] != classes):
        expected = f"of shape [{classes}, {weight.shape[1]}] as the student's vocabulary"
        if vocab_size is None:
            expected += " (vocab_size= names the classes that all have, where heads are padded)"
        raise wrong_value(OP, f"{name}.weight", expected, f"shape {list(weight.shape)}")
    if hidden.device != like.device:
        raise wrong_value(OP, f"{name}.hidden", f"on the student's device {like.device}", f"device {hidden.device}")
    if head.rows is None:
        if hidden.shape[:-1] != like.shape[:-1]:
            expected = f"of shape {[*like.shape[:-1], 'H_k']}, the student's rows"
            raise wrong_value(OP, f"{name}.hidden", expected, f"shape {list(hidden.shape)}")
    else:
        _check_rows(f"{name}.rows", head.rows, flat_rows(hidden).shape[0], like)
    return Teacher(HEAD, flat_rows(hidden), weight, head.bias, head.rows, softcap, scale)


def _check_rows(name: str, rows: object, count: int, like: Tensor) -> None:
    if not isinstance(rows, Tensor) or rows.dtype != torch.int64:
        got = f"dtype {rows.dtype}" if isinstance(rows, Tensor) else type(rows).__name__
        raise wrong_type(OP, name, "an int64 tensor [N_k] of the student's rows", got)
    if rows.shape != (count,):
        raise wrong_value(OP, name, f"of shape [{count}], one per row of its hidden", f"shape {list(rows.shape)}")
    if rows.device != like.device:
        raise wrong_value(OP, name, f"on the student's device {like.device}", f"device {rows.device}")
    if not may_read_values(rows) or count == 0:
        return
    total = like[..., 0].numel()
    if int(rows.min()) < 0 or int(rows.max()) >= total:
        raise wrong_value(OP, name, f"in [0, {total}), the student's rows", f"{int(rows.min())} to {int(rows.max())}")
    if len(rows.unique()) != count:
        raise wrong_value(OP, name, "of different rows", "a row twice")


def _check_combine(combine: Combine, teachers: Sequence[Teacher]) -> None:
    if combine == "losses":
        return
    for k, teacher in enumerate(teachers):
        if teacher.rows is not None or teacher.mode is not None:
            what = "with rows" if teacher.rows is not None else "a TopK"
            raise wrong_value(OP, "combine", f"'losses' where teachers[{k}] is {what}", repr(combine))


def _check_divergence(
    name: object, beta: object, like: Tensor, combine: Combine, teachers: Sequence[Teacher]
) -> tuple[Divergence, Tensor | None]:
    which, shares = check_divergence(OP, name, beta, like, combine)
    sparse = [k for k, teacher in enumerate(teachers) if teacher.mode is not None]
    if sparse and which != FORWARD:
        raise wrong_value(OP, "divergence", f"'forward' where teachers[{sparse[0]}] is a TopK", repr(name))
    return which, shares


def _check_labels(
    target: Tensor | None, mask: object, ignore_index: int, like: Tensor
) -> tuple[Tensor | None, Tensor | None, bool]:
    """The target [R], probabilities [R, V], and whether the target holds classes."""
    check_index(OP, "ignore_index", ignore_index)
    if target is not None and not isinstance(target, Tensor):
        raise wrong_type(OP, "target", "class indices or probabilities", type(target).__name__)
    labels, soft = check_labels(OP, target, mask, ignore_index, like)
    return labels, soft, target is not None and soft is None


def _default_weights(teachers: Sequence[Teacher]) -> tuple[float, ...]:
    """1/K for K teachers of all rows, 1 for a routed one."""
    whole = max(1, sum(teacher.rows is None for teacher in teachers))
    return tuple([1.0 / whole if teacher.rows is None else 1.0 for teacher in teachers])
