"""An environment with the packages that the examples drop into, beside the one that the tests run in."""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
REQUIREMENTS = ROOT / "examples" / "requirements.txt"
FOLDER = ROOT / "build" / "examples"
# Those that are here already, which the installation must neither replace nor bring a second time.
KEPT = ("torch", "torchvision", "numpy")


@pytest.fixture(scope="session")
def frameworks() -> Path:
    """The interpreter of an environment with examples/requirements.txt, this one's packages, and this fastkd.

    Made once for each content of the requirements. Where packages cannot be had the tests are skipped, but not in CI.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (FOLDER / _key()).exists():
            _install()
            (FOLDER / _key()).touch()
    return FOLDER / "venv" / "bin" / "python"


@pytest.fixture
def run_example(frameworks, tmp_path) -> Callable[..., str]:
    """run_example("frameworks/timm_loop.py") runs it as a newcomer does, and returns what it printed.

    `launcher` stands before the script: ["-m", "torch.distributed.run", "--nproc-per-node", "2"].
    """

    def run(name: str, *arguments: str, launcher: Sequence[str] = (), seconds: float = 900) -> str:
        command = [frameworks, *launcher, ROOT / "examples" / name, *arguments]
        done = subprocess.run(
            [str(part) for part in command], cwd=tmp_path, env=_environment(), timeout=seconds, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        assert done.returncode == 0, f"examples/{name}: status {done.returncode}\n{done.stdout[-6000:]}"
        return done.stdout

    return run


def _key() -> str:
    what = f"{REQUIREMENTS.read_text()}{sys.version}{Path(torch.__file__)}{[_version(name) for name in KEPT]}"
    return "installed-" + hashlib.sha256(what.encode()).hexdigest()[:16]


def _version(name: str) -> str:
    return importlib.metadata.version(name)


def _environment() -> dict[str, str]:
    """No hub is asked, nothing is reported home, and a step that leaves the kernels is an error, not a note."""
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "FASTKD_BACKEND")}
    offline = {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "DO_NOT_TRACK": "1"}
    return kept | offline | {"FASTKD_BACKEND": "native", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"}


def _install() -> None:
    shutil.rmtree(FOLDER / "venv", ignore_errors=True)
    for old in FOLDER.glob("installed-*"):
        old.unlink()
    subprocess.run([sys.executable, "-m", "venv", str(FOLDER / "venv")], check=True)
    (site,) = (FOLDER / "venv").glob("lib/python*/site-packages")
    ours = Path(torch.__file__).resolve().parents[1]
    (site / "ours.pth").write_text(f"{ROOT}\n{ours}\n")
    (FOLDER / "kept.txt").write_text("".join(f"{name}=={_version(name)}\n" for name in KEPT))
    command = [str(FOLDER / "venv" / "bin" / "python"), "-m", "pip", "install", "-q", "--no-compile"]
    command += ["--disable-pip-version-check", "-c", str(FOLDER / "kept.txt"), "-r", str(REQUIREMENTS)]
    done = subprocess.run(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=_pip_environment())
    if done.returncode != 0:
        reason = f"examples/requirements.txt could not be installed: {done.stdout.strip()[-1500:]}"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    brought = [name for name in KEPT if (site / name).exists()]
    assert not brought, f"the installation brought its own {', '.join(brought)}"


def _pip_environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"PIP_NO_INPUT": "1"}
