"""ORC: wrong set-ups are refused in one sentence."""

import pytest
import torch
from methods_helpers import batch, mlp, same, snapshot
from orc_helpers import orc
from torch import nn

from fastkd.methods import ORC

TWO = [mlp(2), mlp(3)]


@pytest.mark.parametrize("make, message", [
    (lambda: ORC(mlp(1), [mlp(2)]), "students must be a sequence of at least two networks, got one"),
    (lambda: ORC(mlp(1), []), "students must be a sequence of at least one network, got an empty one"),
    (lambda: ORC(mlp(1), mlp(2)), "students must be a sequence of networks .*, got one Sequential: put it in a list"),
    (lambda: ORC(mlp, TWO), "pivot must be a network .*, got function"),
    (lambda: ORC(mlp(1), TWO, promote=2), r"promote must be an integer in \[1, 1\], got 2"),
    (lambda: ORC(mlp(1), TWO, promote=0), r"promote must be an integer in \[1, 1\], got 0"),
    (lambda: ORC(mlp(1), TWO, promote=1.0), "promote must be an integer, got float"),
    (lambda: ORC(TWO[1], TWO), r"students\.1 must be a network of its own, got .* with pivot"),
    (lambda: ORC(mlp(1), [TWO[0]] * 2), r"students\.1 must be a network of its own, got .* with students\.0"),
    (lambda: ORC(mlp(1).requires_grad_(False), TWO), "pivot must be a network with a parameter that requires grad"),
    (lambda: ORC(mlp(1), TWO, rank_by="loss"), "rank_by must be one of 'ce', 'accuracy', 'top5', 'fixed', got 'loss'"),
    (lambda: ORC(mlp(1), TWO, teach=[]), r"teach must be a sequence of 'intensive', .*, at least one .*, got \[\]"),
    (lambda: ORC(mlp(1), TWO, teach="group"), "teach must be a sequence of .*, got 'group'"),
    (lambda: ORC(mlp(1), TWO, teach=["all"]), r"teach must be a sequence of .*, got \['all'\]"),
    (lambda: ORC(mlp(1), TWO, combine="sum"), "combine must be one of 'each', 'mean', got 'sum'"),
    (lambda: ORC(mlp(1), TWO, mix="cutmix"), "mix must be one of 'mixup', 'feedback', 'batch', got 'cutmix'"),
    (lambda: ORC(mlp(1), TWO, intensive="all"), "intensive must be one of 'pivot', 'group', got 'all'"),
    (lambda: ORC(mlp(1), TWO, errors_only=1), "errors_only must be True or False, got int"),
    (lambda: ORC(mlp(1), TWO, temperature=0), "temperature must be a finite number > 0, got 0"),
    (lambda: ORC(mlp(1), TWO, beta=1.5), r"beta must be a number in \[0, 1\], got 1.5"),
    (lambda: ORC(mlp(1), TWO, alpha=0), "alpha must be a finite number > 0, got 0"),
    (lambda: ORC(mlp(1), TWO, alpha=float("inf")), "alpha must be a finite number > 0, got inf"),
    (lambda: ORC(mlp(1), TWO, pivot_lr=-0.1), "pivot_lr must be a finite number >= 0, got -0.1"),
    (lambda: ORC(mlp(1), TWO, process_group="gloo"), "process_group must be None or .*ProcessGroup.*, got str"),
    (lambda: ORC(mlp(1), TWO, feedback="all"), "feedback must be one of .*local.*global.*"),
    (lambda: ORC(mlp(1), TWO, seed=0.5), "seed must be an integer, got float"),
])  # fmt: skip
def test_wrong_set_ups_are_refused_before_training(make, message):
    with pytest.raises((ValueError, TypeError), match=f"^ORC: {message}"):
        make()


X, Y = batch()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("pivot, students, inputs, target, message", [
    (mlp(1, classes=9), TWO, X, Y, r"pivot must be a network whose logits have shape \[\d+, 7\].*shape \[\d+, 9\]"),
    (mlp(1), [mlp(2), mlp(3, classes=9)], X, Y, r"students\[1\] must be a network whose logits .* 7\].* 9\]$"),
    (mlp(1), [nn.Sequential(mlp(4), nn.Unflatten(1, (7, 1))), mlp(3)], X, Y, r"students\[0\] must be .*, 7, 1\]$"),
    (mlp(1), TWO, X, None, r"target must be class indices \[B\], got NoneType$"),
    (nn.Embedding(9, 7), [nn.Embedding(9, 7) for _ in range(2)], Y, Y, "inputs must be a floating-point .*int64$"),
])  # fmt: skip
def test_what_only_a_batch_shows_is_refused_at_the_first(pivot, students, inputs, target, message, chunks):
    method = ORC(pivot, students)
    before = snapshot(method)
    with pytest.raises((ValueError, TypeError), match=f"^ORC: {message}"):
        next(next(method.phases(inputs, target, chunks=chunks)).losses)
    assert same(snapshot(method), before)


def test_a_tensor_without_the_batchs_rows_is_refused():
    method = orc(lambda seed, hidden: Scaled(mlp(seed, hidden=hidden)))
    with pytest.raises(ValueError, match=r"^ORC: inputs must be tensors of 10 rows as target, got shape \[\]$"):
        next(method.phases((X, torch.ones((), dtype=torch.float64)), Y))


class Scaled(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return self.network(inputs[0] * inputs[1])
