"""mutual_kd: weight of the distillation, masks, divisors, layouts, soft labels, terms, weights of 0, mixed dtypes."""

import math

import pytest
import torch
import torch._dynamo.testing
import torch.nn.functional as torch_functional
from conftest import PLACES
from mutual_helpers import check, loss_and_grads, make

import fastkd
from fastkd.testing import Case, over

F = fastkd.functional
HALF, SINGLE, DOUBLE = torch.float16, torch.float32, torch.float64

CASES = [
    Case("kd_weight", dict(labels=True, ce_weight=0.5, kd_weight=0.3, temperature=3.0)),
    Case("kd_weight 0", dict(labels=True, ce_weight=0.5, kd_weight=0.0, n=1)),
    Case("mask, ignored", dict(labels=True, ignored=(1,), masked=(0, 3), ce_weight=0.5, classes=130)),
    Case("mask, no labels, none", dict(masked=(0, 3), reduction="none")),
    Case("num_items", dict(labels=True, ignored=(1,), ce_weight=0.5, num_items=7.5)),
    Case("num_items, sum", dict(masked=(2,), num_items=3, reduction="sum")),
    Case("soft", dict(soft=True, ce_weight=0.7, temperature=2.0)),
    Case("soft, smoothing, mask", dict(soft=True, masked=(1,), ce_weight=0.7, label_smoothing=0.2, classes=130)),
    Case("soft, T = 2.5, none", dict(soft=True, ce_weight=1.0, temperature=2.5, reduction="none", n=1, classes=1030)),
    Case("weights of 0", dict(weights="zeros", labels=True, ce_weight=0.3, n=2, teacher_weights="zeros")),
    Case("rows' weights of 0", dict(weights="zero rows", labels=True, ce_weight=0.3, n=2, teacher_weights="zero rows")),
]


def build(device, dtype, m=3, rows=5, classes=50, n=0, labels=False, ignored=(), masked=(), soft=False, **options):
    logits, teachers, target = make(m, rows, classes, n, dtype, device=device)
    g = torch.Generator().manual_seed(2)
    target[list(ignored)] = -100
    if masked:
        options["mask"] = torch.ones(rows, dtype=torch.bool, device=device)
        options["mask"][list(masked)] = False
    if soft:
        target = torch.rand(rows, classes, generator=g, dtype=DOUBLE).pow(8)
        target = (target / target.sum(-1, keepdim=True)).to(device, dtype)
        target[0, 3:] = 0
    for name, columns in (("weights", m), ("teacher_weights", n)):
        kind = options.get(name)
        if kind is not None:
            w = torch.rand(m, columns, rows, generator=g, dtype=DOUBLE)
            w = (w * (w > 0.5)).to(device, DOUBLE if dtype == DOUBLE else SINGLE)
            w[:, 0] = 0  # nobody reads the first one
            options[name] = w if kind == "zero rows" else w[..., 0].tolist()
    return logits, target if labels or soft else None, dict(options, teachers=teachers)


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    logits, target, options = build(at(place), dtype, **case.arguments)
    check(logits, target, **options)


def alone(z, peers, target, kd_weight, ce_weight, t):
    """One row's loss, typed again."""
    kd = sum(
        torch_functional.kl_div((z / t).log_softmax(-1), (p / t).softmax(-1), reduction="sum") * t * t for p in peers
    )
    return kd_weight * kd / len(peers) + ce_weight * torch_functional.cross_entropy(z[None], target[None])


