"""The networks of a method: which learn, which only teach, and how each is run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._batch import Batch
from fastkd.methods._calls import GivesLogits, as_argument, call_network, has_auxiliary_heads, logits_from, logits_in
from fastkd.methods._checks import check_apart, check_network, check_networks, is_sequence
from fastkd.methods._features import giving_outputs
from fastkd.methods._twins import Twin
from fastkd.models import prepared
from fastkd.ops.topk import TopK

if TYPE_CHECKING:
    from typing_extensions import Self


class Networks(nn.Module):
    """What `Method` says of its `learners` and its `frozen` networks."""

    gives_outputs = False
    leaves_unused = False

    def __init__(
        self,
        learners: Mapping[str, nn.Module | Sequence[nn.Module]],
        frozen: Mapping[str, nn.Module | Sequence[nn.Module]],
    ):
        super().__init__()
        learning = self._adopt(learners)
        teaching = self._adopt(frozen)
        check_apart(self._name(), learning, teaching)
        self._learner_names, self._frozen_names = tuple(learning), tuple(teaching)
        self._frozen_arguments = tuple(frozen)
        self.leaves_unused |= any(map(has_auxiliary_heads, learning.values()))
        self._wrapped: dict[str, Any] = {}  # learner's name -> what map_learners made of it; not in the state dict
        self._teaching: dict[nn.Module, tuple[Any, Any]] = {}  # what map_teachers made of it, and of its features
        self._twins: dict[nn.Module, Twin] = {}  # what prepare_teachers made; not in the state dict
        self._known: Batch | None = None  # the batch whose part is at hand, where it knows what networks say
        for name in self._frozen_arguments:
            self.get_submodule(name).requires_grad_(False).eval()

    def map_learners(self, wrap: Callable[[nn.Module], Callable[..., Any]]) -> Self:
        """Run each learning network through wrap(network): DistributedDataParallel, torch.compile. Returns the method.

        A second call wraps the first one's result. State dicts and `deployable()` bear the networks themselves. A
        method that needs features hands `wrap` a module that holds the network and returns its `Outputs`.
        """
        self._wrapped = {name: self._wrap(wrap, name, self._to_wrap(name)) for name in self._learner_names}
        return self

    def map_teachers(self, wrap: Callable[[nn.Module], Callable[..., Any]]) -> Self:
        """Run each network that only teaches through wrap(network), as `map_learners` does. Returns the method.

        Of one with `forward_features`, `wrap` is handed a second module, whose call returns its `Outputs`. A second
        call replaces the first one's wrappers.
        """
        found = {}
        for name in self.teacher_names:
            network = self.get_submodule(name)
            found[network] = self._wrap(wrap, name, network), self._wrap(wrap, name, giving_outputs(network))
        self._teaching = found
        return self

    def prepare_teachers(
        self, prepare: Callable[[nn.Module], nn.Module] | None = prepared, note: Callable[[str], None] | None = None
    ) -> Self:
        """Run of each frozen network prepare(network), a copy that computes the same sooner. Returns the method.

        A copy is made when its network first teaches, and again where that one's weights have changed since or moved;
        a write to `.data` is not seen. Mean teachers, whose weights follow the learners', run as they are, and so do
        all that `map_teachers` wraps.

        prepare  `fastkd.models.prepared`, or a function that calls it with other options; None runs them as they are.
        note     is told in a sentence what could not be done (`Prepared.left_out`), once for each network.
        """
        self._twins = {}
        if prepare is not None:
            twins = {name: Twin(as_argument(name), prepare, note) for name in self.frozen_names}
            self._twins = {self.get_submodule(name): twin for name, twin in twins.items()}
        return self

    @property
    def learner_names(self) -> tuple[str, ...]:
        """The names of the learning networks: "student", "students.0", ..."""
        return self._learner_names

    @property
    def frozen_names(self) -> tuple[str, ...]:
        """The names of the networks that never change: "teacher", "guides.0", ..."""
        return self._frozen_names

    @property
    def teacher_names(self) -> tuple[str, ...]:
        """The names of those that teach and have no gradients: the frozen networks, and a subclass's mean teachers."""
        return self.frozen_names

    def learner(self, name: str) -> Any:
        """A learning network ("student", "students.0", ...) as it is run: wrapped by `map_learners`."""
        return self._wrapped[name] if name in self._wrapped else self.get_submodule(name)

    @property
    def no_topk(self) -> str:
        """For subclasses: why `taught` cannot be `fastkd.TopK` of mode "tail", in a clause; "" where it can.

        Where it can, the losses ask for it by `taught_logits_or_topk`.
        """
        return "its loss reads the logits of all classes"

    @torch.no_grad()
    def teach(self, network: nn.Module, inputs: Any, run: Callable[[nn.Module, Any], Any] | None = None) -> Any:
        """The output of a frozen network for `inputs`, or `run(network, inputs)`: in eval mode and without a graph.

        Where `phases` was told what it says of them (`taught`), its logits.
        """
        if any([module.training for module in network.modules()]):  # put back elsewhere: its statistics would move
            network.eval()
        known = self._known
        if known is not None and known.part is not None and known.taught is not None and run is None:
            of_part, rows = known.part
            name = next((name for name in self.frozen_names if self.get_submodule(name) is network), None)
            if inputs is of_part and name is not None:  # other inputs than the batch's are not known
                about = inputs, self._name(), as_argument(name)
                said = known.taught(name, rows, lambda: logits_from(self._as_run(network)[0], *about))
                if isinstance(said, TopK) and self.no_topk:
                    raise wrong_value(self._name(), "taught", f"logits of all classes ({self.no_topk})", "a TopK")
                return said
        plain, full = self._as_run(network)
        return call_network(plain, inputs) if run is None else run(full, inputs)

    def _as_run(self, network: nn.Module) -> tuple[Any, Any]:
        """What is called of a network that teaches, for its logits alone and for its features."""
        if network in self._teaching or network not in self._twins:
            return self._teaching.get(network, (network, network))
        twin = self._twins[network].of(network)
        return twin, twin

    def taught_logits(self, network: nn.Module, inputs: Any, argument: str) -> Tensor:
        """The logits [..., C] of a frozen network, by `teach`; errors call it `argument`."""
        return logits_in(self.teach(network, inputs), self._name(), argument)

    def taught_logits_or_topk(self, network: nn.Module, inputs: Any, argument: str) -> Tensor | TopK:
        """The same, or k classes a row where `phases` was told no more (`taught`): for losses that take both."""
        said = self.teach(network, inputs)
        return said if isinstance(said, TopK) else logits_in(said, self._name(), argument)

    def learned_logits(self, name: str, inputs: Any) -> Tensor:
        """The logits [..., C] of a learning network ("student", "students.0", ...), as it is run."""
        return logits_from(self.learner(name), inputs, self._name(), as_argument(name))

    def train(self, mode: bool = True) -> Self:
        """As in nn.Module; frozen networks stay in eval mode."""
        super().train(mode)
        for network in self._wrapped.values():
            if isinstance(network, nn.Module):
                network.train(mode)
        for name in self._frozen_arguments:
            self.get_submodule(name).eval()
        return self

    def _wrap(self, wrap: Callable[[nn.Module], Callable[..., Any]], name: str, network: nn.Module) -> Any:
        wrapped = wrap(network)
        if not callable(wrapped):
            expected = f"a function that returns a callable network for {name}"
            raise wrong_type(self._name(), "wrap", expected, type(wrapped).__name__)
        return wrapped

    def _to_wrap(self, name: str) -> Any:
        network = self.learner(name)
        if name in self._wrapped:
            return network
        if self.gives_outputs:
            return giving_outputs(network)
        return GivesLogits(network) if has_auxiliary_heads(network) else network

    def _adopt(self, networks: Mapping[str, nn.Module | Sequence[nn.Module]]) -> dict[str, nn.Module]:
        """Register the networks under their attribute names; returns them flat: "guides.0" for one of a sequence."""
        flat: dict[str, nn.Module] = {}
        for key, value in networks.items():
            if is_sequence(value):
                several = check_networks(self._name(), key, value)
                flat |= {f"{key}.{i}": network for i, network in enumerate(several)}
                self.add_module(key, nn.ModuleList(several))
            else:
                flat[key] = check_network(self._name(), key, value)
                self.add_module(key, flat[key])
        return flat

    @classmethod
    def _name(cls) -> str:
        return cls.__name__
