"""The methods of the command line: what builds each, the plan of its stages, and its arguments."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import nn

from fastkd import methods
from fastkd._core.messages import UserError, guess, suggest
from fastkd.runs import stages
from fastkd.runs.config import TrainConfig
from fastkd.runs.stages import Stage

Networks = list[nn.Module]
Build = Callable[[Networks, Networks, dict[str, Any]], methods.Method]


@dataclass(frozen=True)
class Recipe:
    """A method on the command line.

    Attributes:
        method: the class, for its arguments.
        build: (learners, guides, arguments) -> the method; learners and guides in the order of the stage.
        stages: config -> the stages that the student's needs, and the student's.
        about: which networks there are and who teaches whom, for --help and report.md.
        fixed: arguments of the class that this recipe sets itself.
        digits: defaults of its arguments for digits, where maps are small. Our choice: FEED's beta, by validation
            images (5 over 50).
    """

    method: type[methods.Method]
    build: Build
    stages: Callable[[TrainConfig], list[Stage]]
    about: str
    fixed: dict[str, Any] = field(default_factory=dict)
    digits: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def parameters(self) -> dict[str, Any]:
        """All arguments of the class and their defaults, the networks among them."""
        return stages.parameters(self.method)

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments that `options` may set, with their defaults."""
        hidden = _FROM_PLAN | set(self.fixed)
        return {name: default for name, default in self.parameters.items() if name not in hidden}

    def in_force(self, data: str, options: dict[str, Any]) -> dict[str, Any]:
        """`options`, and before them what the method takes for this data instead of its own defaults."""
        return (self.digits if data == "digits" else {}) | options

    def accepted(self, options: dict[str, Any]) -> dict[str, Any]:
        """Those of `options` that the method has."""
        return {name: value for name, value in options.items() if name in self.arguments}

    def described(self, data: str, options: dict[str, Any]) -> str:
        """Which networks there are, and the method's arguments in force."""
        values = self.arguments | self.in_force(data, options)
        shown = ", ".join(f"{name}={value!r}" for name, value in values.items()) or "none"
        return f"{self.about} Arguments: {shown}."


def _alone(method: type[Any]) -> Build:
    return lambda learners, guides, options: method(learners[0], **options)


def _with_teacher(method: type[Any]) -> Build:
    return lambda learners, guides, options: method(learners[0], guides[0], **options)


def _with_guides(method: type[Any], **fixed: Any) -> Build:
    return lambda learners, guides, options: method(learners[0], guides, **options, **fixed)


def _peers(method: type[Any]) -> Build:
    return lambda learners, guides, options: method(learners, **options)


def _pivot_and_group(method: type[Any]) -> Build:
    return lambda learners, guides, options: method(learners[-1], learners[:-1], **options)


def _peers_and_guides(method: type[Any]) -> Build:
    return lambda learners, guides, options: method(learners, guides, **options)


_TEACHER = "The teacher, trained by cross-entropy, guides the student"
_GENERATIONS = (
    "A chain of fresh networks of the student's architecture (--generations, the student is the last): the first "
    "trained by cross-entropy, each next one guided by the "
)

