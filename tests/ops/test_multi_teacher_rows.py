"""multi_teacher_kd: rows that do not count, shapes, strides, launches, the same bits."""

import math

import pytest
import torch
from conftest import PLACES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from multi_teacher_helpers import check, loss_and_grad, make
from rows_helpers import LAYOUTS

import fastkd
from fastkd.ops import _formulas
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES

F = fastkd.functional


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_all_rows_ignored_is_a_differentiable_zero(reduction, place, at):
    student, teachers, target = make(4, 20, 2, device=at(place))
    with torch.no_grad():
        student[1] = math.nan  # what an ignored row holds must not matter
        teachers[0][2] = math.inf
    loss, grad = loss_and_grad(student, teachers, torch.full_like(target, -100), ce_weight=1.0, reduction=reduction)
    assert float(loss.abs().sum()) == 0 and float(grad.abs().sum()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_ignore_index_counts_also_without_cross_entropy(place, at):
    student, teachers, target = make(6, 20, 2, device=at(place))
    target[:2] = 7
    loss = F.multi_teacher_kd(student, teachers, target, ignore_index=7)
    keep = target != 7
    torch.testing.assert_close(loss, F.multi_teacher_kd(student[keep], [t[keep] for t in teachers]))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction, place, at):
    student, teachers, target = make(0, 20, 2, device=at(place))
    loss, grad = loss_and_grad(student, teachers, target, ce_weight=1.0, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and float(loss.sum()) == 0
    assert grad.shape == (0, 20)


@pytest.mark.parametrize("place", PLACES)
def test_leading_dimensions(place, at):
    student, teachers, target = make(6, 33, 2, device=at(place))
    target[4] = -100
    weights = torch.rand(2, 6, device=student.device)
    flat, flat_grad = loss_and_grad(student, teachers, target, weights=weights, ce_weight=0.5, reduction="none")
    shaped = [z.detach().reshape(2, 3, 33) for z in (student, *teachers)]
    loss, grad = loss_and_grad(
        shaped[0].requires_grad_(), torch.stack(shaped[1:]), target.reshape(2, 3), weights=weights.reshape(2, 2, 3),
        ce_weight=0.5, reduction="none",
    )  # fmt: skip
    assert loss.shape == (2, 3)
    assert torch.equal(loss.flatten(), flat) and torch.equal(grad.reshape(6, 33), flat_grad)
    one = F.multi_teacher_kd(student[0], [t[0] for t in teachers], target[0], weights=weights[:, 0], ce_weight=0.5)
    torch.testing.assert_close(one, flat[0])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [64, 67])
def test_layouts_give_the_same_bits(layout, classes, place, at):
    student, teachers, target = make(5, classes, 3, device=at(place))
    expected = loss_and_grad(student, teachers, target, ce_weight=0.5)
    view = LAYOUTS[layout]
    moved = view(student.detach()).requires_grad_()
    actual = loss_and_grad(moved, view(torch.stack(teachers)), target, ce_weight=0.5)
    # The streamed sums depend on which thread reads a class, so on the alignment of the rows.
    if place == "simt_stream" or place != "cpu":
        torch.testing.assert_close(actual[0], expected[0])
        torch.testing.assert_close(actual[1], expected[1])
    else:
        assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])


@pytest.mark.parametrize("place", PLACES)
def test_broadcast_inputs(place, at):
    student, teachers, _ = make(5, 40, 2, device=at(place))
    wide = [teachers[0][:1].expand(5, 40), teachers[1][:, :1].expand(5, 40)]
    check(student, wide)


