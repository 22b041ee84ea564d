"""Which rows of a batch are compared with each other by relations (RKD, CTSL-MKT)."""

from __future__ import annotations

from torch import Tensor

from fastkd._core.labels import counted


def rows_that_count(target: Tensor | None) -> Tensor | None:
    """Indices [N] of the rows with a label, or None where all rows count.

    Relations mix rows, so that a row without a label must leave before they are computed. How many stay is read on the
    host, which waits for the device: ask before the networks run.
    """
    if target is None:
        return None
    counts = counted(target)
    if counts.dim() > 1:  # of several tokens, one is enough
        counts = counts.flatten(1).any(1)
    return None if bool(counts.all()) else counts.nonzero()[:, 0]


def select(features: Tensor, rows: Tensor | None) -> Tensor:
    return features if rows is None else features[rows]
