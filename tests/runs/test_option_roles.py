"""What is declared of each option: a run is held to it, a cached network's key holds it, or it is free."""

import dataclasses
from types import SimpleNamespace
from typing import Literal, get_args, get_origin, get_type_hints

import pytest
from train_helpers import TINY

from fastkd.runs.config import determining, differences
from fastkd.runs.runner import stage_key
from fastkd.train import CompareConfig, TrainConfig, UserError, plan
from fastkd.train.option_types import Role, declared

KINDS = (TrainConfig, CompareConfig)
HINTS = get_type_hints(TrainConfig)
OPTIONS = declared(TrainConfig)
# As the networks that lie in caches were named.
KEY = {"data", "train_size", "validation", "image_size", "augment", "batch_size", "optimizer", "lr", "momentum", "seed"}
KEY |= {"nesterov", "weight_decay", "schedule", "milestones", "gamma", "warmup_epochs", "amp", "accumulate"}
FREE = {"out", "resume", "cache", "quiet", "keep", "log_every", "workers", "device", "threads", "data_root", "download"}
FREE |= {"keep_images", "epochs", "eval_every", "save_every", "bad_images", "non_finite", "channels_last", "compile"}
FREE |= {"cuda_graph", "deterministic", "timeout", "tensorboard", "logits_cache", "diversity", "prepare_teachers"}


@pytest.mark.parametrize("kind", KINDS)
def test_every_option_has_a_role(kind):
    found = declared(kind)
    assert [field.name for field in dataclasses.fields(kind) if field.name not in found] == []
    assert all(how.role in get_args(Role) for how in found.values())
    assert all(how.needs in ("", *found) for how in found.values())


def test_an_option_of_both_commands_has_one_role():
    both = OPTIONS.items() & declared(CompareConfig).items()
    assert {name for name, _ in both} == OPTIONS.keys() & declared(CompareConfig).keys()


def test_what_is_free_and_what_is_in_a_key():
    assert {name for name, how in OPTIONS.items() if how.role == "free"} == FREE
    assert set(determining(TrainConfig(method="ce"))) == KEY
    assert {name for name, how in OPTIONS.items() if how.later} == {
        "variants",
        "label_noise",
        "logits_dtype",
        "logits_topk",
        "sync_batch_norm",
    }


def other(name):
    """Another value of an option."""
    value, kind = getattr(TrainConfig(method="kd", **TINY), name), HINTS[name]
    if get_origin(kind) is Literal:
        return next(choice for choice in get_args(kind) if choice != value)
    special = {"data": "fake", "device": "auto", "momentum": 0.5, "validation": 0.25, "image_size": 16}
    special |= {"label_noise": 0.25}
    special |= {"milestones": [0.25], "nesterov": True, "channels_last": True, "prepare_teachers": True}
    if name in special:
        return special[name]
    return not value if isinstance(value, bool) else f"{value}x" if isinstance(value, str) else (value or 0) + 1


def key(**changes):
    config = TrainConfig(**TINY | {"method": "dgkd", "epochs": 2, "out": "x"} | changes)
    stages = {stage.name: stage for stage in plan(config)}
    return stage_key(config, stages["assistant1"], stages, SimpleNamespace(description={}))


@pytest.mark.parametrize("name", [name for name, how in OPTIONS.items() if how.role in ("data", "result")])
def test_what_determines_a_network_changes_its_key(name):
    needs = {OPTIONS[name].needs: True} if OPTIONS[name].needs else {}
    changes = needs | {name: other(name)}
    same = name == "sync_batch_norm"  # in one process
    assert (key(**changes) == key(**needs)) == same
    old, new = (dataclasses.asdict(TrainConfig(method="kd", out="x", **TINY | one)) for one in (needs, changes))
    assert len(differences(old, new)) == 1


@pytest.mark.parametrize("name", sorted(FREE - {"epochs"}))
def test_what_is_free_changes_none(name):
    value = {"timeout": 1.0, "cuda_graph": True}.get(name, other(name))
    assert key(**{name: value}) == key()
    old, new = (dataclasses.asdict(TrainConfig(**{"method": "kd"} | TINY | one)) for one in ({}, {name: value}))
    assert differences(old, new) == []


def test_options_without_effect_do_not_count():
    assert key(variants=3, augment=False) == key(augment=False)
    assert key(logits_dtype="float16") == key(logits_cache=True) == key()


NUMBERS = [(kind, name) for kind in KINDS for name, how in declared(kind).items() if how.least is not None]


@pytest.mark.parametrize("kind, name", NUMBERS)
def test_numbers_have_a_least(kind, name):
    least, hint = declared(kind)[name].least, get_type_hints(kind)[name]
    settled = kind(**{name: least})
    assert getattr(settled, name) == (settled.epochs if name in ("guide_epochs", "own_epochs") else least)
    for wrong in (least - 1, True, "1", *([] if type(None) in get_args(hint) else [None])):
        what = "a finite number >= 0" if hint is float else f"an integer of at least {least}"
        with pytest.raises(UserError, match=f"^--{name.replace('_', '-')} must be {what}, got {wrong!r}$"):
            kind(**{name: wrong})
