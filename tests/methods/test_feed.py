"""FEED and FT against the formula of the paper, typed again in plain PyTorch in float64."""

import copy
from functools import partial

import pytest
import torch
import torch.nn.functional as torch_functional
from feed_helpers import Net, batch, bn_net, images, step
from group_helpers import assert_states_close, group_of_one
from learning_helpers import assert_example_runs, assert_learnt, fit
from methods_helpers import CLASSES, plain_ce, same, snapshot, train
from torch import nn

from fastkd.data import load
from fastkd.methods import CE, FEED, FT
from fastkd.methods.feed import of_one_size
from fastkd.models import create


def assert_same_gradients(found, expected, tolerance, strict=True):
    assert found.keys() == expected.keys() or not strict
    for name in expected.keys() & found.keys():
        torch.testing.assert_close(found[name], expected[name], rtol=0, atol=tolerance, msg=lambda m: f"{name}: {m}")  # noqa: B023


def plain_pool(x, size):
    """The mean of the pixels that each place of the smaller map covers."""
    height, width = x.shape[-2:]
    rows = []
    for i in range(size[0]):
        top, bottom = i * height // size[0], -((i + 1) * height // -size[0])
        cells = []
        for j in range(size[1]):
            left, right = j * width // size[1], -((j + 1) * width // -size[1])
            cells.append(x[:, :, top:bottom, left:right].mean((2, 3)))
        rows.append(torch.stack(cells, -1))
    return torch.stack(rows, -2)


def plain_transform(layers, x, slope):
    for layer in layers:
        if isinstance(layer, nn.Conv2d):
            x = torch_functional.conv2d(x, layer.weight, layer.bias, padding=1)
        elif isinstance(layer, nn.BatchNorm2d):
            mean, variance = x.mean((0, 2, 3), keepdim=True), x.var((0, 2, 3), unbiased=False, keepdim=True)
            x = (x - mean) / (variance + layer.eps).sqrt() * layer.weight[:, None, None] + layer.bias[:, None, None]
        else:
            x = torch.where(x > 0, x, slope * x)
    return x


def plain_feed(method, x, y, beta, mean=True, p=1, dims=(1, 2, 3), slope=0.1):
    """CE + beta * sum_n || x_n/||x_n|| - NTL_n(x_S)/||NTL_n(x_S)|| ||; the second number is the term of the maps."""
    outputs, total = method.student(x), 0
    for teacher, layers in zip(method.teachers, method.transforms.transforms, strict=True):
        a, b = plain_transform(layers, outputs.maps[-1], slope), teacher(x).maps[-1].detach()
        size = min(a.shape[2], b.shape[2]), min(a.shape[3], b.shape[3])
        a, b = plain_pool(a, size), plain_pool(b, size)
        gap = a / a.square().sum(dims, keepdim=True).sqrt() - b / b.square().sum(dims, keepdim=True).sqrt()
        gap = gap.abs() ** p
        total = total + (gap.mean((1, 2, 3)) if mean else gap.sum((1, 2, 3))).mean()
    return plain_ce(outputs.logits, y) + beta * total, beta * total


def assert_is_the_formula(method, x, y, chunks=1, **options):
    twin = copy.deepcopy(method)
    loss, grads = step(method, x, y, chunks)
    value, _ = plain_feed(twin, x, y, **options)
    named = {name: p for name, p in twin.named_parameters() if p.requires_grad}
    found = torch.autograd.grad(value, list(named.values()))
    assert abs(loss - value) < 1e-10
    assert_same_gradients(grads, dict(zip(named, found, strict=True)), 1e-8)
    assert {name.split(".")[0] for name in named} == {"student", "transforms"}


SIZES = {
    "equal": [(6, 6), (6, 6)],
    "teachers larger": [(12, 12), (9, 8)],
    "student larger": [(3, 3), (4, 5)],
    "one of each": [(3, 9), (7, 2)],
}


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("sizes", SIZES)
def test_loss_and_gradients_are_the_papers(sizes, chunks):
    teachers = [Net(5 + n, channels, size) for n, (channels, size) in enumerate(zip((4, 7), SIZES[sizes], strict=True))]
    method = FEED(Net(1), teachers)
    assert_is_the_formula(method, *batch(), chunks, beta=500.0)


