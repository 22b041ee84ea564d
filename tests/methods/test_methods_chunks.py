"""A batch in parts: gradient accumulation."""

import pytest
import torch
from methods_helpers import MeanTeacher, Translated, batch, gradients, mlp, run
from torch import nn

from fastkd.methods import CE, DGKD, KD, Batch


@pytest.mark.parametrize("rows, chunks, actual", [(10, 2, 2), (10, 3, 3), (10, 10, 10), (2, 5, 2), (1, 4, 1)])
@pytest.mark.parametrize("make", [
    lambda: CE(mlp(1)),
    lambda: DGKD(mlp(1), [mlp(2), mlp(3), mlp(4)], lam=0.3, drop="fixed", seed=1),
    lambda: Translated(mlp(1), mlp(2)),
])  # fmt: skip
def test_chunks_have_the_gradient_of_the_whole_batch(make, rows, chunks, actual):
    x, y = batch(rows)
    torch.manual_seed(0)
    whole, parts = make(), make()
    parts.load_state_dict(whole.state_dict())
    for _ in range(2):  # the second one with another choice of guides
        assert next(parts.phases(x, y, chunks=chunks)).chunks == actual  # a look: the choice is made again
        assert abs(run(whole, x, y) - run(parts, x, y, chunks)) < 1e-12
        learners = [n for n in (whole.student, getattr(whole, "transform", None)) if n is not None]
        others = [n for n in (parts.student, getattr(parts, "transform", None)) if n is not None]
        for first, second in zip(learners, others, strict=True):
            for grad, expected in zip(gradients(second), gradients(first), strict=True):
                torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_a_chunk_runs_when_it_is_asked_for():
    x, y = batch()
    rows = []
    student, teacher = mlp(1), mlp(2)
    student.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    teacher.register_forward_hook(lambda module, args, out: rows.append(-len(args[0])))
    (phase,) = KD(student, teacher).phases(x, y, chunks=3)
    assert rows == [] and phase.parts == {}
    next(phase.losses)
    assert rows == [-3, 3]
    assert len(list(phase.losses)) == 2 and rows == [-3, 3, -3, 3, -4, 4]


def test_the_loss_of_a_batch_in_chunks_is_refused():
    (phase,) = CE(mlp(1)).phases(*batch(), chunks=2)
    with pytest.raises(ValueError, match=r"^Phase: loss must be asked for with chunks=1, got chunks=2: .*losses"):
        _ = phase.loss


class Named(nn.Module):
    """Takes its inputs by name."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x, scale):
        return self.network(x * scale)


def test_inputs_may_be_a_dict():
    x, y = batch()
    plain, named = run(CE(mlp(1)), x, y), {"scale": torch.full((10, 1), 0.5), "x": 2 * x}
    assert run(CE(Named(mlp(1))), named, y) == plain
    assert abs(run(CE(Named(mlp(1))), named, y, chunks=3) - plain) < 1e-12


@pytest.mark.parametrize("chunks, inputs, target, message", [
    (0, batch()[0], batch()[1], "chunks must be an integer of at least 1, got 0"),
    (True, batch()[0], batch()[1], "chunks must be an integer, got bool"),
    (2, ["a", "b"], None, "inputs must be .*, got str"),
    (2, batch()[0], batch(9)[1], "target must be of 10 rows as inputs, got 9"),
    (2, (batch()[0], batch(9)[0]), None, r"inputs must be .*, got \[9, 10\]"),
])  # fmt: skip
def test_a_batch_that_cannot_be_cut_is_refused_at_once(chunks, inputs, target, message):
    with pytest.raises((ValueError, TypeError), match=f"^CE: {message}"):
        CE(mlp(1)).phases(inputs, target, chunks=chunks)


def test_views_are_cut_with_their_labels():
    (x, y), (x2, _) = batch(rows=7), batch(rows=7, seed=1)
    whole, parts = (MeanTeacher([mlp(1), mlp(2)]) for _ in range(2))
    assert abs(run(whole, (x, x2), y) - run(parts, (x, x2), y, chunks=3)) < 1e-12
    for grad, expected in zip(gradients(parts.peers), gradients(whole.peers), strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


def test_a_batch_counts_its_rows_without_reading_them():
    """The shares of the parts stay tensors: on a GPU nothing waits for labels."""
    x, y = batch()
    for inputs, target, (count, total) in Batch(x, y, chunks=3):
        assert torch.is_tensor(count) and torch.is_tensor(total)
        assert len(inputs) == len(target) == int(count)
    assert [share for *_, share in Batch(x, None, chunks=2)] == [(5, 10), (5, 10)]
