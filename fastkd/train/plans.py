"""Which networks a method needs, in which order they are trained, and by what.

A plan is a list of stages; each stage trains one network, and later stages are guided by earlier ones.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from fastkd import methods
from fastkd.train.config import TrainConfig, UserError


@dataclass(frozen=True)
class Stage:
    """One network and how it is trained: `method` guided by the networks of earlier stages, in this order."""

    name: str  # teacher, assistant1, ..., student
    network: str
    method: str
    guides: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)


def _ce(student, guides, options):
    return methods.CE(student, **options)


def _kd(student, guides, options):
    return methods.KD(student, guides[0], **options)


def _aver(student, guides, options):
    return methods.AVER(student, guides, **options)


def _takd(student, guides, options):
    return methods.TAKD(student, guides, **options)


def _dgkd(student, guides, options):
    return methods.DGKD(student, guides, **options)


@dataclass(frozen=True)
class Recipe:
    """A method on the command line.

    Attributes:
        method: the class, for its arguments.
        build: (student, guides, arguments) -> the method.
        guides: the student's: none | teacher | all (teacher and assistants) | last (the smallest assistant).
        assistants: the method that trains the assistants, one after another from the largest; their guides are chosen
            as the student's. Empty for no assistants.
        about: the guides, in a sentence for --help and report.md.
    """

    method: type[methods.Method]
    build: Callable[[nn.Module, list[nn.Module], dict[str, Any]], methods.Method]
    guides: str
    assistants: str
    about: str


RECIPES = {
    "ce": Recipe(methods.CE, _ce, "none", "", "The student alone, by cross-entropy with the labels."),
    "kd": Recipe(
        methods.KD, _kd, "teacher", "", "The teacher, trained by cross-entropy, guides the student; no assistants."
    ),
    "aver": Recipe(
        methods.AVER,
        _aver,
        "all",
        "dgkd",
        "The teacher and all assistants guide the student, weight 1/K each. The assistants are those of dgkd, each "
        "guided by all larger networks (our choice).",
    ),
    "takd": Recipe(
        methods.TAKD,
        _takd,
        "last",
        "takd",
        "A chain: the teacher, by cross-entropy, guides the largest assistant, each assistant the next smaller one, "
        "and the last one the student.",
    ),
    "dgkd": Recipe(
        methods.DGKD,
        _dgkd,
        "all",
        "dgkd",
        "The teacher, by cross-entropy, and all larger assistants guide each assistant, and all of them the student. "
        "Guides are dropped (options.drop) for the student only.",
    ),
}

_FROM_PLAN = {"self", "student", "teacher", "teachers", "guides"}
_STUDENT_ONLY = ("drop", "survival", "drop_num", "ce_weight")


def recipe(name: str) -> Recipe:
    """UserError with the nearest names for a method that is not there."""
    if name in RECIPES:
        return RECIPES[name]
    known = ", ".join(RECIPES)
    if not name:
        raise UserError(f"--method is missing: give one of {known}")
    close = difflib.get_close_matches(name.lower(), RECIPES, n=1)
    guess = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"there is no method {name!r}: {guess}known are {known}")


def arguments(name: str) -> dict[str, Any]:
    """The arguments of a method that `options` may set, with their defaults."""
    parameters = inspect.signature(recipe(name).method.__init__).parameters
    return {p.name: p.default for p in parameters.values() if p.name not in _FROM_PLAN}


def accepted(name: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of `options` that the method has."""
    known = arguments(name)
    return {option: value for option, value in options.items() if option in known}


def check_options(names: list[str], options: dict[str, Any]) -> None:
    """UserError for an option that none of these methods has."""
    known = list(dict.fromkeys(argument for name in names for argument in arguments(name)))
    for option in options:
        if option not in known:
            close = difflib.get_close_matches(option, known, n=1)
            guess = f"did you mean options.{close[0]}? " if close else ""
            has = f"it has {', '.join(known)}" if known else "it has none"
            who = names[0] if len(names) == 1 else "each of the methods"
            raise UserError(f"{who} has no option {option!r}: {guess}{has}")


def plan(config: TrainConfig) -> list[Stage]:
    """The stages of a run; the last one is the student's."""
    how = recipe(config.method)
    check_options([config.method], config.options)
    stages = []
    if how.guides != "none":
        stages.append(Stage("teacher", config.teacher, "ce"))
    if how.assistants:
        shared = {k: v for k, v in accepted(how.assistants, config.options).items() if k not in _STUDENT_ONLY}
        for number, network in enumerate(config.assistants, 1):
            guides = _guides(stages, how.guides)
            stages.append(Stage(f"assistant{number}", network, how.assistants, guides, shared))
    _check_checkpoints(config, stages)
    guides = _guides(stages, how.guides)
    return [*stages, Stage("student", config.student, config.method, guides, config.options)]


def _guides(stages: list[Stage], which: str) -> tuple[str, ...]:
    """The networks so far that guide the next one."""
    return tuple(stage.name for stage in stages[-1 if which == "last" else 0 :])


def _check_checkpoints(config: TrainConfig, stages: list[Stage]) -> None:
    known = ["teacher", *(f"assistant{i}" for i in range(1, len(config.assistants) + 1))]
    for name, path in config.checkpoint.items():
        if name not in known:
            raise UserError(f"--checkpoint.{name}: there is no such guide: known are {', '.join(known)}")
        if any(stage.name == name for stage in stages) and not Path(path).is_file():
            raise UserError(f"--checkpoint.{name}: there is no file {path}: give an existing checkpoint")
