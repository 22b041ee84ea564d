"""Finished runs, looked at again: their networks come from their checkpoints, and nothing is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from fastkd._core.messages import UserError
from fastkd.runs.config import CompareConfig, TrainConfig
from fastkd.runs.folder import Run
from fastkd.runs.job import CompareJob, Job
from fastkd.runs.runner import Result, Runner, load_data
from fastkd.train import checkpoint, same_data
from fastkd.train.devices import cpu_threads
from fastkd.train.loop import Fit

_FREE = {
    "quiet": True,
    "tensorboard": False,
    "diversity": False,
    "resume": False,
}


def job_of(run: Run) -> Job:
    """The run of this folder, as its command found it; the folder may have been moved."""
    kind = CompareConfig if "methods" in run.options else TrainConfig
    known = {field.name for field in dataclasses.fields(kind)}
    out = run.folder.parents[1] if kind is CompareConfig else run.folder
    options: dict[str, Any] = {name: value for name, value in run.options.items() if name in known}
    # The K of --logits-topk is a part of what a stage learned from, and stands beside the cache alone.
    cache = bool(options.get("logits_topk"))
    config = kind(**options | _FREE | {"logits_cache": cache, "out": str(out)})
    if isinstance(config, TrainConfig):
        return Job.of(config)
    return CompareJob.of(config).runs()[run.options["method"], run.options["seed"]]


class Revisited:
    """A finished run: what it trained before the student, and the student's stage in each epoch that was kept."""

    def __init__(self, run: Run):
        job = job_of(run)
        data = load_data(job.config, note=lambda text: None)
        same_data.check(run.folder, data.description)
        self.run, self.runner = run, Runner(job, say=lambda text: None, data=data)
        self.earlier: dict[str, Result] = {}
        *stages, self._student = self.runner.stages.values()
        for stage in stages:
            found = self.runner.finished(stage, self._networks())
            if found is None:
                raise UserError(
                    f"{run.folder}: the cache does not hold its trained {stage.name} {stage.network}: repeat the "
                    "command of the run with --resume"
                )
            self.earlier[stage.name] = found

    @property
    def epochs(self) -> list[int]:
        """Those of which a checkpoint was kept; UserError where there is none."""
        found = checkpoint.epochs(self.run.folder / "checkpoints")
        if not found:
            raise UserError(f"{self.run.folder} holds no checkpoint: repeat the command of the run with --resume")
        return found

    def fit(self, epoch: int | None = None) -> Fit:
        """The student's stage as it was after an epoch, or after the last one that was kept."""
        file = checkpoint.path_of(self.run.folder / "checkpoints", self.epochs[-1] if epoch is None else epoch)
        fit = self.runner.fit(self._student, self._networks(), self.run.folder)
        fit.resume(file)
        return fit

    def student(self) -> Result:
        """The student after the last epoch that was kept."""
        fit = self.fit()
        return Result(self._student, fit.method.deployable(), fit.run() if self.run.finished else fit.rows, None)

    def _networks(self) -> dict[str, nn.Module]:
        return {name: result.network for name, result in self.earlier.items()}


@contextmanager
def revisited(run: Run) -> Iterator[Revisited]:
    """A run and as many threads as it was trained with."""
    with cpu_threads(run.options.get("threads")):
        yield Revisited(run)


def method_of(run: Run) -> str:
    """The method that trained it; of an ablation, whose runs have labels, the label's method."""
    return job_of(run).config.method if run.options.get("ablate") else str(run.options["method"])


def runs_by(runs: list[Run], methods: tuple[str, ...], analysis: str) -> list[Run]:
    """Those of a method that an analysis is for; UserError where there is none, with the command that makes one."""
    found = [run for run in runs if method_of(run) in methods]
    if found:
        return found
    names, more = " or ".join(methods), f"fastkd train --method {methods[0]} --out DIR makes one"
    compared = runs[0].options.get("methods")
    if compared and not runs[0].options.get("ablate"):
        out = runs[0].folder.parents[1]
        more = f"fastkd compare --methods {','.join([*compared, methods[0]])} --out {out} --resume adds one"
    raise UserError(f"{analysis} is of a run of {names}, got runs of others alone: {more}")
