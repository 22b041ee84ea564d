"""For type checkers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

Function = TypeVar("Function", bound=Callable[..., object])


def like(function: Function) -> Callable[[object], Function]:
    """Decorator: says that what is decorated is called as `function` is, as a module's `__call__` as its `forward`."""
    return lambda other: function
