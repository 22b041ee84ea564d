"""Where networks put their logits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor


def find_logits(output: Any) -> Tensor | None:
    """The logits in what a network returned: itself, or its `logits` by attribute or by key; None where there are none.

    So return `fastkd.models.Outputs`, torchvision's networks with auxiliary heads, Hugging Face's, and plain dicts.
    """
    if isinstance(output, Tensor):
        return output
    logits = getattr(output, "logits", None)
    if logits is None and isinstance(output, Mapping):
        logits = output.get("logits")
    return logits if isinstance(logits, Tensor) else None
