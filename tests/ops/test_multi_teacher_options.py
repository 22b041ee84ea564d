"""multi_teacher_kd: which rows and teachers count, what they are divided by, other labels, dtypes and layouts."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES
from multi_teacher_helpers import both, build_options, check, in_float64, loss_and_grad, make, soft_labels

import fastkd
from fastkd.ops import _inputs
from fastkd.ops import multi_teacher as op
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES, Case, over

F = fastkd.functional


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case("kd_weight", dict(kd_weight=0.3, ce_weight=0.7)),
    Case("kd_weight, probs", dict(kd_weight=0.3, ce_weight=0.7, combine="probs")),
    Case("kd_weight, logits", dict(kd_weight=-0.3, combine="logits")),
    Case("kd_weight 0", dict(kd_weight=0.0, ce_weight=0.7)),
    Case("mask", dict(mask=True, ce_weight=0.5)),
    Case("mask, none", dict(mask=True, reduction="none", labels=None, classes=300)),
    Case("num_items", dict(num_items=7, ce_weight=0.5)),
    Case("num_items, sum, mask", dict(num_items=2.5, reduction="sum", mask=True)),
    Case("soft targets", dict(labels="soft", ce_weight=0.5)),
    Case("soft targets, smoothing", dict(labels="soft", ce_weight=0.5, label_smoothing=0.1, temperature=2.5)),
    Case("soft targets, mask, 300 classes", dict(labels="soft", ce_weight=1.0, mask=True, classes=300, rows=3)),
    Case("soft targets, probs, none", dict(labels="soft", ce_weight=1.0, reduction="none", combine="probs")),
    Case("soft targets alone", dict(labels="soft", ce_weight=1.0, kd_weight=0.0)),
    Case("weights of 0 per row", dict(weights="rows", ce_weight=0.5)),
    Case("weights of 0 per row, temperatures", dict(weights="rows", temperature=[1.0, 2.0, 4.5], reduction="none")),
    Case("weights of 0 per row, probs", dict(weights="rows", combine="probs", reduction="none")),
    Case("weights of 0 per row, logits", dict(weights="rows", combine="logits", reduction="none")),
    Case("weights on the device", dict(weights="device", combine="logits", ce_weight=0.5)),
]


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    student, teachers, target, options = build_options(at(place), dtype, **case.arguments)
    check(student, teachers, target, **options)


def test_the_reference_is_the_formula_typed_again():
    """All options at once, rows and teachers that do not count taken out by indexing."""
    g = torch.Generator().manual_seed(0)
    for combine, soft in itertools.product(COMBINE, (False, True)):
        student, teachers, target = make(7, 19, 3, torch.float64)
        mask, weights = torch.tensor([1, 1, 0, 1, 0, 1, 1]).bool(), torch.rand(3, 7, generator=g, dtype=torch.float64)
        weights[1, ::2] = 0
        labels = soft_labels(7, 19, dtype=torch.float64) if soft else target
        rows = []
        for r in mask.nonzero()[:, 0].tolist():
            row = [(w, t[r]) for w, t in zip(weights[:, r], teachers, strict=True) if w != 0]
            log_q = torch.log_softmax(student[r] / 2.5, -1)
            if combine == "losses":
                kd = sum(
                    w * torch_functional.kl_div(log_q, torch.softmax(t / 2.5, -1), reduction="sum") for w, t in row
                )
            else:
                mix = (lambda z: torch.softmax(z / 2.5, -1)) if combine == "probs" else (lambda z: z)
                p = sum(w * mix(t) for w, t in row)
                p = p if combine == "probs" else torch.softmax(p / 2.5, -1)
                kd = torch_functional.kl_div(log_q, p, reduction="sum")
            ce = torch_functional.cross_entropy(student[r], labels[r], label_smoothing=0.1)
            rows.append(0.3 * 2.5**2 * kd + 0.7 * ce)
        expected = torch.stack(rows).sum() / 11
        options = dict(weights=weights, mask=mask, kd_weight=0.3, ce_weight=0.7, label_smoothing=0.1, temperature=2.5)
        for actual in both(
            lambda: F.multi_teacher_kd(student, teachers, labels, combine=combine, num_items=11, **options)  # noqa: B023
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
            gradients = [torch.autograd.grad(x, student, retain_graph=True)[0] for x in (actual, expected)]
            torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-12)


# --- which rows count -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("labels", ["hard", "soft", None])
def test_a_masked_row_counts_nowhere(labels, place, at):
    student, teachers, target, options = build_options(at(place), torch.float32, labels=labels, mask=True, rows=6)
    mask, options = options["mask"], dict(ce_weight=0.5 if labels else 0.0)
    with torch.no_grad():
        for z in (student, *teachers) if labels != "soft" else (student, *teachers, target):
            z[~mask] = math.nan
    if labels is not None:
        target[~mask] = 1000 if labels == "hard" else 0.5
    for loss, grad in both(lambda: loss_and_grad(student, teachers, target, mask=mask, **options)):
        kept = [z.detach()[mask] for z in (student, *teachers)]
        some, some_grad = loss_and_grad(kept[0].requires_grad_(), kept[1:], target[mask] if labels else None, **options)
        torch.testing.assert_close(loss, some)
        assert float(grad[~mask].abs().max()) == 0
        torch.testing.assert_close(grad[mask], some_grad)
    assert float(F.multi_teacher_kd(student, teachers, mask=mask & False)) == 0


def test_a_mask_and_ignored_labels_both_leave_rows_out():
    student, teachers, target = make(6, 10, 2)
    target[1] = 0
    mask = torch.tensor([True] * 4 + [False] * 2)
    keep = mask & (target != 0)
    for loss in both(lambda: F.multi_teacher_kd(student, teachers, target, mask=mask, ignore_index=0, ce_weight=0.5)):
        kept = F.multi_teacher_kd(student[keep], [t[keep] for t in teachers], target[keep], ce_weight=0.5)
        torch.testing.assert_close(loss, kept)
    for loss in both(lambda: F.multi_teacher_kd(student, teachers, mask=mask, ignore_index=0)):
        torch.testing.assert_close(loss, F.multi_teacher_kd(student[:4], [t[:4] for t in teachers]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["sum", "mean"])
def test_num_items_accumulates_as_one_batch(reduction, place, at):
    student, teachers, target = make(6, 20, 2, device=at(place))
    target[1] = -100
    whole, grad = loss_and_grad(student, teachers, target, ce_weight=0.5)
    for items in (5, torch.tensor(5)):
        for parts in both(
            lambda: [
                loss_and_grad(
                    student[i:j].detach().requires_grad_(), [t[i:j] for t in teachers], target[i:j], ce_weight=0.5,
                    num_items=items, reduction=reduction,  # noqa: B023
                )
                for i, j in ((0, 2), (2, 6))
            ]
        ):  # fmt: skip
            torch.testing.assert_close(sum(loss for loss, _ in parts), whole)
            torch.testing.assert_close(torch.cat([g for _, g in parts]), grad)


# --- which teachers count ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("form", ["host", "rows"])
def test_a_teacher_of_weight_0_is_not_read(form, combine, place, at):
    student, teachers, target = make(4, 40, 3, device=at(place))
    teachers[1][:] = math.nan
    weights = [0.4, 0.0, 0.6]
    options = dict(combine=combine, ce_weight=0.5)
    expected = loss_and_grad(student, [teachers[0], teachers[2]], target, weights=[0.4, 0.6], **options)
    if form == "rows":
        weights = torch.tensor(weights, device=student.device)[:, None].expand(3, 4)
    for actual in both(lambda: loss_and_grad(student, teachers, target, weights=weights, **options)):
        torch.testing.assert_close(actual, expected)
    for actual in both(lambda: loss_and_grad(student, teachers, target, kd_weight=0.0, **options)):
        ce = torch_functional.cross_entropy(student, target)
        torch.testing.assert_close(actual[0], 0.5 * ce.detach())
        torch.testing.assert_close(actual[1], 0.5 * torch.autograd.grad(0.5 * ce, student)[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
def test_a_row_that_no_teacher_speaks_about_has_no_distillation(combine, place, at):
    student, teachers, _target = make(4, 40, 2, device=at(place))
    weights = torch.full((2, 4), 0.5, device=student.device)
    weights[:, 2] = 0
    for t in teachers:
        t[2] = math.nan
    for loss, grad in both(
        lambda: loss_and_grad(student, teachers, weights=weights, combine=combine, reduction="none")
    ):
        assert float(loss[2]) == 0 and float(grad[2].abs().max()) == 0 and bool((loss[[0, 1, 3]] > 0).all())
    for loss, grad in both(lambda: loss_and_grad(student, teachers, weights=[0.0, 0.0], combine=combine)):
        assert float(loss) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_kd_weight_multiplies_the_combined_term(place, at):
    """Weights that sum to a are not that: they change another mixture's value, or another target."""
    student, teachers, _ = make(4, 40, 2, device=at(place))
    for combine in COMBINE:
        plain, grad = loss_and_grad(student, teachers, combine=combine)
        for loss, scaled in both(lambda: loss_and_grad(student, teachers, combine=combine, kd_weight=0.3)):  # noqa: B023
            torch.testing.assert_close(loss, 0.3 * plain)
            torch.testing.assert_close(scaled, 0.3 * grad)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("k", [1, 3, 6, 7])
