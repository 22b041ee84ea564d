"""The rows of a study: one for each finished run, in its folder and all together in study.csv."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path
from typing import Any

from fastkd._core.files import write_atomic
from fastkd._core.messages import UserError
from fastkd.runs import study_pool
from fastkd.runs.study import Run, Study
from fastkd.runs.study_worker import ROW
from fastkd.train.metrics import write_csv

WORDS = ("method", "setting", "judged_on")
SCALE = {"epochs": "epochs", "train_images": "train_size"}  # column > option


def read_row(out: Path, run: Run) -> dict[str, Any] | None:
    """The finished run's row, or None where there is none."""
    path = out / "runs" / run.name / ROW
    row: dict[str, Any] | None = json.loads(path.read_text()) if path.is_file() else None
    return row


def finished(out: Path, runs: list[Run]) -> dict[str, Any]:
    """Name of a run > its row."""
    rows = {run.name: read_row(out, run) for run in runs}
    return {name: row for name, row in rows.items() if row is not None}


def write_rows(out: Path, study: Study) -> list[dict[str, Any]]:
    """study.csv: one row for each finished run of the file, in its order."""
    known = finished(out, list(study.runs))
    rows = []
    for run in study.runs:
        if run.name in known:
            rows.append({"method": run.method, "seed": run.seed, "setting": run.setting, **known[run.name]})
    write_csv(out / "study.csv", rows)
    return rows


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows as `write_rows` has them; UserError for a file that is none."""
    if not path.is_file():
        raise UserError(f"there is no file {path}: give a study.csv")
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a study.csv: {error}") from error
    if not rows or not {"method", "seed", "setting", "accuracy"} <= set(rows[0]):
        raise UserError(f"{path} is not a study.csv: it needs rows with method, seed, setting, accuracy")
    return [_read_row(f"{path}, row {number}", row) for number, row in enumerate(rows, 1)]


def _read_row(where: str, row: dict[Any, Any]) -> dict[str, Any]:
    """The columns of one row, in words and numbers; UserError where they are none."""
    if None in row or None in row.values():
        raise UserError(f"{where}: it has more or fewer columns than the first line")
    facts: dict[str, Any] = {}
    for column, word in row.items():
        try:
            facts[column] = word if column in WORDS else int(word) if column == "seed" else float(word or "nan")
        except ValueError:
            kind = "an integer" if column == "seed" else "a number"
            raise UserError(f"{where}: {column} must be {kind}, got {word!r}") from None
    if not math.isfinite(facts["accuracy"]):
        raise UserError(f"{where}: a finished run has an accuracy, got {row['accuracy']!r}: take the row out")
    return facts


def adopt(path: Path, study: Study, out: Path) -> None:
    """Takes the rows of a study.csv, of another machine say, as runs of OUT that are finished.

    A run that OUT has finished itself keeps its own row. UserError where a row is of no run of the study, or of one
    with other epochs or another number of images; the CSV does not know other options.
    """
    runs = {(run.method, run.setting, run.seed): run for run in study.runs}
    rows, seen = read_rows(path), set()
    for row in rows:
        if (row["method"], row["setting"], row["seed"]) not in runs:
            raise UserError(f"{path} has a row of {_told(row)}, which is no run of {study.name}: take it out")
        if _told(row) in seen:
            raise UserError(f"{path} has two rows of {_told(row)}: take one out")
        seen.add(_told(row))
        run = runs[row["method"], row["setting"], row["seed"]]
        for column, option in SCALE.items():
            asked, found = getattr(run.config(out), option), row.get(column)
            if asked is not None and found is not None and asked != found:
                raise UserError(f"{path}: {_told(row)} has {column} {found:g}, the study {asked}: take the row out")
    for row in rows:
        run = runs[row.pop("method"), row.pop("setting"), row.pop("seed")]
        if read_row(out, run) is None:
            facts = {k: int(v) if isinstance(v, float) and v.is_integer() else v for k, v in row.items()}
            (out / "runs" / run.name).mkdir(parents=True, exist_ok=True)
            write_atomic(out / "runs" / run.name / ROW, json.dumps(facts, indent=1).encode())
            if math.isfinite(row.get("seconds", math.nan)):
                study_pool.add_spent(out, run, row["seconds"])


def _told(row: dict[str, Any]) -> str:
    return f"{row['method']}, seed {row['seed']}, setting {row['setting']}"
