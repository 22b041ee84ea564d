"""One kind of call of a network, captured: what `fastkd.graphs` replays. Nothing here needs a GPU."""

from __future__ import annotations

import contextlib
import random
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.utils._pytree import tree_flatten, tree_unflatten

from fastkd.graphs.recorder import Recorder, Recording

CHOICES = 4  # at most this many recorded backward passes per capture

_Choice = tuple[tuple[int, ...] | None, ...]  # the strides of the outputs' gradients, None for those without


class NotCapturedError(RuntimeError):
    """Why a network has no graph."""


class PendingBackward:
    """Whether activations of a network wait for their backward pass: the next replay would overwrite them."""

    def __init__(self) -> None:
        self._last: Callable[[], object | None] = lambda: None

    def any(self) -> bool:
        """Whether activations still wait."""
        return self._last() is not None

    def start(self) -> object:
        """What the autograd graph of the caller keeps: where it is given up, so is the backward pass."""
        token = _Token()
        self._last = weakref.ref(token)
        return token

    def finish(self, token: object) -> None:
        """Ends the wait of `token`; RuntimeError where its activations are gone."""
        if self._last() is not token:
            raise RuntimeError("a backward pass through a CUDA graph can be made once only: its activations are gone")
        self._last = lambda: None


class _Token:
    pass