@pytest.mark.parametrize("temperature", [1.0, 4.0, 7.3, 20.0])
def test_equal_networks_have_no_divergence_by_default_weights(temperature, k, combine, place, at):
    rows = 256 if place == "cpu" else 3
    student, _, _ = make(rows, 1000, 1, scale=1.0, device=at(place))
    options = dict(combine=combine, temperature=temperature)
    for i, loss in enumerate(both(lambda: F.multi_teacher_kd(student, [student.detach()] * k, **options))):
        assert 0 <= float(loss) < 1e-6, ("auto", "reference")[i]
        if combine == "losses":
            assert float(loss) == 0


@pytest.mark.parametrize("place", PLACES)
def test_near_networks_by_probs(place, at):
    """Where the mixture is nearly the student's own, its divergence is far below the rounding of log p."""
    student, _, _ = make(8, 1000, 1, scale=1.0, device=at(place))
    g = torch.Generator().manual_seed(2)
    noise = [torch.randn(8, 1000, generator=g).to(student.device) for _ in range(2)]
    for size, tolerance in ((1e-2, 2e-4), (1e-3, 2e-3)):
        teachers = [student.detach() + size * n for n in noise]
        options = dict(combine="probs", temperature=2.0, reduction="none")
        exact = in_float64(student, teachers, **options)[0]
        loss = F.multi_teacher_kd(student, teachers, **options).double()
        assert float(((loss - exact) / exact).abs().max()) < tolerance


