"""mutual_kd: the CUDA kernel for long rows of up to four networks in whole vectors."""

import pytest
import torch
from mutual_helpers import check, loss_and_grads, make
from simt.fixtures import in_every_schedule

import fastkd

F = fastkd.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
INF = float("inf")


@pytest.fixture
def device(at):
    return at("simt_stream")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m, n", [(2, 0), (2, 1), (3, 0), (2, 2), (4, 0)])
def test_networks(m, n, dtype, device):
    logits, teachers, target = make(m, 3, 72, n, dtype, device=device, seed=m)
    target[1] = -100
    check(logits, target, teachers=teachers, ce_weight=0.5)


@pytest.mark.parametrize("temperature", [1.0, 2.0, 3.0, 4.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_temperatures(temperature, reduction, device):
    logits, _, target = make(3, 3, 40, device=device)
    check(logits, target, temperature=temperature, ce_weight=0.5, reduction=reduction)


@pytest.mark.parametrize("dtype", DTYPES)
def test_several_vectors_of_a_thread(dtype, device):
    """256 or 512 threads of 4 or 8 classes a vector, and some left over."""
    logits, _, target = make(2, 1, 9000, dtype=dtype, device=device)
    check(logits, target, ce_weight=0.5)


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 1028), (torch.bfloat16, 4096)])
def test_rows_that_would_fit_on_chip_take_it(dtype, classes, at):
    logits, _, target = make(2, 2, classes, dtype=dtype, device=at("simt"))
    check(logits, target, ce_weight=0.5)


# Blocks of 32, 32, 64, 128, 256 and 512 threads.
@pytest.mark.parametrize("classes", [4, 100, 1028, 2048, 4100, 8200])
def test_every_size_of_block(classes, simt, at):
    """A row of whole vectors has a block of its own, however short it is."""
    logits, teachers, target = make(2, 6 if classes <= 128 else 2, classes, 1, device=at("simt"))
    simt.reset_counters()
    F.mutual_kd(logits, target, teachers=teachers, ce_weight=0.5, reduction="none")
    assert simt.counters()["blocks"] >= len(target)
    check(logits, target, teachers=teachers, ce_weight=0.5)


@pytest.mark.parametrize("dtype, classes", [(torch.float16, 8), (torch.bfloat16, 200), (torch.bfloat16, 2048)])
def test_short_rows_of_halves(dtype, classes, at):
    logits, _, target = make(4, 5, classes, dtype=dtype, device=at("simt"))
    target[2] = -100
    check(logits, target, ce_weight=0.5)


HALVES = [torch.float16, torch.bfloat16]  # an even number of them, on borders of 4 bytes


@pytest.mark.parametrize("m, n", [(2, 0), (3, 0), (2, 1)])
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("classes", [2, 10, 100, 102, 1030])  # the last vector has one to four words
def test_rows_without_whole_vectors(dtype, classes, m, n, simt, at):
    """Each has a block of its own; what lies past its end, another row, is neither read nor written."""
    logits, teachers, target = make(m, 5, classes, n, dtype, device=at("simt"), seed=classes)
    target[2] = -100
    simt.reset_counters()
    F.mutual_kd(logits, target, teachers=teachers, ce_weight=0.5, reduction="none")
    assert simt.counters()["blocks"] >= len(target)
    check(logits, target, teachers=teachers, ce_weight=0.5)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.7])
def test_narrow_rows_at_temperatures_among_long_ones(temperature, dtype, device):
    """Parts of wider rows, whose other classes are NaN."""
    logits, teachers, target = make(3, 3, 5002, 1, dtype, device=device)
    parts = []
    for z in [*logits, *teachers]:
        wide = torch.full((3, 5008), float("nan"), dtype=dtype)
        wide[:, 2:5004] = z.detach()
        parts.append(wide[:, 2:5004])
    check([z.requires_grad_() for z in parts[:3]], target, teachers=parts[3:], temperature=temperature, ce_weight=0.5)


@pytest.mark.parametrize("dtype", HALVES)
def test_halves_on_borders_of_2_bytes_take_the_other_kernel(dtype, simt, at):
    logits, _, target = make(2, 8, 101, dtype=dtype, device=at("simt"))
    simt.reset_counters()
    F.mutual_kd(logits, target, ce_weight=0.5, reduction="none")
    assert simt.counters()["blocks"] < len(target)
    check(logits, target, ce_weight=0.5)


@pytest.mark.parametrize("dtype", HALVES)
def test_masked_classes_of_narrow_rows(dtype, device):
    """-inf at a row's end is as that past it; one that a network has alone makes it infinitely far."""
    logits, _, target = make(2, 2, 102, dtype=dtype, device=device)
    target[:] = 20
    with torch.no_grad():
        for z in logits:
            z[:, 25:] = -INF
    check(logits, target, ce_weight=0.5, reduction="none")
    with torch.no_grad():
        logits[0][1, 1] = -INF
    loss = F.mutual_kd(logits, target, reduction="none").detach()
    assert loss[0].isinf().tolist() == [False, True] and loss[1].isfinite().all()


