"""mutual_kd: against float64, the formula typed again and multi_teacher_kd, in every place its kernels run."""

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multi_teacher_helpers import size_of_gradient_terms, size_of_terms
from rows_helpers import LAYOUTS, weighted_sum

import fastkd
from fastkd.ops import _common as common
from fastkd.testing import DTYPES, Case, assert_as_accurate, assert_grad_close, difficult_logits, over

F = fastkd.functional


def make(m, rows, classes, n=0, dtype=torch.float32, teacher_dtype=None, scale=3.0, seed=0, device="cpu"):
    """Networks M x [R, C], teachers N x [R, C], target [R], on the device."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(m + n)]
    target = torch.randint(0, classes, (rows,), generator=g)
    learners = [z.to(device, dtype).requires_grad_() for z in logits[:m]]
    return learners, [t.to(device, teacher_dtype or dtype) for t in logits[m:]], target.to(device)


def loss_and_grads(logits, target=None, **options):
    """The losses, and each network's gradient of a weighted sum of them."""
    loss = F.mutual_kd(logits, target, **options)
    return loss.detach(), torch.autograd.grad(weighted_sum(loss), logits)


def in_float64(logits, target=None, teachers=(), **options):
    doubled = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in options.items()}
    with fastkd.use_backend("reference"):
        return loss_and_grads(
            [z.detach().double().requires_grad_() for z in logits], target, teachers=[t.double() for t in teachers],
            **doubled,
        )  # fmt: skip


def row_of_weights(m, count, n, weights, teacher_weights):
    """What network m gives its peers and the teachers, each number or [R], in the order of multi_teacher_kd."""
    peers = [1 / (count - 1)] * count if weights is None else list(weights[m])
    frozen = [1 / max(1, n)] * n if teacher_weights is None else list(teacher_weights[m])
    return peers[:m] + peers[m + 1 :] + frozen


def as_tensor(row, like):
    dtype = common.accumulate_dtype(like.dtype)
    row = [torch.as_tensor(w, dtype=dtype, device=like.device) for w in row]
    return torch.stack([w.expand(like.shape[:-1]) for w in row]) if any(w.dim() for w in row) else torch.stack(row)


def by_multi_teacher(logits, target=None, teachers=(), weights=None, teacher_weights=None, temperature=1.0, **options):
    """The losses by M calls of multi_teacher_kd, the other networks detached."""
    losses = []
    for m, z in enumerate(logits):
        peers = [p.detach() for k, p in enumerate(logits) if k != m] + list(teachers)
        row = as_tensor(row_of_weights(m, len(logits), len(teachers), weights, teacher_weights), z)
        losses.append(F.multi_teacher_kd(z, peers, target, weights=row, temperature=temperature, **options))
    return torch.stack(losses)


