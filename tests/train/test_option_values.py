"""Options given from Python: each is checked from its annotation, and becomes what YAML and JSON can hold."""

import dataclasses
from pathlib import Path
from typing import Literal, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch
from train_helpers import config, one_thread, untrained  # noqa: F401

from fastkd.runs import compare
from fastkd.runs.config import differences, read_yaml, to_yaml
from fastkd.train import CompareConfig, Runner, TrainConfig, UserError

KINDS = (TrainConfig, CompareConfig)
LITERALS = [(k, n, h) for k in KINDS for n, h in get_type_hints(k).items() if get_origin(h) is Literal]
FLAGS = [(kind, name) for kind in KINDS for name, hint in get_type_hints(kind).items() if hint is bool]


def test_all_kinds_of_options_are_seen():
    names = {name for _, name, _ in LITERALS}
    assert {"optimizer", "schedule", "amp", "non_finite", "bad_images", "logits_dtype"} <= names and len(FLAGS) > 20


@pytest.mark.parametrize("kind, name, hint", LITERALS, ids=lambda value: getattr(value, "__name__", str(value)[:12]))
def test_a_choice_is_one_of_its_annotation(kind, name, hint):
    for choice in get_args(hint):
        assert getattr(kind(**{name: choice}), name) == choice
    for wrong in (get_args(hint)[0] + "x", "", None, 1, [get_args(hint)[0]]):
        with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} must be .* or .*, got "):
            kind(**{name: wrong})


@pytest.mark.parametrize("kind, name", FLAGS)
def test_a_flag_is_true_or_false(kind, name):
    with pytest.raises(UserError, match=rf"^--{name.replace('_', '-')} must be true or false, got 'no'$"):
        kind(**{name: "no"})


@pytest.mark.parametrize("options, message", [
    ({"optimizer": "adam"}, "--optimizer must be sgd or adamw, got 'adam'"),
    ({"schedule": "cosin"}, "--schedule must be constant or multistep or cosine, got 'cosin'"),
    ({"data": 5}, "--data must be text, got 5"),
    ({"assistants": "resnet8"}, "--assistants must be a list of names, got 'resnet8'"),
    ({"options": [1]}, "--options must be a dict by name, got "),
])  # fmt: skip
def test_what_is_wrong_is_one_sentence(options, message):
    with pytest.raises(UserError) as error:
        TrainConfig(**options)
    assert str(error.value).startswith(message)


def test_numpys_numbers_paths_and_tuples_are_kept_as_plain_values(tmp_path):
    """As YAML and JSON hold them, and so that a run that is resumed with them has the same options."""
    given = {"lr": np.float32(0.5), "epochs": np.int64(3), "milestones": (np.float64(0.5),), "nesterov": np.bool_(True)}
    one = TrainConfig(**given, out=tmp_path, data_root=Path("x"), options={"temperature": np.float32(2.0)})
    (tmp_path / "c.yaml").write_text(to_yaml(one))
    read = read_yaml(tmp_path / "c.yaml")
    assert read["lr"] == 0.5 and read["options"] == {"temperature": 2.0} and read["data_root"] == "x"
    assert differences(read, dataclasses.asdict(one)) == []
    assert type(one.epochs) is int and one.milestones == [0.5] and one.nesterov is True


@pytest.mark.parametrize("options", [{"amp": "bf16"}, {"accumulate": 4}, {"amp": "bf16", "accumulate": 2}])
def test_compare_times_the_steps_that_the_run_takes(tmp_path, options, monkeypatch):
    runner = Runner(config(tmp_path, batch_size=16, **options))
    stage = runner.stages["student"]
    fit = runner.fit(stage, untrained(runner, stage), None)
    seen = []
    hook = lambda module, args: seen.append((len(args[0]), torch.is_autocast_enabled("cpu")))  # noqa: E731
    fit.method.student.register_forward_pre_hook(hook)
    inputs, target = next(iter(fit.train_batches))
    assert compare._time_step(fit, inputs, target, "native") > 0
    parts = options.get("accumulate", 1)
    assert seen == [(16 // parts, options.get("amp") == "bf16")] * parts
