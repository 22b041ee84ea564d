"""The processes of a study: several at once, stopped in time, each going on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from multiprocessing import connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from fastkd._core.files import write_atomic
from fastkd.runs import study_worker
from fastkd.runs.processes import STOPPED, forking, interrupt
from fastkd.runs.study import Run
from fastkd.train.interrupts import catch_interrupt
from fastkd.train.time_left import expected

SPENT = "spent.json"
POLL = 0.5  # seconds


@dataclass
class Active:
    """A run in its process, and when it started."""

    run: Run
    process: BaseProcess
    started: float


@dataclass
class Pool:
    """Carries out runs in OUT.

    Attributes:
        jobs: how many processes at once.
        deadline: of time.monotonic(), when they are told to stop.
        ended: called with each run that finished or failed, and its exit status.
        interrupted: whether Ctrl-C stopped it.
    """

    out: Path
    jobs: int
    deadline: float
    ended: Callable[[Run, int], None]
    active: list[Active] = field(default_factory=list)
    stopped: bool = False
    interrupted: bool = False

    def carry_out(self, runs: Sequence[Run]) -> None:
        """After Ctrl-C or at the deadline those that run save their state and stop, and no other starts."""
        waiting = list(runs)
        context = forking(study_worker.__name__)
        with catch_interrupt() as interrupted:
            try:
                while self.active or (waiting and not self.stopped):
                    self.interrupted = interrupted()
                    if self.interrupted or time.monotonic() >= self.deadline:
                        self._stop()
                    while waiting and not self.stopped and len(self.active) < self.jobs:
                        self._start(context, self._next(waiting))
                    self._collect()
            finally:
                if self.active:  # an error here
                    self._stop()
                for each in self.active:
                    each.process.join()

    def _next(self, waiting: list[Run]) -> Run:
        """Takes the first run of a seed that no process is at, else the first: runs of one seed share the networks
        that are trained before, and each would wait while another trains them."""
        busy = {each.run.seed for each in self.active}
        run = next((run for run in waiting if run.seed not in busy), waiting[0])
        waiting.remove(run)
        return run

    def _start(self, context: Any, run: Run) -> None:
        process = context.Process(target=study_worker.work, args=(run.config(self.out),))
        process.start()
        self.active.append(Active(run, process, time.monotonic()))

    def _stop(self) -> None:
        """Once: a second SIGINT would not let a process save its state."""
        if self.stopped:
            return
        self.stopped = True
        interrupt(each.process for each in self.active)

    def _collect(self) -> None:
        """Wait a moment for processes that end, and tell of them."""
        connection.wait([each.process.sentinel for each in self.active], timeout=POLL)
        for each in [each for each in self.active if not each.process.is_alive()]:
            each.process.join()
            self.active.remove(each)
            add_spent(self.out, each.run, time.monotonic() - each.started)
            status = each.process.exitcode
            if status is not None and status != STOPPED:  # None while it runs
                self.ended(each.run, status)
            elif not self.stopped:  # by somebody else
                self._stop()


def spent(out: Path) -> dict[str, float]:
    """Seconds that each run has taken here, in all its parts; what it trained for others is in them."""
    path = out / SPENT
    known: dict[str, float] = json.loads(path.read_text()) if path.is_file() else {}
    return known


def add_spent(out: Path, run: Run, seconds: float) -> None:
    """Adds `seconds` to what `run` has taken so far, in a file of `out`."""
    known = spent(out)
    known[run.name] = round(known.get(run.name, 0.0) + seconds, 1)
    write_atomic(out / SPENT, json.dumps(known, indent=1).encode())


def left(out: Path, runs: Sequence[Run], finished: set[str], jobs: int) -> float | None:
    """Seconds until all runs are finished, from what finished ones of the same method took; None before there is one.

    A method of which none is finished counts as the mean of the others.
    """
    known = spent(out)
    times: dict[Hashable, list[float]] = {}
    for run in runs:
        if run.name in finished and run.name in known:
            times.setdefault((run.method, run.setting), []).append(known[run.name])
    waiting = [run for run in runs if run.name not in finished]
    total = expected(times, [((run.method, run.setting), known.get(run.name, 0.0)) for run in waiting])
    return None if total is None else total / jobs
