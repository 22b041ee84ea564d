"""Runs in processes of their own: how they are made, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from multiprocessing import connection, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TextIO

LOG = "log.txt"  # of what such a process says, in its folder
DONE, FAILED, STOPPED = 0, 1, 130  # exit statuses
SLOW_IMPORTS = ("matplotlib.pyplot", "yaml", "PIL.Image", "torch._dynamo")  # of every run


def forking(module: str) -> Any:
    """For multiprocessing: processes forked from one that has imported all and done nothing; elsewhere fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, *SLOW_IMPORTS])
    return context


@contextmanager
def output_to(path: Path) -> Iterator[TextIO]:
    """Within it, all that this process prints goes to the end of a file, libraries' own lines too."""
    with open(path, "a", buffering=1) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
        yield log


def interrupt(processes: Iterable[BaseProcess]) -> None:
    """As by Ctrl-C: those that run save their state and end."""
    for process in processes:
        if process.is_alive() and process.pid is not None:
            os.kill(process.pid, signal.SIGINT)


def follow_parent() -> None:
    """Stop as by Ctrl-C where the process that started this one ends."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