def check(logits, target=None, teachers=(), weights=None, teacher_weights=None, **options):
    """Native against float64, no worse than twice the reference in the same dtype, network by network."""
    given = dict(options, teachers=teachers, weights=weights, teacher_weights=teacher_weights)
    assert fastkd.explain(F.mutual_kd, logits, target, **given).backend == "native"
    loss, grads = loss_and_grads(logits, target, **given)
    with fastkd.use_backend("reference"):
        baseline, baseline_grads = loss_and_grads(logits, target, **given)
    exact, exact_grads = in_float64(logits, target, **given)
    assert loss.dtype == common.accumulate_dtype(logits[0].dtype) and loss.shape[0] == len(logits)
    double = 4 if logits[0].dtype == torch.float64 else 1  # the reference is the exact result itself: both roundings
    summed = len(logits[0]) if options.get("reduction") == "sum" else 1
    eps = torch.finfo(loss.dtype).eps
    size_options = {k: v for k, v in options.items() if k in ("ce_weight", "scale_by_t2")}
    for m, z in enumerate(logits):
        peers = [p.detach() for k, p in enumerate(logits) if k != m] + list(teachers)
        row = as_tensor(row_of_weights(m, len(logits), len(teachers), weights, teacher_weights), z)
        sizes = dict(size_options, temperature=options.get("temperature", 1.0), weights=row)
        largest = float(exact[m].abs().nan_to_num(0, 0, 0).max()) if exact[m].numel() else 0.0
        floor = double * eps * (size_of_terms(z, peers, **sizes) * summed + largest)
        assert_as_accurate(loss[m], exact[m], baseline[m], floor=floor, name=f"loss {m}")
        assert grads[m].dtype == z.dtype
        norm = float(exact_grads[m].nan_to_num(0, 0, 0).norm())
        terms = max(size_of_gradient_terms(z, peers, **sizes), norm) / norm if norm > 0 else 0.0
        floor = double * (eps * terms + 2 * torch.finfo(z.dtype).eps)
        assert_grad_close(grads[m], exact_grads[m], baseline_grads[m], floor=floor, name=f"gradient {m}")


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
    Case("one class", dict(classes=1)),
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
        return w.to(device, common.accumulate_dtype(dtype))

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
    logits, _, target = make(17, 2, 12, device=at(place))
    explanation = fastkd.explain(F.mutual_kd, logits, target)
    if place == "cpu":
        check(logits, target, ce_weight=0.5)
    else:
        assert explanation.backend == "reference" and "more than 16 networks" in explanation.reason
        expected = by_multi_teacher(logits, target, ce_weight=0.5)
        torch.testing.assert_close(F.mutual_kd(logits, target, ce_weight=0.5), expected)


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
@pytest.mark.parametrize("scale", [1.0, 100.0, 1000.0])
@pytest.mark.parametrize("dtype", DTYPES)
def test_identical_networks_have_no_divergence(scale, dtype, place, at):
    (z,), _, _ = make(1, 5, 300, dtype=dtype, scale=scale, device=at(place))
    logits = [z.detach().clone().requires_grad_() for _ in range(3)]
    loss, grads = loss_and_grads(logits, reduction="none", temperature=4.0)
    assert bool((loss >= 0).all()) and float(loss.max()) <= 4 * torch.finfo(loss.dtype).eps * 16
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


# --- rows that do not count, shapes, strides --------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_all_rows_ignored_is_a_differentiable_zero(reduction, dtype, place, at):
    logits, teachers, target = make(2, 4, 300, 1, dtype, device=at(place))
    with torch.no_grad():
        logits[0][1] = math.nan  # what an ignored row holds must not matter
        teachers[0][2] = math.inf
    loss, grads = loss_and_grads(
        logits, torch.full_like(target, -100), teachers=teachers, ce_weight=1.0, reduction=reduction
    )
    assert float(loss.abs().sum()) == 0 and all(float(g.abs().sum()) == 0 for g in grads)


@pytest.mark.parametrize("place", PLACES)
def test_ignore_index_counts_also_without_cross_entropy(place, at):
    logits, _, target = make(2, 6, 20, device=at(place))
    target[:2] = 7
    keep = target != 7
    loss = F.mutual_kd(logits, target, ignore_index=7)
    torch.testing.assert_close(loss, F.mutual_kd([z[keep] for z in logits]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction, place, at):
    logits, teachers, target = make(3, 0, 20, 1, device=at(place))
    loss, grads = loss_and_grads(logits, target, teachers=teachers, ce_weight=1.0, reduction=reduction)
    assert loss.shape == ((3, 0) if reduction == "none" else (3,)) and float(loss.sum()) == 0
    assert all(g.shape == (0, 20) for g in grads)


@pytest.mark.parametrize("place", PLACES)
def test_leading_dimensions_and_stacks(place, at):
    logits, teachers, target = make(3, 6, 33, 2, device=at(place))
    target[4] = -100
    weights, teacher_weights = (torch.rand(3, k, 6, device=target.device) for k in (3, 2))
    options = dict(ce_weight=0.5, reduction="none")
    flat, grads = loss_and_grads(
        logits, target, teachers=teachers, weights=weights, teacher_weights=teacher_weights, **options
    )
    stacked = torch.stack([z.detach().reshape(2, 3, 33) for z in logits]).requires_grad_()
    loss = F.mutual_kd(
        stacked, target.reshape(2, 3), teachers=torch.stack(teachers).reshape(2, 2, 3, 33),
        weights=weights.reshape(3, 3, 2, 3), teacher_weights=teacher_weights.reshape(3, 2, 2, 3), **options,
    )  # fmt: skip
    assert loss.shape == (3, 2, 3) and torch.equal(loss.detach().reshape(3, 6), flat)
    upstream = torch.linspace(0.5, 1.5, 18, device=loss.device).reshape(3, 2, 3)
    (grad,) = torch.autograd.grad(loss, stacked, upstream)
    assert grad.shape == stacked.shape and torch.equal(grad.reshape(3, 6, 33), torch.stack(grads))
    one = F.mutual_kd([z[0] for z in logits], target[0], ce_weight=0.5)
    torch.testing.assert_close(one, F.mutual_kd([z[:1] for z in logits], target[:1], ce_weight=0.5))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [64, 67])
