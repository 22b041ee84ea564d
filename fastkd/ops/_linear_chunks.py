"""linear_multi_teacher_kd by chunks of rows: logits, loss and gradients of one chunk at a time, in one forward pass.

The products are torch.mm and addmm_: none is written here. Row arithmetic is the kernel of multi_teacher_kd, which
gives the losses and the gradient over the student's logits. Rows that do not count leave before the products. The
factors of rows (1 / rows that count, the gradient of each row's loss) go into hidden states, not into logits.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _topk_formula as topk
from fastkd.ops import _topk_kernels as topk_kernels
from fastkd.ops._formulas import flat_rows, reduce_rows
from fastkd.ops._linear_formula import shares_of_rows, sparse_entries, weights_of_rows
from fastkd.ops._linear_inputs import HEAD, LOGITS, SPARSE, Call, given
from fastkd.ops._linear_products import project, project_back
from fastkd.ops._multi_teacher_formula import Options, Tensors

LEAST_ROWS, MULTIPLE = 256, 128
BOTH_ROWS = 64  # of a chunk whose classes' weights [rows, k, H] are gathered
STRIP_ROWS = 128  # of the half of a chunk whose teachers' logits are in memory
BLOCK_BYTES, ROWS_PER_THREAD = 4 << 20, 8


class Gradients(NamedTuple):
    """Accumulators in the call's dtype, or None where nobody wants them."""

    hidden: Tensor | None  # [R, H]
    weight: Tensor | None  # [V or more, H]
    bias: Tensor | None  # [V or more]


class Group(NamedTuple):
    """Rows that the same teachers speak about."""

    rows: Tensor | None  # int64 [n], or None: all, in their order
    teachers: tuple[int, ...]


def forward(call: Call, wants: tuple[bool, bool, bool], row_scale: Tensor | None) -> tuple[Tensor, Gradients]:
    """Losses [L] or [L, R], L = 3 with `terms`, and the gradients; `row_scale` [R]: of each row's loss, else those of
    the reduced loss."""
    hidden, weight = call.hidden, call.projection.weight
    shapes = (hidden.shape, weight.shape, weight.shape[:1])
    made = [hidden.new_zeros(s, dtype=call.dtype) if w else None for s, w in zip(shapes, wants, strict=True)]
    losses = hidden.new_zeros(3 if call.options.terms else 1, hidden.shape[0], dtype=call.dtype)
    worker = _Worker(call, Gradients(*made), losses, row_scale)
    for group in _groups(call):
        worker.run(group)
    valid, options = worker.valid, call.options
    reduced = [reduce_rows(r, valid, options.reduction, (-1,), options.num_items) for r in losses]
    return torch.stack(reduced), worker.gradients


