"""What frozen networks compute on the way to their output is not kept for a backward pass that never comes."""

import weakref

import pytest
import torch
from train_helpers import config, one_thread  # noqa: F401

from fastkd import use_backend
from fastkd.runs.runner import make_network
from fastkd.train import Runner


def fit_of(tmp_path, method, **options):
    runner = Runner(config(tmp_path, method=method, batch_size=8, prepare_teachers=False, **options))
    stage = runner.stages["student"]
    guides = {name: make_network(runner.stages[name].network, runner.data) for name in stage.needs}
    return runner.fit(stage, guides, None), guides


def frozen_networks(fit):
    """Those of the guides that do not learn: ORC's pivot does."""
    learning = {id(p) for group in fit.optimizer.param_groups for p in group["params"]}
    return [m for m in fit.method.children() if not any(id(p) in learning for p in m.parameters())]


class Watch:
    """What the modules of frozen networks returned: `inner` modules, and the networks themselves."""

    def __init__(self, fit, keep):
        self.inner, self.outer, self.keep = [], [], keep
        self.networks = [n for m in frozen_networks(fit) for n in (m if isinstance(m, torch.nn.ModuleList) else [m])]
        for network in self.networks:
            for module in network.modules():
                module.register_forward_hook(lambda module, inputs, output: self.note(module, output))

    def note(self, module, output):
        if isinstance(output, torch.Tensor):
            found = self.outer if any(module is network for network in self.networks) else self.inner
            found.append(output if self.keep else weakref.ref(output))


def step(fit, on_loss=lambda: None):
    """One training step; returns what autograd saved for its backward passes."""
    saved = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    fit.method.train()
    inputs, target = next(iter(fit.train_batches))
    phases = fit.method.phases(inputs, target)
    while True:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            phase = next(phases, None)
        if phase is None:
            return saved
        on_loss()
        fit.optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        fit.optimizer.step()


def storages(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors} - {0}


COMPARE_MAPS = ("rkd", "ft", "feed-parallel", "feed-sequential")
GUIDED = ("kd", "aver", "takd", "ban", "dgkd", "ctsl-mkt", *COMPARE_MAPS)


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("method", ["kd", "dgkd"])
def test_no_saved_tensor_belongs_to_a_teachers_forward(tmp_path, method, backend):
    fit, guides = fit_of(tmp_path, method)
    watch = Watch(fit, keep=True)  # alive, so that no other tensor gets their memory
    with use_backend(backend):
        saved = step(fit)
    assert len(watch.networks) == len(guides) and len(watch.inner) >= 5 * len(guides)
    assert len(watch.outer) == len(guides) and saved
    # The loss keeps the teachers' logits, its own inputs, for a second derivative. Nothing before them.
    assert not storages(saved) & (storages(watch.inner) - storages(watch.outer))
    weights = [tensor for guide in guides.values() for tensor in (*guide.parameters(), *guide.buffers())]
    assert not storages(saved) & storages(weights)


@pytest.mark.parametrize("method", GUIDED)
def test_teachers_activations_are_gone_when_the_loss_is_there(tmp_path, method):
    fit, _ = fit_of(tmp_path, method)
    watch, checked = Watch(fit, keep=False), []

    def on_loss():
        assert watch.inner
        # What the loss compares may live: logits, and where a method compares maps or features, those.
        logits = storages(output() for output in watch.outer if output() is not None)
        alive = {output().untyped_storage().data_ptr() for output in watch.inner if output() is not None} - logits
        assert len(alive) <= (len(watch.networks) if method in COMPARE_MAPS else 0)
        checked.append(len(alive))

    step(fit, on_loss)
    assert checked


def test_the_test_sees_activations_that_are_kept(tmp_path):
    """A teacher that is run with a graph: its activations are saved, and alive."""
    fit, _ = fit_of(tmp_path, "kd")
    fit.method.teach = lambda network, inputs, run=None: network.requires_grad_(True)(inputs)
    watch = Watch(fit, keep=True)
    saved = step(fit)
    assert storages(saved) & (storages(watch.inner) - storages(watch.outer))