@pytest.mark.parametrize("dtype", HALVES)
def test_equal_narrow_networks_are_exactly_0_apart(dtype, device, values_unreadable):
    (one,), _, target = make(1, 3, 102, dtype=dtype, device=device)
    logits = [one.detach().clone().requires_grad_() for _ in range(3)]
    loss, grads = loss_and_grads(logits, reduction="none")
    assert float(loss.abs().max()) == 0 and all(float(g.abs().max()) == 0 for g in grads)
    target[:] = torch.tensor([102, -100, 5])
    loss, grads = loss_and_grads(logits, target, ce_weight=0.5, reduction="none")
    assert loss.isnan().tolist() == [[True, False, False]] * 3 and all(g[0].isnan().all() for g in grads)
    assert all(g[1].eq(0).all() and g[2].isfinite().all() and g[2].ne(0).any() for g in grads)


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 520), (torch.bfloat16, 510)])
def test_every_order_of_threads_gives_the_same_bits(dtype, classes, simt, at):
    at("simt")
    logits, _, target = make(3, 2, classes, dtype=dtype)
    results = in_every_schedule(simt, lambda: loss_and_grads(logits, target, ce_weight=0.5, reduction="none"))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


def test_without_labels_and_with_weights_per_row(device):
    logits, teachers, _ = make(2, 4, 48, 1, device=device)
    g = torch.Generator().manual_seed(0)
    weights, teacher_weights = torch.rand(2, 2, 4, generator=g), torch.rand(2, 1, 4, generator=g)
    weights[0, 1, 2] = 0
    check(logits, teachers=teachers, weights=weights, teacher_weights=teacher_weights, reduction="none")


@pytest.mark.parametrize("m", [2, 3, 4])
@pytest.mark.parametrize("temperature", [1.0, 2.5, 3.0, 7.3])
def test_equal_networks_are_exactly_0_apart(temperature, m, device):
    (one,), _, _ = make(1, 2, 320, device=device)
    logits = [one.detach().clone().requires_grad_() for _ in range(m)]
    loss, grads = loss_and_grads(logits, temperature=temperature, reduction="none")
    assert float(loss.abs().max()) == 0 and all(float(g.abs().max()) == 0 for g in grads)


def test_masked_classes(device):
    """-inf in all: left out. In one alone: what it learns from the other is infinite, not what the other learns."""
    logits, _, target = make(2, 2, 40, device=device)
    target[:] = 20
    with torch.no_grad():
        for z in logits:
            z[:, ::4] = -INF
    check(logits, target, ce_weight=0.5, reduction="none")
    with torch.no_grad():
        logits[0][1, 1] = -INF
        logits[1][1, 1] = -300.0  # whose exponential is 0 in float32
    loss = F.mutual_kd(logits, target, reduction="none").detach()
    assert loss[0].isinf().tolist() == [False, True] and loss[1].isfinite().all()


def test_what_is_not_read_reaches_nothing(device):
    """Network 1 learns from 0 and teaches nobody; network 2, all NaN, has no part."""
    logits, _, _ = make(3, 2, 32, device=device)
    with torch.no_grad():
        logits[2].fill_(float("nan"))
    weights = torch.zeros(3, 3)
    weights[1, 0] = 1.0
    loss, pair = F.mutual_kd(logits, weights=weights), F.mutual_kd(logits[:2], weights=weights[:2, :2])
    grads, expected = torch.autograd.grad(loss.sum(), logits), torch.autograd.grad(pair.sum(), logits[:2])
    assert loss[2] == 0 and float(grads[2].abs().max()) == 0 and float(grads[0].abs().max()) == 0
    torch.testing.assert_close(loss[:2], pair, rtol=0, atol=0)
    torch.testing.assert_close(grads[1], expected[1], rtol=0, atol=0)
    nothing, grads = loss_and_grads(logits, weights=torch.zeros(3, 3))
    assert float(nothing.abs().max()) == 0 and all(float(g.abs().max()) == 0 for g in grads)


def test_networks_without_a_gradient_and_bad_labels(device, values_unreadable):
    logits, _, target = make(3, 3, 32, device=device)
    logits[1].requires_grad_(False)
    with fastkd.use_backend("reference"):
        expected = F.mutual_kd(logits, target, ce_weight=0.5).detach()
    found = F.mutual_kd(logits, target, ce_weight=0.5)
    torch.testing.assert_close(found.detach(), expected)
    target[1] = 99
    found = F.mutual_kd(logits, target, ce_weight=0.5, reduction="none")
    (grad,) = torch.autograd.grad(found.sum(), logits[0])
    assert found[:, 1].isnan().all() and grad[1].isnan().all() and grad[0].isfinite().all()


