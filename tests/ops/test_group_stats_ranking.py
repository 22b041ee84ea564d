"""rank_networks, network_scores, hard_samples: on the device, over a process group; the modes of group_stats."""

import itertools
import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes_helpers import together
from test_group_stats import PLACES, make
from torch._subclasses import FakeTensorMode

import fastkd
from fastkd import _backend
from fastkd.functional import GroupStats

F = fastkd.functional
BY = ("ce", "accuracy", "top5")


def of_ce(rows, **columns) -> GroupStats:
    """Statistics whose CE is `rows` [M, R]; None: no label."""
    ce = torch.tensor([[math.nan if x is None else x for x in row] for row in rows])
    rank = torch.tensor([[-1 if x is None else 0 for x in row] for row in rows])
    values = dict(ce=ce, correct=rank == 0, label_rank=rank, confidence=ce, entropy=ce, margin=ce)
    return GroupStats(**values | columns)


# --- the order of the networks ----------------------------------------------------------------------------------------


def test_scores_and_order_are_the_definitions_typed_again():
    logits, target = make(60, 12, 5)
    target[::7] = -100
    keep = target != -100
    stats = F.group_stats(logits, target)
    scores = {
        "ce": [float(torch.nn.functional.cross_entropy(z, target)) for z in logits],
        "accuracy": [float((z.argmax(-1) == target)[keep].double().mean()) for z in logits],
        "top5": [float((z.topk(5).indices == target[:, None]).any(-1)[keep].double().mean()) for z in logits],
    }
    for by in BY:
        actual = F.network_scores(stats, by)
        assert actual.dtype == torch.float64 and actual.tolist() == pytest.approx(scores[by], rel=1e-6)
        best = sorted(range(5), key=lambda m, by=by: (scores[by][m] if by == "ce" else -scores[by][m], m))
        order = F.rank_networks(stats, by)
        assert order.dtype == torch.int64 and order.tolist() == best
    assert F.rank_networks(stats).tolist() == F.rank_networks(stats, "ce").tolist()


@pytest.mark.parametrize("by", BY)
def test_ties_are_broken_by_index(by):
    logits, target = make(20, 12, 1)
    other = torch.zeros_like(logits[0]).scatter(1, target[:, None], 30.0)
    stats = F.group_stats([logits[0], other, logits[0], other, logits[0]], target)
    assert F.rank_networks(stats, by).tolist() == [1, 3, 0, 2, 4]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("by", BY)
def test_nan_ranks_last_and_infinity_before_it(by, place, at):
    logits, target = make(6, 8, 5, device=at(place))
    logits[0][:] = math.nan  # argmax of NaN is class 0
    target[2] = 0
    logits[2][2] = math.nan
    logits[3][1, target[1]] = -math.inf
    stats = F.group_stats(logits, target)
    order = F.rank_networks(stats, by).tolist()
    assert order[3:] == [0, 2]
    if by == "ce":
        assert order[2] == 3 and F.network_scores(stats)[3] == math.inf
    ignored = target.clone()
    ignored[2] = -100  # then the NaN of network 2 does not count
    assert F.rank_networks(F.group_stats(logits, ignored), by).tolist()[4] == 0


@pytest.mark.parametrize("by", BY)
def test_ignored_rows_do_not_count(by):
    logits, target = make(40, 9, 4)
    target[10:] = -100
    logits[2][10:] = 0.0
    alone = F.group_stats([z[:10] for z in logits], target[:10])
    assert torch.equal(F.rank_networks(F.group_stats(logits, target), by), F.rank_networks(alone, by))
    none = F.group_stats(logits, torch.full_like(target, -100))
    assert F.rank_networks(none, by).tolist() == [0, 1, 2, 3] and F.network_scores(none, by).isnan().all()
    empty = F.group_stats([z[:0] for z in logits], target[:0])
    assert F.rank_networks(empty, by).tolist() == [0, 1, 2, 3]


def test_top5_of_fewer_classes_is_all_but_nan():
    logits, target = make(10, 3, 3)
    logits[0][0] = math.nan
    scores = F.network_scores(F.group_stats(logits, target), "top5").tolist()
    assert math.isnan(scores[0]) and scores[1:] == [1, 1]