RECIPES = {
    "ce": Recipe(methods.CE, _alone(methods.CE), stages.alone, "The student alone, by cross-entropy with the labels."),
    "kd": Recipe(methods.KD, _with_teacher(methods.KD), stages.teacher_then_student, f"{_TEACHER}; no assistants."),
    "aver": Recipe(
        methods.AVER,
        _with_guides(methods.AVER),
        stages.dense,
        "The teacher and all assistants guide the student, weight 1/K each. The assistants are those of dgkd, each "
        "guided by all larger networks (our choice).",
    ),
    "takd": Recipe(
        methods.TAKD,
        _with_guides(methods.TAKD),
        stages.chain,
        "A chain: the teacher, by cross-entropy, guides the largest assistant, each assistant the next smaller one, "
        "and the last one the student.",
    ),
    "dml": Recipe(
        methods.DML,
        _peers(methods.DML),
        stages.peers,
        "Student and assistants, all fresh, learn together, each from the others' probabilities.",
    ),
    "kdcl": Recipe(
        methods.KDCL,
        _peers(methods.KDCL),
        stages.peers,
        "Student and assistants, all fresh, learn together, each from an ensemble of all.",
    ),
    "rkd": Recipe(
        methods.RKD,
        _with_teacher(methods.RKD),
        stages.teacher_then_student,
        f"{_TEACHER} by the distances and angles between the embeddings of a batch; no assistants.",
    ),
    "ft": Recipe(
        methods.FT,
        _with_teacher(methods.FT),
        stages.teacher_then_student,
        f"{_TEACHER} by its last feature map; no assistants.",
    ),
    "pcl": Recipe(
        methods.PCL,
        _alone(methods.PCL),
        stages.branches,
        "Peers of the student's architecture on one stem (--branches), each with its own augmentation of the images, "
        "learn together from their ensemble and from their mean teachers. The first mean teacher is the network that "
        "is kept.",
    ),
    "ban": Recipe(methods.BAN, _with_teacher(methods.BAN), stages.generations, _GENERATIONS + "one before it."),
    "dgkd": Recipe(
        methods.DGKD,
        _with_guides(methods.DGKD),
        stages.dense,
        "The teacher, by cross-entropy, and all larger assistants guide each assistant, and all of them the student. "
        "Guides are dropped (options.drop) for the student only.",
    ),
    "orc": Recipe(
        methods.ORC,
        _pivot_and_group(methods.ORC),
        stages.group,
        "Student and assistants, all fresh, learn together as a group; at every step the best of them teach the "
        "others. The teacher, trained by cross-entropy before, is their pivot and goes on learning.",
    ),
    "ctsl-mkt": Recipe(
        methods.CTSLMKT,
        _peers_and_guides(methods.CTSLMKT),
        stages.peers_and_selves,
        "Student and assistants, all fresh, learn together from each other's probabilities and relations, and each "
        "from its frozen self-teacher (self1, self2, ...): the same network trained alone by cross-entropy before.",
    ),
    "dkel": Recipe(
        methods.DKEL,
        _alone(methods.DKEL),
        stages.branches,
        "As pcl, with mean teachers that start apart from the student and whose ensemble fades out. The first mean "
        "teacher is the network that is kept.",
    ),
    "feed-parallel": Recipe(
        methods.FEED,
        _with_guides(methods.FEED, mode="parallel"),
        stages.copies,
        "Several teachers of the student's architecture (--num-teachers), each trained alone from its own seed, guide "
        "the student by their last feature maps, each through its own transform.",
        fixed={"mode": "parallel"},
        digits={"beta": 5.0},
    ),
    "aver-parallel": Recipe(
        methods.AVER,
        _with_guides(methods.AVER),
        stages.copies,
        "The teachers of feed-parallel guide the student by their logits, weight 1/K each: what an ensemble of logits "
        "does with the same networks.",
    ),
    "feed-sequential": Recipe(
        methods.FEED,
        _with_guides(methods.FEED, mode="sequential"),
        stages.generations,
        _GENERATIONS + "last feature map of the one before it.",
        fixed={"mode": "sequential"},
        digits={"beta": 5.0},
    ),
    "dkd": Recipe(
        methods.DKD,
        _with_teacher(methods.DKD),
        stages.teacher_then_student,
        f"{_TEACHER} by its probability of the label and, apart from it, those of the other classes; no assistants.",
    ),
    "dist": Recipe(
        methods.DIST,
        _with_teacher(methods.DIST),
        stages.teacher_then_student,
        f"{_TEACHER} by the correlations of its probabilities within samples and within classes; no assistants.",
    ),
    "ae-kd": Recipe(
        methods.AEKD,
        _with_guides(methods.AEKD),
        stages.dense,
        "As aver, with weights of the guides that make their gradients agree, found in each batch.",
    ),
    "ca-mkd": Recipe(
        methods.CAMKD,
        _with_guides(methods.CAMKD),
        stages.dense,
        "As aver, each guide weighted image by image by how well it knows the label; its last feature map teaches, "
        "too, weighted by how well the guide reads the label off the student's (options.feature_weight; 0: logits "
        "alone).",
    ),
    "ebkd": Recipe(
        methods.AVER,
        _with_guides(methods.AVER, weights="entropy"),
        stages.dense,
        "As aver, each guide weighted image by image by how sure it is.",
        fixed={"weights": "entropy"},
    ),
    "one": Recipe(
        methods.ONE,
        _alone(methods.ONE),
        stages.branches_of_one_view,
        "Branches of the student's architecture on one stem (--branches) learn together from their gated ensemble. The "
        "first branch is the network that is kept.",
    ),
    "okddip": Recipe(
        methods.OKDDip,
        _alone(methods.OKDDip),
        stages.branches_of_one_view,
        "Branches of the student's architecture on one stem (--branches): peers that learn from mixtures of each "
        "other, each from its own, and a leader that learns from their mean. The leader is the network that is kept.",
    ),
    "mean-teacher": Recipe(
        methods.MeanTeacher,
        _alone(methods.MeanTeacher),
        stages.two_views,
        "The student agrees with the moving average of its own weights on another augmentation of the same images. The "
        "average is the network that is kept.",
        fixed={"views": True},
    ),
}

