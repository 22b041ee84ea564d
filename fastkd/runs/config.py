"""The options of a run: dataclasses that the command line, YAML files and Python share."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastkd._core.messages import UserError
from fastkd.train.option_types import declared, flag, option
from fastkd.train.settings import Settings


@dataclass
class MethodOptions:
    """Method.

    Args:
        method: how the student is trained; see the list below
        options: options.NAME=VALUE sets an argument of the method; see the list below
        seed: of the initial weights, the order of the images, their augmentation and the method's random choices
        out: folder of the run
        resume: go on from OUT, or start where nothing is there; without it an OUT that holds a run is refused
    """

    method: str = option("", "stages")
    options: dict[str, Any] = option({}, "stages")
    seed: int = option(0, "result", least=0)
    out: str = option("", "free")
    resume: bool = option(False, "free")


COMPARED = ("ce", "kd", "dgkd", "orc", "ctsl-mkt", "dkel", "feed-parallel", "feed-sequential")


@dataclass
class CompareOptions:
    """Comparison.

    Args:
        methods: which methods: A,B,...; all for all of them
        ablate: a method whose switches are compared instead, as in its paper (dgkd, orc, ctsl-mkt, dkel, feed-parallel,
            feed-sequential); --methods then keeps to some of the labels
        seeds: one run of each method for each seed: 0,1,...
        options: options.NAME=VALUE sets an argument of every method that has it
        jobs: seeds that run side by side, a process each; default on a CPU where runs have one thread (digits): as many
            as cores, from ten runs on
        out: folder of the comparison
        resume: go on from OUT, or start where nothing is there; without it an OUT that holds a run is refused
    """

    methods: list[str] = option([*COMPARED], "stages", grows=True)
    ablate: str = option("", "stages")
    seeds: list[int] = option([0, 1, 2], "stages", grows=True)
    options: dict[str, Any] = option({}, "stages")
    jobs: int | None = option(None, "free", least=1)
    out: str = option("runs/compare", "free")
    resume: bool = option(False, "free")


@dataclass
class TrainConfig(Settings, MethodOptions):
    """Everything that determines one run.

    >>> config = fastkd.train.TrainConfig(method="kd", epochs=2, milestones=[1])
    >>> config.data, config.epochs
    ('digits', 2)
    """


@dataclass
class CompareConfig(Settings, CompareOptions):
    """Everything that determines a comparison; defaults that make the student's own result leave room to gain.

    >>> config = fastkd.train.CompareConfig(methods=["ce", "kd"], seeds=[0, 1])
    >>> config.run("kd", 1, {}).method, config.schedule
    ('kd', 'cosine')
    """

    epochs: int = 80
    schedule: Literal["constant", "multistep", "cosine"] = "cosine"
    eval_every: int = 10
    keep: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.train_size is None and self.data == "digits":
            self.train_size = 200
        for name in ("methods", "seeds"):
            values = getattr(self, name)
            if not values or len(set(values)) != len(values):
                raise UserError(f"--{name} must be one or more different values, got {values}")
        if any(isinstance(seed, bool) or seed < 0 for seed in self.seeds):
            raise UserError(f"--seeds must be integers of at least 0, got {self.seeds}")

    def run(self, method: str, seed: int, options: dict[str, Any]) -> TrainConfig:
        """The single run of this method and seed."""
        shared = {f.name: getattr(self, f.name) for f in dataclasses.fields(Settings)}
        shared["cache"] = self.cache or str(Path(self.out) / "cache")
        out = str(Path(self.out) / "runs" / f"{method}-seed{seed}")
        return TrainConfig(**shared, method=method, seed=seed, options=options, out=out, resume=True)


_OPTIONS = declared(CompareConfig) | declared(TrainConfig)


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """The options that hold a run to its results and that differ: "lr was 0.1, now 0.05"."""
    names = [name for name in new if _OPTIONS[name].role != "free" and name in old and old[name] != new[name]]
    names = [name for name in names if not (_OPTIONS[name].grows and set(old[name]) <= set(new[name]))]
    return [f"{flag(name)} was {old[name]}, now {new[name]}" for name in names]


def determining(config: TrainConfig) -> dict[str, Any]:
    """The options that say what any network of the run computes, for its key in a cache. See `Option`."""
    found = {}
    for field in dataclasses.fields(config):
        how, value = _OPTIONS[field.name], getattr(config, field.name)
        unused = how.later and (value == field.default or not getattr(config, how.needs, True))
        if how.role in ("data", "result") and not unused:
            found[field.name] = value
    return found


def fingerprint(facts: dict[str, Any]) -> str:
    """12 hex digits that change when any of these (JSON-like) facts does."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]


def to_yaml(config: TrainConfig | CompareConfig) -> str:
    """The options as YAML that `--config` reads; without `resume`, which belongs to one start of the run."""
    from fastkd._core.extras import require

    values = dataclasses.asdict(config)
    values.pop("resume", None)
    text: str = require("yaml", "Writing config.yaml").safe_dump(values, sort_keys=False)
    return text


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The options in a YAML file; UserError where it cannot be read or holds no options."""
    from fastkd._core.extras import require

    yaml = require("yaml", "Reading a config")
    try:
        values = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise UserError(f"the config {path} cannot be read ({error.strerror}): give an existing YAML file") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"the config {path} is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise UserError(f"the config {path} holds no options: write one `name: value` a line")
    return values
