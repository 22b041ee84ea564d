"""What a phase says of the network to ship: its logits where the pass has them, from which a run takes its accuracy."""

import copy

import pytest
import torch
from torch import nn
from train_helpers import config, one_thread, untrained  # noqa: F401

from fastkd.methods import CE, DML, KDCL, Phase
from fastkd.methods.base import Batch
from fastkd.train import RECIPES, Runner, train_epoch
from fastkd.train.metrics import Meter

FEATURES = ("rkd", "ft", "feed-parallel", "ctsl-mkt")  # their learners are wrapped in a module that gives Outputs


def fit_of(tmp_path, method, **options):
    runner = Runner(config(tmp_path, method=method, batch_size=20, teacher="plain2:width=0.125", **options))
    stage = runner.stages["student"]
    return runner.fit(stage, untrained(runner, stage), None)


def shipped(fit, inputs, chunks=1, view=0):
    """The deployable network's logits of the batch in train mode, before the step, part by part."""
    network = copy.deepcopy(fit.method.deployable()).train()
    images = inputs if isinstance(inputs, torch.Tensor) else inputs[view]
    with torch.no_grad():
        return torch.cat([network(part) for part in images.chunk(chunks)])


def outputs_of(fit, inputs, target, chunks=1):
    """Of the last phase that has them."""
    found = None
    fit.method.train()
    for phase in fit.method.phases(inputs, target, chunks=chunks):
        fit.optimizer.zero_grad(set_to_none=True)
        for loss in phase.losses:
            loss.backward()
        fit.optimizer.step()
        found = phase.outputs if phase.outputs is not None else found
    return found


@pytest.mark.filterwarnings("ignore:DKEL. initialise")
@pytest.mark.parametrize("method", RECIPES)
def test_every_method_gives_the_logits_of_the_network_to_ship(tmp_path, method):
    fit = fit_of(tmp_path, method)
    inputs, target = next(iter(fit.train_batches))
    expected = shipped(fit, inputs, view=1 if method == "mean-teacher" else 0)  # its teacher sees the second view
    found = outputs_of(fit, inputs, target)
    assert not found.requires_grad
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore:DKEL. initialise")
@pytest.mark.parametrize("method", ["ce", "dgkd", "dml", "orc", "dkel", *FEATURES])
def test_outputs_of_chunks_are_those_of_the_batch_in_its_order(tmp_path, method):
    fit = fit_of(tmp_path, method)
    inputs, target = next(iter(fit.train_batches))
    expected = shipped(fit, inputs, chunks=4)
    torch.testing.assert_close(outputs_of(fit, inputs, target, chunks=4), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", ["kd", "orc", *FEATURES])
def test_wrapped_networks_have_the_same_outputs(tmp_path, method):
    fit = fit_of(tmp_path, method)
    inputs, target = next(iter(fit.train_batches))
    expected = shipped(fit, inputs)
    fit.method.map_learners(lambda network: torch.compile(network, backend="eager"))
    torch.testing.assert_close(outputs_of(fit, inputs, target), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [DML, KDCL])
def test_the_peer_that_is_shipped_is_meant(kind):
    networks, inputs = [nn.Linear(4, 3), nn.Linear(4, 3)], torch.randn(6, 4)
    (phase,) = kind(networks, deploy=1).phases(inputs, torch.tensor([0, 1, 2, 0, 1, 2]))
    assert torch.equal(phase.outputs, networks[1](inputs))


@pytest.mark.filterwarnings("ignore:DKEL. initialise")
@pytest.mark.parametrize("method", ["ce", "orc", "dkel"])
def test_a_run_takes_its_accuracy_from_them(tmp_path, method):
    fit = fit_of(tmp_path, method, accumulate=2)
    batches = [next(iter(fit.train_batches))]
    inputs, target = batches[0]
    expected = float((shipped(fit, inputs, chunks=2).argmax(1) == target).double().mean())
    meter = Meter(fit.device, 1)
    train_epoch(fit.method, batches, fit.optimizer, meter, steps=fit.steps)
    assert meter.means()["accuracy"] == pytest.approx(expected, abs=1.1 / len(target))


def test_outputs_that_are_not_at_hand_are_none():
    network = nn.Linear(4, 3)

    def terms(inputs, target):
        loss = network(inputs).sum()
        return loss, {"sum": loss.detach()}

    batch = Batch(torch.randn(6, 4), None, 2)
    assert Phase([network], terms, Batch(batch.inputs)).outputs is None
    phase = Phase([network], lambda x, y: (*terms(x, y), network(x)), batch)
    _first, *_ = phase.losses
    assert phase.outputs.shape == (6, 3)
    unfinished = Phase([network], lambda x, y: (*terms(x, y), network(x)), batch)
    next(unfinished.losses)
    assert unfinished.outputs is None


def test_logits_of_sequences_are_not_kept():
    """[B, T, V] of all chunks would undo what gradient accumulation saves."""
    network = nn.Linear(4, 3)
    (phase,) = CE(network).phases(torch.randn(2, 5, 4), torch.zeros(2, 5, dtype=torch.long))
    assert phase.outputs is None
