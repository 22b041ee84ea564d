"""Ctrl-C in the middle of a run."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(Exception):
    """Ctrl-C: what was computed is saved."""


@contextmanager
def catch_interrupt() -> Iterator[Callable[[], bool]]:
    """Gives a function that says whether Ctrl-C came; a second Ctrl-C interrupts at once."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        if caught:
            raise KeyboardInterrupt
        caught.append(number)

    if threading.current_thread() is not threading.main_thread():  # only the main thread may set handlers
        yield lambda: False
        return
    before = signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(caught)
    finally:
        signal.signal(signal.SIGINT, before)


def leave_interrupts(worker: int) -> None:
    """Ctrl-C in a terminal reaches the loader's processes too; the main one decides what to do."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
