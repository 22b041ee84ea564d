"""The papers' ablations, each a comparison over the switches of one method: `fastkd analyze ablate METHOD`.

Which switches a paper's table has is second-hand (S) or, where it is not known, ours (C); see docs/methods.md.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from fastkd._core.messages import UserError, guess
from fastkd.runs.config import COMPARED, CompareConfig, TrainConfig


@dataclass(frozen=True)
class Variant:
    """One row of an ablation: a method, the arguments that it changes, and the options of the run that it changes."""

    method: str
    options: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    def of(self, run: TrainConfig) -> TrainConfig:
        """The run of the method, with what this row changes."""
        return dataclasses.replace(run, method=self.method, options=run.options | self.options, **self.settings)

    def described(self) -> str:
        """ "orc with combine='mean'"."""
        changed = self.options | self.settings
        return self.method + (f" with {', '.join(f'{n}={v!r}' for n, v in changed.items())}" if changed else "")


Variants = dict[str, Variant]


def _switched(method: str, **rows: dict[str, Any]) -> Variants:
    """The method as it is, and with each row's arguments; of the labels _ is written -."""
    return {"full": Variant(method)} | {name.replace("_", "-"): Variant(method, row) for name, row in rows.items()}


def _orc(config: CompareConfig) -> Variants:
    """Which teachings take place, what the pivot learns from, whose logits teach, who is promoted (S)."""
    return _switched(
        "orc",
        group_alone={"teach": ["group"]},
        no_intensive={"teach": ["private", "group"]},
        no_private={"teach": ["intensive", "group"]},
        mean_of_teachers={"combine": "mean"},
        feedback_alone={"mix": "feedback"},
        batch_alone={"mix": "batch"},
        fixed_teacher={"rank_by": "fixed"},
        by_accuracy={"rank_by": "accuracy"},
        not_errors_alone={"errors_only": False},
    )


def _ctsl_mkt(config: CompareConfig) -> Variants:
    """Each transfer left out (S), and self-learning as it is printed."""
    return _switched(
        "ctsl-mkt",
        no_response={"mutual_response": False},
        no_relation={"mutual_relation": False},
        no_self={"self_learning": False},
        self_without_t2={"scale_by_t2": False},
    )


def _dkel(config: CompareConfig) -> Variants:
    """The teacher's initialisation and the decaying ensemble, each left out and both (C), and the released code."""
    return _switched(
        "dkel",
        no_init={"init": None},
        no_decay={"decay": None},
        neither={"init": None, "decay": None},
        ramped_ensemble={"ensemble_ramp": True},
        released={"variant": "released"},
    )


def _dgkd(config: CompareConfig) -> Variants:
    """How guides are dropped, and how many assistants there are (S); TAKD beside it."""
    found = _switched("dgkd", drop_one={"drop": "fixed"}) if config.assistants else _switched("dgkd")
    for survival in (0.5, 0.75):
        found[f"survival-{survival:g}"] = Variant("dgkd", {"drop": "bernoulli", "survival": survival})
    for count in range(len(config.assistants)):
        found[f"assistants-{count}"] = Variant("dgkd", {}, {"assistants": _spread(config.assistants, count)})
    return found | {"takd": Variant("takd")}


def _spread(names: list[str], count: int) -> list[str]:
    """`count` of the names, evenly apart."""
    apart = (len(names) + 1) / (count + 1)
    return [names[round((i + 1) * apart) - 1] for i in range(count)]


def _feed_parallel(config: CompareConfig) -> Variants:
    """The number of teachers (S)."""
    counts = range(1, (config.num_teachers or 0) + 1)
    return {f"teachers-{n}": Variant("feed-parallel", {}, {"num_teachers": n}) for n in counts}


def _feed_sequential(config: CompareConfig) -> Variants:
    """The length of the chain (S)."""
    counts = range(2, config.generations + 1)
    return {f"generations-{n}": Variant("feed-sequential", {}, {"generations": n}) for n in counts}


ABLATIONS: dict[str, Callable[[CompareConfig], Variants]] = {
    "dgkd": _dgkd,
    "orc": _orc,
    "ctsl-mkt": _ctsl_mkt,
    "dkel": _dkel,
    "feed-parallel": _feed_parallel,
    "feed-sequential": _feed_sequential,
}


def variants(config: CompareConfig) -> Variants:
    """Of the method that the comparison ablates, by label, with `ce` to compare to; {} where it ablates none.

    UserError for a method without an ablation.
    """
    if not config.ablate:
        return {}
    if config.ablate not in ABLATIONS:
        near = guess(config.ablate, list(ABLATIONS))
        raise UserError(f"there is no ablation of {config.ablate!r}: {near}use {', '.join(ABLATIONS)}")
    return {"ce": Variant("ce")} | ABLATIONS[config.ablate](config)


def asked(config: CompareConfig) -> CompareConfig:
    """With the labels of its ablation as its methods, where it names no others; UserError for a label that is none."""
    known = variants(config)
    if not known:
        return config
    if config.methods in ([*COMPARED], ["all"]):
        return dataclasses.replace(config, methods=list(known))
    for name in config.methods:
        if name not in known:
            near = guess(name, list(known))
            raise UserError(f"the ablation of {config.ablate} has no {name!r}: {near}use {', '.join(known)}")
    return config
