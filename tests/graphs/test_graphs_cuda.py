"""Networks replayed from real CUDA graphs: the same training as without, fewer launches, and a clean way back."""

import copy

import pytest
import torch
from graphs_helpers import Notes, wrappers
from torch import nn

from fastkd import methods
from fastkd.graphs import Graphed, Graphs
from fastkd.models import branched, create
from fastkd.train.steps import Steps

DEVICE = torch.device("cuda")
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(DEVICE.type == "cuda" and not torch.cuda.is_available(), reason="no GPU"),
]
CLASSES = 10


def net(name: str = "resnet8") -> nn.Module:
    return create(name, CLASSES, image_size=16)


METHODS = {
    "ORC": lambda: methods.ORC(net(), [net(), net(), net()]),
    "CTSL-MKT": lambda: methods.CTSLMKT([net(), net()], [net(), net()]),
    "DGKD": lambda: methods.DGKD(net(), [net(), net()], lam=0.5),
    "DKEL": lambda: methods.DKEL(branched("resnet8", CLASSES, 2, image_size=16), init=None, momentum=0.9),
    "FEED": lambda: methods.FEED(net(), [net(), net()], beta=5.0),
}


def method_of(name: str) -> methods.Method:
    torch.manual_seed(0)
    method = METHODS[name]().to(DEVICE).train()
    method.start_epoch(0, 10)
    return method


def batch(seed: int, rows: int = 16, views: int = 1):
    generator = torch.Generator().manual_seed(seed)
    images = [torch.randn(rows, 3, 16, 16, generator=generator).to(DEVICE) for _ in range(views)]
    return images if views > 1 else images[0], torch.randint(CLASSES, (rows,), generator=generator).to(DEVICE)


def train(method, name, steps=6, **options) -> list[float]:
    """Losses of a few steps, one of them of another batch size."""
    optimizer = torch.optim.SGD(method.parameter_groups(0.02), momentum=0.9)
    taking, losses = Steps(method, optimizer, DEVICE, **options), []
    for i in range(steps):
        for _, loss in taking.take(*batch(i, 12 if i == 4 else 16, 2 if name == "DKEL" else 1)):
            losses.append(float(loss))
    return losses


def graphed(method) -> tuple[methods.Method, Graphs]:
    graphs = Graphs(DEVICE, Notes())
    graphs.wrap(method)
    return method, graphs


def assert_close_states(one, other, atol=1e-4):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        if isinstance(a, torch.Tensor):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=atol, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize(
    "name, options",
    [
        *((name, {}) for name in METHODS),
        ("ORC", {"accumulate": 2}),
        ("ORC", {"amp": "bf16"}),
        ("DGKD", {"amp": "fp16"}),
        ("DKEL", {"amp": "bf16"}),
        ("FEED", {"non_finite": "skip"}),
    ],
    ids=str,
)
def test_the_same_training_on_cuda(name, options):
    plain, (other, graphs) = method_of(name), graphed(method_of(name))
    expected, found = train(plain, name, **options), train(other, name, **options)
    amp = options.get("amp", "none") != "none"
    assert found == pytest.approx(expected, rel=2e-2 if amp else 1e-3)
    assert_close_states(plain, other, atol=1e-2 if amp else 1e-4)
    assert graphs.note == []
    assert sum(wrapper.replays for wrapper in wrappers(other)) >= 3 * len(list(other.learner_names))


def test_fewer_launches_on_cuda():
    from torch.profiler import ProfilerActivity, profile

    counts = []
    for method in (method_of("ORC"), graphed(method_of("ORC"))[0]):
        train(method, "ORC")
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiled:
            train(method, "ORC", steps=1)
            torch.cuda.synchronize()
        count = {event.key: event.count for event in profiled.key_averages()}
        kernels = sum(n for key, n in count.items() if key.startswith(("cudaLaunchKernel", "cuLaunchKernel")))
        counts.append((kernels, count.get("cudaGraphLaunch", 0)))
    (plain, none), (graphs, replayed) = counts
    assert none == 0 and replayed >= 10  # evaluation, training and observation of four networks
    assert graphs < 0.6 * plain, counts


