"""mutual_kd: against float64, the formula typed again and multi_teacher_kd, in every place its kernels run."""

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES
from mutual_helpers import by_multi_teacher, check, loss_and_grads, make

import fastkd
from fastkd.ops._formulas import accumulate_dtype
from fastkd.testing import DTYPES, Case, assert_grad_close, difficult_logits, over

F = fastkd.functional


def typed_again(logits, target, weights, t, ce_weight, smoothing, scale_by_t2):
    """Row losses [M, R] as the papers' codes write them."""
    losses = []
    for m, z in enumerate(logits):
        rows = ce_weight * torch_functional.cross_entropy(z, target, reduction="none", label_smoothing=smoothing)
        for k, peer in enumerate(logits):
            if k != m:
                p, log_q = torch_functional.softmax(peer.detach() / t, -1), torch_functional.log_softmax(z / t, -1)
                kl = torch_functional.kl_div(log_q, p, reduction="none").sum(-1)
                rows = rows + weights[m, k] * (t * t if scale_by_t2 else 1) * kl
        losses.append(rows)
    return torch.stack(losses)


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case("two networks", dict(m=2)),
    Case("17 classes", dict(classes=17)),
    Case("33 classes, 7 rows", dict(classes=33, rows=7)),
    Case("130 classes, a block per row", dict(classes=130, labels=True, ce_weight=0.7)),
    Case("1000 classes, labels", dict(m=4, classes=1000, rows=3, labels=True, ce_weight=1.0)),
    Case("smoothing", dict(classes=10, labels=True, ce_weight=0.5, label_smoothing=0.1)),
    Case("ignored rows, labels", dict(labels=True, ignored=(0, 3), ce_weight=0.3, reduction="sum")),
    Case("none", dict(labels=True, ignored=(2,), ce_weight=0.3, reduction="none")),
    Case("T = 2.5", dict(temperature=2.5, labels=True, ce_weight=1.0, label_smoothing=0.1)),
    Case("T = 4", dict(temperature=4.0, labels=True, ce_weight=1.0, label_smoothing=0.1)),
    Case("weights per row, NaN diagonal", dict(weights="rows", labels=True, ce_weight=0.5)),
    Case("peers x mean teachers", dict(m=3, n=3, labels=True, ce_weight=0.5, temperature=3.0)),
    Case("teachers, weights per row", dict(n=2, weights="rows", teacher_weights="rows", reduction="none")),
    Case("teachers per row, host weights", dict(n=2, weights="matrix", teacher_weights="rows", classes=140)),
]
MORE_CASES = [  # in float32 alone
    Case("two classes, one row", dict(rows=1, classes=2)),
    Case("31 classes", dict(classes=31)),
    Case("32 classes", dict(classes=32)),
    Case("100 classes, labels", dict(m=4, classes=100, labels=True, ce_weight=0.7)),
    Case("smoothing 1", dict(classes=10, labels=True, ce_weight=0.5, label_smoothing=1.0)),
    Case("labels mark ignored rows", dict(labels=True, ignored=(0, 3))),
    Case("T = 20, no T^2", dict(temperature=20.0, scale_by_t2=False)),
    Case("host weights, NaN diagonal", dict(weights="matrix")),
    Case("a teacher", dict(m=2, n=1)),
    Case("teachers, weights", dict(n=2, weights="matrix", teacher_weights="matrix", classes=37)),
]


def build(
    device, dtype, m=3, rows=5, classes=50, n=0, labels=False, ignored=(), weights=None, teacher_weights=None, **o
):
    logits, teachers, target = make(m, rows, classes, n, dtype, device=device)
    target[list(ignored)] = -100
    g = torch.Generator().manual_seed(1)
    random = lambda *shape: torch.rand(*shape, generator=g, dtype=torch.float64) - 0.2  # noqa: E731

    def numbers(kind, columns):
        if kind is None:
            return None
        w = random(m, columns, rows) if kind == "rows" else random(m, columns)
        if columns == m and weights is not None:
            w[range(m), range(m)] = math.nan
        return w.to(device, accumulate_dtype(dtype))

    peers = numbers(weights, m)
    frozen = numbers(teacher_weights, n)
    if m == n and frozen is not None:
        frozen = frozen.nan_to_num(0.3)
    return logits, target if labels else None, dict(o, teachers=teachers, weights=peers, teacher_weights=frozen)


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    logits, target, options = build(at(place), dtype, **case.arguments)
    check(logits, target, **options)


@over(MORE_CASES, PLACES, [torch.float32])
def test_more_of_the_table(case, place, dtype, at):
    logits, target, options = build(at(place), dtype, **case.arguments)
    check(logits, target, **options)


