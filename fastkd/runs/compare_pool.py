"""The seeds of a comparison side by side: one process and one thread each, and one line that says how far they are."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from multiprocessing import connection
from pathlib import Path
from typing import Any

from fastkd.runs.config import CompareConfig
from fastkd.runs.job import CompareJob
from fastkd.runs.processes import LOG, STOPPED, follow_parent, forking, interrupt, output_to
from fastkd.runs.runner import Runner, load_data
from fastkd.train import checkpoint
from fastkd.train.devices import cpu_threads
from fastkd.train.interrupts import Interrupted, catch_interrupt
from fastkd.train.time_left import duration

POLL = 0.5  # seconds
FEW = 10  # runs that are over before the processes have started
WIDTH = 60


def processes(config: CompareConfig, device_type: str) -> int:
    """How many at once: as asked; else as many as cores where runs have one thread each and are not a few."""
    if config.jobs is not None:
        return min(config.jobs, len(config.seeds))
    if device_type != "cpu" or config.threads != 1 or len(config.methods) * len(config.seeds) < FEW:
        return 1
    return min(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1, len(config.seeds))


def in_order(methods: list[str]) -> list[str]:
    """ce first: other methods may use what it trains."""
    return sorted(methods, key=lambda name: name != "ce")


def last_checkpoint(config: CompareConfig, method: str, seed: int) -> Path:
    """The file that a run leaves when it is finished."""
    run = config.run(method, seed, {})
    return checkpoint.path_of(Path(run.out) / "checkpoints", run.epochs)


def carry_out(config: CompareConfig, jobs: int, say: Callable[[str], None]) -> None:
    """Train what is not there yet. A process that fails leaves its runs to the caller, who meets the same error.

    Raises Interrupted after Ctrl-C, once all is saved.
    """
    waiting = list(config.seeds)
    active: list[Any] = []
    context, line = forking(__name__), Line(config, say)
    with catch_interrupt() as interrupted:
        try:
            while waiting or active:
                if interrupted():
                    raise Interrupted
                while waiting and len(active) < jobs:
                    active.append(context.Process(target=work, args=(config, waiting.pop(0))))
                    active[-1].start()
                connection.wait([process.sentinel for process in active], timeout=POLL)
                active = [process for process in active if process.is_alive()]
                line.show()
        finally:
            interrupt(active)
            for process in active:
                process.join()
            line.end()


def work(config: CompareConfig, seed: int) -> None:
    """All runs of one seed, in a process of its own; what they say goes to OUT/log.txt."""
    if hasattr(os, "setsid"):
        os.setsid()  # Ctrl-C in a terminal reaches the first process alone, which tells the others once
    follow_parent()
    with output_to(Path(config.out) / LOG):
        try:
            train_seed(config, seed)
        except (Interrupted, KeyboardInterrupt):
            sys.exit(STOPPED)


def train_seed(config: CompareConfig, seed: int) -> None:
    """Every method's run of this seed."""
    job = CompareJob.of(config)
    runs = job.runs()
    with cpu_threads(config.threads):
        data = load_data(runs[config.methods[0], seed].config, note=lambda text: None)
        for method in in_order(config.methods):
            Runner(runs[method, seed], say=lambda text: None, data=data).run()


class Line:
    """How many runs are finished and how long the others may take: one line that is written over on a terminal.

    Where there is none, a line for each quarter of the runs.
    """

    def __init__(self, config: CompareConfig, say: Callable[[str], None]):
        self.say, self.terminal = say, sys.stderr.isatty() and not config.quiet
        self.last = [last_checkpoint(config, method, seed) for seed in config.seeds for method in config.methods]
        self.started, self.before, self.told = time.monotonic(), self.finished(), 0

    def finished(self) -> int:
        """Runs that have their last checkpoint."""
        return sum(path.exists() for path in self.last)

    def show(self) -> None:
        """Where there is something new to say."""
        done = self.finished()
        if self.terminal:
            print(f"\r{self.text(done):<{WIDTH}}", end="", file=sys.stderr, flush=True)
        elif 4 * done // len(self.last) > self.told:
            self.told = 4 * done // len(self.last)
            self.say(self.text(done))

    def text(self, done: int) -> str:
        """ "12 of 70 runs finished, about 2 min left"."""
        new, left = done - self.before, len(self.last) - done
        seconds = (time.monotonic() - self.started) * left / max(1, new)
        guess = f", about {duration(seconds)} left" if new and left else ""
        return f"{done} of {len(self.last)} runs are finished{guess}"

    def end(self) -> None:
        """Leaves the line."""
        if self.terminal:
            print(file=sys.stderr, flush=True)
