"""Several methods, several seeds: the runs, their statistics, the time of a step, the table and the picture."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import fastkd
from fastkd import models
from fastkd._core.files import write_atomic
from fastkd.runs import compare_pool, environment, processes
from fastkd.runs.ablations import variants
from fastkd.runs.compare_figure import draw
from fastkd.runs.config import CompareConfig, TrainConfig
from fastkd.runs.figures import LAST_EPOCH
from fastkd.runs.job import CompareJob
from fastkd.runs.report import data_text, optimization_text, speed_text
from fastkd.runs.runner import Result, Runner, load_data
from fastkd.runs.study_stats import Difference, paired
from fastkd.runs.tables import final, table
from fastkd.train import same_data
from fastkd.train.devices import to_device
from fastkd.train.loop import Fit
from fastkd.train.metrics import write_csv
from fastkd.train.time_left import duration, expected

ROUNDS = 30  # of timed steps with each backend
WARM_UP = 3
INTERVAL = "95 % interval of it"


@dataclass
class Comparison:
    """The results of all runs: results[method][seed][stage], and the median seconds of a step by method and backend."""

    config: CompareConfig
    results: dict[str, dict[int, dict[str, Result]]] = field(default_factory=dict)
    seconds: dict[str, dict[str, float]] = field(default_factory=dict)
    runners: dict[str, Runner] = field(default_factory=dict)  # of the first seed

    def gains(self, method: str) -> Difference | None:
        """Over ce, seed by seed; None where ce was not run."""
        if "ce" not in self.results or method == "ce":
            return None
        values = [dict(zip(self.config.seeds, self.accuracies(name), strict=True)) for name in (method, "ce")]
        return paired(*values)

    def accuracies(self, method: str) -> list[float]:
        """The student's test accuracy in 0..1, one for each seed."""
        return [final(results["student"]) for results in self.results[method].values()]


class Pace:
    """How fast the runs of a comparison get on; those that are finished already say nothing of it."""

    def __init__(self, config: CompareConfig):
        runs = [(method, seed) for seed in config.seeds for method in config.methods]
        self.all = len(runs)
        self.waiting = [run for run in runs if not compare_pool.last_checkpoint(config, *run).exists()]
        self.times: dict[Hashable, list[float]] = {}

    @contextmanager
    def run(self, method: str, seed: int) -> Iterator[None]:
        """Around one run."""
        started = time.monotonic()
        yield
        if (method, seed) in self.waiting:
            self.waiting.remove((method, seed))
            self.times.setdefault(method, []).append(time.monotonic() - started)

    def left(self) -> str:
        """What to say before a run: nothing before one has taken its time."""
        seconds = expected(self.times, [(method, 0.0) for method, _ in self.waiting])
        if seconds is None or not self.waiting:
            return ""
        return f" ({self.all - len(self.waiting)} of {self.all} runs are finished, about {duration(seconds)} left)"


def check_data(config: CompareConfig) -> None:
    """UserError where one of the runs that go on has trained on other data: before any of them is trained."""
    for seed in config.seeds:
        runs = [config.run(method, seed, {}) for method in config.methods]
        folders = [folder for folder in (Path(one.out) for one in runs) if same_data.has_state(folder)]
        if folders:
            same_data.go_on(folders, load_data(runs[0], note=lambda text: None).description)


def run(asked: CompareJob | CompareConfig, say: Callable[[str], None]) -> Comparison:
    """Run what is not there yet; what several methods share is trained once a seed.

    asked: what the command found out, or its options alone.
    """
    job = asked if isinstance(asked, CompareJob) else CompareJob.of(asked)
    runs = job.runs()  # what cannot be planned shows before anything is trained
    jobs = compare_pool.processes(job.config, job.device.type)
    if jobs > 1:
        log = Path(job.config.out) / processes.LOG
        say(f"{len(job.config.seeds)} seeds, {jobs} side by side; what each says is in {log}")
        compare_pool.carry_out(job.config, jobs, say)
        job, say = dataclasses.replace(job, config=dataclasses.replace(job.config, quiet=True)), lambda text: None
        runs = job.runs()
    config = job.config
    comparison = Comparison(config, {method: {} for method in config.methods})
    pace = Pace(config)
    for number, seed in enumerate(config.seeds):
        told = {} if number == 0 else {"note": lambda text: None}  # once, not for each seed
        data = load_data(runs[config.methods[0], seed].config, **told)
        for method in compare_pool.in_order(config.methods):
            runner = Runner(runs[method, seed], say, data=data)
            say(f"seed {seed}, {method}{pace.left()}")
            comparison.runners.setdefault(method, runner)
            with pace.run(method, seed):
                comparison.results[method][seed] = runner.run()
    for method in config.methods:
        results = comparison.results[method][config.seeds[0]]
        comparison.seconds[method] = time_steps(comparison.runners[method], results)
    return comparison


