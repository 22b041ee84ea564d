"""`Method.prepare_teachers`: frozen networks run through faster copies, and nothing that learns or follows does."""

import copy
from functools import partial

import pytest
import torch
from methods_helpers import same, snapshot
from test_all_methods import CASES, batch, iterate, method_of, optimizer_of
from torch import nn

from fastkd import methods, models

FROZEN = [name for name in CASES if method_of(name).frozen_names]


def teacher(seed: int) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = models.create("plain2", 10, image_size=8, channels=1, width=0.25)
        for norm in (m for m in network.modules() if isinstance(m, nn.BatchNorm2d)):
            norm.running_mean.uniform_(-1, 1)
            norm.running_var.uniform_(0.5, 2)
    return network


def losses(method, case, steps: int = 2):
    """Of each phase, after steps in between."""
    optimizer = optimizer_of(method)
    return [iterate(method, optimizer, *batch(case, seed=step, dtype=torch.float64)) for step in range(steps)]


@pytest.mark.parametrize("case", FROZEN)
def test_the_same_losses_and_steps(case):
    """Of methods that read logits (DGKD and its kin) and of those that read features and maps (FEED, FT, RKD)."""
    plain, fast = (method_of(case, teacher=lambda i: teacher(100 + i)).double() for _ in range(2))
    made = []
    names = list(fast.state_dict())
    fast.prepare_teachers(lambda network: made.append(models.prepared(network)) or made[-1])
    torch.testing.assert_close(losses(fast, case), losses(plain, case), rtol=1e-10, atol=1e-10)
    assert len(made) == len(fast.frozen_names) and all(each.folded == 2 for each in made)
    assert list(fast.state_dict()) == names
    for one, other in zip(fast.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("case", [name for name in CASES if name not in FROZEN])
def test_what_learns_and_mean_teachers_are_never_prepared(case):
    """Whose statistics and weights go on: DKEL's and PCL's mean teacher, ORC's temporary teachers, peers."""
    plain, asked = method_of(case).double(), method_of(case).double()
    asked.prepare_teachers(lambda network: pytest.fail("a network that changes was prepared"))
    assert losses(asked, case) == losses(plain, case)
    assert same(snapshot(plain), snapshot(asked))


def test_a_copy_follows_what_is_loaded_or_changed():
    """Weights that a checkpoint brings after the first step, or that are written in place."""
    made = []
    fast = methods.KD(teacher(0), teacher(1)).double()
    fast.prepare_teachers(lambda network: made.append(network) or models.prepared(network))
    x, y = batch("KD", dtype=torch.float64)
    other = methods.KD(teacher(0), teacher(2)).double()
    for change in (
        lambda: None,
        lambda: fast.load_state_dict(other.state_dict()),
        lambda: nn.init.zeros_(fast.guides[0].fc.weight),
        lambda: fast.to(torch.float32).to(torch.float64),
    ):
        change()
        plain = copy.deepcopy(fast).prepare_teachers(None)
        torch.testing.assert_close(fast.eval()(x, y), plain.eval()(x, y), rtol=1e-10, atol=1e-10)
    count = len(made)
    fast(x, y)
    assert len(made) == count and 3 <= count <= 4  # not made anew for each batch


def test_known_logits_and_wrappers_of_teachers_come_first():
    x, y = batch("KD")
    method = methods.KD(teacher(0), teacher(1)).prepare_teachers(lambda network: pytest.fail("it was run"))
    method.step(optimizer_of(method), x, y, taught={"guides.0": torch.zeros(12, 10)})
    calls = []
    method.map_teachers(lambda network: lambda inputs: calls.append(1) or network(inputs))
    method.step(optimizer_of(method), x, y)
    assert calls == [1]


def test_reasons_are_told_once_and_training_goes_on():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = teacher(1)

        def forward(self, x):
            return self.net(x) if x.sum() > 0 else self.net(-x)

    stuck = teacher(2)
    stuck.extra = stuck.fc.weight * 2  # deepcopy refuses it
    told = []
    method = methods.AVER(teacher(0), [Branching(), stuck]).prepare_teachers(note=told.append)
    for _ in range(2):
        method.step(optimizer_of(method), *batch("KD"))
    first, second = told
    assert first.startswith("guides[0]: batch normalisation is not folded: torch.fx cannot trace Branching (")
    assert second.startswith("guides[1]: prepared: network must be a network that copy.deepcopy copies")


def test_compiled_learners_beside_prepared_teachers():
    torch.compiler.reset()
    plain = method_of("DGKD").double()
    fast = copy.deepcopy(plain).prepare_teachers()
    graphs = []
    fast.map_learners(partial(torch.compile, backend=lambda graph, example: graphs.append(graph) or graph.forward))
    torch.testing.assert_close(losses(fast, "DGKD"), losses(plain, "DGKD"), rtol=1e-10, atol=1e-10)
    assert graphs