# Arguments that the plan gives, or that have no meaning on a command line.
_FROM_PLAN = {"student", "students", "teacher", "teachers", "guides", "pivot", "peers", "self_teachers", "classifier"}
_FROM_PLAN |= {"deploy", "process_group", "channels", "example"}


def recipe(name: str) -> Recipe:
    """UserError with the nearest names for a method that is not there."""
    if name in RECIPES:
        return RECIPES[name]
    known = ", ".join(RECIPES)
    if not name:
        raise UserError(f"--method is missing: give one of {known}")
    begun = [known for known in RECIPES if known.startswith(name.lower())]
    raise UserError(f"there is no method {name!r}: {suggest(begun) or guess(name.lower(), RECIPES)}known are {known}")


def arguments_of(recipes: Mapping[str, Recipe]) -> list[str]:
    """The options that one of these methods has, each once."""
    return list(dict.fromkeys(argument for how in recipes.values() for argument in how.arguments))


def check_options(
    recipes: Mapping[str, Recipe], options: Mapping[str, Any], others: Mapping[str, Recipe] | None = None
) -> None:
    """UserError for an option that none of these methods has, and none of `others` whose options may be there, too."""
    known, let_pass = arguments_of(recipes), arguments_of(others or {})
    for option in options:
        if option not in known and option not in let_pass:
            near = guess(option, known, show="options.{}".format)
            has = f"it has {', '.join(known)}" if known else "it has none"
            who = next(iter(recipes)) if len(recipes) == 1 else "each of the methods"
            raise UserError(f"{who} has no option {option!r}: {near}{has}")


def plan(config: TrainConfig, how: Recipe | None = None) -> list[Stage]:
    """The stages of a run, each after those that it needs; the last one is the student's. how: the method's recipe.

    >>> [stage.name for stage in fastkd.train.plan(fastkd.train.TrainConfig(method="takd", assistants=["resnet14"]))]
    ['teacher', 'assistant1', 'student']
    """
    how = recipe(config.method) if how is None else how
    check_options({config.method: how}, config.options)
    found = how.stages(dataclasses.replace(config, options=how.in_force(config.data, config.options)))
    _check_checkpoints(config, found)
    return found


def _check_checkpoints(config: TrainConfig, found: list[Stage]) -> None:
    guides = [stage.name for stage in found[:-1]]
    # A config serves several methods: those that have no assistants let their checkpoints pass.
    usual = ["teacher", *(f"assistant{number}" for number in range(1, len(config.assistants) + 1))]
    known = list(dict.fromkeys([*guides, *usual]))
    for name, path in config.checkpoint.items():
        if name not in known:
            raise UserError(f"--checkpoint.{name}: there is no such guide: known are {', '.join(known)}")
        if name in guides and not Path(path).is_file():
            raise UserError(f"--checkpoint.{name}: there is no file {path}: give an existing checkpoint")