@pytest.mark.parametrize(
    "options, formula",
    [
        ({"beta": 3.0}, {"beta": 3.0}),
        ({"beta": 0.01, "reduction": "sum"}, {"beta": 0.01, "mean": False}),
        ({"p": 2}, {"beta": 500.0, "p": 2}),
        ({"norm": "position"}, {"beta": 500.0, "dims": 1}),
        ({"norm": "channel"}, {"beta": 500.0, "dims": (2, 3)}),
        ({"layers": 1, "negative_slope": 0.4}, {"beta": 500.0, "slope": 0.4}),
        ({"batch_norm": True}, {"beta": 500.0}),
    ],
    ids=["beta", "sum", "p", "position", "channel", "layers and slope", "batch norm"],
)
def test_options_are_the_formulas(options, formula):
    method = FEED(Net(1), [Net(2), Net(3), Net(4)], **options)  # three alike: the transforms run grouped
    assert_is_the_formula(method, *batch(), **formula)


def test_sequential_is_the_loss_with_one_teacher():
    method = FEED(Net(1), [Net(2)], mode="sequential")
    assert_is_the_formula(method, *batch(), beta=500.0)


@pytest.mark.parametrize("chunks", [1, 2])
def test_ft_and_sequential_are_parallel_with_one_teacher(chunks):
    x, y = batch()
    methods = [FEED(Net(1), [Net(2)]), FEED(Net(1), [Net(2)], mode="sequential"), FT(Net(1), Net(2))]
    states = []
    for method in methods:
        train(method, x, y, steps=3, chunks=chunks)
        states.append(snapshot(method))
    assert same(states[0], states[1]) and same(states[0], states[2])
    assert not same(states[0], snapshot(FEED(Net(1), [Net(2)])))


def test_the_teachers_terms_add_up():
    x, y = batch()
    both, alone = FEED(Net(1), [Net(2), Net(3, 6)]), [FT(Net(1), Net(2)), FT(Net(1), Net(3, 6))]
    for method, transform in zip(alone, both.transforms.transforms, strict=True):
        method.transforms.transforms[0].load_state_dict(transform.state_dict())
    ce = plain_ce(Net(1)(x).logits, y)
    total = sum(step(method, x, y)[0] for method in alone) - ce
    assert abs(step(both, x, y)[0] - total) < 1e-10


def test_the_sum_has_beta_over_the_elements():
    x, y = batch()
    mean, total = FEED(Net(1), [Net(2)]), FEED(Net(1), [Net(2)], reduction="sum", beta=500.0 / (4 * 6 * 6))
    (loss, grads), (other, others) = step(mean, x, y), step(total, x, y)
    assert abs(loss - other) < 1e-10
    assert_same_gradients(others, grads, 1e-10)


def test_without_its_weight_it_is_cross_entropy():
    x, y = batch()
    loss, grads = step(FEED(Net(1), [Net(2)], beta=0), x, y)
    ce, expected = step(CE(Net(1)), x, y)
    assert abs(loss - ce) < 1e-12
    assert_same_gradients(grads, expected, 1e-12, strict=False)
    assert not any(grad.any() for name, grad in grads.items() if name.startswith("transforms"))


def test_only_the_directions_of_the_maps_count():
    """Every teacher's map is divided by its own norm, each sample by itself."""

    class Louder(Net):
        def forward(self, x):
            outputs = super().forward(x)
            factors = torch.arange(1, len(x) + 1, dtype=x.dtype)[:, None, None, None]
            return outputs._replace(maps=(outputs.maps[-1] * factors,))

    assert abs(step(FT(Net(1), Net(2)), *batch())[0] - step(FT(Net(1), Louder(2)), *batch())[0]) < 1e-10


