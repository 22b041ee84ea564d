"""DKEL and PCL in use: averages, initialisation, checkpoints, precision, processes, wrong set-ups, learning."""

import copy
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from dkel_helpers import (
    CLASSES,
    LATE,
    bn_student,
    dkel,
    image_views,
    rows_of_views,
    run,
    tiny,
)
from group_helpers import assert_states_close, group_of_one
from learning_helpers import accuracy, assert_example_runs
from methods_helpers import plain_ce, same, snapshot, train
from torch import nn

from fastkd import data
from fastkd.methods import DKEL, PCL
from fastkd.methods.dkel import _teaching
from fastkd.models import branched


def test_the_teacher_starts_apart_and_moves_a_thousandth():
    views, y = image_views()
    views = [view.double() for view in views]
    torch.manual_seed(0)  # the method's seed
    student = branched("resnet8", CLASSES, image_size=8, channels=1, width=0.25).double()
    before = torch.get_rng_state()
    method = DKEL(student, seed=0, init=3)
    assert torch.equal(torch.get_rng_state(), before)
    weights = [(p, q) for p, q in zip(method.teacher.parameters(), student.parameters(), strict=True) if p.dim() > 1]
    assert not any(torch.equal(p, q) for p, q in weights)
    method.initialised = True
    start = [p.clone() for p in method.teacher.parameters()]
    train(method, views, y, 1)
    for mean, first, value in zip(method.teacher.parameters(), start, student.parameters(), strict=True):
        torch.testing.assert_close(mean, 0.999 * first + 0.001 * value.detach(), rtol=0, atol=1e-15)
        assert torch.equal(mean, torch.lerp(first, value.detach(), 1 - 0.999)) and not torch.equal(value, first)
    assert method.steps == 1