def test_errors_and_the_networks_order_on_each_sample():
    logits, target = make(30, 9, 4)
    target[:3] = -100
    stats = F.group_stats(logits, target)
    right = torch.stack([z.argmax(-1) == target for z in logits])
    assert torch.equal(stats.errors(), ~right & (target != -100))
    place = stats.network_order()
    for r in range(3, 30):
        best = sorted(range(4), key=lambda m, r=r: (float(stats.ce[m, r]), m))
        assert [best.index(m) for m in range(4)] == place[:, r].tolist()
    assert place[:, 0].tolist() == [0, 1, 2, 3]
    assert of_ce([[2.0], [math.nan], [1.0], [2.0]]).network_order()[:, 0].tolist() == [1, 3, 0, 2]


def test_same_scores_for_any_number_of_threads():
    stats = of_ce(torch.rand(1, 70000).tolist())
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            results.append(F.network_scores(stats))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(r, results[0]) for r in results)


# --- hard samples -----------------------------------------------------------------------------------------------------


def typed_again(stats, proportions, n):
    """Plain Python, in exact fractions."""
    total = sum(Fraction(p) for p in proportions)
    quotas = [Fraction(p) * n / total for p in proportions]
    counts = [math.floor(q) for q in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda m: (counts[m] - quotas[m], m))
    for m in by_remainder[: n - sum(counts)]:
        counts[m] += 1
    chosen = []
    for ce, rank, count in zip(stats.ce.tolist(), stats.label_rank.tolist(), counts, strict=True):
        rows = range(len(ce))
        pools = [r for r in rows if not math.isnan(ce[r])], [r for r in rows if rank[r] >= 0], list(rows)
        pool = next(p for p in pools if p)
        if pool is pools[0]:
            pool = sorted(pool, key=lambda r, ce=ce: (-ce[r], r))
        chosen += list(itertools.islice(itertools.cycle(pool), count))
    return chosen


def test_hard_samples_by_hand():
    stats = of_ce([[0.1, 3.0, None, 2.0], [5.0, 0.2, None, 5.0]])
    assert F.hard_samples(stats, [0.5, 0.5], 4).tolist() == [1, 3, 0, 3]
    assert F.hard_samples(stats, torch.tensor([3, 1]), 4).tolist() == [1, 3, 0, 0]
    assert F.hard_samples(stats, [1, 0], 8).tolist() == [1, 3, 0, 1, 3, 0, 1, 3]  # starts again; never the ignored one
    assert F.hard_samples(stats, [0.5, 0.5], 1).tolist() == [1]  # equal remainders: the first
    assert F.hard_samples(stats, [1, 2], 0).tolist() == []
    assert F.hard_samples(stats, [1.0, 1.0], 4).dtype == torch.int64


def test_hard_samples_where_nothing_counts():
    stats = of_ce([[None, None, None], [math.nan, None, math.nan], [2.0, math.nan, 3.0]])
    stats.label_rank[1:] = torch.tensor([[3, -1, 3], [0, 3, 0]])
    assert F.hard_samples(stats, [1, 0, 0], 5).tolist() == [0, 1, 2, 0, 1]
    assert F.hard_samples(stats, [0, 1, 0], 5).tolist() == [0, 2, 0, 2, 0]
    assert F.hard_samples(stats, [0, 0, 1], 5).tolist() == [2, 0, 2, 0, 2]
    with pytest.raises(ValueError, match="hard_samples: n must be 0 where there are no samples, got 2"):
        F.hard_samples(GroupStats(*(t[:, :0] for t in stats)), [1, 1, 1], 2)
    assert F.hard_samples(GroupStats(*(t[:, :0] for t in stats)), [1, 1, 1], 0).shape == (0,)


def test_infinite_cross_entropy_is_the_hardest():
    assert F.hard_samples(of_ce([[1.0, math.inf, 9.0, math.inf]]), [1.0], 3).tolist() == [1, 3, 2]


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_hard_samples_are_the_definition_typed_again(data):
    networks, rows, n = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 9)), data.draw(st.integers(0, 40))
    value = st.sampled_from([None, 0.0, 0.5, 0.5, 1.0, 2.0, 7.25, math.inf])
    stats = of_ce([data.draw(st.lists(value, min_size=rows, max_size=rows)) for _ in range(networks)])
    # Dyadic shares of a power of two: the quotas are exact in floating point as well.
    shares = data.draw(st.lists(st.integers(0, 8), min_size=networks, max_size=networks))
    shares[-1] += 64 - sum(shares)
    shares = [s / 64 for s in shares]
    expected = typed_again(stats, shares, n)
    assert F.hard_samples(stats, shares, n).tolist() == expected
    assert F.hard_samples(stats, torch.tensor(shares), n).tolist() == expected


