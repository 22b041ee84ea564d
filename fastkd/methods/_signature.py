"""Arguments that a method shares with the one that it is made of: written once, there."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any


def takes(
    base: type, *, without: tuple[str, ...] = (), **defaults: Any
) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """For an `__init__(self, ..., **options)`: it takes the keyword arguments of `base`, and its signature shows them.

    Args:
        base: the class whose `__init__` has the keyword-only arguments.
        without: those of them that it does not take.
        defaults: those whose default is another one here; they are always among the options that it is called with.
    """
    found = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
    shared = [
        argument.replace(default=defaults.get(argument.name, argument.default))
        for argument in found
        if argument.kind is argument.KEYWORD_ONLY and argument.name not in without
    ]

    def decorate(init: Callable[..., None]) -> Callable[..., None]:
        own = [a for a in inspect.signature(init).parameters.values() if a.kind is not a.VAR_KEYWORD]
        signature = inspect.Signature([*own, *shared])

        @functools.wraps(init)
        def checked(self: Any, *arguments: Any, **options: Any) -> None:
            try:
                signature.bind(self, *arguments, **options)
            except TypeError as error:
                raise TypeError(f"{type(self).__name__}: {error}") from None
            init(self, *arguments, **defaults | options)

        checked.__signature__ = signature  # type: ignore[attr-defined]
        return checked

    return decorate
