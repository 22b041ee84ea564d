"""CUDA graphs around the networks of a method: one launch where a network's pass has hundreds.

    Graphs(device).wrap(method)         # once its networks are on the device
    for inputs, target in loader: ...   # as before

Forward and backward pass of each network are graphs of their own, replayed in the order in which the method asks for
them: ORC trains other networks in every step. Losses and the optimiser's step stay outside.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten

from fastkd.graphs.capture import Capture, NotCapturedError, PendingBackward, TrainingCapture
from fastkd.graphs.recorder import CudaRecorder, Recorder

if TYPE_CHECKING:
    from fastkd.methods import Method

__all__ = ["Graphed", "Graphs"]

KINDS = 8  # captured call signatures per network, at most
SEEN = 256  # signatures that are remembered after their first call
STARTS = 8  # re-captures of a network whose tensors moved, at most


class Graphs:
    """What the graphs of one method's networks share.

    Args:
        device: the GPU that the networks are on.
        note: is told, once for a network, that it runs without a graph, and why.
        recorder: what records; None for CUDA graphs.
    """

    def __init__(
        self, device: torch.device, note: Callable[[str], None] = print, recorder: Recorder | None = None
    ) -> None:
        self.recorder = CudaRecorder(torch.device(device)) if recorder is None else recorder
        self.note = note
        # For calls without gradients, in all networks: their results are copied before the next replay.
        self.pool = self.recorder.pool()

    def __deepcopy__(self, memo: dict[int, Any]) -> Graphs:
        return self  # where a method is copied: the device is the same

    def wrap(self, method: Method) -> Method:
        """Run every network of the method, those that only teach among them, as `Graphed`. Returns the method.

        ValueError for a network in DistributedDataParallel or compiled.
        """
        names = {id(module): name for name, module in method.named_modules()}

        def graphed(network: nn.Module) -> Graphed:
            # A method that needs features hands over a module that holds the network.
            name = names.get(id(network)) or names.get(id(getattr(network, "network", None)))
            if isinstance(network, DistributedDataParallel) or hasattr(network, "_orig_mod"):
                kind = type(network).__name__
                raise ValueError(f"Graphs.wrap: networks must be neither compiled nor in parallel, got a {kind}")
            return Graphed(network, self, name or type(network).__name__)

        return method.map_learners(graphed).map_teachers(graphed)


class Graphed(nn.Module):
    """A network whose calls are replayed from CUDA graphs, one for each kind of call.

    Kinds differ in shapes, strides, dtypes, autocast, gradients, and the modes of the modules. The first call of a kind
    runs as ever, the second one is captured. Inputs are tensors, also in tuples, lists and dicts; outputs, too, and
    None. Outputs and gradients are the caller's own, not the graphs' memory.

    These calls run as ever: those between a call with gradients and its backward pass; kinds beyond the eighth; and all
    of a network that cannot be captured, of which `Graphs.note` is told. Such a network waits for the device, draws
    random numbers on the CPU, has hooks, replaces its buffers, is on another device, or fails in the capture. Where its
    parameters or buffers moved, new graphs are made.

    What a forward pass decides in Python is decided when it is captured. A backward pass can be made once, and not be
    differentiated.

    Attributes:
        network: the network itself.
        name: for notes.
        replays: calls that were replayed.
    """

    def __init__(self, network: nn.Module, graphs: Graphs, name: str = "") -> None:
        super().__init__()
        self.network, self.name, self.replays = network, name, 0
        self.training = network.training
        self._graphs, self._state = graphs, _State()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What `network` returns for these arguments: a replay where the call is of a kind that can be recorded."""
        leaves, form = tree_flatten((args, kwargs))
        capture = self._capture(leaves, form)
        if capture is None:
            return self.network(*args, **kwargs)
        self.replays += 1
        return capture(leaves)

    def _capture(self, leaves: list[Any], form: Any) -> Capture | None:
        """For this call, made where it is the second of its kind; None where the network itself is to run."""
        state = self._state
        if state.refused or torch.is_inference_mode_enabled() or torch.compiler.is_compiling():
            return None
        if not leaves or not all(isinstance(leaf, Tensor) for leaf in leaves):
            return None
        try:
            layout = state.layout
            if layout is None or not layout.holds():
                layout = state.start(self.network)
            kind = _kind(leaves, form, layout)
            capture = state.captures.get(kind)
            if capture is None and not state.due(kind):
                return None
            if kind.trains and state.pending.any():
                return None
            if capture is None:
                capture = state.captures[kind] = self._make(kind, layout, leaves, form)
            capture.prepare()
        except Exception as error:
            self._refuse(error)
            return None
        return capture

    def _make(self, kind: _Kind, layout: _Layout, leaves: list[Tensor], form: Any) -> Capture:
        state, recorder = self._state, self._graphs.recorder
        elsewhere = {str(t.device) for t in (*leaves, *layout.tensors) if t.device != recorder.device}
        if elsewhere:
            raise NotCapturedError(f"it or its inputs are on {' and '.join(sorted(elsewhere))}, not {recorder.device}")
        if not kind.trains:
            return Capture(self.network, leaves, form, recorder, self._graphs.pool, state.pending)
        if any(buffer.requires_grad for buffer in self.network.buffers()):
            raise NotCapturedError("it has buffers that require grad")
        # Not the pool of all: activations live on until the backward pass, and other networks run in between.
        state.pool = recorder.pool() if state.pool is None else state.pool
        return TrainingCapture(self.network, leaves, form, recorder, state.pool, state.pending)

    def _refuse(self, error: Exception) -> None:
        self._state = _State()
        self._state.refused = True
        self._graphs.pool = self._graphs.recorder.pool()  # the old one may hold the remains of a capture
        reason = str(error) if isinstance(error, NotCapturedError) else f"{type(error).__name__}: {error}"
        self._graphs.note(f"{self.name} runs without CUDA graphs: {' '.join(reason.split())[:160]}")


