"""Tables of reports."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

from fastkd._core.files import write_atomic
from fastkd.runs.runner import Result
from fastkd.train.metrics import Row


def write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> Path:
    """A file of values, whole or not there; returns its path."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    write_atomic(path, text.getvalue().encode())
    return path


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table whose source is aligned too; the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [cells[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = [":" + "-" * max(2, widths[0] - 1), *("-" * max(2, w - 1) + ":" for w in widths[1:])]
    return "\n".join([line(header), f"| {' | '.join(rule)} |", *(line(row) for row in rows)])


def percent(value: float) -> str:
    """0..1 in percent with two digits; "-" for NaN."""
    return "-" if math.isnan(value) else f"{100 * value:.2f}"


def final(result: Result, name: str = "test_accuracy") -> float:
    """The metric `name` of the last epoch; NaN where there is none."""
    return result.rows[-1].get(name, math.nan) if result.rows else math.nan


def terms(rows: list[Row]) -> dict[str, list[float]]:
    """The terms of the loss, epoch by epoch, where there are several; those of peers are added up.

    {"ce": [...], "kd": [...]} from columns such as train_ce, train_kd, train_peers.0.ce.
    """
    found: dict[str, list[float]] = {}
    columns = [name for row in rows for name in row if name.startswith("train_")]
    for column in dict.fromkeys(columns):
        name = re.sub(r"\bpeers\.\d+\.", "", column.removeprefix("train_"))
        if name not in ("loss", "accuracy"):
            values = [row.get(column, math.nan) for row in rows]
            found[name] = [a + b for a, b in zip(found.get(name, [0.0] * len(rows)), values, strict=True)]
    return found if len(found) > 1 else {}
