"""What a person reads: errors that are one sentence, notes on standard error."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Callable, Iterable, Sequence


def wrong_value(op: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def wrong_type(op: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expected}, got {got}")


class UserError(Exception):
    """Something that whoever started the run can put right: one sentence, no traceback. `status` is the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def guess(
    word: str, known: Iterable[str], *, most: int = 1, cutoff: float = 0.6, show: Callable[[str], str] = str
) -> str:
    """The words "did you mean ...? " with at most `most` words of `known` that are near `word`, else nothing."""
    return suggest([show(near) for near in difflib.get_close_matches(word, list(known), n=most, cutoff=cutoff)])


def suggest(words: Sequence[str]) -> str:
    """The words "did you mean A or B? ", nothing of none."""
    return f"did you mean {' or '.join(words)}? " if words else ""


def note(text: str) -> None:
    """What whoever started the run should know, also where it is quiet."""
    print(f"fastkd: note: {text}", file=sys.stderr, flush=True)
