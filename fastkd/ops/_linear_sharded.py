"""linear_multi_teacher_kd with the vocabulary in shards: each process of a group has some classes of every head.

Hidden states, labels and rows are the same everywhere. A chunk gathers the rows' maxima once and their sums once
for each teacher and the labels; the gradient of the hidden states is summed once. The backward is our own: that of a
differentiable all_reduce would sum gradients that are whole already. With e_s = exp((z - max z) / T), e_t alike, and S
their sums over all classes,

    KL(p || q) = sum e_t ((t - max t) - (z - max z)) / T / S_t - log S_t + log S_s
    d/dz       = (e_s / S_s - e_t / S_t) / T
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch import distributed as torch_distributed

from fastkd import _backend
from fastkd._core.messages import wrong_value
from fastkd.ops import _linear_chunks as chunks
from fastkd.ops._autograd import is_transformed, on_host
from fastkd.ops._divergences import FORWARD
from fastkd.ops._formulas import reduce_rows
from fastkd.ops._gather import all_gather_integers
from fastkd.ops._linear_formula import weights_of_rows
from fastkd.ops._linear_inputs import HEAD, LOGITS, OP, Call, Projection, Teacher, given
from fastkd.ops._linear_products import project, project_back

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

REASON = "the vocabulary is in shards (process_group): rows are plain PyTorch, chunk by chunk"


def check_sharded(call: Call) -> None:
    """What shards do not take."""
    options = call.options
    if options.combine != "losses":
        raise wrong_value(OP, "combine", "'losses' with process_group", repr(options.combine))
    if options.divergence != FORWARD:
        raise wrong_value(OP, "divergence", "'forward' with process_group", options.divergence.kind)
    if options.reduction == "none":
        raise wrong_value(OP, "reduction", "'mean' or 'sum' with process_group", "'none'")
    if call.soft is not None:
        raise wrong_value(OP, "target", "class indices with process_group", "probabilities")
    if call.classes != call.projection.weight.shape[0]:
        raise wrong_value(
            OP, "vocab_size", "None with process_group: leave padding out of the last shard", call.classes
        )
    for k, teacher in enumerate(call.teachers):
        if teacher.kind not in (LOGITS, HEAD) or teacher.rows is not None:
            raise wrong_value(
                OP, f"teachers[{k}]", "logits or a head of all rows with process_group", "another teacher"
            )
        if torch.is_grad_enabled() and any([t is not None and t.requires_grad for t in teacher[1:4]]):
            raise wrong_value(OP, f"teachers[{k}]", "detached with process_group", "a tensor that requires grad")
    numbers = {
        "kd_weight": (options.kd_weight,),
        "ce_weight": (options.ce_weight,),
        "temperature": options.temperatures,
    }
    for name, values in numbers.items():
        if not on_host(values):
            raise wrong_value(OP, name, "known on the host with process_group", "a tensor that is not")
    if call.weights is not None and call.weights.requires_grad:
        raise wrong_value(OP, "weights", "detached with process_group", "a tensor that requires grad")
    if is_transformed() or torch.compiler.is_compiling():
        raise RuntimeError(f"{OP}: process_group works in eager mode, outside of torch.compile and torch.func")


def losses_of(call: Call, group: ProcessGroup) -> Sequence[Tensor]:
    """The loss; with `terms` also KD and CE."""
    check_sharded(call)
    if _backend._chosen == "native":
        _backend.note_fallback(OP, REASON)  # which raises
    options = call.options
    numbers = [float(t) for t in (options.kd_weight, options.ce_weight)]
    call = call._replace(
        options=options._replace(
            kd_weight=numbers[0], ce_weight=numbers[1], temperatures=tuple([float(t) for t in options.temperatures])
        )
    )
    weight, bias = call.projection.weight, call.projection.bias
    out = _Sharded.apply(call, group, call.hidden, weight, bias)
    return out if isinstance(out, tuple) else (out,)


class _Sharded(torch.autograd.Function):
    """Gradients are made in the forward."""

    @staticmethod
    def forward(
        ctx: Any, call: Call, group: ProcessGroup, hidden: Tensor, weight: Tensor, bias: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        plain = hidden.detach(), weight.detach(), None if bias is None else bias.detach()
        call = call._replace(hidden=plain[0], projection=call.projection._replace(weight=plain[1], bias=plain[2]))
        with torch.autocast(hidden.device.type, enabled=False):
            losses, ctx.gradients = _Shards(call, group, ctx.needs_input_grad[2:]).run()
        ctx.dtypes = [None if t is None else t.dtype for t in plain]
        loss, *terms = losses
        ctx.mark_non_differentiable(*terms)
        return (loss, *terms) if terms else loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        pairs = zip(ctx.gradients, ctx.dtypes, strict=True)
        return None, None, *[None if g is None else (g * grad).to(dtype) for g, dtype in pairs]


class _Shards:
    """Works all rows that count, chunk by chunk."""

    def __init__(self, call: Call, group: ProcessGroup, wants: Sequence[bool]):
        self.call, self.group = call, group
        shapes = (call.hidden.shape, call.projection.weight.shape, call.projection.weight.shape[:1])
        self.gradients = chunks.Gradients(
            *[call.hidden.new_zeros(s, dtype=call.dtype) if w else None for s, w in zip(shapes, wants, strict=True)]
        )
        self.first, self.classes = self._place()
        options = call.options
        self.labelled = options.labels and (options.ce_weight != 0 or options.terms)

    def _place(self) -> tuple[int, int]:
        """The first class of this shard, and the number of classes of all."""
        sizes = [size for (size,) in all_gather_integers([self.call.classes], self.call.hidden.device, self.group)]
        return sum(sizes[: torch_distributed.get_rank(self.group)]), sum(sizes)

    def run(self) -> tuple[list[Tensor], chunks.Gradients]:
        call, options = self.call, self.call.options
        valid = None if call.target is None else call.target != options.ignore_index
        rows = torch.arange(call.hidden.shape[0], device=call.hidden.device) if valid is None else valid.nonzero()[:, 0]
        self._check_labels(rows)
        divisor = float(options.num_items or 0) or (max(1, len(rows)) if options.reduction == "mean" else 1)
        losses = call.hidden.new_zeros(3 if options.terms else 1, call.hidden.shape[0], dtype=call.dtype)
        for part in rows.split(chunks.chunk_rows(call, 2 * len(call.teachers) + 1)):
            losses[:, part] = torch.stack(self._chunk(part, 1 / divisor)[: len(losses)])
        if self.gradients.hidden is not None:
            torch_distributed.all_reduce(self.gradients.hidden, group=self.group)
        reduced = [reduce_rows(r, valid, options.reduction, (-1,), options.num_items) for r in losses]
        return reduced, self.gradients

    def _check_labels(self, rows: Tensor) -> None:
        target = self.call.target
        if target is not None and self.call.options.labels and target.is_cpu and len(rows):
            low, high = (int(x) for x in target[rows].aminmax())
            if low < 0 or high >= self.classes:
                bad = low if low < 0 else high
                raise wrong_value(OP, "target", f"class indices in [0, {self.classes}) of all shards", f"index {bad}")

    def _whole(self, parts: list[Tensor], combine: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """Each [n], of all shards. Gathered and combined here, in one order, so that equal networks have equal sums."""
        own = torch.stack(parts)
        gathered = [torch.empty_like(own) for _ in range(torch_distributed.get_world_size(self.group))]
        torch_distributed.all_gather(gathered, own, group=self.group)
        return list(combine(torch.stack(gathered)).unbind(0))

    def _logits(self, hidden: Tensor, projection: Projection) -> Tensor:
        out = hidden.new_empty(hidden.shape[0], self.call.classes)
        project(hidden if projection.scale == 1 else hidden * projection.scale, projection, out)
        return out

    def _teacher(self, teacher: Teacher, rows: Tensor) -> Tensor:
        rows_of_it = given(teacher.first)[rows].to(self.call.dtype)
        return rows_of_it if teacher.kind == LOGITS else self._logits(rows_of_it, teacher.projection)

    def _chunk(self, rows: Tensor, factor: float) -> list[Tensor]:
        """The loss, KD and CE of rows, each [n]."""
        call, options = self.call, self.call.options
        hidden = call.hidden[rows].to(call.dtype)
        z = self._logits(hidden, call.projection)
        read = [k for k in range(len(call.teachers)) if not chunks._not_read(call, k)]
        others = {k: self._teacher(call.teachers[k], rows) for k in read}
        top = self._whole([x.amax(1) for x in (z, *others.values())], lambda x: x.amax(0))
        shifted = z - top[0][:, None]
        gradient, kd, ce = torch.zeros_like(z), torch.zeros_like(top[0]), torch.zeros_like(top[0])
        for (k, logits), highest in zip(others.items(), top[1:], strict=True):
            kd += self._divergence(k, rows, shifted, logits - highest[:, None], gradient)
        if self.labelled:
            ce = self._cross_entropy(shifted, given(call.target)[rows], gradient)
        self._add_gradients(gradient, z, hidden, rows, factor)
        return [options.kd_weight * kd + options.ce_weight * ce, kd, ce]

    def _divergence(self, k: int, rows: Tensor, student: Tensor, teacher: Tensor, gradient: Tensor) -> Tensor:
        """The weighted divergence to teacher k, [n]; adds its gradient."""
        options, temperatures = self.call.options, self.call.options.temperatures
        t = temperatures[k % len(temperatures)]
        weight = weights_of_rows(self.call, k, rows)
        if isinstance(weight, Tensor) and weight.dim() == 1:  # a teacher of weight 0 is not read in that row
            teacher = teacher.masked_fill((weight == 0)[:, None], 0)
        e_s, e_t = (student / t).exp_(), (teacher / t).exp_()
        apart = ((teacher - student) * e_t).masked_fill_(e_t == 0, 0)
        sums = [x.sum(1, dtype=torch.float64) for x in (e_s, e_t, apart)]
        s_s, s_t, between = self._whole(sums, lambda x: x.sum(0))
        scale = t * t if options.scale_by_t2 else 1.0
        slope = options.kd_weight * scale / t * weight
        slope = slope if isinstance(slope, float) else slope.reshape(-1, 1).to(gradient.dtype)
        difference = e_s.div_(s_s[:, None].to(e_s.dtype)).sub_(e_t.div_(s_t[:, None].to(e_t.dtype)))
        gradient.add_(difference.mul_(slope))
        divergence = between / s_t / t - s_t.log() + s_s.log()
        return (weight * scale * divergence.clamp(min=0)).to(student.dtype)

    def _cross_entropy(self, student: Tensor, target: Tensor, gradient: Tensor) -> Tensor:
        options, own = self.call.options, target - self.first
        inside = (own >= 0) & (own < student.shape[1])
        place = own.where(inside, 0)[:, None]
        at = student.gather(1, place)[:, 0].masked_fill(~inside, 0)
        e = student.exp()
        sums = [e.sum(1, dtype=torch.float64), at.double(), student.sum(1, dtype=torch.float64)]
        total, at, whole = self._whole(sums, lambda x: x.sum(0))
        smooth = options.label_smoothing
        e.div_(total[:, None].to(e.dtype)).sub_(smooth / self.classes)
        e.scatter_add_(1, place, (inside.to(e.dtype) * (smooth - 1))[:, None])
        gradient.add_(e, alpha=float(options.ce_weight))
        even = whole / self.classes if smooth else 0.0
        return (total.log() - (1 - smooth) * at - smooth * even).to(student.dtype)

    def _add_gradients(self, gradient: Tensor, logits: Tensor, hidden: Tensor, rows: Tensor, factor: float) -> None:
        (to_hidden, to_weight, to_bias), (weight, _, softcap, scale) = self.gradients, self.call.projection
        if softcap:
            gradient.mul_(chunks._softcap_slope(logits, softcap))
        if to_weight is not None:
            to_weight.addmm_(gradient.t(), hidden * (factor * scale))
        if to_bias is not None:
            to_bias.add_(gradient.sum(0), alpha=factor * scale)
        if to_hidden is not None:
            to_hidden[rows] = project_back(gradient, weight).mul_(factor * scale)
