"""What the modules of fastkd.losses share: hyper-parameters that are attributes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.loss import _Loss

from fastkd.ops.shared import Reduction


class Fixed(_Loss):
    """A loss whose hyper-parameters are attributes: each may be set anew at any time.

    Those in `_tensors` may be numbers, lists or tensors, one in the place of another. A tensor is a buffer, a parameter
    a parameter. A state dict that has no entry for a buffer leaves it as it is; one that has an entry where the module
    has no tensor brings a buffer.
    """

    reduction: Reduction
    _tensors: tuple[str, ...] = ()
    _shown: tuple[str, ...] = ()

    def __setattr__(self, name: str, value: object) -> None:
        if name not in self._tensors:
            return super().__setattr__(name, value)  # type: ignore[arg-type]  # torch: Tensor | Module
        for table in (self._parameters, self._buffers, self.__dict__):
            table.pop(name, None)
        if isinstance(value, nn.Parameter):
            self.register_parameter(name, value)
        elif isinstance(value, Tensor):
            self.register_buffer(name, value)
        else:
            self.__dict__[name] = value

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        *rest: Any,
    ) -> None:
        for name in self._tensors:
            saved = state_dict.get(prefix + name)
            if saved is not None and not isinstance(getattr(self, name), Tensor):
                setattr(self, name, saved.detach().clone())
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        kept = {prefix + name for name in self._tensors if name in self._buffers}
        missing_keys += [key for key in missing if key not in kept]

    def extra_repr(self) -> str:
        return ", ".join(f"{name}={_told(getattr(self, name))}" for name in self._shown)


def _told(value: object) -> str:
    return f"tensor{list(value.shape)}" if isinstance(value, Tensor) and value.dim() > 0 else repr(value)
