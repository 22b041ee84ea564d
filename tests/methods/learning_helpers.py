"""Handwritten digits to learn, a loop that trains, what having learnt means; and the examples' promises."""

import runpy
from pathlib import Path

import pytest
import torch


def digits(*shape: int):
    """(x, y), (x_test, y_test): 8 x 8 pixels in [0, 1], of this shape or flat; 300 digits to learn from."""
    data = pytest.importorskip("sklearn.datasets").load_digits()
    x = torch.tensor(data.data, dtype=torch.float32).reshape(-1, *(shape or (64,))) / 16
    y = torch.tensor(data.target)
    return (x[:300], y[:300]), (x[300:], y[300:])


def fit(method, x, y, epochs=20, lr=0.1):
    """Trains in batches of 50; the network to deploy."""
    optimizer = torch.optim.SGD(method.parameter_groups(lr), momentum=0.9)
    order = torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in torch.randperm(len(x), generator=order).split(50):
            for phase in method.phases(x[rows], y[rows]):
                optimizer.zero_grad(set_to_none=True)
                phase.loss.backward()
                optimizer.step()
    return method.deployable()


def accuracy(model, x, y) -> float:
    """In eval mode, where the model stays."""
    with torch.no_grad():
        return (model.eval()(x).argmax(1) == y).double().mean().item()


def assert_learnt(model, x, y, *untrained, margin=0.4):
    """Much better than each of the untrained networks, and than the most frequent digit."""
    constant = (y == y.mode().values).double().mean().item()
    assert accuracy(model, x, y) > max(constant, *(accuracy(network, x, y) for network in untrained)) + margin


def assert_example_runs(name: str, says: str, capsys):
    """examples/<name>.py: short, learns, and prints this word."""
    example = Path(__file__).parents[2] / "examples" / f"{name}.py"
    assert len(example.read_text().splitlines()) < 60
    result = runpy.run_path(str(example), run_name="__main__")
    assert result["accuracy"] > 0.5
    assert says in capsys.readouterr().out
