"""Options as fields of dataclasses: what is declared of each, and what the checks make of it.

The command line brings values into the types that the annotations say; for options given from Python that is done here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import NoneType
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np

Role = Literal["data", "result", "stages", "free"]


@dataclass(frozen=True)
class Option:
    """What is declared of an option beside its type, whose `Literal` lists its choices, and its default.

    Attributes:
        role: what it means for a run that goes on, and for networks in a cache:
            data: the images; both are held to it.
            result: how networks are trained; both are held to it.
            stages: which networks are trained, by what and for how long; the run is held to it, and each network in the
                cache to what concerns its own stage.
            free: nothing that is computed, or only where the run goes on to.
        least: the smallest number that is allowed.
        grows: a run that goes on may have more of it, a list, and none less.
        later: younger than the caches that are there, whose keys have it only where it is not the default.
        needs: the flag without which it has no effect on a network in a cache; "" for none.
    """

    role: Role
    least: float | None = None
    grows: bool = False
    later: bool = False
    needs: str = ""


def option(default: Any, role: Role, **declared: Any) -> Any:
    """A field of options; `declared` as in `Option`. Each config has its own copy of a default that can be changed."""
    how = {"option": Option(role, **declared)}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: copy.copy(default), metadata=how)
    return field(default=default, metadata=how)


def declared(kind: type) -> dict[str, Option]:
    """The options of a dataclass by name. Where a subclass changes a default, the rest stays as it was declared."""
    bases = [base for base in reversed(kind.__mro__) if dataclasses.is_dataclass(base)]
    return {f.name: f.metadata["option"] for base in bases for f in dataclasses.fields(base) if "option" in f.metadata}


def flag(name: str) -> str:
    """ "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


def is_switch(kind: object) -> bool:
    """Whether an option of this annotation, as the source has it, is turned on by its flag and off by --no-FLAG."""
    return kind in ("bool", "bool | None")


def settle(config: Any) -> str | None:
    """Makes NumPy's numbers Python's, paths strings and tuples lists, which YAML and JSON can hold, in all fields.

    Returns what is wrong with the first field whose value is not of its `Literal`, bool or str, or less than its least,
    in one sentence.
    """
    for each in dataclasses.fields(config):
        setattr(config, each.name, _plain(getattr(config, each.name)))
    kinds, declarations = get_type_hints(type(config)), declared(type(config))
    for name in kinds:
        wrong = _wrong(kinds[name], getattr(config, name))
        if wrong:
            return f"{flag(name)} must be {wrong}, got {getattr(config, name)!r}"
    for name, how in declarations.items():
        wrong = "" if how.least is None else _wrong_number(kinds[name], getattr(config, name), how.least)
        if wrong:
            return f"{flag(name)} must be {wrong}, got {getattr(config, name)!r}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def _wrong(kind: Any, value: Any) -> str:
    """What a value of this annotation is, where this one is none of it; "" where it is, or numbers have to say."""
    if get_origin(kind) is Literal:
        choices = get_args(kind)
        return "" if any(value == choice and type(value) is type(choice) for choice in choices) else _listed(choices)
    if kind is bool or bool in get_args(kind):
        return "" if isinstance(value, bool) or (value is None and NoneType in get_args(kind)) else "true or false"
    if kind is str:
        return "" if isinstance(value, str) else "text"
    if get_origin(kind) is list:
        fits = isinstance(value, list) and not any(_wrong(get_args(kind)[0], item) for item in value)
        return "" if fits else "a list" + (" of names" if get_args(kind)[0] is str else "")
    if get_origin(kind) is dict:
        return "" if isinstance(value, dict) else "a dict by name"
    return ""


def _wrong_number(kind: Any, value: Any, least: float) -> str:
    """The same for a number of at least so much: int, float, or None where the annotation has it."""
    kinds = get_args(kind) or (kind,)
    if value is None and NoneType in kinds:
        return ""
    if float in kinds:
        fits = isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
        return "" if fits and value >= least else f"a finite number >= {least:g}"
    fits = isinstance(value, int) and not isinstance(value, bool)
    return "" if fits and value >= least else f"an integer of at least {least:g}"


def _listed(choices: tuple[Any, ...]) -> str:
    return " or ".join(map(str, choices))
