"""The native losses of M networks in one launch: raw operations, their fake kernels, autograd.

csrc/mutual/op.cpp registers, with M networks of R rows and C classes, S of which want a gradient (`learners`, their
indices), and A = float64 for float64 logits, else float32:

    forward(...) -> loss A [M] or [M, R]; terms A [2, M] or [2, M, R], KD and CE, [0, ...] without with_terms;
                    rows [S, R, C]: gradients without reduction and grad_output; saved A [S, R]: inverse of the power of
                    two that float16 rows were multiplied by ([0, R] for other dtypes); aux A [2]: the factor that
                    `rows` still lacks (1 / rows that count), targets out of range
    backward(grad_output, rows, saved, aux, learners, reduction) -> [S, R, C]
    backward_(grad_output, rows, saved, aux, learners, reduction): the same in place
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastkd import _backend
from fastkd.ops import _losses
from fastkd.ops._autograd import Inputs, graph_is_kept, may_read_values, save_for_backward, with_kept
from fastkd.ops._formulas import accumulate_dtype, count_rows, rows_of
from fastkd.ops._inputs import REDUCTIONS, out_of_range
from fastkd.ops._peer_losses import Options, Tensors, reference


def register_fakes(namespace: str) -> None:
    """`namespace` is fastkd, or the test build that runs the CUDA kernels on the host."""

    def forward(
        logits: Sequence[Tensor], teachers: Sequence[Tensor], target: Tensor | None, soft: Tensor | None,
        weights: Tensor | None, teacher_weights: Tensor | None, scalars: Tensor | None, host_weights: Sequence[float],
        temperature: float, kd_weight: float, ce_weight: float, num_items: float, cross_entropy: bool,
        label_smoothing: float, ignore_index: int, scale_by_t2: bool, reduction: int, with_terms: bool,
        learners: Sequence[int], stream: bool,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        like, rows = logits[0], count_rows(logits[0])
        dtype = accumulate_dtype(like.dtype)
        shape = (len(logits), rows) if reduction == 0 else (len(logits),)
        return (
            like.new_empty(shape, dtype=dtype),
            like.new_empty((2 if with_terms else 0, *shape), dtype=dtype),
            like.new_empty((len(learners), rows, like.shape[-1])),
            like.new_empty((len(learners) if like.dtype == torch.float16 else 0, rows), dtype=dtype),
            like.new_empty((2,), dtype=dtype),
        )

    def backward(
        grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, learners: Sequence[int], reduction: int
    ) -> Tensor:
        return torch.empty_like(rows)

    torch.library.register_fake(f"{namespace}::mutual_forward", forward)

    def backward_(
        grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, learners: Sequence[int], reduction: int
    ) -> None: ...

    torch.library.register_fake(f"{namespace}::mutual_backward", backward)
    torch.library.register_fake(f"{namespace}::mutual_backward_", backward_)


def arguments(tensors: Tensors, options: Options, learners: Sequence[int]) -> tuple[Any, ...]:
    """Those of mutual_forward."""
    return (
        tensors.logits, tensors.teachers, tensors.target, tensors.soft, tensors.weights, tensors.teacher_weights,
        tensors.scalars, options.host_weights, options.temperature, options.kd_weight, options.ce_weight,
        options.num_items, options.cross_entropy, options.label_smoothing, options.ignore_index, options.scale_by_t2,
        REDUCTIONS.index(options.reduction), options.return_terms, learners, _backend.machine.stream_always,
    )  # fmt: skip


def forward(op: str, tensors: Tensors, options: Options, learners: Sequence[int]) -> tuple[Tensor, ...]:
    first = tensors.logits[0]
    out: tuple[Tensor, ...] = _backend.native_ops(first).mutual_forward(*arguments(tensors, options, learners))
    if tensors.target is not None and may_read_values(first) and out[4].tolist()[1] != 0:
        raise out_of_range(op, tensors.target, first.shape[-1], options.ignore_index)
    return out


def run(op: str, tensors: Tensors, options: Options) -> tuple[Tensor, Tensor | None]:
    """As reference(): the losses and their terms, from one launch."""
    learners: list[int] = []
    if torch.is_grad_enabled():
        if tensors.stacked is None:
            learners = [m for m, z in enumerate(tensors.logits) if z.requires_grad]
        elif tensors.stacked.requires_grad:
            learners = list(range(len(tensors.logits)))
    if not learners:
        out = forward(op, tensors, options, learners)
        return out[0], out[1] if options.return_terms else None
    given = len(tensors.logits) if tensors.stacked is None else 0
    out = _Native.apply(op, options, learners, given, *_flat(tensors))
    loss, terms = out if options.return_terms else (out, None)
    if not torch.compiler.is_compiling():
        state, values = loss.grad_fn.state, loss.detach()  # without its graph: no circle that only a collector frees
        loss = _losses.with_graphs(loss, lambda m: state.alone(values, m))
    return loss, terms


BEFORE_NETWORKS = 5  # of _flat()
NOTHING = (None,) * (4 + BEFORE_NETWORKS)  # the gradients of what comes before the networks in _Native


def _flat(tensors: Tensors) -> tuple[Tensor | None, ...]:
    given = tensors.logits if tensors.stacked is None else (tensors.stacked,)
    return (
        tensors.target, tensors.soft, tensors.weights, tensors.teacher_weights, tensors.scalars, *given,
        *tensors.teachers,
    )  # fmt: skip


def _tensors(flat: Sequence[Any], given: int) -> Tensors:
    """From _flat(), of which `given` are the networks: all of them, or 0: one tensor that they are stacked in."""
    target, soft, weights, teacher_weights, scalars, *networks = flat
    logits: tuple[Tensor, ...] = tuple(networks[:given])
    stacked: Tensor | None = None
    if given == 0:
        stacked, given = networks[0], 1
        logits = tuple([rows_of(z) for z in stacked.unbind(0)])
    return Tensors(logits, tuple(networks[given:]), stacked, target, soft, weights, teacher_weights, scalars)


class _State:
    """What a forward leaves for the backward of its losses: of all of them together, or of one network alone."""

    def __init__(
        self, op: str, options: Options, learners: Sequence[int], given: int, flat: Sequence[Tensor | None],
        rows: Tensor, saved: Tensor, aux: Tensor,
    ) -> None:  # fmt: skip
        self.op, self.options, self.learners, self.given = op, options, learners, given
        self.rows: Tensor | None = rows  # None: the graph was freed
        self.saved, self.aux = saved, aux
        self.inputs: Inputs | None = Inputs(flat)
        self.networks = _networks(flat, given)
        self.teachers = len(flat) - BEFORE_NETWORKS - len(self.networks)
        self.graphs = [z.grad_fn for z in self.networks]
        # Whether the stored rows are the gradients of a plain `losses.sum().backward()`.
        scaled = options.reduction == "none" or rows.dtype == torch.float16
        self.ready = not scaled and _backend.device_kind(rows) == "cpu"
        self.waiting: weakref.WeakSet[Any] | None = None  # the graphs of networks alone that were not gone through
        self.done: set[int] | None = None

    def gradients(self, grad: Tensor) -> Sequence[Tensor]:
        """The gradients of the networks that learn; the stored rows themselves where nobody will ask for them again."""
        rows = self.rows if self.rows is not None else self._stored()
        kept = graph_is_kept() or bool(self.waiting)
        if self.ready and type(grad) is Tensor and all([g == 1.0 for g in grad.tolist()]):
            result = rows.clone() if kept else rows
        elif not kept and _backend.device_kind(rows) != "cpu":
            # In place: a kernel sees on the GPU whether anything is left to do.
            reduction = REDUCTIONS.index(self.options.reduction)
            backward_ = _backend.native_ops(rows).mutual_backward_
            backward_(grad.contiguous(), rows, self.saved, self.aux, self.learners, reduction)
            result = rows
        else:
            result = _scaled(grad, rows, self.saved, self.aux, self.learners, self.options)
        networks = self.networks
        if not kept:
            self._release()
        return _as_given(result, networks, self.learners, self.given)

    def alone(self, losses: Tensor, m: int) -> Tensor | None:
        """Loss m of `losses`, which have no graph, with one of its own.

        None where the network is not what it was, or the graph was freed.
        """
        if self.rows is None:
            return None
        if m not in self.learners:
            return losses[m]
        place = m if self.given else 0
        z = self.networks[place]
        if not z.requires_grad or z.grad_fn is not self.graphs[place]:
            return None
        if self.waiting is None:
            self.waiting, self.done = weakref.WeakSet(), set()
        loss: Tensor = _Alone.apply(self, m, losses[m], z)
        return loss

    def gradient(self, m: int, grad: Tensor) -> Tensor:
        """The gradient of network m alone, in memory of its own."""
        rows, slot = self._stored(), self.learners.index(m)
        saved = self.saved[slot : slot + 1] if len(self.saved) else self.saved
        grad = grad.reshape(1, *grad.shape)
        result = _scaled(grad, rows[slot : slot + 1], saved, self.aux, [0], self.options)
        if self.given:
            return result.view(self.networks[m].shape)
        gradient = torch.zeros_like(self.networks[0])
        gradient[m] = result.view(gradient.shape[1:])
        return gradient

    def leave(self, graph: Any, m: int) -> None:
        """After the backward of network m alone, if that was its last."""
        if graph_is_kept() or self.waiting is None or self.done is None:
            return
        self.waiting.discard(graph)
        self.done.add(m)
        if len(self.done) == len(self.learners) and not self.waiting:
            self._release()

    def second(self, grad: Tensor, m: int | None = None) -> Sequence[Tensor]:
        """The gradients as functions of the inputs: of loss m, or of all."""
        self._stored()
        assert self.inputs is not None
        return _differentiable(self.inputs.unchanged(self.op), self.given, self.options, self.learners, grad, m)

    def _stored(self) -> Tensor:
        if self.rows is None:
            raise RuntimeError(
                f"{self.op}: Trying to backward through the graph a second time; say retain_graph=True the first time"
            )
        return self.rows

    def _release(self) -> None:
        self.rows = self.inputs = None
        self.networks, self.graphs = (), []


class _Native(torch.autograd.Function):
    """The native losses of all networks. The backward asked for with create_graph=True goes through the reference."""

    @staticmethod
    def forward(
        ctx: Any, op: str, options: Options, learners: Sequence[int], given: int, *flat: Tensor | None
    ) -> Tensor | tuple[Tensor, Tensor]:
        loss, terms, rows, saved, aux = forward(op, _tensors(flat, given), options, learners)
        if torch.compiler.is_compiling():
            ctx.state = None
            ctx.options, ctx.learners, ctx.given = options, learners, given
            save_for_backward(ctx, (rows, saved, aux, *flat))
        else:
            ctx.state = _State(op, options, learners, given, flat, rows, saved, aux)
            ctx.save_for_backward(aux)  # by which a second backward is told that the graph was freed
        ctx.set_materialize_grads(False)
        if not options.return_terms:
            return loss
        ctx.mark_non_differentiable(terms)
        return loss, terms

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, *_: Tensor | None) -> tuple[Tensor | None, ...]:
        saved_tensors, state = ctx.saved_tensors, ctx.state
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        if state is not None:
            learners, given = state.learners, state.given
            result = state.second(grad) if torch.is_grad_enabled() else state.gradients(grad)
            if given and len(learners) == given:  # all networks learn
                return (*NOTHING, *result, *([None] * state.teachers))
        else:
            learners, given = ctx.learners, ctx.given
            rows, saved, aux, *flat = with_kept(ctx, saved_tensors)
            if torch.is_grad_enabled():
                result = _differentiable(flat, given, ctx.options, learners, grad)
            else:
                result = _scaled(grad, rows, saved, aux, learners, ctx.options)
                result = _as_given(result, _networks(flat, given), learners, given)
        gradients: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
        for place, gradient in zip(learners if given else [0], result, strict=True):
            gradients[len(NOTHING) + place] = gradient
        return tuple(gradients)


class _Alone(torch.autograd.Function):
    """The loss of one network out of a forward of all: its graph holds this network and no other."""

    @staticmethod
    def forward(ctx: Any, state: _State, m: int, value: Tensor, z: Tensor) -> Tensor:
        ctx.state, ctx.m = state, m
        ctx.save_for_backward(state.aux)
        state.waiting.add(ctx)  # type: ignore[union-attr]  # made by alone()
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None, Tensor]:
        state, _ = ctx.state, ctx.saved_tensors
        if torch.is_grad_enabled():
            (gradient,) = state.second(grad, ctx.m)
        else:
            gradient = state.gradient(ctx.m, grad)
        state.leave(ctx, ctx.m)
        return None, None, None, gradient


def _scaled(
    grad: Tensor, rows: Tensor, saved: Tensor, aux: Tensor, learners: Sequence[int], options: Options
) -> Tensor:
    """[S, R, C], the stored rows times what they lack."""
    reduction = REDUCTIONS.index(options.reduction)
    result: Tensor = _backend.native_ops(rows).mutual_backward(grad.contiguous(), rows, saved, aux, learners, reduction)
    return result


def _networks(flat: Sequence[Any], given: int) -> Sequence[Tensor]:
    return flat[BEFORE_NETWORKS : BEFORE_NETWORKS + max(1, given)]


def _as_given(result: Tensor, networks: Sequence[Tensor], learners: Sequence[int], given: int) -> Sequence[Tensor]:
    """[S, R, C] as the gradients of the networks as they were given."""
    if given == 0:
        return (result if networks[0].dim() == 3 else result.view(networks[0].shape),)
    parts = result.unbind(0)
    if all([z.dim() == 2 for z in networks]):
        return parts
    return [g.view(networks[m].shape) for g, m in zip(parts, learners, strict=True)]


def _differentiable(
    flat: Sequence[Tensor | None], given: int, options: Options, learners: Sequence[int], grad: Tensor,
    m: int | None = None,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Through the reference. Of views, so that a network that was given twice gets each of its two gradients."""
    tensors = _tensors(flat, given)
    inputs = [] if tensors.stacked is None else [tensors.stacked]
    if given:
        tensors = tensors._replace(logits=tuple([z.view_as(z) for z in tensors.logits]))
        inputs = [tensors.logits[k] for k in (learners if m is None else [m])]
    loss, _ = reference(tensors, options)
    return torch.autograd.grad(loss if m is None else loss[m], inputs, grad, create_graph=True)