@settings(deadline=None, max_examples=100)
@given(st.lists(st.floats(0, 1e300), min_size=1, max_size=8).filter(any), st.integers(0, 200))
def test_counts_sum_to_n_and_are_near_their_quotas(shares, n):
    networks = len(shares)
    rows = torch.arange(networks * 200.0).reshape(networks, 200)
    stats = of_ce(torch.where(rows.long() // 200 == torch.arange(networks)[:, None], rows, 0.0).tolist())
    chosen = F.hard_samples(stats, shares, n)
    assert chosen.shape == (n,) and bool(((chosen >= 0) & (chosen < 200)).all())
    from fastkd.ops.ranking import _largest_remainder

    counts = _largest_remainder(torch.tensor(shares, dtype=torch.float64), n)
    assert int(counts.sum()) == n
    total = sum(Fraction(s) for s in shares)
    for count, share in zip(counts.tolist(), shares, strict=True):
        assert abs(count - Fraction(share) * n / total) < 1 + 1e-9


@pytest.mark.usefixtures("values_unreadable")
def test_proportions_that_cannot_be_checked():
    """As on a GPU: the indices stay in range, and as many."""
    stats = of_ce([[1.0, 2.0], [4.0, 3.0]])
    for bad, expected in (
        ([math.nan, math.nan], [1, 0, 0, 1]),
        ([0.0, 0.0], [1, 0, 0, 1]),
        ([-1.0, 1.0], [0, 1, 0, 1]),
        ([math.nan, 1.0], [0, 1, 0, 1]),
        ([math.inf, 1.0], [0, 1, 0, 1]),
    ):
        assert F.hard_samples(stats, torch.tensor(bad), 4).tolist() == expected


# --- a process group --------------------------------------------------------------------------------------------------


def _worker(rank: int, folder: str, failures) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    try:
        logits, target = make(25, 12, 4)
        target[3] = -100
        for m, z in enumerate(logits):  # the second part disagrees with the first
            z[:16] += torch.nn.functional.one_hot(target[:16].clamp(min=0), 12) * m
        world, pair = torch.distributed.group.WORLD, torch.distributed.new_group([0, 1])
        for parts in (((0, 16), (16, 25)), ((0, 25), (25, 25)), ((0, 1), (1, 25))):
            begin, end = parts[rank]
            mine = F.group_stats([z[begin:end] for z in logits], target[begin:end])
            whole = F.group_stats(logits, target)
            for by, group in itertools.product(BY, (world, pair)):
                order = F.rank_networks(mine, by, process_group=group)
                assert torch.equal(order, F.rank_networks(whole, by)), (rank, parts, by)
                torch.testing.assert_close(F.network_scores(mine, by, group), F.network_scores(whole, by))
            gathered = [torch.empty(4, dtype=torch.float64) for _ in range(2)]
            torch.distributed.all_gather(gathered, F.network_scores(mine, "ce", world))
            assert torch.equal(*gathered)
        mine = F.group_stats(
            [z[16:] for z in logits] if rank else [z[:16] for z in logits], target[16:] if rank else target[:16]
        )
        if rank:
            local, overall = F.rank_networks(mine), F.rank_networks(mine, process_group=world)
            assert not torch.equal(local, overall)  # so that the reduction is seen to matter
        else:
            F.rank_networks(mine, process_group=world)
        shares = F.network_scores(mine, "ce", world).softmax(0)
        assert F.hard_samples(mine, shares, 8).shape == (8,)
        traced = torch.compile(lambda s: F.rank_networks(s, "ce", world), fullgraph=True, backend="aot_eager")
        assert torch.equal(traced(mine), F.rank_networks(mine, "ce", world))
    finally:
        torch.distributed.destroy_process_group()


def test_every_rank_gets_the_order_of_the_global_batch(tmp_path):
    together(_worker, 2, str(tmp_path))


# --- no wait for the device, no gradient, transforms, compile ---------------------------------------------------------


def everything(logits, target):
    stats = F.group_stats(logits, target)
    orders = [F.rank_networks(stats, by) for by in BY]
    shares = F.network_scores(stats).softmax(0)
    return (*stats, *orders, F.hard_samples(stats, shares, 7), F.hard_samples(stats, [1.0] * len(logits), 7),
            stats.errors(), stats.network_order(), torch.stack(list(logits))[orders[0][:2]].sum())  # fmt: skip


def test_it_runs_on_fake_tensors():
    with FakeTensorMode():
        logits, target = [torch.randn(6, 9) for _ in range(3)], torch.randint(0, 9, (6,))
        results = everything(logits, target)
    real = everything(*make(6, 9, 3))
    assert [(r.shape, r.dtype) for r in results] == [(r.shape, r.dtype) for r in real]


@pytest.mark.parametrize("dynamic", [False, True])
def test_fullgraph_compile(dynamic):
    torch._dynamo.reset()
    compiled = torch.compile(everything, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (6, 7, 11) if dynamic else (6,):
        logits, target = make(rows, 9, 3)
        target[1] = -100
        for a, b in zip(compiled(logits, target), everything(logits, target), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def test_export():
    class Order(torch.nn.Module):
        def forward(self, a, b, y):
            return F.rank_networks(F.group_stats([a, b], y))

    logits, target = make(6, 9, 2)
    program = torch.export.export(Order(), (*logits, target))
    assert torch.equal(program.module()(*logits, target), F.rank_networks(F.group_stats(logits, target)))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_nothing_waits_for_the_gpu():
    logits, target = make(64, 100, 4, device="cuda")
    everything(logits, target)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        everything(logits, target)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("labels", [True, False])
def test_opcheck(labels, dtype, place, at):
    logits, target = make(5, 40, 3, dtype, device=at(place))
    ops = _backend.native_ops(logits[0])
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    soft = torch.softmax(logits[0].reshape(1, 5, 40), -1)
    mixed = [*logits, logits[0].double()]
    torch.library.opcheck(ops.group_stats.default, (mixed, None, soft, -100), test_utils=checks)
    if labels:  # without, ce is NaN, which this check takes for a difference
        checks = (*checks, "test_aot_dispatch_dynamic")
    torch.library.opcheck(ops.group_stats.default, (logits, target if labels else None, None, -100), test_utils=checks)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_never_differentiable(backend):
    logits, target = make(6, 9, 3)
    logits = [z.requires_grad_() for z in logits]
    with fastkd.use_backend(backend):
        assert not any(t.requires_grad for t in everything(logits, target)[:-1])
        stacked = torch.stack(logits)
        stats = F.group_stats(stacked, target)
        assert not any(t.requires_grad for t in stats)
        shares = torch.ones(3, requires_grad=True)
        assert not F.hard_samples(stats, shares, 4).requires_grad
        with torch.inference_mode():
            inside = torch.stack(logits) * 1
        for a, b in zip(F.group_stats(inside, target), stats, strict=True):
            torch.testing.assert_close(a, b, equal_nan=True)


def test_under_transforms_there_is_no_derivative_and_no_mistake():
    logits, target = make(5, 9, 3, torch.float64)
    stacked = torch.stack(logits)
    expected = F.group_stats(stacked, target)
    ce = lambda z: F.group_stats(z, target).ce  # noqa: E731
    assert "transform" in _explained_inside(stacked, target)
    value, tangent = torch.func.jvp(ce, (stacked,), (torch.ones_like(stacked),))
    torch.testing.assert_close(value, expected.ce)
    assert float(tangent.abs().max()) == 0
    assert float(torch.func.grad(lambda z: ce(z).sum() + z.sum())(stacked).sub(1).abs().max()) == 0
    per_sample = torch.func.vmap(lambda z, y: F.group_stats(z[:, None], y[None]).ce[:, 0], in_dims=(1, 0))
    torch.testing.assert_close(per_sample(stacked, target), expected.ce.T)


def _explained_inside(stacked, target) -> str:
    reasons = []

    def look(z):
        reasons.append(fastkd.explain(F.group_stats, z, target).reason)
        return z.sum()

    torch.func.grad(look)(stacked)
    return reasons[0]


def test_explain():
    logits, target = make(5, 9, 3)
    assert fastkd.explain(F.group_stats, logits, target).backend == "native"
    assert fastkd.explain(F.group_stats, torch.stack(logits), target).backend == "native"
    assert fastkd.explain(F.group_stats, [logits[0].double(), *logits[1:]], target).backend == "native"
    stats = F.group_stats([logits[0].double(), *logits[1:]], target)
    assert stats.ce.dtype == torch.float64
    torch.testing.assert_close(stats.ce.float(), F.group_stats(logits, target).ce)
    eight = fastkd.explain(F.group_stats, [z.to(torch.float8_e4m3fn) for z in logits], target)
    assert eight.backend == "reference" and "float8_e4m3fn" in eight.reason
    assert "group_stats" in fastkd.backend_info()