@pytest.mark.parametrize("make", [partial(DKEL, variant="released", init=0), PCL])
def test_the_released_average_overwrites_the_start(make):
    views, y = image_views()
    method = make(bn_student())
    assert all(torch.equal(p, q) for p, q in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    assert method.teacher.peer(0).conv1 is not method.student.peer(0).conv1
    method.initialise([(views, y)], lr=10.0)
    train(method, views, y, 1)
    assert all(torch.equal(p, q) for p, q in zip(method.teacher.parameters(), method.student.parameters(), strict=True))
    train(method, views, y, 1)
    assert not torch.equal(method.teacher.peer(0).conv1.weight, method.student.peer(0).conv1.weight)


def test_buffers_are_of_the_teachers_own_forward():
    views, y = image_views()
    method = DKEL(bn_student(), teacher=bn_student(9), init=None, momentum=1.0).train()
    twin = copy.deepcopy(method.teacher).train()
    train(method, views, y, 1)
    with torch.no_grad():
        twin(views)
    buffers = dict(method.teacher.named_buffers())
    assert all(torch.equal(buffers[name], value) for name, value in twin.named_buffers())
    assert not torch.equal(buffers["peers.0.bn1.running_mean"], method.student.peer(0).bn1.running_mean)
    assert buffers["peers.0.bn1.num_batches_tracked"] == 3  # a view each


def test_a_skipped_step_does_not_count():
    views, y = image_views()
    method = DKEL(bn_student(), init=None)
    before = [p.clone() for p in method.teacher.parameters()]
    for phase in method.phases(views, y):
        phase.skipped = True
    assert method.steps == 0
    assert all(torch.equal(p, q) for p, q in zip(method.teacher.parameters(), before, strict=True))


def test_chunks_average_once():
    views, y = rows_of_views()
    whole, parts = dkel(epoch=4, c=5.0, momentum=0.5), dkel(epoch=4, c=5.0, momentum=0.5)
    train(whole, views, y, 3), train(parts, views, y, 3, chunks=4)
    assert whole.steps == parts.steps == 3
    for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("variant", ["intended", "released"])
def test_initialise_takes_plain_sgd_steps(variant):
    batches = [image_views(seed=s) for s in range(5)]
    method = DKEL(bn_student(), init=2, variant=variant)
    plain, student = copy.deepcopy(method.teacher).requires_grad_(True).train(), snapshot(method.student)
    taken = []
    method.initialise((taken.append(1) or batch for batch in batches), lr=30.0)
    assert len(taken) == 3 and method.initialised
    for views, y in batches[:3]:
        loss = sum(plain_ce(o.logits, y) for o in plain(views)) / 3
        parameters = list(plain.parameters())
        for p, g in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            p.data.sub_(0.3 * (g + 5e-4 * p))
    for name, value in method.teacher.state_dict().items():
        torch.testing.assert_close(value, plain.state_dict()[name], rtol=1e-4, atol=1e-5)
    assert same(snapshot(method.student), student)
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    method.initialise((taken.append(1) for _ in range(9)), lr=30.0)  # once is enough: no batch is taken
    restored = DKEL(bn_student(5), init=2)
    restored.load_state_dict(method.state_dict())
    restored.initialise((taken.append(1) for _ in range(9)), lr=30.0)
    PCL(bn_student()).initialise((taken.append(1) for _ in range(9)), lr=30.0)
    assert len(taken) == 3 and same(snapshot(restored), snapshot(method))


def test_initialise_in_chunks_takes_the_same_steps():
    views, y = rows_of_views()
    y[[0, 3]] = -100
    seen, methods = [], [DKEL(tiny(1), teacher=tiny(2)) for _ in range(2)]
    methods[1].teacher.register_forward_hook(lambda module, args, out: seen.append(len(args[0][0])))
    for method, chunks in zip(methods, (1, 3), strict=True):
        method.initialise([(views, y)] * 2, lr=30.0, chunks=chunks)
    assert seen == [3, 3, 4] * 2
    for p, q in zip(methods[0].teacher.parameters(), methods[1].teacher.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


def test_a_forgotten_initialisation_is_told():
    views, y = image_views()
    with pytest.warns(RuntimeWarning, match=r"^DKEL: initialise\(batches, lr\) was not called"):
        run(DKEL(bn_student()), views, y)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(DKEL(bn_student(), init=None), views, y)
        run(PCL(bn_student()), views, y)
        method = DKEL(bn_student())
        method.initialise([(views, y)], lr=0.1)  # fewer batches than init + 1
        run(method, views, y)


def test_initialise_averages_over_processes(monkeypatch):
    """Two threads stand for two processes; all_reduce adds what both hold."""
    (views, y), whole, ranks = rows_of_views(), dkel(), [dkel(), dkel()]
    for method in (whole, *ranks):
        method.initialised = False
    whole.initialise([(views, y)], lr=50.0)
    barrier, held = threading.Barrier(2, timeout=60), {}

    def all_reduce(tensor):
        held[threading.get_ident()] = tensor.clone()
        barrier.wait()
        total = sum(held.values())
        barrier.wait()
        tensor.copy_(total)

    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda r: ranks[r].initialise([([v[r::2] for v in views], y[r::2])], lr=50.0), range(2)))
    for method in ranks:
        for p, q in zip(method.teacher.parameters(), whole.teacher.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=0, atol=1e-12)


@pytest.mark.parametrize("make", [
    lambda s: DKEL(s, seed=3), lambda s: DKEL(s, variant="released", init=0), lambda s: PCL(s, momentum=0.9),
])  # fmt: skip
def test_resumes_to_the_same_bits(make, tmp_path):
    views, y = image_views()

    def begin(method):
        method.start_epoch(3, 20)
        method.initialise([(views, y)] * 2, lr=1.0)
        return method.train()

    whole, first = begin(make(bn_student())), begin(make(bn_student()))
    train(whole, views, y, 5)
    optimizer = train(first, views, y, 2)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = make(bn_student(8))
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    assert second.steps == 2 and second.initialised == (type(second) is DKEL)
    second.train()
    train(second, views, y, 3, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict())
    assert second.steps == second.iterations == 5


def test_what_trains_and_what_is_deployed():
    views, y = image_views()
    method = DKEL(bn_student(), init=None)
    trained = {id(p) for group in method.parameter_groups(0.1) for p in group["params"]}
    assert trained == {id(p) for n in (method.student, method.classifier) for p in n.parameters()}
    (phase,) = method.phases(views, y)
    assert phase.networks == (method.student, method.classifier)
    start = snapshot(method)
    method.train()
    train(method, views, y, 2)
    assert not any(torch.equal(v, start[k]) for k, v in method.state_dict().items() if torch.is_tensor(v))
    network = method.deployable()
    assert network is method.teacher.peer(0) and network(views[0]).shape == (8, CLASSES)
    assert network.state_dict().keys() == bn_student().peer(0).state_dict().keys()
    bn_student().peer(0).load_state_dict(network.state_dict())
    method.eval()
    assert not any(m.training for m in method.modules())