def test_a_student_that_gives_the_teachers_map_has_no_distance():
    method = FT(Net(1), Net(1), layers=1, negative_slope=1.0)
    (convolution, _) = method.transforms.transforms[0]
    with torch.no_grad():
        nn.init.dirac_(convolution.weight)
        convolution.bias.zero_()
    (phase,) = method.phases(*batch())
    assert phase.parts["features"] == 0 and phase.parts["ce"] > 0


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(chunks):
    x, y = batch()
    method = FEED(Net(1), [Net(2), Net(3)])
    (phase,) = method.phases(x, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    value, features = plain_feed(method, x, y, 500.0)
    assert phase.parts.keys() == {"ce", "features"}
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(phase.parts["features"] - features) < 1e-10 and abs(phase.parts["ce"] + features - value) < 1e-10
    assert abs(total - value) < 1e-10
    assert phase.networks == (method.student, method.transforms)


@pytest.mark.parametrize("chunks", [1, 4])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch(rows=10)
    y[[0, 1, 2, 6]] = -100  # with 4 chunks, the first one has no row that counts
    rows = y != -100
    loss, grads = step(FEED(Net(1), [Net(2), Net(3)]), x, y, chunks)
    alone, expected = step(FEED(Net(1), [Net(2), Net(3)]), x[rows], y[rows])
    assert abs(loss - alone) < 1e-10
    assert_same_gradients(grads, expected, 1e-9)
    loss, grads = step(FEED(Net(1), [Net(2), Net(3)]), x, torch.full_like(y, -100), chunks)
    assert loss == 0 and not any(grad.any() for grad in grads.values())


def test_teachers_run_once_per_chunk_and_without_a_graph():
    x, y = batch()
    teachers, seen = [Net(2), Net(3)], []
    method = FEED(Net(1), teachers)
    for net in (method.student, *teachers):
        net.calls = 0
        hook = lambda module, args, output: seen.append((module.training, output.maps[-1].requires_grad))  # noqa: E731
        net.register_forward_hook(hook)
    teachers[0].train()  # as an evaluation elsewhere would do
    step(method, x.requires_grad_(), y, chunks=3)
    assert [net.calls for net in (method.student, *teachers)] == [3, 3, 3]
    assert sorted(seen) == [(False, False)] * 6 + [(True, True)] * 3


def test_layouts_give_the_same():
    x, y = images()
    results = []
    for layout in (torch.contiguous_format, torch.channels_last):
        method = FEED(bn_net(1), [bn_net(2), bn_net(3, "plain4")]).to(memory_format=layout)
        results.append(step(method, x.to(memory_format=layout), y))
    (loss, grads), (other, others) = results
    torch.testing.assert_close(loss, other)
    assert_same_gradients(others, grads, 1e-4 * max(grad.abs().max() for grad in grads.values()).item())


@pytest.mark.parametrize("size, other", [((6, 6), (3, 2)), ((7, 5), (3, 2)), ((4, 6), (6, 4)), ((5, 5), (5, 5))])
def test_the_larger_map_is_pooled(size, other):
    a, b = torch.randn(2, 3, *size), torch.randn(2, 3, *other)
    goal = [min(pair) for pair in zip(size, other, strict=True)]
    for found, x in zip(of_one_size(a, b), (a, b), strict=True):
        torch.testing.assert_close(found, plain_pool(x, goal))
        assert found is x or found.shape != x.shape


@pytest.mark.parametrize("batch_norm", [False, True])
def test_teachers_are_frozen_and_the_rest_learns(batch_norm):
    teachers = [bn_net(2), bn_net(3, "resnet8", 0.25)]
    method = FEED(bn_net(1), teachers, batch_norm=batch_norm)
    frozen, learning = snapshot(method.teachers), {n: snapshot(method.get_submodule(n)) for n in method._learner_names}
    method.train()
    optimizer = train(method, *images(), steps=2)
    method.teachers[0].train()
    train(method, *images(), steps=2, optimizer=optimizer)
    assert same(snapshot(method.teachers), frozen)
    method.train()
    assert not any(m.training for m in method.teachers.modules())
    assert all(m.training for n in ("student", "transforms") for m in method.get_submodule(n).modules())
    assert all(p.grad is None and not p.requires_grad for p in method.teachers.parameters())
    assert method.teachers[0] is teachers[0]
    for name, before in learning.items():
        after = snapshot(method.get_submodule(name))
        assert not any(torch.equal(after[key], before[key]) for key in before), name


def test_the_transforms_are_trained_but_not_deployed():
    method = FEED(bn_net(1), [bn_net(2)])
    trained = {id(p) for group in method.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for n in (method.student, method.transforms) for p in n.parameters()}
    student = method.deployable()
    assert student is method.student and student.state_dict().keys() == bn_net(1).state_dict().keys()
    assert not any("transform" in name for name in student.state_dict())
    assert not {id(p) for p in student.parameters()} & {id(p) for p in method.transforms.parameters()}
    assert student(images()[0]).shape == (8, CLASSES)


def test_resumes_to_the_same_bits(tmp_path):
    def fresh(first, seed):
        return FEED(bn_net(first), [bn_net(2), bn_net(3)], batch_norm=True, seed=seed)

    x, y = images()
    whole = fresh(1, 7)
    train(whole, x, y, steps=7)
    first = fresh(1, 7)
    optimizer = train(first, x, y, steps=3)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = fresh(8, 123)
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, x, y, steps=4, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict()) and second.iterations == 7