# --- dtypes and layouts -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("dtype", DTYPES)
def test_teachers_of_any_dtype_each_its_own(dtype, combine, place, at):
    student, teachers, target = make(5, 100, 4, dtype, device=at(place))
    teachers = [t.to(d) for t, d in zip(teachers, DTYPES, strict=True)]
    check(student, teachers, target, ce_weight=0.5, combine=combine)
    for loss in both(lambda: F.multi_teacher_kd(student, teachers, target, ce_weight=0.5, combine=combine)):
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


@pytest.mark.parametrize("form", ["bfloat16", "sliced", "channels_last"])
def test_no_teacher_is_copied_whatever_its_dtype_and_layout(form):
    student, teachers, target = make(64, 1000, 3)
    networks, options = [student.detach(), *[t.bfloat16() for t in teachers]], {}
    if form == "sliced":  # rows that merge into no matrix
        networks = [torch.cat([z, z], -1).reshape(4, 16, 2000)[:, :-1, :1000] for z in networks]
        target = target.reshape(4, 16)[:, :-1]
    elif form == "channels_last":
        networks, target = [z.reshape(4, 4, 4, 1000).movedim(-1, 1) for z in networks], target.reshape(4, 4, 4)
        options = dict(class_dim=1)
    student = networks[0].requires_grad_()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profiler:
        F.multi_teacher_kd(student, networks[1:], target, ce_weight=0.5, **options)
    taken = sum(e.self_cpu_memory_usage for e in profiler.events() if e.self_cpu_memory_usage > 0)
    assert taken <= student.numel() * 4 * 1.1  # one gradient


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_any_strides_in_place(place, at):
    """What language models do: the last position has no label, and [:, :-1] merges into no matrix."""
    student, teachers, target = make(12, 33, 2, device=at(place))
    shaped = [z.detach().reshape(3, 4, 33) for z in (student, *teachers)]
    expected = loss_and_grad(
        shaped[0][:, :-1].contiguous().requires_grad_(), [t[:, :-1].contiguous() for t in shaped[1:]],
        target.reshape(3, 4)[:, 1:], ce_weight=0.5,
    )  # fmt: skip
    leaf = shaped[0].clone().requires_grad_()
    for loss, grad in both(lambda: _of_leaf(leaf, shaped, target)):
        torch.testing.assert_close(loss, expected[0])
        torch.testing.assert_close(grad[:, :-1], expected[1])
        assert float(grad[:, -1].abs().max()) == 0


