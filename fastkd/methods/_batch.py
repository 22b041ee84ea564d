"""One batch, cut by rows into the parts of a gradient accumulation."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from fastkd._core.checks import check_integer
from fastkd._core.labels import counted
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.ops.topk import TopK

Share = tuple[Tensor | int, Tensor | int]
# (name of a frozen network, its rows of the batch, what runs it on them) -> its logits of these rows, or k classes
Taught = Callable[[str, slice, Callable[[], Tensor]], Tensor | TopK]


class Batch:
    """Inputs and targets of one iteration; iterating gives (inputs, target, share) of each of its `chunks` parts.

    >>> batch = fastkd.methods.Batch(torch.arange(5), chunks=2)
    >>> [inputs.tolist() for inputs, target, share in batch]
    [[0, 1], [2, 3, 4]]

    Args:
        inputs: a tensor [B, ...], or a tuple, list or dict of them, nested; passed on untouched where chunks = 1.
        target: class indices [B] or [B, T], a tuple, list or dict of them, or None.
        chunks: number of parts, at most B; B rows are cut as evenly as they go.
        name: who asks, for the errors.
        taught: what hands out a frozen network's logits in the place of running it, as `Method.phases` says; None runs
            them all.
        tell: where `taught` is given, called as tell(batch, True) before a part is given out, and as tell(batch, False)
            after the last one, or whenever an iteration that was left is closed.

    `share` holds (rows of this part that count, rows of the batch that count); the mean losses of the parts, weighted
    by `Batch.weigh(loss, share)`, add up to the mean loss of the batch. None where the batch is one part.

    Attributes:
        part: (inputs, rows of the batch as a slice) of the part that was given out last; None before the first one.
    """

    def __init__(
        self,
        inputs: Any,
        target: Any = None,
        chunks: int = 1,
        *,
        name: str = "Batch",
        taught: Taught | None = None,
        tell: Callable[[Batch, bool], None] = lambda batch, at_hand: None,
    ):
        self.inputs, self.target, self.taught, self.tell = inputs, target, taught, tell
        self.part: tuple[Any, slice] | None = None
        self.chunks = check_integer(name, "chunks", chunks, 1)
        if self.chunks > 1:
            rows = _rows(name, "inputs", inputs)
            if target is not None and _rows(name, "target", target) != rows:
                raise wrong_value(name, "target", f"of {rows} rows as inputs", _rows(name, "target", target))
            self.chunks = max(1, min(chunks, rows))

    def __iter__(self) -> Iterator[tuple[Any, Any, Share | None]]:
        if self.taught is None:
            yield from (part for part, _ in self._parts())
            return
        try:
            for part, rows in self._parts():
                self.part = part[0], rows
                self.tell(self, True)
                yield part
        finally:
            self.tell(self, False)

    def _parts(self) -> Iterator[tuple[tuple[Any, Any, Share | None], slice]]:
        if self.chunks == 1:
            yield (self.inputs, self.target, None), slice(None)
            return
        count = next(_tensors(self.inputs)).shape[0]
        cuts = [slice(count * part // self.chunks, count * (part + 1) // self.chunks) for part in range(self.chunks)]
        parts = [(_cut(self.inputs, rows), _cut(self.target, rows), rows) for rows in cuts]
        total = _count(self.inputs, self.target)
        for inputs, target, rows in parts:
            yield (inputs, target, (_count(inputs, target), total)), rows

    @staticmethod
    def weigh(loss: Tensor, share: Share | None) -> Tensor:
        """A part's mean loss as it enters the sum over the parts; a scalar of the same dtype."""
        if share is None:
            return loss
        count, total = share
        dtype = torch.promote_types(loss.dtype, torch.float32)
        return (loss.to(dtype) * count / total).to(loss.dtype)


def rows_of(known: Tensor | TopK, rows: slice) -> Tensor | TopK:
    """These rows of what is known of a batch."""
    if isinstance(known, Tensor):
        return known[rows]
    log_probs, tail = (None if part is None else part[rows] for part in (known.log_probs, known.tail_log_prob))
    return dataclasses.replace(known, ids=known.ids[rows], log_probs=log_probs, tail_log_prob=tail)


def map_tree(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """The same nested tuples, lists and dicts, with function(leaf, ...) for each leaf; `others` have its form."""
    if isinstance(tree, Mapping):
        return {key: map_tree(function, branch, *(o[key] for o in others)) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        branches = [map_tree(function, *each) for each in zip(tree, *others, strict=True)]
        return type(tree)(*branches) if hasattr(tree, "_fields") else type(tree)(branches)  # a NamedTuple, or not
    return function(tree, *others)


def _tensors(tree: Any) -> Iterator[Any]:
    """The leaves of nested tuples, lists and dicts."""
    if isinstance(tree, Mapping):
        tree = tuple(tree.values())
    if isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)
    else:
        yield tree


def _rows(name: str, argument: str, tree: Any) -> int:
    leaves = list(_tensors(tree))
    if not leaves or not all(isinstance(leaf, Tensor) and leaf.dim() > 0 for leaf in leaves):
        expected = "a tensor [B, ...], or a tuple, list or dict of them, to be cut into chunks"
        other = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, Tensor)]
        raise wrong_type(name, argument, expected, ", ".join(other) or "nothing that has rows")
    rows: set[int] = {leaf.shape[0] for leaf in leaves}
    if len(rows) > 1:
        raise wrong_value(name, argument, "tensors of one number of rows", sorted(rows))
    return rows.pop()


def _cut(tree: Any, rows: slice) -> Any:
    if tree is None:
        return None
    if isinstance(tree, Mapping):
        return {key: _cut(branch, rows) for key, branch in tree.items()}
    if isinstance(tree, (tuple, list)):
        return tuple(_cut(branch, rows) for branch in tree)
    return tree[rows]


def _count(inputs: Any, target: Any) -> Tensor | int:
    """How many rows count: a 0-d tensor on the device where labels say so, since reading it would wait."""
    if target is None:
        rows: int = next(_tensors(inputs)).shape[0]
        return rows
    return counted(next(_tensors(target))).sum().clamp(min=1)
