"""How long it will still take, for the progress of an epoch, a comparison and a study."""

from __future__ import annotations

import statistics
from collections.abc import Hashable, Iterable, Mapping, Sequence


def expected(times: Mapping[Hashable, Sequence[float]], waiting: Iterable[tuple[Hashable, float]]) -> float | None:
    """Seconds that the runs of `waiting`, (kind, seconds that it has taken already), will take in all.

    times: what finished runs of each kind took; a kind of which none is finished counts as the mean of the others.
    None before there is one.
    """
    means = {kind: statistics.fmean(values) for kind, values in times.items() if values}
    if not means:
        return None
    usual = statistics.fmean(means.values())
    return sum(max(0.0, means.get(kind, usual) - spent) for kind, spent in waiting)


def duration(seconds: float) -> str:
    """`seconds` in words: s, min, or h and min."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02d} min"