def test_layouts_give_the_same_bits(layout, classes, place, at):
    logits, teachers, target = make(3, 5, classes, 1, device=at(place))
    expected = loss_and_grads(logits, target, teachers=teachers, ce_weight=0.5)
    view = LAYOUTS[layout]
    moved = [view(z.detach()).requires_grad_() for z in logits]
    loss, grads = loss_and_grads(moved, target, teachers=[view(teachers[0])], ce_weight=0.5)
    stacked = view(torch.stack([z.detach() for z in logits])).requires_grad_()
    together = F.mutual_kd(stacked, target, teachers=teachers, ce_weight=0.5)
    assert torch.equal(loss, expected[0]) and torch.equal(together.detach(), expected[0])
    assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_broadcast_networks(at):
    logits, _, target = make(2, 5, 40, device=at("cpu"))
    wide = [logits[0].detach()[:1].expand(5, 40).requires_grad_(), logits[1].detach()[:, :1].expand(5, 40)]
    losses = [F.mutual_kd(zs, target, ce_weight=0.5) for zs in (wide, [z.contiguous() for z in wide])]
    assert torch.equal(*losses)


def test_networks_are_never_copied():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    logits, teachers, target = make(3, 8, 40, 1)
    stacked = torch.stack([z.detach() for z in logits]).requires_grad_()
    for zs in (logits, stacked):
        names = []
        with Recorder():
            loss = F.mutual_kd(zs, target, teachers=teachers, ce_weight=1.0)
            torch.autograd.grad(loss, zs, torch.tensor([1.0, 2.0, 3.0]))
        allowed = {"fastkd::mutual_forward", "fastkd::mutual_backward", "aten::unbind.int", "aten::detach"}
        of_scalars = {"aten::select.int", "aten::_local_scalar_dense", "aten::lift_fresh"}
        assert set(names) <= allowed | of_scalars, names


@pytest.mark.parametrize("place", ["simt", "simt_stream"])
@pytest.mark.parametrize("classes", [100, 300])
def test_every_schedule_gives_the_same_bits(classes, place, at, simt):
    from simt.fixtures import in_every_schedule

    logits, teachers, target = make(3, 5, classes, 1, device=at(place))
    results = in_every_schedule(simt, lambda: loss_and_grads(logits, target, teachers=teachers, ce_weight=0.5))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    logits, teachers, target = make(3, 150, 257, 1, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_grads(logits, target, teachers=teachers, ce_weight=0.5))
    finally:
        torch.set_num_threads(before)
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


# --- anything ---------------------------------------------------------------------------------------------------------


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_anything(place, at, data):
    draw = data.draw
    device, dtype = at(place), draw(st.sampled_from(DTYPES))
    m, n, rows = draw(st.integers(2, 4)), draw(st.integers(0, 2)), draw(st.integers(1, 4))
    classes, scale = draw(st.integers(1, 150)), draw(st.sampled_from([1e-3, 1.0, 10.0, 300.0]))
    logits, teachers, target = make(
        m, rows, classes, n, dtype, scale=scale, seed=draw(st.integers(0, 99)), device=device
    )
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    logits = [layout(z.detach()).requires_grad_() for z in logits]
    masked = draw(st.booleans()) and classes > 1
    if masked:
        with torch.no_grad():
            for z in (*logits, *teachers):
                z[:, 0] = -math.inf
        target = target.clamp(min=1)
    if rows > 1 and draw(st.booleans()):
        target[0] = -100
    weights = torch.rand(m, m, *([rows] if draw(st.booleans()) else []), dtype=common.accumulate_dtype(dtype)) * 2 - 0.5
    ce_weight = draw(st.sampled_from([0.0, 0.3, 1.0]))
    check(
        logits, target, teachers=teachers, weights=weights, ce_weight=ce_weight,
        label_smoothing=0.0 if masked else draw(st.sampled_from([0.0, 0.1])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0, 4.5])), reduction=draw(st.sampled_from(common.REDUCTIONS)),
        scale_by_t2=draw(st.booleans()),
    )  # fmt: skip
