"""mutual_kd: rows that do not count, shapes, strides, threads and random cases, in every place its kernels run."""

import math

import pytest
import torch
from conftest import PLACES
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from mutual_helpers import check, loss_and_grads, make
from rows_helpers import LAYOUTS

import fastkd
from fastkd.ops._formulas import accumulate_dtype
from fastkd.ops._inputs import REDUCTIONS
from fastkd.testing import DTYPES

F = fastkd.functional


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
    if place != "cpu" and layout == "offset" and classes % 4 == 0:
        # Rows that allow whole vectors have a kernel of their own: gradients differ from it in the last place.
        for a, b in zip(grads, expected[1], strict=True):
            torch.testing.assert_close(a, b, rtol=3e-6, atol=1e-7)
        return
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
    classes, scale = draw(st.integers(2, 150)), draw(st.sampled_from([1e-3, 1.0, 10.0, 300.0]))
    logits, teachers, target = make(
        m, rows, classes, n, dtype, scale=scale, seed=draw(st.integers(0, 99)), device=device
    )
    layout = LAYOUTS[draw(st.sampled_from(sorted(LAYOUTS)))]
    logits = [layout(z.detach()).requires_grad_() for z in logits]
    masked = draw(st.booleans())
    if masked:
        with torch.no_grad():
            for z in (*logits, *teachers):
                z[:, 0] = -math.inf
        target = target.clamp(min=1)
    if rows > 1 and draw(st.booleans()):
        target[0] = -100
    weights = torch.rand(m, m, *([rows] if draw(st.booleans()) else []), dtype=accumulate_dtype(dtype)) * 2 - 0.5
    ce_weight = draw(st.sampled_from([0.0, 0.3, 1.0]))
    check(
        logits, target, teachers=teachers, weights=weights, ce_weight=ce_weight,
        label_smoothing=0.0 if masked else draw(st.sampled_from([0.0, 0.1])),
        temperature=draw(st.sampled_from([0.5, 1.0, 3.0, 4.5])), reduction=draw(st.sampled_from(REDUCTIONS)),
        scale_by_t2=draw(st.booleans()),
    )  # fmt: skip