def _of_leaf(leaf, shaped, target):
    labels = target.reshape(3, 4)[:, 1:]
    loss = F.multi_teacher_kd(leaf[:, :-1], [t[:, :-1] for t in shaped[1:]], labels, ce_weight=0.5)
    return loss.detach(), torch.autograd.grad(loss * 0.5, leaf)[0]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("form", [torch.contiguous_format, torch.channels_last])
def test_maps(form, place, at):
    device = at(place)
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 7, 3, 5, generator=g).to(device, memory_format=form) for _ in range(3)]
    target = torch.randint(0, 7, (2, 3, 5), generator=g).to(device)
    target[0, 1] = -100
    student, teachers = maps[0].requires_grad_(), maps[1:]
    rows = [z.detach().movedim(1, -1).reshape(-1, 7) for z in maps]
    weights = torch.rand(2, 2, 3, 5, generator=g).to(device)
    for reduction in ("mean", "none"):
        options = dict(ce_weight=0.5, reduction=reduction)
        loss, grad = loss_and_grad(
            rows[0].requires_grad_(), rows[1:], target.flatten(), weights=weights.flatten(1), **options
        )
        for stacked in (teachers, torch.stack(teachers)):
            actual, map_grad = loss_and_grad(student, stacked, target, weights=weights, class_dim=1, **options)
            assert actual.shape == ((2, 3, 5) if reduction == "none" else ())
            torch.testing.assert_close(actual.flatten(), loss.flatten())
            torch.testing.assert_close(map_grad.movedim(1, -1).reshape(-1, 7), grad)
    soft = torch_functional.one_hot(target.clamp(min=0), 7).float().movedim(-1, 1)
    mask = target >= 0
    torch.testing.assert_close(
        F.multi_teacher_kd(student, teachers, soft, mask=mask, ce_weight=0.5, class_dim=1),
        F.multi_teacher_kd(student, teachers, target, ce_weight=0.5, class_dim=-3),
    )


def test_the_smallest_map():
    student, teacher = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3)
    teacher[0, 0, 0, 0] = 3
    for loss in both(lambda: F.multi_teacher_kd(student, [teacher], temperature=1.0, class_dim=1)):
        assert float(loss) == pytest.approx(0.167427, abs=1e-6)
    _inputs._warned_of_maps.discard(op.OP)
    with pytest.warns(
        UserWarning, match=r"classes of student \[1, 2, 1, 3\] were taken from the last dimension"
    ) as told:
        F.multi_teacher_kd(student, [teacher], temperature=1.0)
    assert told[0].filename == __file__
