"""Checks of arguments that every layer shares: one sentence with caller, argument, what was expected, what came."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real

from fastkd._core.messages import wrong_type, wrong_value

LARGEST = sys.float_info.max


def check_number(
    op: str, name: str, value: object, expected: str, low: float = -LARGEST, high: float = LARGEST
) -> float:
    """A finite Python number within [low, high]; a tensor is refused, since its gradient would be lost."""
    if type(value) is not float:
        if isinstance(value, bool) or not isinstance(value, Real):
            raise wrong_type(op, name, expected, type(value).__name__)
        if hasattr(value, "dtype"):  # np.float32 compares in its own dtype, in which LARGEST overflows
            value = float(value)
    number: float = value  # type: ignore[assignment]  # a Real of any type, which compares with a float
    if not low <= number <= high:  # comparisons only: NaN fails them, and torch.compile traces them for a dynamic float
        raise wrong_value(op, name, expected, number)
    return float(number)


def check_index(op: str, name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(op, name, "an integer", type(value).__name__)


def check_choice(op: str, name: str, value: object, choices: Sequence[str]) -> None:
    if value not in choices:
        raise wrong_value(op, name, "one of " + ", ".join(repr(c) for c in choices), repr(value))


def check_integer(method: str, argument: str, value: object, low: int | None = None, high: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise wrong_type(method, argument, "an integer", type(value).__name__)
    number = int(value)
    if (low is not None and number < low) or (high is not None and number > high):
        expected = f"an integer of at least {low}" if high is None else f"an integer in [{low}, {high}]"
        raise wrong_value(method, argument, expected, number)
    return number


def check_temperature(method: str, value: object, argument: str = "temperature") -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise wrong_type(method, argument, "a finite number > 0", type(value).__name__)
    number = float(value)
    if not (math.isfinite(number) and number > 0):
        raise wrong_value(method, argument, "a finite number > 0", value)
    return number
