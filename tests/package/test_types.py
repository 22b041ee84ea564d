"""A user's file with every public call runs, and type checkers take it; wrong choices they do not take."""

import importlib.util
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import typing
from pathlib import Path

import pytest
import torch
from torch import nn

import fastkd
from fastkd import functional, losses, methods, models

ROOT = Path(__file__).resolve().parents[2]
FILE = Path(__file__).with_name("users_file.py")
# --follow-imports=silent: of the user's file, as where the package is installed. `Tensor.backward` has no types.
OPTIONS = ["--strict", "--follow-imports=silent", "--untyped-calls-exclude=torch", "--cache-dir=/dev/null"]

WRONG = """
import torch
from fastkd import functional, losses, methods, models

z = torch.zeros(2, 3)
functional.multi_teacher_kd(z, [z], reduction="men")
functional.multi_teacher_kd(z, [z], combine="prob")
functional.multi_teacher_kd(z, [z], activation="relu")
functional.multi_label_kd(z, [z], classes="max")
functional.mutual_kd([z, z], reduction="avg")
functional.rkd_angle(z, z, reduction="average")
functional.feature_ensemble([z], [z], norm="batch")
functional.cross_entropy(z, None)
losses.MultiTeacherKD(combine="mean")
losses.MultiLabelKD(class_mean=True)
losses.MutualKD(temperatur=2.0)
losses.RKDDistance(reduction=0)
methods.DGKD(models.create("plain2", 3), [], drop="all")
methods.KDCL([], ensemble="best")
loss: int = losses.RKDAngle()(z, z)
"""


def checked(file: Path, folder: Path) -> list[str]:
    pytest.importorskip("mypy")
    command = [sys.executable, "-m", "mypy", *OPTIONS, str(file)]
    environment = os.environ | {"MYPYPATH": str(ROOT)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stderr
    return [line for line in done.stdout.splitlines() if ": error: " in line]


def pyright_lines(file: Path, folder: Path) -> list[int]:
    """The lines of `file` in which pyright sees an error. Its wheel, with that of node, holds all that it runs."""
    if importlib.util.find_spec("pyright") is None:
        reason = "pyright is not installed: make venv"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    if file.parent != folder:  # what lies outside of the project is silently left out
        shutil.copy(file, folder)
    project = {"include": [file.name], "extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(project))
    command = [sys.executable, "-m", "pyright", "--outputjson", "-p", str(folder), "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode in (0, 1), done.stdout + done.stderr
    said = json.loads(done.stdout)
    assert said["summary"]["filesAnalyzed"] == 1
    errors = [each for each in said["generalDiagnostics"] if each["severity"] == "error"]
    return sorted(each["range"]["start"]["line"] + 1 for each in errors)


@pytest.mark.slow
def test_a_users_file_passes_strict_type_checks(tmp_path):
    assert checked(FILE, tmp_path) == []


@pytest.mark.slow
def test_a_users_file_passes_pyright(tmp_path):
    assert pyright_lines(FILE, tmp_path) == []


@pytest.fixture
def wrong(tmp_path) -> tuple[Path, set[int]]:
    """A file of wrong calls and their lines."""
    file = tmp_path / "wrong.py"
    file.write_text(WRONG)
    return file, {n for n, line in enumerate(WRONG.splitlines(), 1) if n > 5 and line}


@pytest.mark.slow
def test_wrong_calls_do_not(wrong, tmp_path):
    file, lines = wrong
    assert {int(line.split(":")[1]) for line in checked(file, tmp_path)} == lines


@pytest.mark.slow
def test_pyright_sees_wrong_calls(wrong, tmp_path):
    file, lines = wrong
    assert set(pyright_lines(file, tmp_path)) == lines


@pytest.mark.slow
@pytest.mark.parametrize("ci, outcome", [("", pytest.skip.Exception), ("true", pytest.fail.Exception)])
def test_a_missing_pyright_skips_and_fails_in_ci(ci, outcome, monkeypatch, tmp_path):
    monkeypatch.setenv("CI", ci)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(outcome, match="pyright is not installed"):
        pyright_lines(FILE, tmp_path)


@pytest.mark.slow
def test_a_users_file_runs():
    subprocess.run([sys.executable, "-W", "ignore", str(FILE)], check=True, env=os.environ | {"PYTHONPATH": str(ROOT)})


def public():
    found = []
    for module, prefix in ((functional, "functional"), (losses, "losses"), (methods, "methods"), (models, "models")):
        for name in module.__all__:
            found.append(pytest.param(getattr(module, name), id=f"{prefix}.{name}"))
    others = {"nn.FeatureTransforms": fastkd.nn.FeatureTransforms, "nn.chosen_form": fastkd.nn.chosen_form}
    return [*found, *[pytest.param(what, id=name) for name, what in others.items()]]


@pytest.mark.parametrize("what", public())
def test_the_users_file_names_all_that_is_public(what):
    assert re.search(rf"\b{what.__name__}\b", FILE.read_text())


@pytest.mark.parametrize("what", public())
def test_every_argument_has_a_type_that_can_be_looked_up(what):
    call = what.__init__ if inspect.isclass(what) and not issubclass(what, tuple) else what
    arguments = [p for p in inspect.signature(call).parameters.values() if p.name != "self"]
    assert all(p.annotation is not p.empty for p in arguments), inspect.signature(call)
    hints = typing.get_type_hints(inspect.unwrap(call) if not inspect.isclass(call) else call)
    assert hints or not arguments


@pytest.mark.parametrize(
    "module",
    [
        losses.MultiTeacherKD(weights=torch.ones(2), temperature=2.0),
        losses.MutualKD(kd_weight=0.5),
        losses.MultiLabelKD(pos_weight=torch.ones(3)),
        losses.LinearMultiTeacherKD(softcap=30.0),
        losses.RKDDistance(reduction="sum"),
        losses.RKDAngle(eps=0.1),
        losses.FeatureEnsemble(p=2),
    ],
    ids=lambda module: type(module).__name__,
)
def test_a_module_shows_all_its_arguments(module):
    names = [p.name for p in inspect.signature(type(module)).parameters.values() if p.name != "process_group"]
    assert all(f"{name}=" in repr(module) for name in names), repr(module)


def test_a_method_shows_what_it_was_made_with():
    student, teacher = nn.Linear(2, 3), nn.Linear(2, 3)
    text = repr(methods.KD(student, teacher, temperature=2.0, lam=0.25))
    assert "temperature=2.0, lam=0.25, ce_weight=None" in text and "(student): Linear" in text
    assert "drop='bernoulli'" in repr(methods.DGKD(nn.Linear(2, 3), [nn.Linear(2, 3)], drop="bernoulli"))