def test_teachers_are_never_copied():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    student, teachers, target = make(8, 40, 3)
    stacked, padded = torch.stack(teachers), torch.cat([torch.stack(teachers)] * 2, -1)[..., :40]
    for form in (teachers, stacked, padded, list(padded)):
        names = []
        with Recorder():
            torch.autograd.grad(F.multi_teacher_kd(student, form, target, ce_weight=1.0), student)
        allowed = {"fastkd::multi_teacher_forward", "fastkd::multi_teacher_backward", "aten::unbind.int"}
        of_scalars = {"aten::ones_like", "aten::detach", "aten::select.int", "aten::_local_scalar_dense"}
        assert set(names) <= allowed | of_scalars, names


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_of_more_than_31_bits(dtype):
    """Rows that lie 2^31 elements and more from the first; the memory between them is never touched."""
    torch.use_deterministic_algorithms(False)  # which would fill the memory
    classes, stride = 40, 2**30 + 8
    memory = torch.empty(2 * stride + classes, dtype=dtype)
    far = memory.as_strided((3, classes), (stride, 1))
    near = torch.randn(3, classes).to(dtype)
    far.copy_(near)
    teachers = [torch.randn(3, classes).to(dtype)]
    expected = loss_and_grad(near.clone().requires_grad_(), teachers)
    actual = loss_and_grad(far.detach().requires_grad_(), teachers)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
    assert torch.equal(F.multi_teacher_kd(teachers[0], [far]), F.multi_teacher_kd(teachers[0], [near]))


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
@pytest.mark.parametrize("k", [15, 16, 17, 33])
def test_more_teachers_than_a_launch_takes(k, place, at):
    student, teachers, target = make(3, 20, k, device=at(place))
    weights = torch.rand(k, 3, device=student.device)
    check(student, teachers, target, weights=weights, ce_weight=0.5)
    check(student, teachers, target, temperature=[1.0 + i / 4 for i in range(k)], ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("classes", [1024, 1030, 4096, 4100, 8192, 8200])
def test_every_launch_policy(classes, at):
    student, teachers, target = make(2, classes, 2, device=at("simt"))
    check(student, teachers, target, ce_weight=0.5)


@pytest.mark.parametrize("place", ["simt", "simt_stream"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("classes", [100, 1000])
def test_every_schedule_gives_the_same_bits(classes, combine, place, at, simt):
    from simt.fixtures import in_every_schedule

    student, teachers, target = make(5, classes, 2, device=at(place))
    results = in_every_schedule(simt, lambda: loss_and_grad(student, teachers, target, combine=combine, ce_weight=0.5))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    student, teachers, target = make(300, 257, 3, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(student, teachers, target, ce_weight=0.5))
    finally:
        torch.set_num_threads(before)
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


# --- anything ---------------------------------------------------------------------------------------------------------

ANYTHING = dict(
    rows=st.integers(0, 9),
    classes=st.integers(2, 140),
    k=st.integers(1, 5),
    dtype=st.sampled_from(DTYPES),
    combine=st.sampled_from(COMBINE),
    reduction=st.sampled_from(["none", "sum", "mean"]),
    temperature=st.sampled_from([0.5, 1.0, 3.0, 4.0, 7.3]),
    scale=st.sampled_from([1e-3, 1.0, 30.0, 1000.0]),
    labelled=st.booleans(),
    ignored=st.booleans(),
    row_weights=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
    seed=st.integers(0, 1000),
)


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_anything(place, at):
    device = at(place)

    @settings(max_examples=150, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
    @given(**ANYTHING)
    def run(
        rows, classes, k, dtype, combine, reduction, temperature, scale, labelled, ignored, row_weights, layout, seed
    ):
        student, teachers, target = make(rows, classes, k, dtype, scale=scale, seed=seed, device=device)
        view = LAYOUTS[layout]
        student, teachers = view(student.detach()).requires_grad_(), [view(t) for t in teachers]
        if ignored:
            target[::2] = -100
        weights = torch.rand(k, rows, generator=torch.Generator().manual_seed(seed)) if row_weights else None
        if weights is not None:
            weights = weights.to(_formulas.accumulate_dtype(dtype))
        options = dict(combine=combine, reduction=reduction, temperature=temperature, weights=weights)
        check(student, teachers, target if labelled else None, ce_weight=0.5 if labelled else 0.0, **options)

    run()
