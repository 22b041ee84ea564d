"""Means, intervals and paired differences of the rows of a study."""

from __future__ import annotations

import math
import statistics
from dataclasses import dataclass
from typing import Any

from fastkd._core.extras import require

Rows = list[dict[str, Any]]
TEST = "paired t-test, two-sided"
LEVEL = 0.95


def half_width(values: list[float]) -> float:
    """Half the 95 % interval of the mean, by Student's t; NaN for fewer than two values."""
    if len(values) < 2:
        return math.nan
    t = require("scipy.stats", "fastkd study").t.ppf((1 + LEVEL) / 2, len(values) - 1)
    return float(t) * statistics.stdev(values) / math.sqrt(len(values))


@dataclass(frozen=True)
class Difference:
    """The paired differences of two methods, over the seeds that both have.

    Attributes:
        mean: of the differences.
        half: half the 95 % interval of the mean; NaN for one seed.
        p: of the paired t-test; NaN for one seed.
        better: how many differences are above 0.
        seeds: how many there are.
    """

    mean: float
    half: float
    p: float
    better: int
    seeds: int

    @property
    def interval(self) -> str:
        """The 95 % interval of the mean, in points; "-" for one seed."""
        low, high = 100 * self.mean - 100 * self.half, 100 * self.mean + 100 * self.half
        return "-" if math.isnan(self.half) else f"{low:+.2f} to {high:+.2f}"

    @property
    def verdict(self) -> str:
        """Whether the first is better."""
        if not self.half < abs(self.mean):  # NaN: of one seed nothing can be told
            return "cannot tell"
        return "holds" if self.mean > 0 else "does not"


def paired(values: dict[int, float], others: dict[int, float]) -> Difference | None:
    """values, others: seed > accuracy. None where no seed is common."""
    gains = [values[seed] - others[seed] for seed in values if seed in others]
    if not gains:
        return None
    mean, half, p = statistics.fmean(gains), half_width(gains), math.nan
    if len(gains) > 1:
        p = 0.0 if mean else 1.0  # of equal gains
        if statistics.stdev(gains) > 0:
            p = float(require("scipy.stats", "fastkd study").ttest_1samp(gains, 0.0).pvalue)
    return Difference(mean, half, p, sum(gain > 0 for gain in gains), len(gains))


def holm(ps: list[float]) -> list[float]:
    """p-values of so many comparisons made together, by Holm's step-down; NaN stays and does not count."""
    order = sorted((i for i, p in enumerate(ps) if not math.isnan(p)), key=lambda i: ps[i])
    adjusted, worst = list(ps), 0.0
    for rank, i in enumerate(order):
        worst = max(worst, min(1.0, (len(order) - rank) * ps[i]))
        adjusted[i] = worst
    return adjusted


def by_seed(rows: Rows, method: str, column: str = "accuracy") -> dict[int, float]:
    """seed > value, of the rows of one setting."""
    return {row["seed"]: row[column] for row in rows if row["method"] == method}


def mean_of(rows: Rows, method: str, *columns: str) -> float:
    """The mean over seeds of the sum of these columns; NaN where the rows lack one."""
    values = [sum(row.get(name, math.nan) for name in columns) for row in rows if row["method"] == method]
    return statistics.fmean(values)
