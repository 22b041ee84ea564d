"""`fastkd study FILE`: methods x seeds x settings of one YAML file, each run once, wherever it was stopped before."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastkd._core.messages import UserError, guess
from fastkd.runs.config import TrainConfig, differences, read_yaml
from fastkd.runs.plans import check_options, plan, recipe
from fastkd.train.settings import Settings

RECIPES = Path(__file__).parents[1] / "recipes" / "study"
FORBIDDEN = ("method", "seed", "out", "resume", "cache")  # the study's own business
DEFAULT = "default"


@dataclass(frozen=True)
class Run:
    """One training: `method` is its label in the file, `options` all that `fastkd train` is told."""

    method: str
    setting: str
    seed: int
    options: dict[str, Any]

    @property
    def name(self) -> str:
        """The run's name, which its folder has too."""
        return "-".join([self.setting] * (self.setting != DEFAULT) + [self.method, f"seed{self.seed}"])

    def config(self, out: Path) -> TrainConfig:
        """The same for every start of the study; networks trained before the student are shared in OUT/cache."""
        own = {"seed": self.seed, "out": str(out / "runs" / self.name), "cache": str(out / "cache"), "resume": True}
        return TrainConfig(**self.options | own)


@dataclass(frozen=True)
class Study:
    """What a file asks for.

    Attributes:
        name: of the file.
        runs: seeds outermost, so that whole seeds come together; each process takes the first of a seed of its own.
        baselines: methods to which all others are compared.
        pairs: (method, method): is the first better than the second? Asked in each setting that has both. One may be
            named with its setting, "SETTING:METHOD"; a plain name beside it is of the setting "default".
    """

    name: str
    runs: tuple[Run, ...]
    baselines: tuple[str, ...]
    pairs: tuple[tuple[str, str], ...]

    def chosen(self, only: list[str]) -> list[Run]:
        """The runs of these methods, settings, seeds ("seed3"); each of the three kinds that is not named is whole."""
        kinds = [[getattr(run, kind) for run in self.runs] for kind in ("method", "setting")]
        kinds.append([f"seed{run.seed}" for run in self.runs])
        for word in only:
            if not any(word in kind for kind in kinds):
                raise UserError(f"--only {word}: no run of {self.name} is of this method, setting or seed")
        asked = [[word for word in only if word in kind] for kind in kinds]
        own = zip(self.runs, *kinds, strict=True)
        return [run for run, *words in own if all(w in a or not a for w, a in zip(words, asked, strict=True))]


def find(name: str) -> Path:
    """A file as it is named; where there is none, the study of that name in the package."""
    if Path(name).is_file():
        return Path(name)
    known = sorted(path.stem for path in RECIPES.glob("*.yaml"))
    asked = name.removesuffix(".yaml")
    if asked in known:
        return RECIPES / f"{asked}.yaml"
    near = guess(asked, known)
    raise UserError(f"there is no study {name}, neither a file nor in the package: {near}known are {', '.join(known)}")


def read(path: Path, overrides: dict[str, Any] | None = None) -> Study:
    """The study in a YAML file; `overrides` are train's options that are put over its own (`--epochs 2`)."""
    own, over = read_yaml(path), overrides or {}
    values = own | over | {"options": own.get("options", {}) | over.get("options", {})}
    methods = _table(values.pop("methods", None), "methods", path)
    settings = _table(values.pop("settings", [DEFAULT]), "settings", path)
    seeds = _seeds(values.pop("seeds", [0]), path)
    baselines = tuple(values.pop("baselines", [next(iter(methods))]))
    pairs = tuple((better, than) for better, than in values.pop("pairs", []))
    runs = []
    for seed in seeds:
        for setting, changes in settings.items():
            special = dict(changes)
            among, of = special.pop("methods", methods), special.pop("seeds", seeds)
            _check_among(among, methods, setting, path)
            runs += [
                Run(method, setting, seed, _options(values, methods[method], special, method))
                for method in methods
                if method in among and seed in of
            ]
    _check(runs, path)
    there = {*methods, *(f"{run.setting}:{run.method}" for run in runs)}
    for names, known in ((baselines, methods), ([name for pair in pairs for name in pair], there)):
        for name in names:
            if name not in known:
                raise UserError(f"the study {path}: {name!r} is compared, but is not one of its methods")
    return Study(path.stem, tuple(runs), baselines, pairs)