def test_the_weight_mask_and_divisor_of_the_formula_typed_again():
    logits, _, target = make(3, 5, 7, dtype=DOUBLE)
    target[4], mask = -100, torch.tensor([True, False, True, True, True])
    expected = [
        sum(alone(z[r], [p[r] for p in logits if p is not z], target[r], 0.3, 0.7, 2.0) for r in (0, 2, 3)) / 6
        for z in logits
    ]
    for backend in ("native", "reference"):
        with fastkd.use_backend(backend):
            loss, terms = F.mutual_kd(
                logits, target, kd_weight=0.3, ce_weight=0.7, temperature=2.0, mask=mask, num_items=6, return_terms=True
            )
        torch.testing.assert_close(loss, torch.stack(expected))
        torch.testing.assert_close(loss, 0.3 * terms.kd + 0.7 * terms.ce)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_terms(reduction, place, at):
    device = at(place)
    logits, teachers, target = make(2, 5, 40, 1, device=device)
    target[1] = -100
    options = dict(teachers=teachers, temperature=2.0, reduction=reduction)
    for backend in ("native", "reference"):
        with fastkd.use_backend(backend):
            loss, terms = F.mutual_kd(logits, target, kd_weight=2.0, ce_weight=0.0, return_terms=True, **options)
            kd = F.mutual_kd(logits, target, **options)
            ce = F.cross_entropy([z.detach() for z in logits], target, reduction=reduction)
            assert not terms.kd.requires_grad and not terms.ce.requires_grad and loss.requires_grad
            torch.testing.assert_close(terms.kd, kd.detach())
            torch.testing.assert_close(terms.ce, ce)
            torch.testing.assert_close(loss, 2 * kd)
            _, none = F.mutual_kd(logits, None, mask=target != -100, return_terms=True, **options)
            torch.testing.assert_close(none.kd, terms.kd)
            assert float(none.ce.abs().max()) == 0  # no labels
            grads = torch.autograd.grad(loss.sum(), logits)
        torch.testing.assert_close(grads, torch.autograd.grad(2 * kd.sum(), logits))


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_of_zero_reads_nothing(place, at):
    """NaN behind it reaches neither loss nor gradient: a peer that nobody learns from, one row of a teacher."""
    logits, teachers, target = make(3, 4, 40, 2, device=at(place))
    with torch.no_grad():
        logits[2].fill_(math.nan)
        teachers[0].fill_(math.nan)
        teachers[1][2] = math.nan
    weights = torch.tensor([[9, 1.0, 0], [0.5, 9, 0], [0, 0, 9.0]])
    rows = torch.ones(3, 2, 4)
    rows[:, 0], rows[:, 1, 2], rows[2] = 0, 0, 0
    for backend in ("native", "reference"):
        for kind in (weights.tolist(), weights[..., None].expand(3, 3, 4).to(target.device)):
            with fastkd.use_backend(backend):
                loss, grads = loss_and_grads(
                    logits, weights=kind, teachers=teachers, teacher_weights=rows.to(target.device), reduction="none"
                )
            assert bool(loss.isfinite().all()) and all(bool(g.isfinite().all()) for g in grads)
            assert float(loss[2].abs().max()) == 0 and float(grads[2].abs().max()) == 0
            assert bool((loss[:2] > 0).all())
        with fastkd.use_backend(backend):
            zero = F.mutual_kd(logits[:2], target, teachers=teachers, kd_weight=0.0, ce_weight=1.0)
            torch.testing.assert_close(zero, F.cross_entropy(logits[:2], target))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [HALF, SINGLE, DOUBLE, torch.bfloat16])
def test_teachers_each_of_its_own_dtype(dtype, place, at):
    logits, teachers, target = make(2, 5, 100, 4, dtype, device=at(place))
    mixed = [t.to(d) for t, d in zip(teachers, (HALF, SINGLE, DOUBLE, torch.bfloat16), strict=True)]
    assert fastkd.explain(F.mutual_kd, logits, target, teachers=mixed).backend == "native"
    loss, grads = loss_and_grads(logits, target, teachers=mixed, ce_weight=0.5)
    same = [t.to(DOUBLE if dtype == DOUBLE else SINGLE) for t in mixed]
    with fastkd.use_backend("reference"):
        expected, expected_grads = loss_and_grads(logits, target, teachers=same, ce_weight=0.5)
        assert F.mutual_kd(logits, teachers=mixed).dtype == loss.dtype
    torch.testing.assert_close(loss, expected)
    for a, b in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(a, b, atol=1e-3 if dtype in (HALF, torch.bfloat16) else 1e-6, rtol=1e-2)