# Rows of at least 16 KiB, of which there are few, have a block for each part of 8 KiB or more.
SPLIT = [(torch.float32, 4100, 2), (torch.float32, 12300, 6), (torch.bfloat16, 8208, 2), (torch.float16, 8202, 2)]


@pytest.mark.parametrize("dtype, classes, parts", SPLIT)
@pytest.mark.parametrize("m, n", [(2, 0), (2, 1), (4, 0)])
def test_few_long_rows_are_split(m, n, dtype, classes, parts, simt, at):
    whole = classes * dtype.itemsize % 16 == 0
    if m == 4 and not whole:
        pytest.skip("four networks take no rows on borders of 4 bytes")
    logits, teachers, target = make(m, 3, classes, n, dtype, device=at("simt"), seed=m)
    target[:] = torch.tensor([classes - 1, -100, classes // 2])
    simt.reset_counters()
    F.mutual_kd(logits, target, teachers=teachers, ce_weight=0.5, reduction="none")
    counters = simt.counters()
    assert counters["launches"] >= 3 and counters["blocks"] >= 3 * (2 * parts + 1)
    check(logits, target, teachers=teachers, ce_weight=0.5)


def test_many_long_rows_are_not_split(simt, at):
    logits, _, _ = make(2, 264, 4096, device=at("simt"))
    simt.reset_counters()
    F.mutual_kd(logits, reduction="none")
    assert 264 <= simt.counters()["blocks"] < 2 * 264


@pytest.mark.parametrize("temperature", [1.0, 3.0, 0.7])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_split_rows_at_temperatures_with_weights_per_row(temperature, reduction, device):
    logits, teachers, target = make(2, 3, 6152, 1, device=device)
    g = torch.Generator().manual_seed(1)
    weights, teacher_weights = torch.rand(2, 2, 3, generator=g), torch.rand(2, 1, 3, generator=g)
    weights[:, :, 1] = teacher_weights[:, :, 1] = 0  # a row from which nobody learns
    check(logits, target, teachers=teachers, weights=weights, teacher_weights=teacher_weights, temperature=temperature,
          ce_weight=0.5, reduction=reduction)  # fmt: skip
    check(logits, teachers=teachers, weights=weights, teacher_weights=teacher_weights, reduction=reduction)


@pytest.mark.parametrize("dtype, classes", [(torch.float32, 6152), (torch.bfloat16, 12302)])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_equal_split_networks_are_exactly_0_apart(temperature, dtype, classes, device, values_unreadable):
    (one,), _, target = make(1, 3, classes, dtype=dtype, device=device)
    logits = [one.detach().clone().requires_grad_() for _ in range(3)]
    loss, grads = loss_and_grads(logits, temperature=temperature, reduction="none")
    assert float(loss.abs().max()) == 0 and all(float(g.abs().max()) == 0 for g in grads)
    target[:] = torch.tensor([classes, -100, 5])
    loss, grads = loss_and_grads(logits, target, ce_weight=0.5, reduction="none")
    assert loss.isnan().tolist() == [[True, False, False]] * 3 and all(g[0].isnan().all() for g in grads)
    assert all(g[1].eq(0).all() and g[2].isfinite().all() and g[2].ne(0).any() for g in grads)


@pytest.mark.parametrize("masked", [slice(0, 4096), slice(2048, 4096), slice(4000, None)])  # parts of 2052 classes
def test_masked_parts_of_split_rows(masked, device):
    """A part may have no class at all; one that a network has alone makes what it learns infinite."""
    logits, _, target = make(2, 2, 6152, device=device)
    target[:] = 3999 if masked.start == 4000 else 5000
    with torch.no_grad():
        for z in logits:
            z[:, masked] = -INF
    check(logits, target, ce_weight=0.5, reduction="none")
    with torch.no_grad():
        logits[0][1, 1 if masked.start == 4000 else 6000] = -INF
    loss = F.mutual_kd(logits, target, reduction="none").detach()
    assert loss[0].isinf().tolist() == [False, True] and loss[1].isfinite().all()


def test_split_rows_give_the_same_bits_in_every_order_of_threads(simt, at):
    at("simt")
    logits, _, target = make(2, 1, 4100)
    results = in_every_schedule(simt, lambda: loss_and_grads(logits, target, ce_weight=0.5, reduction="none"))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("clusters", [False, True])
def test_split_rows_with_large_and_near_logits(clusters, dtype, device):
    """Logits of a trained model: a few classes far above the rest, or all networks nearly equal."""
    (first, second), _, target = make(2, 3, 12304, dtype=dtype, device=device)
    with torch.no_grad():
        if clusters:
            for z in (first, second):
                z[:, 5000:5010] += 60
        else:
            second.copy_(first + 0.01 * second)
    check([first, second], target, ce_weight=0.5, reduction="none")