def test_a_batch_left_half_way_moves_no_weight():
    views, y = image_views()
    method = DKEL(bn_student(), init=None)
    before = [p.clone() for p in method.parameters()]
    phases = method.phases(views, y)
    next(phases).loss.backward()
    phases.close()
    assert method.steps == method.iterations == 0
    assert all(torch.equal(p, q) for p, q in zip(method.parameters(), before, strict=True))


@pytest.mark.parametrize("epoch", [0, 3, LATE])
def test_low_precision_autocast_is_close(epoch):
    views, y = image_views(rows=32)
    methods = [DKEL(bn_student(norm="group"), init=None, c=5.0) for _ in range(2)]
    for method in methods:
        method.teacher.load_state_dict(bn_student(9, norm="group").state_dict())
        method.start_epoch(epoch, 300)
    loss = run(methods[0], views, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = methods[1].phases(views, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32 and 0 < abs(phase.loss - loss) < 0.02 * loss
    exact, low = ([p.grad for p in m.parameters() if p.grad is not None] for m in methods)
    for grad, expected in zip(low, exact, strict=True):
        assert nn.functional.cosine_similarity(grad.flatten(), expected.flatten(), dim=0) > 0.97
    train(methods[1], views, y, 1)
    assert all(p.dtype == torch.float32 for p in methods[1].teacher.parameters())


def test_the_mean_of_the_teachers_is_not_rounded():
    teachers = [torch.randn(4, CLASSES, generator=torch.Generator().manual_seed(k)).bfloat16() for k in range(3)]
    columns, weights = _teaching(teachers, 0.125, 0.375)
    assert {column.dtype for column in columns} == {torch.float32} and len(columns) == 6
    assert torch.equal(columns[3], (teachers[1].float() + teachers[2].float()) / 2)
    assert weights[0] == [0, 0.1875, 0.1875, 0.125, 0, 0]
    assert _teaching(teachers, 0.0, 0.5)[0] == teachers  # in their own dtype, three columns to read
    assert len(_teaching(teachers, 0.5, 0.0)[0]) == 3 and _teaching(teachers, 0.0, 0.0)[0] == []


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    views, y = rows_of_views()
    plain, compiled = dkel(epoch=2, c=9.0), dkel(epoch=2, c=9.0)
    compiled.map_learners(partial(torch.compile, backend=backend))
    train(plain, views, y, 2), train(compiled, views, y, 2)
    for (name, p), q in zip(plain.named_parameters(), compiled.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=1e-12, msg=name)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_under_distributed_data_parallel(tmp_path):
    views, y = image_views()
    plain, wrapped = DKEL(bn_student(), init=None), DKEL(bn_student(), init=None)
    with group_of_one(tmp_path):
        wrapped.map_learners(nn.parallel.DistributedDataParallel)
        train(plain, views, y, 2), train(wrapped, views, y, 2)
    assert_states_close(wrapped, plain, rtol=1e-4, atol=1e-6)


VIEWS, Y = image_views(rows=2)


@pytest.mark.parametrize("call, error, message", [
    (lambda: DKEL(nn.Linear(2, 2)), TypeError, "DKEL: student must be .*Branched.*, got Linear"),
    (lambda: PCL(bn_student(), teacher=nn.Linear(2, 2)), TypeError, "PCL: teacher must be .*Branched.*, got Linear"),
    (lambda: DKEL(bn_student(), teacher=bn_student(1, 2)), ValueError, "DKEL: teacher must be .*student's shapes"),
    (lambda: DKEL(bn_student(), classifier=3), TypeError, "DKEL: classifier must be a network .*, got int"),
    (lambda: DKEL(tiny(1)), ValueError, "DKEL: teacher must be given where the student was not made by .*branched"),
    (lambda: DKEL(bn_student(), c=-1), ValueError, "DKEL: c must be a finite number >= 0, got -1"),
    (lambda: DKEL(bn_student(), ramp="80"), TypeError, "DKEL: ramp must be .*, got str"),
    (lambda: DKEL(bn_student(), of=0), ValueError, "DKEL: of must be a number >= 1, or None, got 0"),
    (lambda: DKEL(bn_student(), init=-1), ValueError, "DKEL: init must be an integer of at least 0, got -1"),
    (lambda: DKEL(bn_student(), decay=-0.5), ValueError, "DKEL: decay must be .*, got -0.5"),
    (lambda: PCL(bn_student(), momentum=1.5), ValueError, r"PCL: momentum must be a number in \[0, 1\], got 1.5"),
    (lambda: PCL(bn_student(), temperature=0), ValueError, "PCL: temperature must be a finite number > 0, got 0"),
    (lambda: PCL(bn_student(), variant="code"), ValueError, "PCL: variant must be one of 'intended', 'released'"),
    (lambda: DKEL(bn_student(), seed=0.5), TypeError, "DKEL: seed must be an integer, got float"),
    (lambda: run(PCL(bn_student()), VIEWS[0], Y), TypeError, "PCL: inputs must be 3 views .*, got one tensor"),
    (lambda: run(PCL(bn_student()), VIEWS[:2], Y), ValueError, "PCL: inputs must be 3 views .*, got 2 views"),
    (lambda: run(PCL(bn_student()), {"x": VIEWS[0]}, Y), TypeError, "PCL: inputs must be 3 views .*, got dict"),
    (lambda: run(PCL(bn_student()), VIEWS), ValueError, "PCL: target must be class indices .*, got None"),
    (lambda: run(PCL(bn_student(), classifier=nn.Linear(48, 4)), VIEWS, Y), ValueError,
     r"PCL: classifier must be .*\[2, 7\], got .*\[2, 4\]"),
    (lambda: run(PCL(bn_student()).bfloat16(), [v.bfloat16() for v in VIEWS], Y), TypeError,
     "PCL: student must be of float32 .*torch.autocast.*, got torch.bfloat16"),
    (lambda: DKEL(bn_student()).initialise([], 0.1), ValueError, "DKEL: batches must be .*at least one"),
    (lambda: DKEL(bn_student()).initialise([(VIEWS[0], Y)], 0.1), TypeError, "DKEL: batches must be 3 views"),
    (lambda: DKEL(bn_student()).initialise([(VIEWS, Y)], -1), ValueError, "DKEL: lr must be .*, got -1"),
])  # fmt: skip
def test_wrong_set_ups(call, error, message):
    with pytest.raises(error, match=f"^{message}"):
        call()


def test_a_network_shared_with_the_teacher_is_refused():
    student = bn_student()
    with pytest.raises(ValueError, match=r"^DKEL: teacher must be a network of its own"):
        DKEL(student, teacher=student)


@pytest.mark.parametrize("make", [
    partial(DKEL, c=1.0, momentum=0.9), partial(DKEL, variant="released", momentum=0.9), partial(PCL, momentum=0.9),
])  # fmt: skip
def test_digits_are_learnt(make):
    """300 handwritten digits, 48 steps: an average with 0.9 follows that fast, one with 0.999 does not."""
    digits = data.load("digits", train_size=300, views=3)
    x, y_test = torch.stack([digits.test[i][0] for i in range(300)]), torch.tensor(digits.test.labels[:300])
    torch.manual_seed(0)
    method = make(branched("resnet8", 10, image_size=8, channels=1, width=0.5))

    untrained = accuracy(method.deployable(), x, y_test)
    batches, epochs = data.loader(digits.train, 50, shuffle=True), 8
    method.initialise(batches, lr=0.1)
    optimizer = torch.optim.SGD(method.parameter_groups(0.1), momentum=0.9, nesterov=True, weight_decay=5e-4)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for views, target in batches:
            for phase in method.phases(views, target):
                optimizer.zero_grad(set_to_none=True)
                phase.loss.backward()
                optimizer.step()
    constant = max(y_test.bincount()).item() / len(y_test)
    assert accuracy(method.deployable(), x, y_test) > max(untrained, constant) + 0.4


def test_the_example_runs(capsys):
    assert_example_runs("dkel", "deployed", capsys)