def time_steps(runner: Runner, results: dict[str, Result], rounds: int = ROUNDS) -> dict[str, float]:
    """Median seconds of a training step of the student's stage with each backend.

    The steps alternate between the backends, so that a change in the machine's load meets both alike.
    """
    stage = runner.stages["student"]
    trained = {name: results[name].network for name in stage.needs}
    times: dict[str, list[float]] = {"native": [], "reference": []}
    fits = {backend: runner.fit(stage, trained, None) for backend in times}
    for fit in fits.values():
        fit.initialise()
    inputs, target = to_device(next(iter(fits["native"].train_batches)), fits["native"].device)
    for number in range(WARM_UP + rounds):
        for backend in sorted(times, reverse=bool(number % 2)):
            seconds = _time_step(fits[backend], inputs, target, backend)
            if number >= WARM_UP:
                times[backend].append(seconds)
    return {backend: statistics.median(values) for backend, values in times.items()}


def _time_step(fit: Fit, inputs: Any, target: torch.Tensor, backend: str) -> float:
    """Seconds of one step; "native" is the backend "auto": a method may ask for something that has no kernel."""
    fit.method.train()
    wait: Callable[[], None] = torch.cuda.synchronize if fit.device.type == "cuda" else lambda: None
    with fastkd.use_backend("auto" if backend == "native" else backend):
        wait()
        started = time.perf_counter()
        for _ in fit.steps.take(inputs, target):  # as the run takes them: its precision, its parts of a batch
            pass
        wait()
        return time.perf_counter() - started


def spread(values: list[float], scale: float = 100) -> str:
    """mean +- sample standard deviation."""
    mean = f"{scale * statistics.fmean(values):.2f}"
    return f"{mean} +- {scale * statistics.stdev(values):.2f}" if len(values) > 1 else mean


def summary_table(comparison: Comparison) -> str:
    """One row a method: accuracy, gain over CE and its interval, time of a step on both backends."""
    header = ["method", "student's test accuracy [%]", "gain over ce", INTERVAL, "seeds better than ce"]
    header += ["native [ms/step]", "reference [ms/step]"]
    rows = []
    for method in comparison.results:
        values, found = comparison.accuracies(method), comparison.gains(method)
        gain, interval, better = "-", "-", "-"
        if found is not None:
            baseline = comparison.accuracies("ce")
            gain = spread([value - other for value, other in zip(values, baseline, strict=True)])
            interval, better = found.interval, f"{found.better} of {found.seeds}"
        times = [f"{1000 * comparison.seconds[method][backend]:.2f}" for backend in ("native", "reference")]
        rows.append([method, spread(values), gain, interval, better, *times])
    return table(header, rows)


def guides_table(comparison: Comparison) -> str:
    """Each distinct guide: its network, how it was trained, and its own accuracy."""
    found: dict[tuple[str, str, str, tuple[str, ...]], list[Result]] = {}
    users: dict[tuple[str, str, str, tuple[str, ...]], list[str]] = {}
    for user, seeds in comparison.results.items():
        for run in seeds.values():
            for result in run.values():
                stage = result.stage
                if stage.name != "student":
                    key = (stage.name, stage.network, stage.method, stage.guides)
                    found.setdefault(key, []).append(result)
                    users.setdefault(key, []).append(user)
    rows = []
    for (name, network, method, guides), results in found.items():
        distinct = list({str(r.folder): r for r in results}.values())
        values = [final(r) for r in distinct if r.rows]
        count = f"{models.parameters_count(results[0].network):,}"
        how = method + (f" from {', '.join(guides)}" if guides else "")
        whom = ", ".join(dict.fromkeys(users[name, network, method, guides]))
        rows.append([name, network, count, how if values else "given", whom, spread(values) if values else "-"])
    return table(["guide", "network", "parameters", "trained by", "used by", "test accuracy [%]"], rows)


