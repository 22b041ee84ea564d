"""The engine that trains any method: the loop, its checkpoints, metrics and devices. Runs on top are fastkd.runs."""

from importlib import import_module
from typing import Any

from fastkd._core.messages import UserError
from fastkd.train.evaluation import evaluate
from fastkd.train.interrupts import Interrupted
from fastkd.train.loop import Fit, train_epoch
from fastkd.train.task import Setup, Task

# Names of fastkd.runs that were here first; asked for on use, since runs stand on the engine.
_RUNS = {
    "CompareConfig": "config",
    "TrainConfig": "config",
    "RECIPES": "plans",
    "plan": "plans",
    "Runner": "runner",
    "Learner": "stages",
    "Stage": "stages",
}

__all__ = ["Fit", "Interrupted", "Setup", "Task", "UserError", "evaluate", "train_epoch", *_RUNS]


def __getattr__(name: str) -> Any:
    if name in _RUNS:
        return getattr(import_module(f"fastkd.runs.{_RUNS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
