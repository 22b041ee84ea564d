"""What a command finds out once, when it starts, and hands down to all that carries it out."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from fastkd._core.messages import UserError
from fastkd.methods import MeanTeacher, Method
from fastkd.runs.ablations import Variants, asked, variants
from fastkd.runs.config import CompareConfig, TrainConfig
from fastkd.runs.plans import RECIPES, Recipe, arguments_of, check_options, plan, recipe
from fastkd.runs.stages import Stage
from fastkd.train.devices import pick_device
from fastkd.train.distributed import ALONE, World
from fastkd.train.task import Setup


@dataclass(frozen=True)
class Job(Setup):
    """One run of `fastkd train`.

    Attributes:
        settings: its options (`config`); those of the first process, and quiet in the others.
        recipe: what its method is.
    """

    settings: TrainConfig
    recipe: Recipe

    @classmethod
    def of(cls, config: TrainConfig, world: World = ALONE, *, device: torch.device | None = None) -> Job:
        """UserError for a method or a device that is not there. device: where it was found out before."""
        how = recipe(config.method)
        config = config if world.first else dataclasses.replace(config, quiet=True)
        return cls(config, pick_device(config.device) if device is None else device, world, how)

    def among(self, world: World) -> Job:
        """The same run of several processes: a run that is resumed has the options that the first one finds."""
        if world.size == 1:
            return self
        return Job.of(world.broadcast(lambda: self.config), world, device=self.device)

    @property
    def config(self) -> TrainConfig:
        """The options of the command."""
        return self.settings

    @property
    def folder(self) -> Path:
        """Where the run's files go."""
        return Path(self.config.out)

    @cached_property
    def stages(self) -> dict[str, Stage]:
        """By name, each after those that it needs. UserError for what cannot be planned."""
        return {stage.name: stage for stage in plan(self.config, self.recipe)}

    @cached_property
    def recipes(self) -> dict[str, Recipe]:
        """The recipes of the stages' methods, by the methods' names."""
        known = {self.config.method: self.recipe}
        for stage in self.stages.values():
            known[stage.method] = known.get(stage.method) or recipe(stage.method)
        return {name: known[stage.method] for name, stage in self.stages.items()}

    def teaches_logits(self, stage: Stage) -> bool:
        """Whether the stage's frozen networks teach by their logits of each image alone: these may be kept."""
        return self.recipes[stage.name].method.teaches_logits and bool(stage.guides) and stage.views == 1

    def keeps_logits(self) -> bool:
        """Whether --logits-cache has something to keep."""
        return any(map(self.teaches_logits, self.stages.values()))

    def check(self) -> None:
        """UserError for an option that nothing in this run can use."""
        if self.config.logits_cache and not self.keeps_logits():
            raise UserError(
                f"--logits-cache: no frozen network of {self.config.method} teaches by its logits of each image alone: "
                "leave the option out"
            )
        if self.config.diversity and not self.has_several():
            raise UserError(f"--diversity: {self.config.method} has one network alone: leave the option out")

    def check_topk(self, stage: Stage, method: Method, classes: int) -> None:
        """UserError where --logits-topk asks for what cannot be, of the stage's method and so many classes."""
        k = self.config.logits_topk
        if k > classes:
            raise UserError(f"--logits-topk must be at most {classes}, the number of classes, got {k}")
        if k and self.teaches_logits(stage) and method.no_topk:
            raise UserError(
                f"--logits-topk: {stage.name}, trained by {stage.method}, cannot learn from a network's {k} likeliest "
                f"classes: {method.no_topk}; leave the option out"
            )

    def has_several(self) -> bool:
        """Whether the student's stage has several networks, which --diversity can compare."""
        student = self.stages["student"]
        averaged = issubclass(self.recipe.method, MeanTeacher)
        return averaged or bool(student.guides) or len(student.learners) > 1 or student.learners[0].branches > 1


@dataclass(frozen=True)
class CompareJob:
    """One `fastkd compare`: its options, what its methods are, and its device; of an ablation its rows by label."""

    config: CompareConfig
    recipes: dict[str, Recipe]
    device: torch.device
    variants: Variants = field(default_factory=dict)

    @classmethod
    def of(cls, config: CompareConfig) -> CompareJob:
        """UserError for a method or a device that is not there."""
        config = asked(config)
        rows = variants(config)
        recipes = {name: recipe(rows[name].method if rows else name) for name in config.methods}
        return cls(config, recipes, pick_device(config.device), rows)

    @property
    def methods(self) -> list[str]:
        """The names of the methods that are compared."""
        return self.config.methods

    def unused(self) -> list[str]:
        """Options that other methods have, and none of these."""
        known = arguments_of(self.recipes)
        return [option for option in self.config.options if option not in known and option in arguments_of(RECIPES)]

    def runs(self) -> dict[tuple[str, int], Job]:
        """The job of each method and seed; UserError for an option that no method has, or a plan that cannot be.

        Options of methods that are not compared may be there: a recipe serves whichever are asked for.
        """
        check_options(self.recipes, self.config.options, RECIPES)
        return {(name, seed): self._run(name, seed) for seed in self.config.seeds for name in self.methods}

    def _run(self, name: str, seed: int) -> Job:
        options: dict[str, Any] = self.recipes[name].accepted(self.config.options)
        run = self.config.run(name, seed, options)
        run = self.variants[name].of(run) if self.variants else run
        job = Job(run, self.device, ALONE, self.recipes[name])
        cache = job.config.logits_cache and job.keeps_logits()
        diversity = job.config.diversity and job.has_several()
        topk = job.config.logits_topk if cache else 0
        return dataclasses.replace(
            job, settings=dataclasses.replace(job.config, logits_cache=cache, logits_topk=topk, diversity=diversity)
        )
