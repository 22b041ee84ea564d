"""Options given from Python, brought into the types that their annotations say: the command line does that itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin, get_type_hints

import numpy as np


def settle(config: Any) -> str | None:
    """Makes NumPy's numbers Python's, paths strings and tuples lists, which YAML and JSON can hold, in all fields.

    Returns what is wrong with the first field whose value is not of its `Literal`, bool or str, in one sentence.
    """
    for field in dataclasses.fields(config):
        setattr(config, field.name, _plain(getattr(config, field.name)))
    for name, kind in get_type_hints(type(config)).items():
        wrong = _wrong(kind, getattr(config, name))
        if wrong:
            return f"--{name.replace('_', '-')} must be {wrong}, got {getattr(config, name)!r}"
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
    if kind is bool:
        return "" if isinstance(value, bool) else "true or false"
    if kind is str:
        return "" if isinstance(value, str) else "text"
    if get_origin(kind) is list:
        fits = isinstance(value, list) and not any(_wrong(get_args(kind)[0], item) for item in value)
        return "" if fits else "a list" + (" of names" if get_args(kind)[0] is str else "")
    if get_origin(kind) is dict:
        return "" if isinstance(value, dict) else "a dict by name"
    return ""


def _listed(choices: tuple) -> str:
    return " or ".join(map(str, choices))
