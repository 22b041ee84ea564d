"""What a method keeps beside its tensors, as one tensor: whatever stores or averages tensors takes it along."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

TEXT = 1024  # bytes, or a multiple: states of one method have one size, as element-wise loops over two of them need


def pack(state: dict[str, Any], random: Tensor) -> Tensor:
    """uint8 [n] on the CPU: `state` (numbers, strings, lists, dicts of them) as JSON, and after it `random`, uint8."""
    text = json.dumps(state).encode()
    text += b" " * (-(len(text) + 1) % TEXT) + b"\n"
    return torch.cat([torch.frombuffer(bytearray(text), dtype=torch.uint8), random])


def unpack(method: str, packed: Any) -> tuple[dict[str, Any], Tensor]:
    """(state, random) of what `pack` made, or of the dict that earlier versions saved."""
    if isinstance(packed, dict):
        return {key: value for key, value in packed.items() if key != "random"}, packed["random"].cpu()
    try:
        # torch.load's map_location may have moved it.
        text, _, random = packed.cpu().numpy().tobytes().partition(b"\n")
        return json.loads(text), torch.from_numpy(np.frombuffer(random, dtype=np.uint8).copy())
    except (AttributeError, ValueError) as error:
        got = f"{packed.dtype} {list(packed.shape)}" if isinstance(packed, Tensor) else type(packed).__name__
        raise ValueError(
            f"{method}: _extra_state must be the uint8 tensor that get_extra_state() gave, got {got} that is not: "
            "leave it out of averages and casts of a state dict"
        ) from error