def _table(values: Any, what: str, path: Path) -> dict[str, dict[str, Any]]:
    """A list of names, or a mapping of names to what is special about each."""
    table = dict.fromkeys(values, None) if isinstance(values, list) else values
    if not isinstance(table, dict) or not table or not all(isinstance(v, dict | None) for v in table.values()):
        raise UserError(f"the study {path}: {what} must be a list of names or a mapping name: options, got {values!r}")
    bad = [name for name in table if not re.fullmatch(r"[\w.+=-]+", str(name))]
    if bad:
        raise UserError(
            f"the study {path}: the name {bad[0]!r} in {what} must consist of letters, digits and . + = - _"
        )
    return {str(name): dict(own or {}) for name, own in table.items()}


def _seeds(values: Any, path: Path) -> list[int]:
    seeds = list(range(values)) if isinstance(values, int) else values
    good = isinstance(seeds, list) and seeds and all(isinstance(s, int) and s >= 0 for s in seeds)
    if not good or len(set(seeds)) < len(seeds):
        raise UserError(
            f"the study {path}: seeds must be different integers of at least 0 or their number, got {values!r}"
        )
    return seeds


def _check_among(among: Any, methods: dict[str, Any], setting: str, path: Path) -> None:
    unknown = [name for name in among if name not in methods]
    if unknown:
        raise UserError(f"the study {path}: the setting {setting} has a method {unknown[0]!r} that is not in methods")


def _options(shared: dict[str, Any], own: dict[str, Any], setting: dict[str, Any], label: str) -> dict[str, Any]:
    """All of a run's options: the file's, over them the method's, over them the setting's.

    A method's own `options` must be arguments of it; of those for all methods each takes what it has.
    """
    layers = [{"threads": 1, "quiet": True, "keep": 1}, shared, {"method": label}, own, setting]
    merged: dict[str, Any] = {}
    for layer in layers:
        merged |= layer
    name = merged["method"]
    near = [key for key in own if guess(str(key), ["method"], cutoff=0.7)]
    if near and "method" not in own:
        raise UserError(f"the method {label!r} of the study has an unknown option {near[0]!r}: did you mean method?")
    how = recipe(name)
    check_options({name: how}, own.get("options", {}))
    general = how.accepted(shared.get("options", {})) | own.get("options", {})
    return merged | {"options": general | how.accepted(setting.get("options", {}))}


def _check(runs: list[Run], path: Path) -> None:
    """What is wrong with any of the runs shows before the first one starts."""
    known = [field.name for field in dataclasses.fields(Settings)] + ["method", "options"]
    for run in runs:
        for name in run.options:
            if name not in known:
                near = guess(str(name), known)
                why = "belongs to the study itself" if name in FORBIDDEN else "is unknown"
                raise UserError(f"the study {path}: the option {name!r} {why}: {near}see fastkd train --help")
        plan(run.config(path.parent))
    names = [run.name for run in runs]
    twice = [name for name in names if names.count(name) > 1]
    if twice:
        raise UserError(f"the study {path}: two runs are called {twice[0]}: rename a method or a setting")


def check_resumed(runs: list[Run], out: Path) -> None:
    """UserError where OUT holds one of these runs with other options: their results do not belong together."""
    for run in runs:
        config = run.config(out)
        kept = Path(config.out) / "config.yaml"
        if kept.exists():
            old, new = read_yaml(kept), dataclasses.asdict(config)
            found = differences(old, new)
            found += [f"--epochs was {old['epochs']}, now {new['epochs']}"] * (old.get("epochs") != new["epochs"])
            if found:
                raise UserError(
                    f"{out} holds the run {run.name} with other options ({'; '.join(found)}): delete its folder "
                    f"{config.out}, or give another --out"
                )


def arguments_text(run: Run) -> str:
    """The arguments of a run's method that the file sets or leaves at their defaults."""
    values = recipe(run.options["method"]).arguments | run.options["options"]
    return ", ".join(f"{name}={value!r}" for name, value in values.items()) or "none"
