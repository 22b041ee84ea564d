"""One run of a study in a process of its own; imported before the processes are forked, which then start at once."""

from __future__ import annotations

import json
import math
import statistics
import sys
import traceback
from pathlib import Path
from typing import Any, TextIO

from fastkd import models
from fastkd._core.files import write_atomic
from fastkd.runs.commands import train
from fastkd.runs.config import TrainConfig
from fastkd.runs.processes import FAILED, LOG, STOPPED, follow_parent, output_to
from fastkd.runs.runner import Result, Runner
from fastkd.runs.study_cost import costs
from fastkd.runs.tables import final
from fastkd.train.devices import cpu_threads
from fastkd.train.interrupts import Interrupted

ROW = "row.json"


def work(config: TrainConfig) -> None:
    """Carry out a run, or go on with it; leaves its row in OUT/row.json. The process ends with DONE, FAILED, STOPPED.

    A SIGINT, and the end of the study's process, stop it after the present batch, whose state is saved.
    """
    follow_parent()
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    with output_to(out / LOG) as log:
        try:
            carry_out(config, log)
        except (Interrupted, KeyboardInterrupt):
            sys.exit(STOPPED)
        except Exception as error:
            traceback.print_exc(file=log)
            print(f"failed: {' '.join(str(error).split()) or type(error).__name__}", file=log)
            sys.exit(FAILED)


def carry_out(config: TrainConfig, log: TextIO) -> dict[str, Any]:
    """The run, its report, and its row."""
    command = f"fastkd train --config {config.out}/config.yaml --out {config.out} --resume"
    results = train(config, command, say=lambda text: print(text, file=log, flush=True))
    with cpu_threads(config.threads):
        row = describe(config, results)
    write_atomic(Path(config.out) / ROW, json.dumps(row, indent=1).encode())
    return row


def describe(config: TrainConfig, results: dict[str, Result]) -> dict[str, Any]:
    """What the study's CSV says of a run: all of the last epoch; of test images nothing where there are others."""
    runner = Runner(config, say=lambda text: None)
    images: Any = runner.data.train
    part = "test" if runner.data.validation is None else "validation"
    student = results["student"]
    guides = [final(r, f"{part}_accuracy") for name, r in results.items() if name != "student" and r.rows]
    teacher = results.get("teacher")
    return {
        "judged_on": part,
        "accuracy": final(student, f"{part}_accuracy"),
        "loss": final(student, f"{part}_loss"),
        "train_accuracy": final(student, "train_accuracy"),
        "teacher_accuracy": final(teacher, f"{part}_accuracy") if teacher else math.nan,
        "guides_accuracy": statistics.fmean(guides) if guides else math.nan,
        "epochs": int(student.rows[-1]["epoch"]),
        "train_images": len(images),
        "parameters": models.parameters_count(student.network),
        **costs(runner, results),
    }