@over(CASES + MORE_CASES, ["cpu", "simt", "cuda"], [torch.float32])
def test_is_m_calls_of_multi_teacher_kd(case, place, dtype, at):
    logits, target, options = build(at(place), dtype, **case.arguments)
    actual, expected = F.mutual_kd(logits, target, **options), by_multi_teacher(logits, target, **options)
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    factors = torch.linspace(0.5, 1.5, len(logits), device=actual.device)
    upstream = factors[:, None].expand_as(actual) if actual.dim() == 2 else factors
    grads = [torch.autograd.grad(x, logits, upstream) for x in (actual, expected)]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6 * float(b.abs().max()))


@pytest.mark.parametrize("place", PLACES)
def test_is_multi_teacher_kd_to_the_last_digits(place, at):
    logits, teachers, target = make(4, 9, 100, 2, torch.float64, device=at(place))
    for options in (dict(), dict(ce_weight=1.0, label_smoothing=0.1), dict(ce_weight=0.5, temperature=4.0)):
        losses = [f(logits, target, teachers=teachers, **options) for f in (F.mutual_kd, by_multi_teacher)]
        torch.testing.assert_close(*losses, rtol=1e-13, atol=1e-13)
        for a, b in zip(*[torch.autograd.grad(loss.sum(), logits) for loss in losses], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_teachers_of_half_precision_networks(place, dtype, at):
    logits, teachers, target = make(2, 5, 100, 2, dtype, torch.float32, device=at(place))
    check(logits, target, teachers=teachers, ce_weight=0.5)


def test_reference_is_the_formula_typed_again():
    logits, _, target = make(3, 7, 19, dtype=torch.float64)
    weights = torch.rand(3, 3, 7, dtype=torch.float64)
    for smoothing, scale_by_t2, t in ((0.0, True, 4.0), (0.1, False, 2.5), (0.1, True, 1.0)):
        expected = typed_again(logits, target, weights, t, 0.6, smoothing, scale_by_t2)
        with fastkd.use_backend("reference"):
            actual = F.mutual_kd(
                logits, target, weights=weights, ce_weight=0.6, label_smoothing=smoothing, temperature=t,
                scale_by_t2=scale_by_t2, reduction="none",
            )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
        for m, z in enumerate(logits):
            grads = [torch.autograd.grad(x[m].mean(), z, retain_graph=True)[0] for x in (actual, expected)]
            torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-12)


NUMBERS = [("cpu", 16, 16), ("cpu", 2, 40)]
NUMBERS += [(p, m, n) for p in ("simt", "simt_stream") for m, n in ((2, 0), (8, 8), (15, 1), (16, 0), (2, 62))]


