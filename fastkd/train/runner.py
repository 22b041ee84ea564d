"""Carries out a plan: builds networks and data, trains the guides once, and then the student.

Guides are trained by the same loop as the student and kept in a cache, under a name that changes with everything that
determines their weights.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd import data as datasets
from fastkd import methods, models
from fastkd.train import checkpoint
from fastkd.train.config import TrainConfig, UserError, fingerprint
from fastkd.train.locks import lock
from fastkd.train.loop import Fit, pick_device
from fastkd.train.metrics import Row
from fastkd.train.plans import Stage, arguments, plan, recipe

_TRAINING = ("batch_size", "optimizer", "lr", "momentum", "nesterov", "weight_decay", "schedule", "milestones")
_TRAINING += ("gamma", "warmup_epochs")
_DATA = ("data", "train_size", "validation", "image_size", "augment")


def parse_network(spec: str) -> tuple[str, dict[str, Any]]:
    """ "plain4:width=0.5:norm=group" -> ("plain4", {"width": 0.5, "norm": "group"})."""
    name, *parts = spec.split(":")
    options = {}
    for part in parts:
        key, equals, value = part.partition("=")
        if not (key and equals and value):
            raise UserError(f"the network {spec!r} is not NAME:option=value:..., got {part!r}")
        options[key] = _value(value)
    return name, options


def _value(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(text.lower(), text)


def make_network(spec: str, data: datasets.Data) -> nn.Module:
    name, options = parse_network(spec)
    return models.create(name, data.num_classes, image_size=data.image_size, channels=data.channels, **options)


@functools.lru_cache(maxsize=1)
def _load(name: str, items: tuple) -> datasets.Data:
    return datasets.load(name, **dict(items))


def load_data(config: TrainConfig) -> datasets.Data:
    items = {
        "root": config.data_root,
        "download": config.download,
        "train_size": config.train_size,
        "validation": config.validation,
        "seed": config.seed,
        "image_size": config.image_size,
        "augment": config.augment,
    }
    return _load(config.data, tuple(items.items()))


def stage_epochs(config: TrainConfig, stage: Stage) -> int:
    return config.epochs if stage.name == "student" else config.guide_epochs


def stage_key(config: TrainConfig, stage: Stage, stages: dict[str, Stage]) -> str:
    """Changes with all that determines the weights of this stage's network, its guides' keys among it."""
    if stage.name in config.checkpoint:
        content = Path(config.checkpoint[stage.name]).read_bytes()
        return fingerprint({"network": stage.network, "file": hashlib.sha256(content).hexdigest()})
    values = dataclasses.asdict(config)
    facts = {name: values[name] for name in (*_DATA, *_TRAINING, "seed")}
    if config.data.startswith("imagefolder:"):
        facts["data"] = str(Path(config.data.partition(":")[2]).resolve())
    facts |= {"name": stage.name, "network": stage.network, "method": stage.method, "options": stage.options}
    facts |= {"epochs": stage_epochs(config, stage)}
    # Arguments that are not given have the defaults of this version of the method.
    facts |= {"defaults": {k: repr(v) for k, v in arguments(stage.method).items()}}
    return fingerprint(facts | {"guides": [stage_key(config, stages[name], stages) for name in stage.guides]})


@dataclass
class Result:
    """A finished stage: its trained network, its metrics, and how long the training took in this process."""

    stage: Stage
    network: nn.Module
    rows: list[Row]
    folder: Path | None
    method: methods.Method | None = None


class Runner:
    """Carries out the plan of one run."""

    def __init__(self, config: TrainConfig, say: Callable[[str], None] = print):
        self.config, self.say = config, say
        self.stages = {stage.name: stage for stage in plan(config)}
        pick_device(config.device)
        self.data = load_data(config)
        for stage in self.stages.values():  # a wrong name or option shows before anything is trained
            self.build(stage, [make_network(self.stages[g].network, self.data) for g in stage.guides])

    def run(self) -> dict[str, Result]:
        """Train what is not there yet; the results by the stages' names."""
        results: dict[str, Result] = {}
        for stage in self.stages.values():
            guides = [results[name].network for name in stage.guides]
            train = self._student if stage.name == "student" else self._guide
            results[stage.name] = train(stage, guides)
        return results

    def build(self, stage: Stage, guides: list[nn.Module]) -> methods.Method:
        """The method of a stage with a freshly initialised network: the same one for every method of this seed."""
        torch.manual_seed(self._seed(stage))
        network = make_network(stage.network, self.data)
        options = dict(stage.options)
        if "seed" in arguments(stage.method):
            options.setdefault("seed", self.config.seed)
        return recipe(stage.method).build(network, guides, options)

    def fit(self, stage: Stage, guides: list[nn.Module], folder: Path | None) -> Fit:
        facts = {"stage": stage.name, "network": stage.network, "method": stage.method, "seed": self.config.seed}
        facts |= {"num_classes": self.data.num_classes, "image_size": self.data.image_size}
        facts |= {"channels": self.data.channels}
        return Fit(
            self.build(stage, guides),
            self.data,
            self.config,
            folder,
            stage_epochs(self.config, stage),
            self._seed(stage),
            f"{stage.name} {stage.network}" if stage.name != "student" else f"{stage.method}: student {stage.network}",
            facts,
        )

    def _seed(self, stage: Stage) -> int:
        return zlib.crc32(f"{self.config.seed} {stage.name}".encode())

    def _student(self, stage: Stage, guides: list[nn.Module]) -> Result:
        folder = Path(self.config.out)
        fit = self.fit(stage, guides, folder)
        if self.config.resume:
            fit.resume()
        fit.run()
        return Result(stage, fit.method.deployable(), fit.rows, folder, fit.method)

    def _guide(self, stage: Stage, guides: list[nn.Module]) -> Result:
        if stage.name in self.config.checkpoint:
            return self._given(stage, self.config.checkpoint[stage.name])
        cache = Path(self.config.cache or Path(self.config.out) / "cache")
        folder = cache / f"{stage.name}-{stage_key(self.config, stage, self.stages)}"
        folder.mkdir(parents=True, exist_ok=True)
        with lock(folder, wait=lambda: self.say(f"waiting for another run that trains {folder} ...")):
            settings = dataclasses.replace(self.config, keep=1)
            fit = self.fit(stage, guides, folder)
            fit.settings = settings
            fit.resume()
            if fit.epoch == fit.epochs and not self.config.quiet:
                self.say(f"{stage.name} {stage.network}: taken from {folder}")
            fit.run()
        return Result(stage, fit.method.deployable(), fit.rows, folder)

    def _given(self, stage: Stage, path: str) -> Result:
        network = make_network(stage.network, self.data)
        state = checkpoint.load(path)
        state = state.get("network", state)  # one of ours, or a plain state dict
        try:
            network.load_state_dict(state)
        except (RuntimeError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:160]
            raise UserError(
                f"--checkpoint.{stage.name}: {path} does not fit the network {stage.network} ({reason}): "
                f"name the network it was saved from"
            ) from error
        return Result(stage, network, [], None)
