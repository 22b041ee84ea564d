"""A network whose named modules are watched as they run: for those that torch.fx cannot trace."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from torch import Tensor, nn

from fastkd.models.base import Outputs, logits_of


class Watched:
    """Runs a network and hands collect(logits, outputs of its modules `names` in this order) what came.

    The hooks are there during a call only, so that nothing of them is in a copy or a file of the network. Of a module
    that runs several times the last output counts, of a tuple the first tensor, as transformers' blocks return them.
    """

    def __init__(
        self, model: nn.Module, names: Sequence[str], collect: Callable[[Tensor, Sequence[Tensor]], Outputs]
    ) -> None:
        self.model, self.names, self.collect = model, list(names), collect
        for name in self.names:
            model.get_submodule(name)

    def __call__(self, *args: Any, **kwargs: Any) -> Outputs:
        """What `collect` makes of one call of the network; ValueError where a watched module did not run."""
        seen: dict[str, Tensor] = {}
        with self._watching(seen):
            logits = logits_of(self.model(*args, **kwargs))
        for name in self.names:
            if name not in seen:
                raise ValueError(f"with_features: {type(self.model).__name__} did not run layer {name!r}; name another")
        return self.collect(logits, [seen[name] for name in self.names])

    @contextlib.contextmanager
    def _watching(self, seen: dict[str, Tensor]) -> Iterator[None]:
        def hook_of(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: Any, output: Any) -> None:
                # A copy: what follows may work in place.
                seen[name] = _tensor_in(name, output).clone()

            return hook

        hooks = [self.model.get_submodule(name).register_forward_hook(hook_of(name)) for name in self.names]
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _tensor_in(name: str, output: Any) -> Tensor:
    first = output[0] if isinstance(output, (tuple, list)) and output else output
    if not isinstance(first, Tensor):
        raise ValueError(f"with_features: layer {name!r} must give a tensor, got {type(output).__name__}; name another")
    return first