@pytest.mark.parametrize("place, m, n", [*NUMBERS, ("simt", 16, 17)])
def test_numbers_of_networks(place, m, n, at):
    """More than a CUDA launch takes go in groups of teachers."""
    logits, teachers, target = make(m, 2, 20, n, device=at(place))
    weights = torch.rand(m, n, 2, device=target.device) if n > 32 else None
    actual, grads = loss_and_grads(logits, target, teachers=teachers, teacher_weights=weights, ce_weight=0.5)
    with fastkd.use_backend("reference"):
        expected, expected_grads = loss_and_grads(
            logits, target, teachers=teachers, teacher_weights=weights, ce_weight=0.5
        )
    torch.testing.assert_close(actual, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_more_learners_than_a_launch_takes(place, at):
    """On CUDA 16 learn in one launch and one in another, each group's others its teachers."""
    logits, teachers, target = make(17, 2, 12, 3, device=at(place))
    check(logits, target, ce_weight=0.5)
    weights = torch.rand(17, 17, 2, device=target.device)
    check(logits, target, teachers=teachers, weights=weights, ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("classes", [128, 132, 1024, 1030, 4096, 4100])
def test_every_launch_policy(classes, at):
    logits, _, target = make(2, 2, classes, device=at("simt"))
    check(logits, target, ce_weight=0.5)


@pytest.mark.parametrize("shared", [100, 164, 227])
def test_every_size_of_shared_memory(shared, at, simt):
    """Rows of many networks are streamed where a GPU's shared memory does not hold them."""
    simt.set_device(shared_optin=shared << 10)
    logits, teachers, target = make(8, 2, 1000, 8, device=at("simt"))
    check(logits, target, teachers=teachers, ce_weight=0.5)


# --- numbers that random normal logits do not show --------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name, _ in difficult_logits((1, 3))])
def test_difficult_logits(name, place, at):
    device = at(place)
    pick = lambda seed: dict(difficult_logits((6, 70), seed=seed))[name].to(device)  # noqa: E731
    logits = [pick(seed).requires_grad_() for seed in range(3)]
    target = torch.tensor([1, 4, 7, 10, 1, 2], device=device)
    check(logits, target, teachers=[pick(3)], ce_weight=0.5, reduction="none", temperature=2.0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("scale, t", [(1.0, 3.0), (1.0, 7.3), (100.0, 4.0), (1000.0, 2.5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_networks_have_no_divergence(scale, t, dtype, place, at):
    (z,), _, _ = make(1, 5, 300, dtype=dtype, scale=scale, device=at(place))
    logits = [z.detach().clone().requires_grad_() for _ in range(3)]
    loss, grads = loss_and_grads(logits, reduction="none", temperature=t)
    assert float(loss.abs().max()) == 0
    assert all(float(g.abs().max()) == 0 for g in grads)


@pytest.mark.parametrize("place", PLACES)
def test_near_networks_keep_their_small_divergence_non_negative(place, at):
    (z,), _, _ = make(1, 64 if place == "cpu" else 8, 100, device=at(place))
    loss = F.mutual_kd([z, z.detach() * (1 + 1e-6), z.detach() * (1 - 1e-6)], reduction="none")
    assert bool((loss >= 0).all())


@pytest.mark.parametrize("place", PLACES)
def test_masked_classes(place, at):
    logits, teachers, _ = make(2, 4, 40, 1, device=at(place))
    with torch.no_grad():
        for z in (*logits, *teachers):
            z[:, 5:9] = -math.inf  # masked everywhere: counts 0
        logits[0][2, 12] = -math.inf  # masked in one learner: its own loss is infinite, the other's finite
        teachers[0][1, 11] = -math.inf  # masked in a teacher only: finite
        logits[0][3, 12] = -math.inf
        for z in (logits[1], teachers[0]):
            z[3, 12] = -500.0  # also where the probability of the others underflows
    loss, grads = loss_and_grads(logits, teachers=teachers, reduction="none")
    assert bool(loss[:, :2].isfinite().all()) and loss[0, 2:].tolist() == [math.inf, math.inf]
    assert bool(loss[1].isfinite().all())
    assert all(bool(g.isfinite().all()) and float(g[:, 5:9].abs().max()) == 0 for g in grads)
    check(logits, teachers=teachers, reduction="none")


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_of_zero_removes_an_infinite_divergence(place, at):
    logits, _, _ = make(3, 2, 10, device=at(place))
    with torch.no_grad():
        logits[0][0, 3] = logits[2][0, 3] = -math.inf
    weights = [[0, 0.0, 1.0], [1.0, 0, 1.0], [1.0, 0.0, 0]]  # networks 0 and 2 do not learn from 1
    assert bool(F.mutual_kd(logits, weights=weights, reduction="none").isfinite().all())
    check(logits, weights=torch.tensor(weights, device=logits[0].device), reduction="none")


@pytest.mark.parametrize("place", PLACES)
def test_smoothing_over_a_masked_class_is_infinite_as_in_torch(place, at):
    logits, _, target = make(2, 2, 10, device=at(place))
    with torch.no_grad():
        logits[0][0, 3] = logits[1][0, 3] = -math.inf
    target[0] = 1
    loss = F.mutual_kd(logits, target, ce_weight=1.0, label_smoothing=0.1, reduction="none")
    assert bool((loss[:, 0] == math.inf).all() and loss[:, 1].isfinite().all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", ["learner", "teacher"])
def test_nan_and_infinity_reach_the_losses_of_their_row_alone(value, where, place, at):
    logits, teachers, _ = make(2, 3, 40, 1, device=at(place))
    with torch.no_grad():
        (logits[0] if where == "learner" else teachers[0])[1, 7] = value
    loss, grads = loss_and_grads(logits, teachers=teachers, reduction="none")
    assert loss.isnan().tolist() == [[False, True, False]] * 2
    assert all(g.isnan().any(1).tolist() == [False, True, False] for g in grads)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [100, 1000])
def test_float16_with_a_loss_scale_is_as_good_as_eager(classes, place, at):
    """(q - p) / B in float16 underflows; the loss scale of mixed-precision training must still save it."""
    scale, batch = 65536.0, 256  # of which these rows are a part
    logits, _, target = make(2, 32 if place == "cpu" else 4, classes, dtype=torch.float16, scale=4.0, device=at(place))
    options = dict(ce_weight=1.0, reduction="sum", temperature=2.0)
    grads = torch.autograd.grad((F.mutual_kd(logits, target, **options) * (scale / batch)).sum(), logits)
    with fastkd.use_backend("reference"):
        eager = torch.autograd.grad((F.mutual_kd(logits, target, **options) * (scale / batch)).sum(), logits)
        doubled = [z.detach().double().requires_grad_() for z in logits]
        exact = torch.autograd.grad((F.mutual_kd(doubled, target, **options) * (scale / batch)).sum(), doubled)
    for g, e, x in zip(grads, eager, exact, strict=True):
        assert int((g == 0).sum()) <= int((e == 0).sum())
        assert_grad_close(g, x, e)
        small = x.abs() < x.abs().median()
        relative = lambda y: float(((y.double() - x)[small] / x[small]).abs().mean())  # noqa: B023, E731
        assert relative(g) <= 2 * relative(e) + 1e-3
