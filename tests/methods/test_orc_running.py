"""ORC in parts, resumed, in low precision, compiled, without waiting for a GPU."""

import copy
from functools import partial

import pytest
import torch
from group_helpers import group_of_one
from methods_helpers import batch, bn_net, images, mlp, same, snapshot, train
from orc_helpers import bn_mlp, optimizer_of, orc
from torch import nn

from fastkd._core.modes import data_parallel
from fastkd.methods import ORC
from fastkd.models import Outputs


@pytest.mark.parametrize("chunks", [2, 3, 12])
@pytest.mark.parametrize("options", [{}, {"promote": 2, "intensive": "group", "errors_only": True}], ids=str)
def test_chunks_have_the_gradient_of_the_whole_batch(options, chunks):
    whole, parts = orc(**options), orc(**options)
    steps = [optimizer_of(whole), optimizer_of(parts)]
    for step in range(3):
        x, y = batch(rows=12, seed=step)
        for one, other in zip(whole.phases(x, y), parts.phases(x, y, chunks=chunks), strict=True):
            for optimizer in steps:
                optimizer.zero_grad(set_to_none=True)
            one.loss.backward()
            total = 0
            for loss in other.losses:
                loss.backward()
                total += loss.detach()
            assert other.chunks == chunks and abs(total - one.loss) < 1e-12
            for p, q in zip(whole.parameters(), parts.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None)
                if p.grad is not None:
                    torch.testing.assert_close(q.grad, p.grad, rtol=0, atol=1e-12)
            for optimizer in steps:
                optimizer.step()
    assert torch.equal(whole.promotions, parts.promotions)


@pytest.mark.parametrize("options", [{}, {"promote": 2, "intensive": "group"}], ids=str)
def test_resumes_to_the_same_bits(options, tmp_path):
    x, y = images()

    def fresh(first, seed):
        method = ORC(bn_net(first), [bn_net(first + 1), bn_net(first + 2), bn_net(first + 3)], seed=seed, **options)
        return method.train()

    torch.manual_seed(0)
    whole = fresh(1, 7)
    optimizer = train(whole, x, y, steps=4)
    state = {"method": whole.state_dict(), "optimizer": optimizer.state_dict(), "torch": torch.get_rng_state()}
    torch.save(state, tmp_path / "run.pt")
    train(whole, x, y, steps=5, optimizer=optimizer)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = fresh(30, 123)
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    torch.set_rng_state(saved["torch"])  # of dropout
    train(second, x, y, steps=5, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict())
    assert second.iterations == 9 and int(second.promotions.sum()) == 9 * second.promote


def test_a_copy_goes_on_alike():
    x, y = batch()
    method = orc(promote=2)
    train(method, x, y, steps=2)
    twin = copy.deepcopy(method)
    train(method, x, y, steps=3)
    train(twin, x, y, steps=3)
    assert same(snapshot(method), snapshot(twin)) and method.deployable() is method.students[0]


@pytest.mark.parametrize("intensive", ["pivot", "group"])
def test_low_precision_autocast_is_close(intensive):
    """Under one autocast around the iteration: the evaluation without grad must not cost a phase its gradients."""
    x, y = images(rows=32)
    exact, low = (ORC(bn_net(1), [bn_net(2), bn_net(3)], intensive=intensive).eval() for _ in range(2))
    with torch.autocast("cpu", torch.bfloat16):
        pairs = zip(low.phases(x, y), exact.phases(x, y), strict=True)
        for phase, _ in pairs:
            low.zero_grad(set_to_none=True)
            phase.loss.backward()
            assert phase.loss.dtype == torch.float32
            assert all(p.grad is not None and p.grad.isfinite().all() for n in phase.networks for p in n.parameters())
    losses = [[], []]
    for autocast, into in zip((True, False), losses, strict=True):
        method = low if autocast else exact
        phases = method.phases(x, y)
        for _ in range(3):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                into.append(next(phases).loss)
        phases.close()
    for one, other in zip(*losses, strict=True):
        assert 0 < abs(one - other) < 0.02 * other


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    plain, compiled = orc(bn_mlp, promote=2), orc(bn_mlp, promote=2)
    compiled.map_learners(partial(torch.compile, backend=backend))
    for method in (plain, compiled):
        method.train()
        train(method, *batch(), steps=2)
    first, second = plain.state_dict(), compiled.state_dict()
    assert first.keys() == second.keys()
    for key, value in first.items():
        if torch.is_tensor(value):
            torch.testing.assert_close(second[key], value, rtol=0, atol=1e-10)
    assert all(m.training for m in compiled.modules())


@pytest.mark.parametrize("order", ["compiled inside", "compiled outside"])
def test_compiled_and_data_parallel(order, tmp_path):
    def wrap(network):
        parallel = nn.parallel.DistributedDataParallel
        if order == "compiled inside":
            return parallel(torch.compile(network, backend="eager"))
        return torch.compile(parallel(network), backend="eager")

    torch.compiler.reset()
    plain, wrapped = orc(bn_mlp, students=2), orc(bn_mlp, students=2)
    with group_of_one(tmp_path):
        wrapped.map_learners(wrap)  # one process: no process group is needed
        assert all(
            type(data_parallel(wrapped.learner(name))) is nn.parallel.DistributedDataParallel
            for name in ("pivot", "students.0", "students.1")
        )
        for method in (plain, wrapped):
            train(method.train(), *batch(), steps=1)
    assert all(
        torch.allclose(p, q, rtol=0, atol=1e-10) for p, q in zip(plain.parameters(), wrapped.parameters(), strict=True)
    )


class WithOutputs(nn.Module):
    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, inputs):
        return Outputs(self.network(inputs), features=inputs)


def test_networks_may_return_outputs():
    plain, others = orc(), orc(lambda seed, hidden: WithOutputs(mlp(seed, hidden=hidden)))
    for one, other in zip(plain.phases(*batch()), others.phases(*batch()), strict=True):
        assert one.loss == other.loss


@pytest.mark.parametrize("errors_only", [False, True])
def test_nothing_is_read_before_private_teaching(errors_only):
    """On the meta device, where no value can be read, all goes well until the host must know who is promoted."""
    method = orc(errors_only=errors_only).to("meta")
    phases = method.phases(torch.empty(8, 5, device="meta", dtype=torch.float64),
                           torch.empty(8, device="meta", dtype=torch.int64))  # fmt: skip
    phase = next(phases)
    phase.loss.backward()
    with pytest.raises(NotImplementedError, match="meta"):
        next(phases)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_without_waiting():
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    method, host = orc(bn_mlp, promote=2, errors_only=True).cuda().train(), orc(bn_mlp, promote=2, errors_only=True)
    host.train()
    steps = [optimizer_of(method), optimizer_of(host)]
    for step in range(3):
        x, y = batch(seed=step)
        others = host.phases(x, y)
        phases = method.phases(x.cuda(), y.cuda())
        for _ in range(3):
            torch.cuda.set_sync_debug_mode("error")
            try:
                phase = next(phases)
            finally:
                torch.cuda.set_sync_debug_mode("default")
            other = next(others)
            assert abs(phase.loss.cpu() - other.loss) < 1e-9
            for one, optimizer in zip((phase, other), steps, strict=True):
                optimizer.zero_grad(set_to_none=True)
                one.loss.backward()
                optimizer.step()
        assert next(phases, None) is next(others, None) is None
    assert torch.equal(method.promotions.cpu(), host.promotions)
