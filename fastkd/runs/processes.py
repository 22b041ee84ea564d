"""Runs in processes of their own: how they are made, and how they end."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from multiprocessing import connection, parent_process
from typing import Any

DONE, FAILED, STOPPED = 0, 1, 130  # exit statuses
SLOW_IMPORTS = ("matplotlib.pyplot", "yaml", "PIL.Image", "torch._dynamo")  # of every run


def forking(module: str) -> Any:
    """For multiprocessing: processes forked from one that has imported all and done nothing; elsewhere fresh ones."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context: Any = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([module, *SLOW_IMPORTS])
    return context


def follow_parent() -> None:
    """Stop as by Ctrl-C where the process that started this one ends."""
    parent = parent_process()
    if parent is None:
        return

    def watch() -> None:
        connection.wait([parent.sentinel])
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=watch, daemon=True).start()