@pytest.mark.parametrize("place", PLACES)
def test_learners_each_of_its_own_dtype(place, at):
    """One launch for each dtype, the others its teachers; every gradient in its network's dtype."""
    logits, teachers, target = make(4, 5, 40, 2, DOUBLE, device=at(place))
    dtypes = (SINGLE, HALF, SINGLE, DOUBLE)
    mixed = [z.detach().to(d).requires_grad_() for z, d in zip(logits, dtypes, strict=True)]
    weights = torch.rand(4, 4, generator=torch.Generator().manual_seed(0)).tolist()
    rows = torch.rand(4, 2, 5, generator=torch.Generator().manual_seed(0)).to(target.device)
    options = dict(teachers=teachers, weights=weights, teacher_weights=rows, temperature=2.0)
    assert fastkd.explain(F.mutual_kd, mixed, target, **options).backend == "native"
    loss, terms = F.mutual_kd(mixed, target, ce_weight=0.5, return_terms=True, **options)
    grads = torch.autograd.grad(loss.sum(), mixed, retain_graph=True)
    alone = torch.autograd.grad(loss[2], mixed, allow_unused=True)
    with fastkd.use_backend("reference"):
        expected, expected_terms = F.mutual_kd(mixed, target, ce_weight=0.5, return_terms=True, **options)
        expected_grads = torch.autograd.grad(expected.sum(), mixed)
    assert loss.dtype == DOUBLE and [g.dtype for g in grads] == list(dtypes)
    torch.testing.assert_close((loss, *terms), (expected, *expected_terms), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(grads, expected_grads, rtol=1e-3, atol=1e-5)
    assert [a is None for a in alone] == [True, True, False, True] and torch.equal(alone[2], grads[2])


# --- where classes, rows and networks lie -----------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_class_dim(backend):
    student, teacher = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    teacher[0, 0, 0, 0] = 3
    with fastkd.use_backend(backend):
        loss = F.mutual_kd([student, teacher], class_dim=1)
        assert float(loss[0]) == pytest.approx(0.167427, abs=1e-6)
        with pytest.warns(UserWarning, match="taken from the last dimension; class_dim=1"):
            fastkd.ops._inputs._warned_of_maps.discard("mutual_kd")
            assert float(F.mutual_kd([student, teacher])[0]) == pytest.approx(0.366009, abs=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_maps_of_classes(memory_format, place, at):
    device = at(place)
    maps = [torch.randn(2, 6, 3, 5, device=device).to(memory_format=memory_format).requires_grad_() for _ in range(4)]
    target, mask = torch.randint(0, 6, (2, 3, 5), device=device), torch.rand(2, 3, 5, device=device) > 0.3
    soft = torch.rand(2, 6, 3, 5, device=device).softmax(1)
    options = dict(mask=mask, ce_weight=0.5, reduction="none")
    rows = [z.detach().movedim(1, -1).reshape(-1, 6).requires_grad_() for z in maps]
    for y, flat in ((target, target.flatten()), (soft, soft.movedim(1, -1).reshape(-1, 6))):
        loss = F.mutual_kd(maps[:3], y, teachers=[maps[3].detach()], class_dim=1, **options)
        expected = F.mutual_kd(rows[:3], flat, teachers=[rows[3].detach()], **dict(options, mask=mask.flatten()))
        assert loss.shape == (3, 2, 3, 5)
        torch.testing.assert_close(loss.reshape(3, -1), expected)
        stacked = torch.stack([z.detach() for z in maps[:3]]).requires_grad_()
        together = F.mutual_kd(stacked, y, teachers=maps[3].detach(), class_dim=1, **options)
        torch.testing.assert_close(together, loss)
        upstream = torch.rand_like(loss)
        grads = torch.autograd.grad(loss, maps[:3], upstream)
        by_rows = torch.autograd.grad(expected, rows[:3], upstream.reshape(3, -1))
        (of_stack,) = torch.autograd.grad(together, stacked, upstream)
        for g, r, s in zip(grads, by_rows, of_stack, strict=True):
            torch.testing.assert_close(g.movedim(1, -1).reshape(-1, 6), r)
            torch.testing.assert_close(s, g)


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_rows_that_do_not_merge_are_read_in_place(place, at):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.add(function.name())
            return function(*args, **(kwargs or {}))

    device, names = at(place), set()
    whole = [torch.randn(3, 5, 40, device=device, requires_grad=True) for _ in range(4)]
    target = torch.randint(0, 40, (3, 4), device=device)
    views = [z[:, :-1] for z in whole]
    with Recorder():
        loss = F.mutual_kd(views[:3], target, teachers=[views[3].detach()], ce_weight=0.5)
    assert not names & {"aten::clone", "aten::_to_copy", "aten::copy_", "aten::contiguous"}, names
    copies = [z.detach().contiguous().requires_grad_() for z in views[:3]]
    expected = F.mutual_kd(copies, target, teachers=[views[3].detach().contiguous()], ce_weight=0.5)
    assert torch.equal(loss, expected)
    grads = torch.autograd.grad(loss.sum(), views[:3])
    assert all(torch.equal(a, b) for a, b in zip(grads, torch.autograd.grad(expected.sum(), copies), strict=True))


def test_num_items_as_a_tensor():
    logits, _, target = make(2, 4, 10)
    options = dict(ce_weight=1.0, return_terms=True)
    loss, terms = F.mutual_kd(logits, target, num_items=12, **options)
    for items in (torch.tensor(12), torch.tensor(12.0, requires_grad=True)):
        other, other_terms = F.mutual_kd(logits, target, num_items=items, **options)
        torch.testing.assert_close((other, *other_terms), (loss, *terms))
    grads = torch.autograd.grad(other[1], logits, allow_unused=True)
    assert grads[0] is None
    torch.testing.assert_close(grads[1], torch.autograd.grad(loss[1], logits[1])[0])


# --- schedules --------------------------------------------------------------------------------------------------------


def test_a_schedule_needs_one_graph():
    logits, teachers, target = make(2, 4, 10, 1)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")

    @torch.compile(fullgraph=True, backend=counter)
    def loss_of(zs, y, t, ce, kd, items):
        return F.mutual_kd(
            zs, y, teachers=teachers, temperature=t, ce_weight=ce, kd_weight=kd, num_items=items, return_terms=True
        )

    for step in range(12):
        numbers = (1 + step / 3, step / 12, 1 - step / 20, 4.0 + step)
        loss, terms = loss_of(logits, target, *[torch.tensor(x) for x in numbers])
        names = ("temperature", "ce_weight", "kd_weight", "num_items")
        options = dict(zip(names, numbers, strict=True), teachers=teachers, return_terms=True)
        expected, expected_terms = F.mutual_kd(logits, target, **options)
        torch.testing.assert_close((loss, *terms), (expected, *expected_terms))
        grads = [torch.autograd.grad(x.sum(), logits) for x in (loss, expected)]
        torch.testing.assert_close(*grads)
    assert counter.frame_count == 1
    assert fastkd.explain(F.mutual_kd, logits, target, temperature=torch.tensor(2.0)).backend == "native"


@pytest.mark.parametrize("divergence, beta", [("reverse", None), ("jsd", None), ("jsd", 0.2), ("jsd", 1.0)])
@pytest.mark.parametrize("weights", [None, "rows"])
def test_other_divergences_are_calls_of_multi_teacher_kd(divergence, beta, weights):
    logits, teachers, target = make(3, 6, 20, 1, DOUBLE)
    target[2] = -100
    shared = dict(
        temperature=2.0, ce_weight=0.5, kd_weight=0.7, reduction="none", divergence=divergence, divergence_beta=beta
    )
    w = torch.full((3, 3), 0.5, dtype=DOUBLE)
    if weights:
        w = torch.rand(3, 3, 6, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
        w[0, 1, :3] = 0
    losses = F.mutual_kd(logits, target, teachers=teachers, weights=w, **shared)
    for m in range(3):
        others = [n for n in range(3) if n != m]
        each = [logits[n].detach() for n in others] + teachers
        frozen = torch.ones_like(w[m, :1])
        expected = F.multi_teacher_kd(logits[m], each, target, weights=torch.cat([w[m, others], frozen]), **shared)
        torch.testing.assert_close(losses[m], expected, rtol=1e-12, atol=1e-12)
        ours = torch.autograd.grad(losses[m].sum(), logits, retain_graph=True, allow_unused=True)
        (slope,) = torch.autograd.grad(expected.sum(), logits[m])
        torch.testing.assert_close(ours[m], slope, rtol=1e-12, atol=1e-12)
        assert all(g is None or not g.any() for n, g in enumerate(ours) if n != m)


def test_explain_names_the_plain_path_of_other_divergences():
    networks = [torch.zeros(2, 3), torch.ones(2, 3)]
    assert "divergence='forward' alone" in str(fastkd.explain(F.mutual_kd, networks, divergence="jsd"))
    module = fastkd.MutualKD(divergence="jsd", divergence_beta=0.2)
    assert torch.equal(module(networks), F.mutual_kd(networks, divergence="jsd", divergence_beta=0.2))
