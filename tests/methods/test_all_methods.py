"""What every method promises, one table for all: a new method gets an entry in CASES and in NAMES."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import pytest
import torch
from methods_helpers import same, snapshot
from torch import nn

from fastkd import methods, models
from fastkd.methods import Method
from fastkd.models import create, logits_of

# The methods that the library has: a missing one fails, it is not skipped.
NAMES = ("AEKD", "CAMKD", "DIST", "DKD", "MeanTeacher", "OKDDip", "ONE")  # neighbours; then papers and baselines
NAMES += ("AVER", "BAN")
NAMES += ("CE", "CTSLMKT", "DGKD", "DKEL", "DML", "FEED", "FT", "KD", "KDCL", "ORC", "PCL", "RKD", "TAKD")
CLASSES = 10


def net(seed: int, classes: int = CLASSES, norm: str = "batch") -> nn.Module:
    """A small network of fastkd.models for images [B, 1, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create("plain2", classes, image_size=8, channels=1, width=0.25, norm=norm)


def branched(seed: int, norm: str = "batch") -> nn.Module:
    """Three peers on one stem."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.branched("plain2", CLASSES, branches=3, image_size=8, channels=1, width=0.25, norm=norm)


def mapless() -> nn.Module:
    """Gives logits only."""
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(32, CLASSES))


@dataclass(frozen=True)
class Case:
    """make(net, teacher) builds the method of networks of either kind, each called with a number of its own."""

    make: Callable[[Callable[[int], nn.Module], Callable[[int], nn.Module]], Method]
    wrong: Callable[[], Method]  # a wrong set-up, found here or at the first batch
    learner: Callable[..., nn.Module] = net  # what `net` is
    shipped: Callable[[nn.Module], nn.Module] = lambda network: network  # the part of such a network that is deployed
    views: int = 0  # images per sample, where the inputs are a tuple of them
    chunks: str = "exact"  # or "parts": relations over the batch are those over each chunk


def other(seed: int) -> nn.Module:
    return net(seed, classes=CLASSES + 2)


branches = {"learner": branched, "shipped": lambda network: network.peer(0)}  # one image for all
peers = branches | {"views": 3}
CASES = {
    "CE": Case(lambda n, t: methods.CE(n(0)), lambda: methods.CE(nn.Linear)),
    "KD": Case(lambda n, t: methods.KD(n(0), t(0)), lambda: methods.KD(net(0), other(1))),
    "AVER": Case(lambda n, t: methods.AVER(n(0), [t(0), t(1)]), lambda: methods.AVER(net(0), [net(1), other(2)])),
    "TAKD": Case(lambda n, t: methods.TAKD(n(0), [t(0), t(1)]), lambda: methods.TAKD(net(0), [net(1), other(2)])),
    "BAN": Case(lambda n, t: methods.BAN(n(0), t(0)), lambda: methods.BAN(net(0), other(1))),
    "DGKD": Case(
        lambda n, t: methods.DGKD(n(0), [t(0), t(1)], lam=0.5, drop="bernoulli", survival=0.5),
        lambda: methods.DGKD(net(0), [net(1), other(2)]),
    ),
    "DKD": Case(lambda n, t: methods.DKD(n(0), t(0)), lambda: methods.DKD(net(0), other(1))),
    "DIST": Case(lambda n, t: methods.DIST(n(0), t(0)), lambda: methods.DIST(net(0), other(1)), chunks="parts"),
    "AEKD": Case(
        lambda n, t: methods.AEKD(n(0), [t(0), t(1)]),
        lambda: methods.AEKD(net(0), [net(1), other(2)]),
        chunks="parts",
    ),
    "AVER confidence": Case(
        lambda n, t: methods.AVER(n(0), [t(0), t(1)], weights="confidence"),
        lambda: methods.AVER(net(0), [net(1)], weights="confidence"),
    ),
    "CAMKD": Case(
        lambda n, t: methods.CAMKD(n(0), [t(0), t(1)], batch_norm=False),
        lambda: methods.CAMKD(net(0), [net(1), mapless()]),
    ),
    "MeanTeacher": Case(
        lambda n, t: methods.MeanTeacher(n(0), momentum=0.9),
        lambda: methods.MeanTeacher(nn.Linear),
        views=2,
        chunks="parts",  # an image without a label agrees, too, and a chunk weighs as its labelled ones
    ),
    "ONE": Case(  # its gate normalises the batch
        lambda n, t: methods.ONE(n(0)), lambda: methods.ONE(net(0)), **branches, chunks="parts"
    ),
    "OKDDip": Case(lambda n, t: methods.OKDDip(n(0)), lambda: methods.OKDDip(net(0)), **branches),
    "ORC": Case(lambda n, t: methods.ORC(t(0), [n(0), n(1), n(2)]), lambda: methods.ORC(net(0), [net(1), other(2)])),
    "CTSLMKT": Case(
        lambda n, t: methods.CTSLMKT([n(0), n(1)], [t(0), t(1)]),
        lambda: methods.CTSLMKT([net(0), other(1)], [net(2), net(3)]),
        chunks="parts",
    ),
    "DML": Case(lambda n, t: methods.DML([n(0), n(1)]), lambda: methods.DML([net(0), other(1)])),
    "KDCL": Case(lambda n, t: methods.KDCL([n(0), n(1)]), lambda: methods.KDCL([net(0), other(1)])),
    "RKD": Case(lambda n, t: methods.RKD(n(0), t(0)), lambda: methods.RKD(net(0), mapless()), chunks="parts"),
    "DKEL": Case(lambda n, t: methods.DKEL(n(0), init=None, momentum=0.9), lambda: methods.DKEL(net(0)), **peers),
    "PCL": Case(lambda n, t: methods.PCL(n(0), momentum=0.9), lambda: methods.PCL(net(0)), **peers),
    "FEED": Case(lambda n, t: methods.FEED(n(0), [t(0), t(1)]), lambda: methods.FEED(net(0), [net(1), mapless()])),
    "FEED sequential": Case(
        lambda n, t: methods.FEED(n(0), [t(0)], mode="sequential"),
        lambda: methods.FEED(net(0), [net(1), net(2)], mode="sequential"),
    ),
    "FT": Case(lambda n, t: methods.FT(n(0), t(0)), lambda: methods.FT(net(0), mapless())),
}
EVERY = pytest.mark.parametrize("case", [name for name in CASES if hasattr(methods, name.split()[0])])


def method_of(case: str, seed: int = 0, norm: str = "batch", teacher: Callable | None = None) -> Method:
    """The method with networks that this seed initialises, in train mode."""
    learner = CASES[case].learner
    teacher = teacher or (lambda i: net(100 + i, norm=norm))
    return CASES[case].make(lambda i: learner(10 * seed + i, norm=norm), teacher).train()


def batch(case: str, rows: int = 12, seed: int = 0, dtype: torch.dtype = torch.float32):
    generator = torch.Generator().manual_seed(seed)
    views = [torch.randn(rows, 1, 8, 8, generator=generator).to(dtype) for _ in range(max(1, CASES[case].views))]
    target = torch.randint(CLASSES, (rows,), generator=generator)
    return tuple(views) if CASES[case].views else views[0], target


def optimizer_of(method: Method, lr: float = 0.02) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameter_groups(lr), momentum=0.9, weight_decay=5e-4)


def iterate(method: Method, optimizer, inputs, target, chunks: int = 1) -> list[torch.Tensor]:
    """One iteration; the loss of each phase."""
    losses = []
    for phase in method.phases(inputs, target, chunks=chunks):
        optimizer.zero_grad(set_to_none=True)
        total = 0
        for loss in phase.losses:
            loss.backward()
            total = total + loss.detach()
        optimizer.step()
        losses.append(total)
    return losses


def run(case: str, method: Method, optimizer, steps: range) -> None:
    for step in steps:
        method.start_epoch(step // 2, 10)
        iterate(method, optimizer, *batch(case, seed=step))


def frozen_of(method: Method) -> nn.ModuleList:
    return nn.ModuleList([method.get_submodule(name) for name in method._frozen_names])


def test_every_method_is_here():
    found = [v for v in vars(methods).values() if isinstance(v, type) and issubclass(v, Method) and v is not Method]
    assert sorted({c.__name__ for c in found}) == sorted(NAMES)
    assert set(NAMES) <= set(methods.__all__)
    missing = set(NAMES) - {name.split()[0] for name in CASES}
    assert not missing, "each method needs an entry in CASES"


@EVERY
def test_it_can_be_printed(case):
    """Also where an argument is called as a method is: ORC's `teach`, AVER's `weights`."""
    method = method_of(case)
    text = repr(method).splitlines()[1].strip()
    assert repr(method).startswith(f"{type(method).__name__}(") and "<" not in text
    own = {"ORC": "teach=('intensive', 'private', 'group')", "AVER": "weights='equal'", "KD": "temperature=4.0"}
    assert own.get(case, "") in text


@EVERY
def test_continues_to_the_same_bits(case, tmp_path):
    """State saved mid-training, loaded into a method of other networks; the global generator has no part in it."""
    torch.manual_seed(0)
    whole, first = method_of(case), method_of(case)
    run(case, whole, optimizer_of(whole), range(6))
    optimizer = optimizer_of(first)
    torch.manual_seed(1)
    run(case, first, optimizer, range(3))
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = method_of(case, seed=7)
    optimizer = optimizer_of(second)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    run(case, second, optimizer, range(3, 6))
    assert same(snapshot(whole), snapshot(second)) and second.iterations == 6
    assert not same(snapshot(whole), saved["method"])


@EVERY
def test_only_the_networks_of_a_phase_change(case):
    """In weights and buffers, with momentum and weight decay; frozen ones never do, and train() leaves them in eval."""
    method = method_of(case)
    optimizer, frozen = optimizer_of(method), frozen_of(method)
    before, moved = snapshot(frozen), set()
    for step in range(3):
        phases = method.phases(*batch(case, seed=step))
        learners = {name: method.learner(name) for name in method._learner_names}
        states = {name: snapshot(network) for name, network in learners.items()}
        for phase in phases:
            optimizer.zero_grad(set_to_none=True)
            phase.loss.backward()
            optimizer.step()
            for name, network in learners.items():
                if any(network is other for other in phase.networks):
                    moved.add(name)
                    assert not same(snapshot(network), states[name]), name
                else:
                    assert same(snapshot(network), states[name]), name
                states[name] = snapshot(network)
        for network in frozen:
            network.train()  # as an evaluation elsewhere may do
    assert moved == set(method._learner_names)
    assert same(snapshot(frozen), before)
    assert all(p.grad is None and not p.requires_grad for p in frozen.parameters())
    method.train()
    assert not any(m.training for m in frozen.modules() if m is not frozen)
    assert all(m.training for name in method._learner_names for m in method.get_submodule(name).modules())


@EVERY
def test_the_deployed_network_is_an_ordinary_one(case):
    """Without what only training needs: the weights of one network, logits from images alone."""
    method = method_of(case)
    run(case, method, optimizer_of(method), range(2))
    method.map_learners(lambda network: partial(network))  # a wrapper that is not deployed
    deployed, plain = method.deployable(), CASES[case].shipped(CASES[case].learner(0))
    assert {k: v.shape for k, v in deployed.state_dict().items()} == {k: v.shape for k, v in plain.state_dict().items()}
    assert len(list(deployed.parameters())) == len(list(plain.parameters()))
    plain.load_state_dict(deployed.state_dict())
    image = torch.randn(1, 1, 8, 8)
    with torch.no_grad():
        logits = logits_of(deployed.eval()(image))
        assert logits.shape == (1, CLASSES) and torch.equal(logits, logits_of(plain.eval()(image)))


@EVERY
def test_autocast(case):
    """Finite losses in float32 and a finite gradient for every parameter of the networks that a phase trains."""
    method = method_of(case)
    optimizer, phases = optimizer_of(method), method.phases(*batch(case))
    while True:
        with torch.autocast("cpu", torch.bfloat16):
            phase = next(phases, None)
        if phase is None:
            break
        optimizer.zero_grad(set_to_none=True)
        phase.loss.backward()
        assert phase.loss.dtype == torch.float32 and phase.loss.isfinite()
        assert all(part.isfinite() and not part.requires_grad for part in phase.parts.values())
        grads = [p.grad for network in phase.networks for p in network.parameters()]
        assert all(grad is not None and grad.isfinite().all() for grad in grads)
        assert any(grad.any() for grad in grads)
        optimizer.step()


@EVERY
def test_compiled_learners_give_the_same(case):
    torch.compiler.reset()
    plain, compiled = method_of(case).double(), method_of(case).double()
    graphs = []
    compiled.map_learners(partial(torch.compile, backend=lambda graph, example: graphs.append(graph) or graph.forward))
    optimizers = optimizer_of(plain), optimizer_of(compiled)
    for step in range(2):
        inputs, target = batch(case, seed=step, dtype=torch.float64)
        expected = iterate(plain, optimizers[0], inputs, target)
        found = iterate(compiled, optimizers[1], inputs, target)
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert graphs and list(compiled.state_dict()) == list(plain.state_dict())


@EVERY
def test_chunks(case):
    """The losses and the step of the whole batch, where the loss of a sample does not depend on the others."""
    whole, parts = method_of(case, norm="group").double(), method_of(case, norm="group").double()
    inputs, target = batch(case, dtype=torch.float64)
    target[[0, 1, 7]] = -100
    expected = iterate(whole, optimizer_of(whole), inputs, target)
    found = iterate(parts, optimizer_of(parts), inputs, target, chunks=3)
    if CASES[case].chunks == "parts":
        assert all(loss.isfinite() for loss in found)
        return
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    for first, second in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(second, first, rtol=0, atol=1e-9)


@EVERY
def test_an_iteration_left_half_way_leaves_no_trace(case):
    method, untouched = method_of(case), method_of(case)
    parameters = snapshot(nn.ParameterList(method.parameters()))
    random = torch.get_rng_state()
    phases = method.phases(*batch(case))
    next(phases).loss.backward()
    phases.close()
    assert torch.equal(method.get_extra_state(), untouched.get_extra_state())
    assert same(snapshot(nn.ParameterList(method.parameters())), parameters)
    assert torch.equal(torch.get_rng_state(), random)


@EVERY
def test_a_wrong_set_up_is_one_sentence(case):
    with pytest.raises((ValueError, TypeError)) as error:
        next(CASES[case].wrong().phases(*batch(case)))
    sentence = str(error.value)
    assert "\n" not in sentence and " must be " in sentence and ", got " in sentence
    assert sentence.startswith(f"{case.split()[0]}: ")


@pytest.fixture(scope="module")
def digits():
    """300 handwritten digits, the others to test with, and two teachers trained on the former."""
    found = pytest.importorskip("sklearn.datasets").load_digits()
    x, y = torch.tensor(found.images, dtype=torch.float32)[:, None] / 16, torch.tensor(found.target)
    data = (x[:300], y[:300], x[300:], y[300:])
    return data, [fit("CE", methods.CE(net(90 + i)), data) for i in range(2)]


def fit(case: str, method: Method, data, epochs: int = 6) -> nn.Module:
    x, y, views = data[0], data[1], CASES[case].views
    optimizer, order = optimizer_of(method), torch.Generator().manual_seed(0)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in torch.randperm(len(x), generator=order).split(30):
            noisy = [x[rows] + 0.02 * torch.randn(x[rows].shape, generator=order) for _ in range(views)]
            iterate(method, optimizer, tuple(noisy) if views else x[rows], y[rows])
    return method.deployable()


@EVERY
def test_digits_are_learnt(case, digits):
    data, teachers = digits

    def accuracy(model):
        with torch.no_grad():
            return (logits_of(model.eval()(data[2])).argmax(1) == data[3]).double().mean().item()

    method = method_of(case, seed=3, teacher=lambda i: copy.deepcopy(teachers[i]))
    untrained = accuracy(copy.deepcopy(method.deployable()))
    constant = (data[3] == data[3].mode().values).double().mean().item()
    assert accuracy(fit(case, method, data)) > max(untrained, constant) + 0.4
