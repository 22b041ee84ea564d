"""What a row of a logits cache holds: the logits of all classes, or the k likeliest classes of a row.

A form turns logits [B, C] into a NumPy array of B rows, and such rows into what a method's losses take.
"""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from fastkd.ops.topk import TopK

DType = Literal["float32", "float16"]
DTYPES: dict[DType, Any] = {"float32": np.float32, "float16": np.float16}
FLOATS = {str(dtype): dtype for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16)}


class AllClasses:
    """A row is its logits, [C] float32 or float16."""

    def __init__(self, classes: int, dtype: DType):
        self.classes, self.shape, self.dtype = classes, (classes,), np.dtype(DTYPES[dtype])
        self.facts: dict[str, Any] = {"dtype": dtype}

    def kept(self, logits: Tensor, count: int) -> np.ndarray:
        """[B, C] of a network's logits; ValueError for others, and for what float16 cannot hold."""
        values = checked(logits, count, self.classes).float().cpu().numpy()
        with np.errstate(over="ignore"):
            kept = np.ascontiguousarray(values, dtype=self.dtype)
        if kept.dtype != values.dtype and (np.isinf(kept) & ~np.isinf(values)).any():
            largest = float(np.abs(values[np.isfinite(values)]).max())
            raise ValueError(f"LogitsCache: float16 cannot hold the logit {largest:g}: keep them as float32")
        return kept

    def given(self, values: np.ndarray, counts: np.ndarray, device: torch.device, dtype: torch.dtype | None) -> Tensor:
        """The logits [B, C] in the network's dtype; rows that do not count, False in `counts` [B], are 0."""
        return torch.from_numpy(values).to(device, dtype, non_blocking=True)


class TopClasses:
    """A row is its k likeliest classes: ids [k] int32, log-probabilities [k] float16, that of all others float32."""

    def __init__(self, classes: int, k: int):
        if isinstance(k, bool) or not isinstance(k, int) or not 1 <= k <= classes:
            raise ValueError(f"LogitsCache: topk must be an integer from 1 to {classes}, the classes, got {k!r}")
        self.classes, self.k, self.shape = classes, k, ()
        self.dtype = np.dtype([("ids", "<i4", (k,)), ("log_probs", "<f2", (k,)), ("log_tail", "<f4")])
        self.facts: dict[str, Any] = {"topk": k}

    def kept(self, logits: Tensor, count: int) -> np.ndarray:
        """B rows of a network's logits; ValueError for others."""
        log_p = checked(logits, count, self.classes).double().log_softmax(-1)
        log_probs, ids = log_p.topk(self.k, -1)  # NaN is above all numbers
        if bool(log_probs.isnan().any()):
            raise ValueError("LogitsCache: logits must leave each row a softmax, got NaN or infinite ones")
        tail = log_p.scatter(-1, ids, -torch.inf).logsumexp(-1)
        rows = np.zeros(count, self.dtype)
        rows["ids"] = ids.cpu().numpy()
        with np.errstate(over="ignore"):  # below -65504 is -inf, which is no entry
            rows["log_probs"] = log_probs.cpu().numpy()
        rows["log_tail"] = tail.cpu().numpy()
        return rows

    def given(self, values: np.ndarray, counts: np.ndarray, device: torch.device, dtype: torch.dtype | None) -> TopK:
        """The sparse teacher of these rows; those that do not count have no entry."""
        ids, log_probs, tail = (
            torch.from_numpy(np.ascontiguousarray(values[name])).to(device, non_blocking=True)
            for name in self.dtype.names or ()
        )
        if not counts.all():
            nowhere = torch.from_numpy(~counts).to(device)
            ids = ids.masked_fill(nowhere[:, None], -1)
        return TopK(ids, log_probs, tail_log_prob=tail)


Form = AllClasses | TopClasses


def form_of(classes: int, dtype: DType, topk: int | None) -> Form:
    """What rows hold; ValueError for what cannot be."""
    if dtype not in DTYPES:
        raise ValueError(f"LogitsCache: dtype must be 'float32' or 'float16', got {dtype!r}")
    if topk is None:
        return AllClasses(classes, dtype)
    if dtype != "float32":
        raise ValueError(f"LogitsCache: dtype must be left out where topk is given, whose form is fixed, got {dtype!r}")
    return TopClasses(classes, topk)


def checked(logits: Tensor, count: int, classes: int) -> Tensor:
    """ValueError for what is no logits [B, C]."""
    if logits.shape != (count, classes) or str(logits.dtype) not in FLOATS:
        got = f"{logits.dtype} {list(logits.shape)}"
        raise ValueError(f"LogitsCache: logits must be floating-point [{count}, {classes}], got {got}")
    return logits
