"""Training: the loop, its options and checkpoints, the plans of stages, comparisons and reports."""

from fastkd.train.config import CompareConfig, TrainConfig, UserError
from fastkd.train.interrupts import Interrupted
from fastkd.train.loop import Fit, evaluate, train_epoch
from fastkd.train.plans import RECIPES, plan
from fastkd.train.runner import Runner
from fastkd.train.stages import Learner, Stage

__all__ = [
    "RECIPES",
    "CompareConfig",
    "Fit",
    "Interrupted",
    "Learner",
    "Runner",
    "Stage",
    "TrainConfig",
    "UserError",
    "evaluate",
    "plan",
    "train_epoch",
]