class Capture:
    """Calls without gradients.

    Args:
        network: what is captured, in its present modes, under the present autocast.
        leaves: the tensors of a call, `form` what it is made of.
        pool: where the recording has its memory.
        pending: of the network.
    """

    trains = False

    def __init__(
        self,
        network: nn.Module,
        leaves: Sequence[Tensor],
        form: Any,
        recorder: Recorder,
        pool: Any,
        pending: PendingBackward,
    ) -> None:
        self.network, self.form, self.recorder, self.pool, self.pending = network, form, recorder, pool, pending
        self.needs = [self.trains and leaf.requires_grad for leaf in leaves]
        with torch.no_grad():
            self.inputs = [torch.empty_like(leaf).copy_(leaf) for leaf in leaves]
        for own, needed in zip(self.inputs, self.needs, strict=True):
            own.requires_grad_(needed)
        # Inside, parameters are leaves of their own over the same storage: what autograd keeps about the real ones,
        # the stream of an earlier pass among it, does not come in, and gradients are this capture's alone.
        self.parameters = [p for p in network.parameters() if self.trains and p.requires_grad]
        self.aliases = {p: p.detach().requires_grad_() for p in self.parameters}
        self.output_form: Any = None
        with _untouched(network, recorder.device):
            self._check()
            recorder.warm_up(self._warm_up)
            self.forward = recorder.record(self._run, pool)

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """The network's output for such leaves."""
        self._replay(leaves)
        return self._output(copies(self.results()))

    def prepare(self) -> None:
        """Record what a call needs beside the forward pass."""

    def results(self) -> list[Tensor]:
        """What the last replay wrote; the next one writes there again."""
        return [result for result in self.forward.results if result is not None]

    def _replay(self, leaves: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for own, leaf in zip(self.inputs, leaves, strict=True):
                own.copy_(leaf)
        self.forward.replay()

    def _output(self, tensors: Sequence[Tensor]) -> Any:
        found = iter(tensors)
        return tree_unflatten([None if r is None else next(found) for r in self.forward.results], self.output_form)

    def _run(self) -> list[Tensor | None]:
        args, kwargs = tree_unflatten(self.inputs, self.form)
        # Autocast keeps the weights that it has cast: those from before the run must not come in, its own not get out.
        torch.clear_autocast_cache()
        try:
            with _with_parameters(self.network, self.aliases):
                output = self.network(*args, **kwargs)
        finally:
            torch.clear_autocast_cache()
        results, self.output_form = tree_flatten(output)
        other = {type(result).__name__ for result in results if not (result is None or isinstance(result, Tensor))}
        if other:
            raise NotCapturedError(f"it returns {', '.join(sorted(other))} instead of tensors")
        return results

    def _warm_up(self) -> None:
        self._run()

    def _check(self) -> None:
        """One run that shows whether a recording would do all that the network does."""
        called: set[nn.Module] = set()
        tables = [(module._buffers, dict(module._buffers)) for module in self.network.modules()]
        drawn = _cpu_random_state()
        handle = register_module_forward_pre_hook(lambda module, inputs: called.add(module))
        try:
            self._warm_up()
        finally:
            handle.remove()
            replaced = any(list(map(id, now.values())) != list(map(id, then.values())) for now, then in tables)
            for now, then in tables:
                now.update(then)
        if replaced:
            raise NotCapturedError("it replaces its buffers: let it write into them")
        if _cpu_random_state() != drawn:
            raise NotCapturedError("it draws random numbers on the CPU")
        for name, module in self.network.named_modules():
            hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
            if module in called and any(hooks):
                raise NotCapturedError(f"{name or type(module).__name__} has hooks")


class TrainingCapture(Capture):
    """Calls with gradients, and their backward passes: one recording for each choice of outputs that have a gradient.

    In which order a gradient's memory is counts, too: another order may be another kernel, and other roundings.

    The autograd graph of the recorded forward pass is kept. A choice that was not there before goes through it without
    a recording, and is recorded before the next call. So parameters on which no such output depends have no gradient,
    as without a capture.
    """

    trains = True

    def __init__(self, *args: Any) -> None:
        self.backwards: dict[_Choice, tuple[list[Tensor], Recording]] = {}
        super().__init__(*args)
        self.wanted: dict[_Choice, list[Tensor]] = {}  # and memory for the gradients of those outputs
        differentiable = [result if result.requires_grad else None for result in self.results()]
        if sum(result is not None for result in differentiable) == 1:
            self._want(differentiable)

    def __call__(self, leaves: Sequence[Tensor]) -> Any:
        """The outputs for `leaves`, which backward passes can follow."""
        self._replay(leaves)
        return self._output(_Replayed.apply(self, *leaves, *self.parameters))

    def prepare(self) -> None:
        """Records the backward passes that have been asked for and not replayed so far."""
        # Not in the backward pass, which runs in a thread of autograd's.
        for choice, grad_outputs in self.wanted.items():
            recording = self.recorder.record(partial(self._backward, choice, grad_outputs), self.pool)
            self.backwards[choice] = grad_outputs, recording
        self.wanted.clear()

    def gradients(self, grad_outputs: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Gradients of leaves and parameters, given those of the outputs."""
        choice, given = _choice(grad_outputs), [grad for grad in grad_outputs if grad is not None]
        if choice in self.backwards:
            own, recording = self.backwards[choice]
            torch._foreach_copy_(own, given)
            recording.replay()
            copied = iter(copies([r for r in recording.results if r is not None]))
            found = iter([None if r is None else next(copied) for r in recording.results])
        else:
            self._want(grad_outputs)
            found = iter(self._backward(choice, given))
            self.recorder.join()
        return [*[next(found) if needed else None for needed in self.needs], *found]

    def _want(self, grad_outputs: Sequence[Tensor | None]) -> None:
        if len(self.backwards) < CHOICES:
            with torch.no_grad():
                self.wanted[_choice(grad_outputs)] = [
                    torch.zeros_like(grad) for grad in grad_outputs if grad is not None
                ]

    def _run(self) -> list[Tensor | None]:
        # What autograd saves is written again by every replay and by the optimiser. Its check of that does not look at
        # what went through hooks; a detached tensor is in no cycle with its graph.
        with saved_tensors_hooks(lambda tensor: tensor.detach(), lambda tensor: tensor):
            return super()._run()

    def _warm_up(self) -> None:
        results = [r for r in self._run() if r is not None and r.requires_grad]
        if not results:
            raise NotCapturedError("its outputs have no gradient")
        grad_outputs = self._gradients_of(
            results, [*self._sources(), *self.parameters], [torch.zeros_like(r) for r in results]
        )
        if any(grad is not None for grad in grad_outputs[len(self._sources()) :]):
            raise NotCapturedError("it has its parameters from elsewhere than its modules")

    def _sources(self) -> list[Tensor]:
        return [*[own for own, needed in zip(self.inputs, self.needs, strict=True) if needed], *self.aliases.values()]

    def _backward(self, choice: _Choice, grad_outputs: Sequence[Tensor]) -> list[Tensor | None]:
        results = [result for result, strides in zip(self.results(), choice, strict=True) if strides is not None]
        return self._gradients_of(results, self._sources(), grad_outputs)

    def _gradients_of(
        self, results: Sequence[Tensor], sources: Sequence[Tensor], grad_outputs: Sequence[Tensor]
    ) -> list[Tensor | None]:
        # A recording is made under the autocast of a forward pass.
        with torch.autocast(self.recorder.device.type, enabled=False):
            return list(torch.autograd.grad(results, sources, grad_outputs, retain_graph=True, allow_unused=True))


def _choice(grad_outputs: Sequence[Tensor | None]) -> _Choice:
    return tuple([None if grad is None else grad.stride() for grad in grad_outputs])


class _Replayed(torch.autograd.Function):
    """Copies of a capture's results to the caller, and the gradients back."""

    @staticmethod
    def forward(ctx: Any, capture: TrainingCapture, *sources: Tensor) -> tuple[Tensor, ...]:
        # Not for their values: autograd refuses to go back where they were written to in between.
        ctx.save_for_backward(*capture.parameters)
        ctx.set_materialize_grads(False)
        ctx.capture, ctx.token = capture, capture.pending.start()
        results = capture.results()
        copied = copies(results)
        without = [copy for copy, result in zip(copied, results, strict=True) if not result.requires_grad]
        ctx.mark_non_differentiable(*without)
        return tuple(copied)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:
        ctx.capture.pending.finish(ctx.token)
        ctx.saved_tensors  # noqa: B018
        return None, *ctx.capture.gradients(grad_outputs)


@torch.no_grad()
def copies(tensors: Sequence[Tensor]) -> list[Tensor]:
    """In memory of their own: `p.grad` may be the very tensor that a backward pass returns."""
    copied = [torch.empty_like(tensor) for tensor in tensors]
    if copied:
        torch._foreach_copy_(copied, list(tensors))  # one launch for many
    return copied


@contextlib.contextmanager
def _with_parameters(network: nn.Module, others: Mapping[nn.Parameter, Tensor]) -> Iterator[None]:
    """Other tensors in the place of parameters. torch.func.functional_call does not restore a module that is shared."""
    tables = {id(module._parameters): module._parameters for module in network.modules()}
    before = [(table, dict(table)) for table in tables.values()]
    try:
        for table, parameters in before:
            table.update({name: others[p] for name, p in parameters.items() if p in others})  # type: ignore[misc, index]
        yield
    finally:
        for table, parameters in before:
            table.update(parameters)


@contextlib.contextmanager
def _untouched(network: nn.Module, device: torch.device) -> Iterator[None]:
    """Afterwards buffers and random numbers are as before."""
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[device.index] if device.type == "cuda" else []):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for buffer, before in buffers:
            # By .data, which leaves the version alone: an earlier call may still wait for its backward pass.
            buffer.data.copy_(before)


def _cpu_random_state() -> tuple[Any, ...]:
    state: Any = np.random.get_state()
    kind, keys, *rest = state
    return torch.get_rng_state().numpy().tobytes(), random.getstate(), (kind, keys.tobytes(), *rest)