class Stops(nn.Module):
    """A network that does what a graph cannot hold."""

    def __init__(self, how: str):
        super().__init__()
        self.network, self.how = net(), how

    def forward(self, x):
        z = self.network(x)
        if self.how == "item":
            return z * (1.0 if float(z.sum()) > -1e30 else 0.0)
        if self.how == "synchronize" and DEVICE.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if self.how == "raise" and torch.cuda.is_current_stream_capturing():
            raise ValueError("not in a capture")
        if self.how == "host":
            return z + torch.rand(1).to(z.device)
        return z


@pytest.mark.parametrize("how", ["item", "synchronize", "raise", "host"])
def test_what_cannot_be_captured_on_cuda_leaves_nothing_behind(how):
    torch.manual_seed(0)
    plain = methods.ORC(Stops(how), [net(), net()]).to(DEVICE).train()
    other, graphs = graphed(copy.deepcopy(plain))
    losses = []
    for method in (plain, other):
        torch.manual_seed(1)
        losses.append(train(method, "ORC"))
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert len(graphs.note) == 1 and graphs.note[0].startswith("pivot runs without CUDA graphs: ")
    assert other.learner("pivot").replays == 0 and other.learner("students.0").replays > 0
    assert torch.cuda.current_stream(DEVICE) == torch.cuda.default_stream(DEVICE)
    assert not torch.cuda.is_current_stream_capturing() and torch.cuda.get_sync_debug_mode() == 0
    assert torch.nn.functional.dropout(torch.ones(1000, device=DEVICE)).sum() > 0  # the generator captures nothing
    fresh, shared = graphed(method_of("DGKD"))
    train(fresh, "DGKD")
    assert shared.note == []


def test_dropout_on_cuda_draws_the_same_numbers():
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Flatten(), nn.Linear(768, 64), nn.Dropout(0.5), nn.Linear(64, CLASSES), nn.Dropout(0.1))
    plain = plain.to(DEVICE)
    graphs = Graphs(DEVICE, Notes())
    found = []
    for network in (plain, Graphed(copy.deepcopy(plain), graphs, "net")):
        torch.manual_seed(3)
        outputs = []
        for i in range(5):
            outputs.append(network(batch(i)[0]))
            outputs[-1].square().mean().backward()
        found.append([z.detach() for z in outputs] + [p.grad for p in network.parameters()])
    torch.testing.assert_close(found[1], found[0], rtol=1e-5, atol=1e-6)
    assert not torch.equal(found[0][1] == 0, found[0][2] == 0)  # other masks in every call
    assert graphs.note == []


def test_outputs_and_gradients_on_cuda_are_the_callers_own():
    torch.manual_seed(0)
    network = net().to(DEVICE)
    wrapper = Graphed(copy.deepcopy(network), Graphs(DEVICE, Notes()), "net")
    for i in range(4):
        outputs = []
        for module in (network, wrapper):
            module.zero_grad(set_to_none=True)
            outputs.append([module(batch(2 * i + j)[0]) for j in range(2)])  # two calls before a backward pass
            sum(z.square().mean() for z in outputs[-1]).backward()
            for j in range(2):  # and two passes that add up
                module(batch(j)[0]).sum().backward()
        torch.testing.assert_close(outputs[1], outputs[0], rtol=1e-4, atol=1e-4)
    for a, b in zip(network.parameters(), wrapper.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert wrapper.replays >= 9


def test_weights_on_cuda_that_move_or_are_loaded():
    torch.manual_seed(0)
    network = net().to(DEVICE)
    wrapper = Graphed(copy.deepcopy(network), Graphs(DEVICE, Notes()), "net")
    other = net().state_dict()
    for i in range(9):
        for module, inner in ((network, network), (wrapper, wrapper.network)):
            if i == 3:
                inner.load_state_dict(other)
            if i == 6:
                inner.to("cpu").to(DEVICE)
            module.zero_grad(set_to_none=True)
            module(batch(i)[0]).square().mean().backward()
        for a, b in zip(network.parameters(), wrapper.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)
    assert wrapper.replays == 8
    for a, b in zip(network.buffers(), wrapper.buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
