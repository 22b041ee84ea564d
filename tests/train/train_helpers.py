"""What the tests of training share: tiny runs, and bitwise comparison of what they leave."""

from pathlib import Path

import pytest
import torch

from fastkd.runs.runner import make_network
from fastkd.train import Runner, TrainConfig, checkpoint
from fastkd.train.devices import cpu_threads
from fastkd.train.metrics import read_csv

TINY = dict(
    train_size=60,
    teacher="plain2:width=0.25",
    assistants=["plain2:width=0.125"],
    student="plain2:width=0.0625",
    num_teachers=2,
    quiet=True,
    device="cpu",
)


@pytest.fixture(autouse=True)
def one_thread():
    """Networks so small are slowed down by a second thread, on a busy machine tenfold."""
    with cpu_threads(1):
        yield


def config(tmp_path, **options) -> TrainConfig:
    return TrainConfig(**{"method": "ce", "epochs": 2, "out": str(tmp_path / "run")} | TINY | options)


def run(options: TrainConfig):
    return Runner(options, say=lambda text: None).run()


def untrained(runner: Runner, stage) -> dict[str, torch.nn.Module]:
    """Fresh networks in the place of those that a stage needs."""
    return {name: make_network(runner.stages[name].network, runner.data) for name in stage.needs}


def assert_same(one, other, where="state"):
    """Bitwise equality of nested states."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype and torch.equal(one, other), where
    elif isinstance(one, dict):
        assert list(one) == list(other), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same(a, b, f"{where}[{i}]")
    else:
        assert one == other, where


def last_state(folder) -> dict:
    folder = Path(folder) / "checkpoints"
    return torch.load(checkpoint.path_of(folder, checkpoint.epochs(folder)[-1]), weights_only=True)


def rows_without_times(folder) -> list[dict]:
    timed = ("images_per_s", "seconds", "cpu_seconds")
    return [{k: v for k, v in row.items() if k not in timed} for row in read_csv(Path(folder) / "metrics.csv")]