def chunk_rows(call: Call, heads: int) -> int:
    """As many rows as keep the logits of student and heads within one weight gradient in float32."""
    if call.chunk_rows:
        return call.chunk_rows
    rows = 4 * call.hidden.shape[1] // ((heads + 1) * call.dtype.itemsize)
    return max(LEAST_ROWS, rows // MULTIPLE * MULTIPLE)


def _groups(call: Call) -> list[Group]:
    """Rows that count, by the teachers that speak about them. On a GPU only routing looks at values."""
    numbers, valid = range(len(call.teachers)), _counting(call)
    read = [k for k in numbers if not _not_read(call, k)]
    routed = [k for k in read if call.teachers[k].rows is not None]
    if not routed:
        if valid is None or not valid.is_cpu or bool(valid.all()):
            return [Group(None, tuple(read))]
        return [Group(valid.nonzero()[:, 0], tuple(read))]
    spoken = torch.zeros(call.hidden.shape[0], len(routed), dtype=torch.bool, device=call.hidden.device)
    for column, k in enumerate(routed):
        spoken[call.teachers[k].rows, column] = True
    kinds, kind = spoken.unique(dim=0, return_inverse=True)
    groups = []
    for i, present in enumerate(kinds.tolist()):
        rows = kind == i if valid is None else (kind == i) & valid
        speaking = {k for k, speaks in zip(routed, present, strict=True) if speaks}
        teachers = tuple([k for k in read if k in speaking or call.teachers[k].rows is None])
        groups.append(Group(rows.nonzero()[:, 0], teachers))
    return sorted(groups, key=lambda group: group.teachers)


def _not_read(call: Call, k: int) -> bool:
    return bool(call.options.kd_weight == 0) or (call.weights is None and call.options.host_weights[k] == 0)


def _counting(call: Call) -> Tensor | None:
    return None if call.target is None else call.target != call.options.ignore_index


class _Worker:
    """Works groups chunk by chunk into losses and gradients; owns the chunks' logits."""

    def __init__(self, call: Call, gradients: Gradients, losses: Tensor, row_scale: Tensor | None):
        self.call, self.gradients, self.losses = call, gradients, losses
        self.valid, self.row_scale = _counting(call), row_scale
        self.learns = any(g is not None for g in gradients)
        self.factor = self.losses.new_ones(()) if row_scale is not None else self._divisor().reciprocal()
        self.place: dict[int, Tensor] = {}  # of routed teachers: the row of their hidden states, [R]
        self.buffers: dict[tuple[object, torch.dtype], Tensor] = {}

    def _divisor(self) -> Tensor:
        reduction, items = self.call.options.reduction, self.call.options.num_items
        one = self.losses.new_ones(())
        if items is not None:
            return one * items
        if reduction != "mean":
            return one
        return one * max(1, self.losses.shape[1]) if self.valid is None else one * self.valid.sum().clamp(min=1)

    def run(self, group: Group) -> None:
        count = self.losses.shape[1] if group.rows is None else group.rows.shape[0]
        if only_inside(self.call, group.teachers):
            step, work = BOTH_ROWS, self._inside
        else:
            heads = sum(self.call.teachers[k].kind == HEAD for k in group.teachers)
            step, work = min(chunk_rows(self.call, heads), max(1, count)), self._chunk
        for start in range(0, count, step):
            stop = min(start + step, count)
            work(group, slice(start, stop) if group.rows is None else group.rows[start:stop], stop - start)

    def _buffer(self, name: object, rows: int, dtype: torch.dtype) -> Tensor:  # [rows, V]
        key = (name, dtype)
        if key not in self.buffers or self.buffers[key].shape[0] < rows:
            self.buffers.pop(key, None)
            self.buffers[key] = self.call.hidden.new_empty(rows, self.call.classes, dtype=dtype)
        return self.buffers[key][:rows]

    def _hidden(self, rows: slice | Tensor) -> Tensor:
        """The student's hidden states, times the logits' scale, [n, H]."""
        hidden = self.call.hidden[rows].to(self.call.dtype)
        if self.valid is not None and isinstance(rows, slice) and not hidden.is_cpu:
            hidden = hidden.masked_fill(~self.valid[rows][:, None], 0)
        scale = self.call.projection.scale
        return hidden if scale == 1 else hidden * scale

    def _chunk(self, group: Group, rows: slice | Tensor, count: int) -> None:
        call, hidden = self.call, self._hidden(rows)
        logits = self._buffer("student", count, call.dtype)
        project(hidden, call.projection, logits)
        for strip in _cut(slice(0, count), max(STRIP_ROWS, -(-count // 2))):
            part = _part(rows, strip)
            teachers = {k: self._teacher_logits(k, i, part) for i, k in enumerate(self._dense(group))}
            for block in _cut(strip, self._block_rows(count)):
                inside = slice(block.start - strip.start, block.stop - strip.start)
                self._rows(group, _part(rows, block), logits[block], {k: t[inside] for k, t in teachers.items()})
        if self.learns:
            factor = self.factor if self.row_scale is None else self.row_scale[rows].to(call.dtype)[:, None]
            self._add_gradients(logits, hidden, rows, factor)

    def _block_rows(self, count: int) -> int:
        """Rows whose gradient is made beside their logits before it takes their place. A GPU takes all at once."""
        if not self.call.hidden.is_cpu:
            return max(1, count)
        row = self.call.classes * self.call.dtype.itemsize
        return max(ROWS_PER_THREAD * torch.get_num_threads(), BLOCK_BYTES // row)

    def _add_gradients(self, gradient: Tensor, hidden: Tensor, rows: slice | Tensor, factor: Tensor) -> None:
        call, (to_hidden, to_weight, to_bias) = self.call, self.gradients
        scale, classes = call.projection.scale, call.classes
        if to_weight is not None:
            to_weight[:classes].addmm_(gradient.t(), hidden * factor)
        if to_bias is not None:
            column = (factor * scale).reshape(-1, 1).expand(gradient.shape[0], 1)
            to_bias[:classes].unsqueeze(1).addmm_(gradient.t(), column)
        if to_hidden is not None:
            to_hidden[rows] = project_back(gradient, call.projection.weight[:classes]).mul_(factor * scale)

    def _dense(self, group: Group) -> list[int]:
        return [k for k in group.teachers if self.call.teachers[k].kind < SPARSE]

    def _rows(self, group: Group, rows: slice | Tensor, logits: Tensor, teachers: dict[int, Tensor]) -> None:
        """The losses of some rows, and their gradient in the place of the logits [n, V]."""
        call, dense = self.call, list(teachers)
        soft = None if call.soft is None else flat_rows(call.soft)[rows]
        target = None if call.target is None else call.target[rows].contiguous()
        shares = shares_of_rows(call, rows)
        tensors = Tensors(logits, tuple(teachers.values()), target, soft, self._weights(dense, rows), shares)
        losses, gradient = row_kernel(tensors, self._options(dense), self.learns)
        losses = losses.reshape(-1, logits.shape[0])
        for k in group.teachers:
            if call.teachers[k].kind >= SPARSE:
                self._add_sparse(k, rows, logits, losses, gradient)
        self.losses[:, rows] = losses
        if self.learns:
            slope = _softcap_slope(logits, call.projection.softcap) if call.projection.softcap else None
            torch.mul(gradient, slope, out=logits) if slope is not None else logits.copy_(gradient)

    def _options(self, teachers: list[int]) -> Options:
        options, t = self.call.options, self.call.options.temperatures
        host = options.host_weights
        return options._replace(
            host_weights=tuple([host[k] for k in teachers]) if host else (),
            temperatures=t if len(t) == 1 else tuple([t[k] for k in teachers]) or (1.0,),
            reduction="none", num_items=None,
        )  # fmt: skip

    def _weights(self, teachers: list[int], rows: slice | Tensor) -> Tensor | None:
        weights = self.call.weights
        if weights is None or not teachers:
            return None
        weights = weights[teachers]
        return weights if weights.dim() == 1 else weights[:, rows].contiguous()

    def _teacher_logits(self, k: int, position: int, rows: slice | Tensor) -> Tensor:
        """[n, V], in a buffer where a product makes them."""
        teacher, first = self.call.teachers[k], given(self.call.teachers[k].first)
        if teacher.kind == LOGITS:
            return first[rows]
        dtype = torch.promote_types(self.call.dtype, torch.promote_types(first.dtype, given(teacher.second).dtype))
        hidden = first[rows if teacher.rows is None else self._places(k)[rows]].to(dtype)
        hidden = hidden if teacher.scale == 1 else hidden * teacher.scale
        logits = self._buffer(position, hidden.shape[0], dtype)
        project(hidden, teacher.projection, logits)
        return logits

    def _places(self, k: int) -> Tensor:
        if k not in self.place:
            spoken = given(self.call.teachers[k].rows)
            place = torch.zeros(self.losses.shape[1], dtype=torch.int64, device=spoken.device)
            self.place[k] = place.index_copy_(0, spoken, torch.arange(len(spoken), device=spoken.device))
        return self.place[k]

    def _add_sparse(self, k: int, rows: slice | Tensor, logits: Tensor, losses: Tensor, gradient: Tensor) -> None:
        t = self._temperature(k)
        counts = None if self.valid is None else self.valid[rows]
        weight = self._sparse_weight(k, rows, t, counts)
        if topk_kernels.has_kernel(logits):
            value, slope = topk_kernels.weighted_rows(logits, self._sparse(k, rows), weight, t, self.learns)
            self._add_losses(losses, value, 1.0)
            if self.learns:
                gradient.add_(slope)
            return
        entries = sparse_entries(self.call, k, rows, counts, t)
        x = logits if t == 1 else logits / t
        mode = self.call.teachers[k].mode
        assert mode is not None
        value, slope = topk.divergence_and_gradient(mode, entries, x)
        self._add_losses(losses, value, weight)
        if self.learns:
            weight = weight / t if isinstance(weight, float) else (weight / t).to(slope.dtype)[:, None]
            gradient.add_(slope.mul_(weight))

    def _sparse(self, k: int, rows: slice | Tensor) -> topk_kernels.Sparse:
        teacher = self.call.teachers[k]
        assert teacher.mode is not None
        values, tail = (None if t is None else t[rows] for t in (teacher.first, teacher.third))
        return topk_kernels.Sparse(teacher.mode, given(teacher.second)[rows], values, tail, 1.0, 1.0)

    def _temperature(self, k: int) -> float:
        temperatures = self.call.options.temperatures
        return temperatures[k % len(temperatures)]  # type: ignore[return-value]  # numbers, in kernels

    def _sparse_weight(self, k: int, rows: slice | Tensor, t: float, counts: Tensor | None) -> float | Tensor:
        """kd_weight * w_k * T^2, a number or [n], without the rows that do not count."""
        options = self.call.options
        weight = options.kd_weight * (t * t if options.scale_by_t2 else 1.0) * weights_of_rows(self.call, k, rows)
        dtype = self.losses.dtype
        if counts is not None:
            return weight * counts.to(dtype)
        return weight.to(dtype) if isinstance(weight, Tensor) else weight

    def _add_losses(self, losses: Tensor, value: Tensor, weight: float | Tensor) -> None:
        total = (value * weight).to(losses.dtype)
        losses[0].add_(total)
        if self.call.options.terms:
            losses[1].add_(total / self.call.options.kd_weight)

    def _inside(self, group: Group, rows: slice | Tensor, count: int) -> None:
        """Sparse teachers of mode "both" alone: products with the k classes' weights only."""
        hidden = self._hidden(rows)
        losses = self.losses.new_zeros(self.losses.shape[0], count)
        for k in group.teachers:
            self._inside_of(k, rows, hidden, losses)
        self.losses[:, rows] = losses

    def _inside_of(self, k: int, rows: slice | Tensor, hidden: Tensor, losses: Tensor) -> None:
        (weight, bias, softcap, scale), t = self.call.projection, self._temperature(k)
        counts = None if self.valid is None else self.valid[rows]
        entries = sparse_entries(self.call, k, rows, counts, t)
        inside = weight[entries.ids].to(hidden.dtype)  # [n, k, H]
        z = torch.bmm(inside, hidden.unsqueeze(2)).squeeze(2)  # [n, k]
        if bias is not None:
            z = z + bias[entries.ids].to(z.dtype) * scale
        z = z if not softcap else softcap * torch.tanh(z / softcap)
        factor = self._sparse_weight(k, rows, t, counts)
        self._add_losses(losses, topk.divergence_both(entries, z / t), factor)
        if not self.learns:
            return
        slope = topk.gradient_both(entries, z / t).to(z.dtype)
        slope = slope * (factor / t if isinstance(factor, float) else (factor / t)[:, None])
        slope = slope if not softcap else slope * _softcap_slope(z, softcap)
        scales = self.factor if self.row_scale is None else self.row_scale[rows].to(z.dtype)[:, None]
        self._add_inside(slope * scales, entries.ids, hidden, inside, rows)

    def _add_inside(self, slope: Tensor, ids: Tensor, hidden: Tensor, inside: Tensor, rows: slice | Tensor) -> None:
        (to_hidden, to_weight, to_bias), scale = self.gradients, self.call.projection.scale
        if to_hidden is not None:
            to_hidden[rows] += torch.bmm(slope.unsqueeze(1), inside).squeeze(1).mul_(scale)
        if to_bias is not None:
            to_bias.index_add_(0, ids.flatten(), slope.flatten() * scale)
        if to_weight is not None:
            to_weight.index_add_(0, ids.flatten(), (slope.unsqueeze(2) * hidden.unsqueeze(1)).flatten(0, 1))


def only_inside(call: Call, teachers: tuple[int, ...]) -> bool:
    """Whether these teachers and the labels need no class but those of sparse teachers of mode "both"."""
    labelled = (call.options.labels or call.soft is not None) and (call.options.ce_weight != 0 or call.options.terms)
    return bool(teachers) and not labelled and all(call.teachers[k].mode == "both" for k in teachers)


def _cut(rows: slice, step: int) -> list[slice]:
    return [slice(i, min(i + step, rows.stop)) for i in range(rows.start, rows.stop, step)]


def _part(rows: slice | Tensor, block: slice) -> slice | Tensor:
    """The rows of a block."""
    return rows[block] if isinstance(rows, Tensor) else slice(rows.start + block.start, rows.start + block.stop)


def _softcap_slope(logits: Tensor, softcap: float) -> Tensor:
    """d softcap * tanh(z / softcap) / dz from its value, over which it is written."""
    return logits.div_(softcap).square_().neg_().add_(1)


def row_kernel(tensors: Tensors, options: Options, learns: bool) -> tuple[Tensor, Tensor]:
    """Losses [L, n] or [n], and the gradient of the sum of the rows' losses, [n, V]."""
    losses, rows, saved, aux = native.forward(tensors, options, None, learns, False)
    if learns and native.streams(tensors.student, options):  # long rows on a GPU: a second read makes the gradient
        student = tensors.student
        ones = torch.ones(student.shape[0], dtype=losses.dtype, device=student.device)
        stream = _backend.native_ops(student).multi_teacher_stream_backward
        rows = stream(ones, *tensors, None, saved, aux, *native.numbers_of(options))
    return losses, rows