def write_metrics(comparison: Comparison, folder: Path) -> None:
    """metrics.csv: every epoch of every student; results.csv: one row a run."""
    rows: list[dict[str, Any]] = []
    last: list[dict[str, Any]] = []
    for method, seeds in comparison.results.items():
        for seed, results in seeds.items():
            student = results["student"]
            rows += [{"method": method, "seed": seed} | row for row in student.rows]
            last.append({"method": method, "seed": seed, "epoch": student.rows[-1]["epoch"]})
            last[-1] |= {name: student.rows[-1][name] for name in ("test_loss", "test_accuracy")}
            last[-1] |= {f"seconds_per_step_{b}": value for b, value in comparison.seconds[method].items()}
    write_csv(folder / "metrics.csv", rows)
    write_csv(folder / "results.csv", last)


def backend_text(device: torch.device) -> str:
    """Which kernels the device of the comparison has."""
    return f"native on {device.type}: {fastkd.backend_info().get(device.type, 'none')}"


def text(comparison: Comparison, command: str) -> str:
    """The report of a comparison in Markdown."""
    config = comparison.config
    runner = next(iter(comparison.runners.values()))
    student = next(iter(next(iter(comparison.results.values())).values()))["student"].network
    one = config.run(config.methods[0], config.seeds[0], {})
    seeds = ", ".join(map(str, config.seeds))
    title = f"Ablation of {config.ablate}" if config.ablate else ", ".join(config.methods)
    lines = [f"# {title} on {config.data}", ""]
    count = f"{models.parameters_count(student):,}"
    lines += [
        f"Student {config.student} ({count} parameters), seeds {seeds}; mean +- standard deviation over the seeds."
    ]
    lines += ["", summary_table(comparison), "", "![accuracy of each method](comparison.png)", *_reading(), ""]
    if any(len(runner.stages) > 1 for runner in comparison.runners.values()):
        lines += ["## Networks trained before", "", guides_table(comparison), ""]
    lines += ["## Methods", ""]
    jobs = {method: runner.job for method, runner in comparison.runners.items()}
    rows = variants(config)
    for m in config.methods:
        row = f"{rows[m].described()}. " if rows else ""
        lines += [f"- **{m}**: {row}{jobs[m].recipe.described(config.data, jobs[m].config.options)}"]
    lines += ["", "## Data", "", data_text(config, runner.data), ""]
    if config.train_size:
        lines += ["Each seed draws its own training images; the test images are the same for all.", ""]
    optimization = [optimization_text(config), _epochs_text(one), speed_text(config, runner.job.device)]
    lines += ["## Optimisation", "", " ".join(optimization), ""]
    lines += ["## How to repeat it", "", "```", command, "```", ""]
    device = runner.job.device
    lines += [f"{environment.describe(device)}; {backend_text(device)}.", ""]
    return "\n".join(lines)


def _epochs_text(one: TrainConfig) -> str:
    text = f"The student, and what learns together with it, trains for {one.epochs} epochs with every method; "
    text += f"teacher and assistants that are trained before for {one.guide_epochs}, other networks of the student's "
    return text + f"architecture (self1, teachers of feed-parallel, generations) for {one.own_epochs}."


def _reading() -> list[str]:
    lines = [LAST_EPOCH + " The numbers are what came out, also where a method does not help."]
    lines += [
        "The gain is the mean over seeds of the difference to ce with the same seed, that is with the same initial "
        "weights and the same order of images, and its standard deviation. The interval is that of the mean gain, by "
        "Student's t: where it holds 0, these seeds cannot tell the method from ce.",
        f"The time is the median of {ROUNDS} training steps of the student, its guides' forward passes included "
        "(also with --logits-cache), with the fused operation (native) and with its plain PyTorch formula (reference), "
        "in turns. With few classes the loss is a small part of the step, and the two are alike.",
    ]
    return ["", *(f"- {line}" for line in lines)]


def write(comparison: Comparison, command: str) -> list[Path]:
    """Write report.md, comparison.png, metrics.csv and results.csv into OUT; returns the paths for the user."""
    out = Path(comparison.config.out)
    write_metrics(comparison, out)
    draw(comparison, out / "comparison.png")
    write_atomic(out / "report.md", text(comparison, command).encode())
    return [out / name for name in ("report.md", "comparison.png", "metrics.csv", "results.csv")]