def test_low_precision_autocast_is_close():
    x, y = images(rows=32)
    exact, low = (FEED(bn_net(1), [bn_net(2), bn_net(3, "plain4")], beta=20.0) for _ in range(2))
    loss, expected = step(exact, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = low.phases(x, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32 and 0 < abs(phase.loss - loss) < 0.02 * loss
    for name in ("student.stages.0.0.weight", "transforms.transforms.1.4.weight"):
        found = low.get_parameter(name).grad
        assert torch_functional.cosine_similarity(found.flatten(), expected[name].flatten(), dim=0) > 0.98


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    x, y = images()
    plain, compiled = (FEED(bn_net(1).double(), [bn_net(2).double()]) for _ in range(2))
    loss, expected = step(plain, x.double(), y)
    compiled.map_learners(partial(torch.compile, backend=backend))
    other, found = step(compiled, x.double(), y)
    assert abs(loss - other) < 1e-10
    assert_same_gradients(found, expected, 1e-9)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_under_distributed_data_parallel(tmp_path):
    """Student and transforms are wrapped one by one; the maps of the early stages are outputs without a loss."""
    x, y = images()
    plain, wrapped = (FEED(bn_net(1), [bn_net(2)]) for _ in range(2))
    with group_of_one(tmp_path):
        wrapped.map_learners(nn.parallel.DistributedDataParallel)
        for method in (plain, wrapped):
            train(method, x, y, steps=2)
            train(method, x, y, steps=1, chunks=2)
    assert_states_close(wrapped, plain, rtol=0, atol=1e-6)


def tensors(part):
    images, labels = zip(*part, strict=True)
    return torch.stack(images), torch.tensor(labels)


def test_digits_are_learnt():
    """Two teachers in parallel, then a chain; small plain networks on 400 handwritten digits."""
    pytest.importorskip("sklearn")
    data = load("digits", train_size=400, augment=False)
    (x, y), (x_test, y_test) = (tensors(data.train), tensors(data.test))

    def network(seed, width=0.25):
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            return create("plain2", 10, image_size=8, channels=1, width=width)

    fitted = partial(fit, x=x, y=y, epochs=8, lr=0.02)
    teachers = [fitted(CE(network(1, 0.5))), fitted(CE(network(2, 0.5)))]
    method, features = FEED(network(3), teachers), []
    features.append(next(method.phases(x, y)).parts["features"])
    student = fitted(method)
    features.append(next(method.phases(x, y)).parts["features"])
    assert features[1] < 0.8 * features[0]  # the maps came nearer
    assert_learnt(student, x_test, y_test, network(3))
    chain = [fitted(CE(network(4)))]
    chain.append(fitted(FEED(network(5), chain, mode="sequential")))
    assert_learnt(chain[1], x_test, y_test, network(5))


def test_the_example_runs(capsys):
    assert_example_runs("feed", "student", capsys)
