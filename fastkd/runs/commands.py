"""What `fastkd train` and `fastkd compare` do, for the command line and for Python."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from fastkd._core.files import write_atomic
from fastkd._core.locks import lock, why_not_writable
from fastkd._core.messages import UserError, note
from fastkd.runs import compare as comparing
from fastkd.runs import environment
from fastkd.runs.ablations import asked
from fastkd.runs.config import CompareConfig, TrainConfig, differences, read_yaml, to_yaml
from fastkd.runs.folder import CONFIG, holds_run
from fastkd.runs.job import CompareJob, Job
from fastkd.runs.plans import RECIPES
from fastkd.runs.report import write_train_report
from fastkd.runs.runner import Result, Runner
from fastkd.runs.tables import percent
from fastkd.train import board, checkpoint
from fastkd.train.devices import cpu_threads
from fastkd.train.distributed import deterministic, joined, launched

Options = TypeVar("Options", TrainConfig, CompareConfig)


def _open(config: TrainConfig | CompareConfig) -> Path:
    """Make OUT, or check that this run may go on in it; leaves config.yaml there."""
    if not config.out:
        raise UserError("--out is missing: name a folder for the run")
    out = Path(config.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file: name a folder")
    if holds_run(out) and not config.resume:
        raise UserError(f"{out} holds a run already: add --resume to go on with it, or give another --out")
    if (out / CONFIG).exists():
        differing = differences(read_yaml(out / CONFIG), dataclasses.asdict(config))
        if differing:
            raise UserError(
                f"{out} holds a run with other options ({'; '.join(differing)}): give the same ones, or another --out"
            )
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made ({error.strerror}): name a folder that can be written") from error
    reason = why_not_writable(out)
    if reason:
        raise UserError(f"--out {out} cannot be written ({reason}): name a folder that can be written")
    return out


ADDED = {"channels_last": False, "prepare_teachers": False}  # what runs did before they had the option, or its default


def _as_begun(config: Options) -> Options:
    """A run that goes on keeps what it does where nobody asks for anything else: its steps are then the same bits."""
    path = Path(config.out) / CONFIG
    if not config.resume or not path.is_file():
        return config
    before = read_yaml(path)
    kept = {name: before.get(name, old) for name, old in ADDED.items() if getattr(config, name) is None}
    return dataclasses.replace(config, **kept)


def _keep_config(out: Path, config: TrainConfig | CompareConfig) -> None:
    write_atomic(out / CONFIG, to_yaml(config).encode())


def train(config: TrainConfig, command: str, say: Callable[[str], None] = print) -> dict[str, Result]:
    """Train one student, and what it needs before; leaves checkpoints, metrics, curves and a report in OUT."""
    job = Job.of(_as_begun(config))
    with joined(job.device, config.timeout) as world:
        job = job.among(world)
        config, say = job.config, say if world.first else lambda text: None
        if config.tensorboard:
            world.broadcast(lambda: board.writer_type() and None)  # only this process needs the package
        out = world.broadcast(lambda: _open(config))
        with world.locked(out), cpu_threads(config.threads), deterministic(config.deterministic):
            world.broadcast(lambda: _note_epochs(job, say))
            runner = Runner(job, say)
            world.broadcast(lambda: _keep_config(out, config))
            results = runner.run()
            others = runner.accuracies(results["student"].others)
            report = world.broadcast(lambda: write_train_report(job, results, others, runner.data, command))
    last = results["student"].rows[-1]
    say(f"{config.method}: test accuracy {percent(last['test_accuracy'])} % after epoch {int(last['epoch'])}")
    say(f"report: {report}, curves: {out / 'curves.png'}")
    return results


def _note_epochs(job: Job, say: Callable[[str], None]) -> None:
    config, out = job.config, job.folder
    before = read_yaml(out / CONFIG).get("epochs", config.epochs) if (out / CONFIG).exists() else config.epochs
    if before == config.epochs or not checkpoint.epochs(out / "checkpoints"):
        return
    guides = [f"{stage.name} keeps its {stage.epochs} epochs" for stage in list(job.stages.values())[:-1]]
    if config.schedule != "constant" or guides:
        what = [*guides, f"the schedule ({config.schedule}) changes"]
        say(
            f"note: planned were {before} epochs, now {config.epochs}: {', '.join(what)}, "
            "so the result is not that of a run planned like this"
        )


def compare(config: CompareConfig, command: str, say: Callable[[str], None] = print) -> comparing.Comparison:
    """Run all methods and seeds, print the table, and leave the report, the picture and the metrics in OUT."""
    config = asked(config)
    if config.methods == ["all"]:
        config = dataclasses.replace(config, methods=list(RECIPES))
    if launched() > 1:
        raise UserError("fastkd compare runs in one process: start it without torchrun")
    config = _as_begun(config)
    job = CompareJob.of(config)
    for option in job.unused():
        note(f"options.{option} changes nothing: none of {', '.join(config.methods)} has it")
    if config.tensorboard:
        board.writer_type()
    out = _open(config)
    with lock(out), cpu_threads(config.threads), deterministic(config.deterministic):
        comparing.check_data(config)
        _keep_config(out, config)
        comparison = comparing.run(job, say=say if not config.quiet else lambda text: None)
        paths = comparing.write(comparison, command)
        where = f"{environment.describe(job.device)}; {comparing.backend_text(job.device)}"
    say("\n" + comparing.summary_table(comparison))
    say(
        "\nAccuracies after the last epoch, mean +- standard deviation over the seeds; median time of a student's step."
    )
    say(where)
    say(f"report: {paths[0]}, picture: {paths[1]}, metrics: {paths[2]}, {paths[3]}")
    return comparison
