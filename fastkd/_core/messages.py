"""What a person reads: errors that are one sentence, notes on standard error."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Sequence


def wrong_value(op: str, argument: str, expected: str, got: object) -> ValueError:
    return ValueError(f"{op}: {argument} must be {expected}, got {got}")


def wrong_type(op: str, argument: str, expected: str, got: object) -> TypeError:
    return TypeError(f"{op}: {argument} must be {expected}, got {got}")


class UserError(Exception):
    """Something that whoever started the run can put right: one sentence, no traceback. `status` is the exit status."""

    def __init__(self, message: str, status: int = 2):
        super().__init__(message)
        self.status = status


def guess(word: str, known: Sequence[str]) -> str:
    """The words "did you mean ...? " where a word of `known` is near `word`, else nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]}? " if close else ""


def note(text: str) -> None:
    """What whoever started the run should know, also where it is quiet."""
    print(f"fastkd: note: {text}", file=sys.stderr, flush=True)
