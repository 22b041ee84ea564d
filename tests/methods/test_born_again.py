"""BAN: KD at temperature 1 from the previous generation."""

import pytest
import torch
from learning_helpers import assert_learnt, digits, fit
from methods_helpers import batch, bn_net, gradients, images, mlp, plain_ce, plain_gradients, run, same, snapshot, train
from torch import nn

from fastkd.methods import BAN, CE, DGKD, KD
from fastkd.models import create


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_loss_and_gradients_are_the_formula(lam, chunks):
    """(1 - lam) CE + lam KL: labels of its own and the previous generation's probabilities."""
    x, y = batch()
    p = torch.softmax(mlp(2)(x), 1).detach()

    def formula(network):
        z = network(x)
        return (1 - lam) * plain_ce(z, y) + lam * (p * (p.log() - torch.log_softmax(z, 1))).sum(1).mean()

    method = BAN(mlp(1), mlp(2), lam=lam)
    loss = run(method, x, y, chunks)
    value, grads = plain_gradients(mlp(1), formula)
    assert abs(loss - value) < 1e-10
    for grad, expected in zip(gradients(method.student), grads, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("chunks", [1, 2])
def test_it_is_kd_at_temperature_1(chunks):
    x, y = batch()
    options = {"temperature": 1.0, "lam": 0.5}
    methods = BAN(mlp(1), mlp(2)), KD(mlp(1), mlp(2), **options), DGKD(mlp(1), [mlp(2)], **options)
    for method in methods:
        train(method, x, y, steps=3, chunks=chunks)
    assert same(snapshot(methods[0]), snapshot(methods[1])) and same(snapshot(methods[0]), snapshot(methods[2]))
    assert not same(snapshot(methods[0]), snapshot(BAN(mlp(1), mlp(2))))


def test_the_temperature_is_kds():
    x, y = batch()
    loss = run(BAN(mlp(1), mlp(2), temperature=3.0, lam=0.7), x, y)
    assert loss == run(KD(mlp(1), mlp(2), temperature=3.0, lam=0.7), x, y)


def test_the_previous_generation_is_frozen():
    student, teacher = bn_net(1), bn_net(2)
    before, start = snapshot(teacher), snapshot(student)
    method = BAN(student, teacher)
    method.train()
    train(method, *images(), steps=3)
    assert same(snapshot(teacher), before) and not teacher.training
    after = snapshot(student)
    assert not any(torch.equal(after[key], start[key]) for key in start)
    assert method.deployable() is student


@pytest.mark.parametrize(
    "make, argument",
    [
        (lambda: BAN(mlp(1), [mlp(2)]), "teacher"),
        (lambda: BAN(nn.Linear, mlp(2)), "student"),
        (lambda: BAN(mlp(1), mlp(2), lam=1.5), "lam"),
        (lambda: BAN(mlp(1), mlp(2), temperature=0), "temperature"),
    ],
)
def test_wrong_set_up_is_one_sentence(make, argument):
    with pytest.raises((ValueError, TypeError), match=rf"^BAN: {argument} must be .*, got ") as error:
        make()
    assert "\n" not in str(error.value)


def test_three_generations_learn_digits():
    (x, y), (x_test, y_test) = digits(1, 8, 8)

    def network(seed):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return create("plain2", 10, image_size=8, channels=1, width=0.25)

    generations = [fit(CE(network(1)), x, y, epochs=6, lr=0.05)]
    for seed in (2, 3):
        generations.append(fit(BAN(network(seed), generations[-1]), x, y, epochs=6, lr=0.05))
    for seed, generation in enumerate(generations, 1):
        assert_learnt(generation, x_test, y_test, network(seed))