class _State:
    """The captures of a network. A copy of the network has none."""

    def __init__(self) -> None:
        self.refused = False
        self.starts = 0
        self.layout: _Layout | None = None
        self.captures: dict[_Kind, Capture] = {}
        self.seen: set[_Kind] = set()
        self.pool: Any = None
        self.pending = PendingBackward()

    def __reduce__(self) -> tuple[type[_State], tuple[()]]:
        return _State, ()

    def start(self, network: nn.Module) -> _Layout:
        """Its tensors are new, or were moved."""
        self.starts += 1
        if self.starts > STARTS:
            raise NotCapturedError("its parameters or buffers are replaced or moved again and again")
        self.captures.clear()
        self.pool = None
        self.layout = _Layout(network)
        return self.layout

    def due(self, kind: _Kind) -> bool:
        """Whether a kind without a capture is to have one."""
        if kind in self.seen:
            return len(self.captures) < KINDS
        if len(self.seen) == SEEN:
            self.seen.clear()
        self.seen.add(kind)
        return False


class _Layout:
    """The tensors that a network consists of, and where they are."""

    def __init__(self, network: nn.Module) -> None:
        self.modules = list(network.modules())
        self.parameters = list(network.parameters())
        self.tensors = [*self.parameters, *network.buffers()]
        self._tables: list[dict[str, Any]] = [
            table for m in self.modules for table in (m._parameters, m._buffers, m._modules) if table
        ]
        self._members = self._now()  # kept alive: an id may not come again
        self._ids, self._places = list(map(id, self._members)), list(map(Tensor.data_ptr, self.tensors))

    def holds(self) -> bool:
        """Asked in every call: without a walk through the modules, without a Python loop."""
        return list(map(id, self._now())) == self._ids and list(map(Tensor.data_ptr, self.tensors)) == self._places

    def _now(self) -> list[Any]:
        return list(chain.from_iterable(map(dict.values, self._tables)))


class _Kind(NamedTuple):
    """What one capture is good for. `trains`: which parameters learn; () for a call without gradients."""

    form: Any
    tensors: tuple[Any, ...]
    autocast: tuple[Any, ...]
    modes: tuple[bool, ...]
    trains: tuple[bool, ...]


def _kind(leaves: Sequence[Tensor], form: Any, layout: _Layout) -> _Kind:
    device, grad = leaves[0].device.type, torch.is_grad_enabled()
    autocast = (torch.get_autocast_dtype(device), torch.is_autocast_cache_enabled())
    learning = tuple([p.requires_grad for p in layout.parameters]) if grad else ()
    needs = [grad and leaf.requires_grad for leaf in leaves]
    return _Kind(
        form,
        tuple([(t.shape, t.stride(), t.dtype, t.device, need) for t, need in zip(leaves, needs, strict=True)]),
        autocast if torch.is_autocast_enabled(device) else (),
        tuple([module.training for module in layout.modules]),
        learning or (False,) if any(learning) or any(needs) else (),
    )
