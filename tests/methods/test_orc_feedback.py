"""ORC: which samples are feedback, how they are mixed, and what never counts."""

import random

import pytest
import torch
from methods_helpers import batch, mlp, plain_ce
from orc_helpers import Mixed, next_share, orc, rows_of_table, table
from torch import nn

from fastkd.methods import ORC


def mixed(students, x, y, **options) -> Mixed:
    method = Mixed(mlp(1), students, **options)
    next(method.phases(x, y))
    return method


def test_beta_of_the_mix_up():
    x, y = batch(rows=2)
    for alpha in (0.3, 1.0, 4.0):
        method, shares = Mixed(mlp(1), [mlp(2), mlp(3)], alpha=alpha, seed=1), []
        for _ in range(200):
            list(method.phases(x, y))
            shares.append(method.share)
        shares = torch.tensor(shares, dtype=torch.float64)
        assert shares.min() >= 0 and shares.max() <= 1
        variance = 1 / (4 * (2 * alpha + 1))
        assert abs(shares.mean() - 0.5) < 4.5 * (variance / 200) ** 0.5
        assert abs(shares.var() / variance - 1) < 0.4


def test_the_mix_up_follows_the_seed():
    x, y = batch()
    torch.manual_seed(0)
    first = mixed([mlp(2), mlp(3)], x, y, seed=1).share
    torch.manual_seed(99)  # the global generators have no part in it
    random.seed(5)
    assert mixed([mlp(2), mlp(3)], x, y, seed=1).share == first != mixed([mlp(2), mlp(3)], x, y, seed=2).share


class Nested(nn.Module):
    """Takes parts=[x[:, :2], (x[:, 2:], rows)]; keeps the rows that it saw."""

    def __init__(self, network):
        super().__init__()
        self.network, self.rows = network, []

    def forward(self, parts):
        left, (right, rows) = parts
        self.rows.append(rows)
        return self.network(torch.cat([left, right], 1))


@pytest.mark.parametrize("chunks", [1, 3])
def test_inputs_may_be_nested(chunks):
    (x, y), rows = batch(), torch.arange(10)
    plain = orc()
    nested = orc(lambda seed, hidden: Nested(mlp(seed, hidden=hidden)))
    for one, other in zip(
        plain.phases(x, y, chunks=chunks),
        nested.phases({"parts": [x[:, :2], (x[:, 2:], rows)]}, y, chunks=chunks),
        strict=True,
    ):
        for loss, same_loss in zip(one.losses, other.losses, strict=True):
            assert abs(loss - same_loss) < 1e-13
    assert torch.equal(torch.cat(nested.pivot.rows[:chunks]), rows)  # integers are not mixed


@pytest.mark.parametrize("chunks", [1, 4])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch(rows=12)
    y[[0, 1, 2, 7, 11]] = -100  # with 4 chunks, the first one has no row that counts
    rows = y != -100
    x[~rows] *= 50  # they would be the hardest
    whole, alone = orc(Watched), orc(Watched)
    share = next_share(whole)
    for phase, other in zip(whole.phases(x, y, chunks=chunks), alone.phases(x[rows], y[rows]), strict=True):
        whole.zero_grad()
        alone.zero_grad()
        total = 0
        for loss in phase.losses:
            loss.backward()
            total += loss.detach()
        if phase.name == "intensive":
            x_mixed = torch.cat(whole.pivot.inputs)
            feedback = ((x_mixed - share * x) / (1 - share))[rows]
            distance = torch.cdist(feedback, x[rows])
            assert distance.amin(1).max() < 1e-9
            z = whole.pivot.network(x_mixed)[rows]
            expected = share * plain_ce(z, y[rows]) + (1 - share) * plain_ce(z, y[rows][distance.argmin(1)])
            assert abs(total - expected) < 1e-10
            continue
        other.loss.backward()
        assert abs(total - other.loss) < 1e-12
        for p, q in zip(whole.parameters(), alone.parameters(), strict=True):
            assert (p.grad is None or not p.grad.any()) == (q.grad is None or not q.grad.any())
            if p.grad is not None and q.grad is not None:
                torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-12)


class Watched(nn.Module):
    """Keeps its inputs."""

    def __init__(self, seed, hidden=6):
        super().__init__()
        self.network, self.inputs = mlp(seed, hidden=hidden), []

    def forward(self, inputs):
        self.inputs.append(inputs)
        return self.network(inputs)


@pytest.mark.parametrize("errors_only", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_a_batch_of_ignored_rows_is_zero(chunks, errors_only):
    x, y = batch()
    method = orc(errors_only=errors_only)
    for phase in method.phases(x, torch.full_like(y, -100), chunks=chunks):
        method.zero_grad(set_to_none=True)
        for loss in phase.losses:
            loss.backward()
            assert loss == 0
        assert not any(p.grad.any() for p in method.parameters() if p.grad is not None)


def feedback_of(*ces, **options):
    x, y = rows_of_table(len(ces[0]))
    method = Mixed(table([1.0] * len(y)), [table(ce) for ce in ces], **options)
    next(method.phases(x, y))
    return method.feedback.tolist()


# With 3 classes, a sample is right where its cross-entropy is below log 3 = 1.0986.
def test_feedback_is_the_hardest_by_softmax_shares():
    # Mean CEs 1 and 1 + log 3: shares 1/4 and 3/4.
    assert feedback_of([0.5, 1.5, 0.7, 1.3], [2.4, 1.6986, 2.2, 2.0959]) == [1, 0, 2, 3]


def test_errors_only():
    # Equal means. The first network errs on 1 and 3, the second on 0 alone.
    ces = [0.4, 1.5, 0.6, 1.5], [2.5, 0.5, 0.5, 0.5]
    assert feedback_of(*ces, errors_only=False) == [1, 3, 0, 1]
    assert feedback_of(*ces, errors_only=True) == [1, 3, 0, 0]
    # No error: its share goes to the network with errors, however much better that is on average.
    assert feedback_of([1.0, 1.0, 1.0, 0.9], [0.1, 0.1, 1.2, 0.1], errors_only=True) == [2, 2, 2, 2]
    # No error at all: the highest.
    assert feedback_of([0.4, 0.2, 0.1, 0.1], [0.1, 0.1, 0.3, 0.3], errors_only=True) == [0, 1, 2, 3]


def test_a_network_that_gave_nan_has_no_share_and_is_not_promoted():
    broken = [float("nan")] * 4
    assert feedback_of(broken, [0.1, 0.4, 0.3, 0.2]) == [1, 2, 3, 0]
    assert feedback_of(broken, [0.1, 1.4, 0.3, 0.2], errors_only=True) == [1, 1, 1, 1]
    assert sorted(feedback_of(broken, broken)) == [0, 0, 1, 1]
    x, y = rows_of_table(4)
    method = ORC(table([1.0] * 4), [table(broken), table([3.0] * 4), table([2.0] * 4)], promote=1)
    list(method.phases(x, y))
    assert method.promotions.tolist() == [0, 0, 1]
