"""Probabilities as labels, as mix-up and CutMix make them, in every method."""

import pytest
import torch
from test_all_methods import CASES, CLASSES, EVERY, batch, iterate, method_of, optimizer_of

from fastkd import methods
from fastkd.models import create


def losses_and_weights(case, target_of):
    method, (inputs, target) = method_of(case), batch(case)
    losses = iterate(method, optimizer_of(method), inputs, target_of(target))
    return losses, list(method.parameters())


@EVERY
def test_one_hot_labels_are_the_class_indices(case):
    """Ranks, samples, ensembles and losses alike."""
    if case == "DKD":
        pytest.skip("it parts the classes by the label's index, and refuses probabilities")
    expected, trained = losses_and_weights(case, lambda target: target)
    actual, weights = losses_and_weights(case, lambda target: torch.nn.functional.one_hot(target, CLASSES).float())
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(weights, trained)


@EVERY
def test_mixed_labels_train_in_chunks_as_at_once(case):
    def mixed(target):
        one_hot = torch.nn.functional.one_hot(target, CLASSES).float()
        return one_hot.lerp(one_hot.flip(0), 0.3)

    if case == "DKD" or CASES[case].chunks == "parts":
        pytest.skip("refused, or of a batch other than of its chunks")
    results = []
    for chunks in (1, 3):
        method, (inputs, target) = method_of(case, norm="group"), batch(case)
        losses = iterate(method, optimizer_of(method), inputs, mixed(target), chunks=chunks)
        assert all(torch.isfinite(loss) for loss in losses)
        results.append(losses)
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_mixed_labels_are_the_sum_of_both_losses():
    network = create("plain2", CLASSES, image_size=8, channels=1, width=0.25)
    inputs, target = batch("CE")
    one_hot = torch.nn.functional.one_hot(target, CLASSES).float()
    method = methods.CE(network).eval()

    def loss(labels):
        return next(method.phases(inputs, labels)).loss.detach()

    mixed = loss(one_hot.lerp(one_hot.flip(0), 0.3))
    torch.testing.assert_close(mixed, 0.7 * loss(target) + 0.3 * loss(target.flip(0)))


@pytest.mark.parametrize("ensemble", ["linear", "minlogit"])
def test_an_ensemble_relative_to_the_label_refuses_probabilities(ensemble):
    method = methods.KDCL([method_of("CE").student, method_of("CE", 1).student], ensemble=ensemble)
    inputs, target = batch("KDCL")
    one_hot = torch.nn.functional.one_hot(target, CLASSES).float()
    with pytest.raises(TypeError, match=r"KDCL: target must be class indices for ensemble=.*, got probabilities"):
        next(method.phases(inputs, one_hot))
