"""Which networks are trained, in which order, and who guides whom: one function a scheme, config -> its stages.

A stage trains one network, or several together; later stages use the networks of earlier ones.
"""

from __future__ import annotations

import dataclasses
import inspect
from dataclasses import dataclass, field
from typing import Any

from fastkd import methods
from fastkd._core.messages import UserError
from fastkd.runs.config import TrainConfig


@dataclass(frozen=True)
class Learner:
    """A network that a stage trains.

    Attributes:
        name: of its seed: learners of one name start from the same weights in every method.
        network: NAME or NAME:option=value:...
        start: the stage from whose trained network it goes on; empty for a fresh one.
        branches: 0, or the number of peers on one stem (fastkd.models.branched).
    """

    name: str
    network: str
    start: str = ""
    branches: int = 0


@dataclass(frozen=True)
class Stage:
    """What is trained together, by `method`. The first learner is the network that the stage is for.

    Attributes:
        name: teacher, assistant1, self1, ..., student.
        learners: the networks that are trained.
        method: by which method.
        epochs: for how long.
        guides: the frozen networks: earlier stages, in the order in which the method takes them.
        options: of the method.
        views: augmentations of each training image.
    """

    name: str
    learners: tuple[Learner, ...]
    method: str
    epochs: int
    guides: tuple[str, ...] = ()
    options: dict[str, Any] = field(default_factory=dict)
    views: int = 1

    @property
    def network(self) -> str:
        """The name of the network that the stage is for."""
        return self.learners[0].network

    @property
    def needs(self) -> tuple[str, ...]:
        """The earlier stages that this one uses."""
        return (*self.guides, *(learner.start for learner in self.learners if learner.start))


def parameters(method: type[methods.Method]) -> dict[str, Any]:
    """The arguments of a method's class and their defaults, the networks among them."""
    found = inspect.signature(method.__init__).parameters.values()
    return {p.name: p.default for p in found if p.name != "self"}


def _student(
    config: TrainConfig, guides: tuple[str, ...] = (), *, more: tuple[Learner, ...] = (), views: int = 1
) -> Stage:
    learner = Learner("student", config.student)
    return Stage("student", (learner, *more), config.method, config.epochs, guides, config.options, views)


def _teacher(config: TrainConfig) -> Stage:
    return Stage("teacher", (Learner("teacher", config.teacher),), "ce", config.guide_epochs)


def _assistants(config: TrainConfig) -> tuple[Learner, ...]:
    return tuple(Learner(f"assistant{number}", network) for number, network in enumerate(config.assistants, 1))


def _larger_peers(config: TrainConfig) -> tuple[Learner, ...]:
    """The assistants as networks that learn together with the student."""
    if not config.assistants:
        raise UserError(
            f"{config.method} trains the student together with the assistants and needs one at least, got none: "
            "name them by --assistants A,B,..."
        )
    return _assistants(config)


def alone(config: TrainConfig) -> list[Stage]:
    """The student."""
    return [_student(config)]


def teacher_then_student(config: TrainConfig) -> list[Stage]:
    """Teacher, student."""
    return [_teacher(config), _student(config, ("teacher",))]


# What trains the assistants of a chain.
_ASSISTANTS: dict[str, type[methods.Method]] = {"dgkd": methods.DGKD, "takd": methods.TAKD}


def _guided_assistants(config: TrainConfig, method: str, last_only: bool) -> list[Stage]:
    """Teacher, assistants by decreasing size, student."""
    stages = [_teacher(config)]
    known = set(parameters(_ASSISTANTS[method])) - set(_ASSISTANTS[method].last_only)
    options = {name: value for name, value in config.options.items() if name in known}

    def guides() -> tuple[str, ...]:
        return tuple(stage.name for stage in stages[-1 if last_only else 0 :])

    for learner in _assistants(config):
        stages.append(Stage(learner.name, (learner,), method, config.guide_epochs, guides(), options))
    return [*stages, _student(config, guides())]


def dense(config: TrainConfig) -> list[Stage]:
    """DGKD's: each network is guided by all that are larger."""
    return _guided_assistants(config, "dgkd", last_only=False)


def chain(config: TrainConfig) -> list[Stage]:
    """TAKD's: each network is guided by the next larger one."""
    return _guided_assistants(config, "takd", last_only=True)


def group(config: TrainConfig) -> list[Stage]:
    """ORC's: student and assistants, and as the last learner the teacher, which goes on from its own stage."""
    pivot = Learner("teacher", config.teacher, start="teacher")
    return [_teacher(config), _student(config, more=(*_larger_peers(config), pivot))]


def peers(config: TrainConfig, guides: tuple[str, ...] = ()) -> list[Stage]:
    """Student and assistants together."""
    assistants = _larger_peers(config)
    views = 1 + len(assistants) if config.options.get("views") is True else 1
    return [_student(config, guides, more=assistants, views=views)]


def peers_and_selves(config: TrainConfig) -> list[Stage]:
    """Each peer alone before. The first self-teacher is the student of the method ce."""
    assistants = _larger_peers(config)
    wanted = config.options.get("self_learning", True)
    if not (any(wanted) if isinstance(wanted, (list, tuple)) else wanted):
        return peers(config)
    selves = [Stage("self1", (Learner("student", config.student),), "ce", config.own_epochs)]
    for number, learner in enumerate(assistants, 2):
        selves.append(Stage(f"self{number}", (learner,), "ce", config.guide_epochs))
    return [*selves, *peers(config, tuple(stage.name for stage in selves))]


def two_views(config: TrainConfig) -> list[Stage]:
    """The student, with two augmentations of each image."""
    return [_student(config, views=2)]


def branches_of_one_view(config: TrainConfig) -> list[Stage]:
    """Branches of the student's architecture on one stem, which see the same image."""
    return [dataclasses.replace(stage, views=1) for stage in branches(config)]


def branches(config: TrainConfig) -> list[Stage]:
    """Peers of the student's architecture on one stem, each with its own view of the images."""
    if config.branches < 2:
        raise UserError(f"{config.method} needs peers on one stem: give --branches 2 or more, got {config.branches}")
    learner = Learner("student", config.student, branches=config.branches)
    return [Stage("student", (learner,), config.method, config.epochs, (), config.options, config.branches)]


def _copy(config: TrainConfig, name: str, number: int, method: str = "ce", guides: tuple[str, ...] = ()) -> Stage:
    """A network of the student's own architecture; the copies of one number start alike in every method."""
    options = {} if method == "ce" else config.options
    learner = Learner(f"copy{number}", config.student)
    return Stage(name, (learner,), method, config.own_epochs, guides, options)


def copies(config: TrainConfig) -> list[Stage]:
    """Teachers of the student's architecture, then the student."""
    teachers = [_copy(config, f"teacher{number}", number) for number in range(1, (config.num_teachers or 0) + 1)]
    return [*teachers, _student(config, tuple(stage.name for stage in teachers))]


def generations(config: TrainConfig) -> list[Stage]:
    """A chain of the student's architecture, each network guided by the one before."""
    if config.generations < 2:
        raise UserError(
            f"{config.method} is a chain of networks: give --generations 2 or more, got {config.generations}"
        )
    stages = [_copy(config, "generation1", 1)]
    for number in range(2, config.generations):
        stages.append(_copy(config, f"generation{number}", number, config.method, (stages[-1].name,)))
    return [*stages, _student(config, (stages[-1].name,))]
