"""Carries out a plan: builds networks and data, trains what the student needs once, and then the student.

Earlier stages are trained by the same loop as the student's and kept in a cache, under a name that changes with
everything that determines their weights.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import hashlib
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd import data as datasets
from fastkd import methods, models
from fastkd._core.files import write_atomic
from fastkd._core.locks import NotWritable, why_not_writable
from fastkd._core.messages import UserError, note
from fastkd.models.registry import SMALLEST_IMAGE
from fastkd.runs.config import TrainConfig, determining, fingerprint
from fastkd.runs.job import Job
from fastkd.runs.stages import Learner, Stage
from fastkd.train import batch_norm, checkpoint, same_data
from fastkd.train.devices import check_cuda_graph, keeps_channels_last, prepares_teachers
from fastkd.train.distributed import world
from fastkd.train.evaluation import evaluate
from fastkd.train.given import load_weights
from fastkd.train.loaders import held_out_batches
from fastkd.train.loop import Fit
from fastkd.train.metrics import Row
from fastkd.train.steps import check_amp
from fastkd.train.task import Setup, Task


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


def make_network(spec: str, data: datasets.Data, branches: int = 0) -> nn.Module:
    """A fresh network for these images; with `branches` so many peers on one stem."""
    name, options = parse_network(spec)
    sizes = {"image_size": data.image_size, "channels": data.channels}
    if branches:
        return models.branched(name, data.num_classes, branches=branches, **sizes, **options)
    return models.create(name, data.num_classes, **sizes, **options)


_FIXED = ("digits", "fake")  # data that nobody can change while this process runs


@functools.lru_cache(maxsize=1)
def _load_once(name: str, items: tuple[tuple[str, Any], ...]) -> datasets.Data:
    return datasets.load(name, **dict(items))


def load_data(config: TrainConfig, note: Callable[[str], None] = note) -> datasets.Data:
    """The data of a run; what their folders hold beside is told to `note` by the first process."""
    items: dict[str, Any] = {
        "root": config.data_root,
        "download": config.download,
        "train_size": config.train_size,
        "validation": config.validation if config.validation < 1 else int(config.validation),
        "seed": config.seed,
        "image_size": config.image_size,
        "augment": config.augment,
        "bad_images": config.bad_images,
        "variants": config.variants,
        "label_noise": config.label_noise,
        "keep_images": config.keep_images,
    }
    if config.data in _FIXED:
        return _load_once(config.data, tuple(items.items()))
    return datasets.load(config.data, **items, note=note if world().first else lambda text: None)


def _check_size(config: TrainConfig, data: datasets.Data) -> None:
    """UserError for images that are too small, where nobody gave a size."""
    if config.image_size is None and data.image_size < SMALLEST_IMAGE:
        raise UserError(
            f"--data {config.data}: the shorter side of the first image has {data.image_size} of the {SMALLEST_IMAGE} "
            "pixels that networks need: give --image-size, to which all images are resized"
        )


def _job(run: Job | TrainConfig) -> Job:
    return run if isinstance(run, Job) else Job.of(run, world())


def stage_key(run: Job | TrainConfig, stage: Stage, stages: dict[str, Stage], data: datasets.Data | None = None) -> str:
    """Changes with all that determines the weights of this stage's network, the keys of what it needs among it.

    data: those of the run; loaded where they are not given.
    """
    job = _job(run)
    config = job.config
    if stage.name in config.checkpoint:
        content = Path(config.checkpoint[stage.name]).read_bytes()
        return fingerprint({"network": stage.network, "file": hashlib.sha256(content).hexdigest()})
    facts = determining(config)
    data = load_data(config) if data is None else data
    facts["data"] = [config.data.partition(":")[0], data.description]  # wherever a folder stands
    if not batch_norm.synchronises(config, job.world):
        facts.pop("sync_batch_norm", None)
    if not stage.guides:
        facts = {name: value for name, value in facts.items() if name not in ("logits_dtype", "logits_topk")}
    facts |= {name: getattr(stage, name) for name in ("method", "options", "epochs", "views")}
    facts |= {"learners": [dataclasses.asdict(learner) for learner in stage.learners]}
    # Arguments that are not given have the defaults of this version of the method.
    facts |= {"defaults": {name: repr(value) for name, value in job.recipes[stage.name].arguments.items()}}
    return fingerprint(facts | {"needs": [stage_key(job, stages[name], stages, data) for name in stage.needs]})


@dataclass
class Result:
    """A finished stage: the network that it is for, its metrics, and where they are kept.

    `others`: the networks that learned together with it, by the learners' names, where they were trained just now.
    """

    stage: Stage
    network: nn.Module
    rows: list[Row]
    folder: Path | None
    others: dict[str, nn.Module] = field(default_factory=dict)


class Runner:
    """Carries out the plan of one run.

    >>> runner = fastkd.train.Runner(fastkd.train.TrainConfig(method="kd", data="fake", out="nowhere"))
    >>> list(runner.stages), runner.data.num_classes
    (['teacher', 'student'], 10)

    Args:
        run: what its command found out, or its options alone.
        say: tells a line to the user; in the first process only.
        data: those of the options, where they are loaded already.
    """

    def __init__(
        self, run: Job | TrainConfig, say: Callable[[str], None] = print, *, data: datasets.Data | None = None
    ):
        self.job = _job(run)
        self.config, self.world, self.stages = self.job.config, self.job.world, self.job.stages
        self.say = say if self.world.first else lambda text: None
        self.job.check()
        self._check_device()
        self.data = load_data(self.config) if data is None else data
        _check_size(self.config, self.data)
        for stage in self.stages.values():  # a wrong name or option shows before anything is trained
            networks = {name: make_network(self.stages[name].network, self.data) for name in stage.needs}
            self.job.check_topk(stage, self.build(stage, networks), self.data.num_classes)

    def run(self) -> dict[str, Result]:
        """Train what is not there yet; the results by the stages' names."""
        if self.world.size > 1:
            same_data.check_alike(self.world, self.data.description)
        self.world.broadcast(self._record_data)
        results: dict[str, Result] = {}
        for stage in self.stages.values():
            trained = {name: results[name].network for name in stage.needs}
            train = self._student if stage.name == "student" else self._earlier
            results[stage.name] = train(stage, trained)
        return results

    def accuracies(self, networks: Mapping[str, nn.Module]) -> dict[str, float]:
        """Each network's accuracy on the test images, by its name. Every process must call."""
        batches = held_out_batches(self.data, self.config, self.world)["test"]
        about = self.job.device, self.data.num_classes, self.world
        return {name: evaluate(network, batches, *about)[1] for name, network in networks.items()}

    def _check_device(self) -> None:
        check_amp(self.config.amp, self.job.device)
        check_cuda_graph(self.config, self.job.device, self.world)
        self.world.broadcast(lambda: batch_norm.check(self.config, self.job.device, self.world))

    def _record_data(self) -> None:
        folder = self.job.folder
        if self.config.resume:
            same_data.go_on([folder], self.data.description)
        same_data.keep(folder, self.data.description)

    def build(self, stage: Stage, trained: Mapping[str, nn.Module]) -> methods.Method:
        """The method of a stage; `trained` holds the networks of the stages that it needs.

        Fresh networks are the same for every method of this seed. A network that goes on learning is a copy.
        """
        return self._build(stage, self._learners(stage, trained), trained)

    def _build(self, stage: Stage, learners: list[nn.Module], trained: Mapping[str, nn.Module]) -> methods.Method:
        torch.manual_seed(self._seed(f"{stage.name} {stage.method}"))  # of what the method makes beside the networks
        options, how = dict(stage.options), self.job.recipes[stage.name]
        if "seed" in how.arguments:
            options.setdefault("seed", self.config.seed)
        if "process_group" in how.parameters:
            options["process_group"] = self.world.group
        return how.build(learners, [trained[name] for name in stage.guides], options)

    def fit(self, stage: Stage, trained: Mapping[str, nn.Module], folder: Path | None) -> Fit:
        """The training run of `stage`, its guides taken from `trained`; `folder` None: nothing is written."""
        facts = {"stage": stage.name, "network": stage.network, "method": stage.method, "seed": self.config.seed}
        facts |= {"num_classes": self.data.num_classes, "image_size": self.data.image_size}
        facts |= {"channels": self.data.channels, "learners": [learner.name for learner in stage.learners]}
        facts |= {"channels_last": keeps_channels_last(self.config, self.job.device)}
        facts |= {"prepare_teachers": prepares_teachers(self.config, self.job.device)}
        learners = self._learners(stage, trained)
        task = Task(
            f"{stage.name} {stage.network}" if stage.name != "student" else f"{stage.method}: student {stage.network}",
            stage.epochs,
            self._seed(stage.learners[0].name),
            facts,
            folder,
            others={each.name: network for each, network in list(zip(stage.learners, learners, strict=True))[1:]},
            curves=self._curves(stage) if folder is not None else None,
            guides={name: trained[name] for name in stage.guides},
            logits=self._cache / "logits" if self.config.logits_cache and self.job.teaches_logits(stage) else None,
        )
        data = self.data.with_views(stage.views) if stage.views > 1 else self.data
        return Fit(self._build(stage, learners, trained), data, self._setup(stage), task)

    def _setup(self, stage: Stage) -> Setup:
        """What the engine does in a stage: of networks trained before the student the last checkpoint is enough."""
        if stage.name == "student":
            return self.job
        return Setup(dataclasses.replace(self.config, keep=1, diversity=False), self.job.device, self.world)

    def _curves(self, stage: Stage) -> Path | None:
        """Where a stage's curves go: in this run's folder, also where its checkpoints go into the cache."""
        name = f"{stage.name}-{stage.method}"  # TensorBoard shows it as the run's
        return self.job.folder / "tensorboard" / name if self.config.tensorboard else None

    def _learners(self, stage: Stage, trained: Mapping[str, nn.Module]) -> list[nn.Module]:
        return [self._learner(learner, trained) for learner in stage.learners]

    def _learner(self, learner: Learner, trained: Mapping[str, nn.Module]) -> nn.Module:
        if learner.start:
            return copy.deepcopy(trained[learner.start]).requires_grad_(True)  # it may be frozen as a guide elsewhere
        torch.manual_seed(self._seed(learner.name))
        return make_network(learner.network, self.data, learner.branches)

    def _seed(self, name: str) -> int:
        return zlib.crc32(f"{self.config.seed} {name}".encode())

    def _student(self, stage: Stage, trained: Mapping[str, nn.Module]) -> Result:
        folder = self.job.folder
        fit = self.fit(stage, trained, folder)
        if self.config.resume:
            fit.resume()
        fit.run()
        if self.config.cache and stage.method == "ce" and fit.on_schedule():
            self._share(stage, folder)
        return Result(stage, fit.method.deployable(), fit.rows, folder, dict(fit.others))

    @property
    def _cache(self) -> Path:
        return Path(self.config.cache or self.job.folder / "cache")

    def _cached(self, stage: Stage) -> Path:
        """The folder of a stage in the cache."""
        # The first process's: the times of files may differ between machines.
        key = self.world.broadcast(lambda: stage_key(self.job, stage, self.stages, self.data))
        return self._cache / f"{stage.learners[0].name}-{key}"

    def _wait(self, folder: Path) -> Callable[[], None]:
        return lambda: self.say(f"waiting for another run that trains {folder} ...")

    def _share(self, stage: Stage, source: Path) -> None:
        """Put a student that was trained alone where other methods look for it: it is their student's self-teacher."""
        folder = self._cached(stage)
        reason = self.world.broadcast(lambda: why_not_writable(folder))
        if reason:
            if self.world.first and not self.config.quiet:
                note(f"the student is not put into {self._cache}, which cannot be written ({reason})")
            return
        with self.world.locked(folder, wait=self._wait(folder)):
            self.world.broadcast(lambda: self._copy(stage, source, folder))

    def _copy(self, stage: Stage, source: Path, folder: Path) -> None:
        target = checkpoint.path_of(folder / "checkpoints", stage.epochs)
        if not target.exists():
            write_atomic(folder / "metrics.csv", (source / "metrics.csv").read_bytes())
            last = checkpoint.path_of(source / "checkpoints", stage.epochs)
            write_atomic(target, last.read_bytes())

    def _earlier(self, stage: Stage, trained: Mapping[str, nn.Module]) -> Result:
        if stage.name in self.config.checkpoint:
            return self._given(stage, self.config.checkpoint[stage.name])
        folder = self._cached(stage)
        reason = self.world.broadcast(lambda: why_not_writable(folder))
        if reason:
            return self._only_read(stage, trained, reason)
        with self.world.locked(folder, wait=self._wait(folder)):
            fit = self.fit(stage, trained, folder)
            fit.resume()
            if fit.epoch == fit.epochs and not self.config.quiet:
                self.say(f"{stage.name} {stage.network}: taken from {folder}")
            fit.run()
        return Result(stage, fit.method.deployable(), fit.rows, folder)

    def finished(self, stage: Stage, trained: Mapping[str, nn.Module]) -> Result | None:
        """An earlier stage as it was trained, from its file: nothing is trained or locked. None where there is none."""
        if stage.name in self.config.checkpoint:
            return self._given(stage, self.config.checkpoint[stage.name])
        folder = self._cached(stage)
        done = checkpoint.path_of(folder / "checkpoints", stage.epochs)
        if not self.world.broadcast(done.is_file):
            return None
        fit = self.fit(stage, trained, folder)
        fit.resume(done)
        if not self.config.quiet:
            self.say(f"{stage.name} {stage.network}: taken from {folder}")
        return Result(stage, fit.method.deployable(), fit.run(), folder)

    def _only_read(self, stage: Stage, trained: Mapping[str, nn.Module], reason: str) -> Result:
        """A network that is finished, from a cache that this process may not write."""
        found = self.finished(stage, trained)
        if found is None:
            advice = f"it does not hold the trained {stage.name} {stage.network}: name a --cache that can be written"
            raise NotWritable(self._cache, reason, advice)
        return found

    def _given(self, stage: Stage, path: str) -> Result:
        network = make_network(stage.network, self.data)
        load_weights(network, path, f"--checkpoint.{stage.name}", stage.network)
        return Result(stage, network, [], None)
