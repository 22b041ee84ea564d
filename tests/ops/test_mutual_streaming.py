"""mutual_kd: long rows on CUDA, several tiles of a block's threads."""

import math

import pytest
import torch
from mutual_helpers import check, in_float64, loss_and_grads, make

DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]


def few(dtype, at, classes=4608, m=2, n=1, **options):
    return make(m, 2, classes, n, dtype, device=at("simt_stream"), **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("classes", [4608, 4611])
def test_rows_of_several_tiles(classes, dtype, at):
    logits, teachers, target = few(dtype, at, classes)
    check(logits, target, teachers=teachers, ce_weight=0.5, temperature=3.0)


@pytest.mark.parametrize("options", [dict(label_smoothing=0.1), dict(temperature=4.0), dict(temperature=1.0)])
def test_labels_of_every_kind(options, at):
    logits, teachers, target = few(torch.float32, at)
    check(logits, target, teachers=teachers, ce_weight=0.5, **options)
    soft = torch.softmax(teachers[0] * 3, -1)
    check(logits, soft, teachers=teachers, ce_weight=0.5, **options)


def test_so_many_networks_that_tiles_are_small(at):
    logits, teachers, target = few(torch.float32, at, classes=1024, m=8, n=3)
    check(logits, target, teachers=teachers, ce_weight=0.5)


@pytest.mark.parametrize("part", [slice(0, 2048), slice(2048, 4096)])
@pytest.mark.parametrize("lowest", [-math.inf, torch.finfo(torch.float32).min])
def test_a_part_masked_in_all_networks(lowest, part, at):
    logits, teachers, target = few(torch.float32, at)
    with torch.no_grad():
        for z in (*logits, *teachers):
            z[:, part] = lowest
    target[:] = 4607
    loss, grads = loss_and_grads(logits, target, teachers=teachers, ce_weight=0.5)
    exact, exact_grads = in_float64(logits, target, teachers=teachers, ce_weight=0.5)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    for grad, expected in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(grad.double(), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("temperature", [1.0, 3.0, 7.3])
def test_equal_networks_are_exactly_0_apart(temperature, at):
    logits, _, _ = few(torch.float32, at, m=1, n=0)
    same = [logits[0].detach().clone().requires_grad_() for _ in range(3)]
    loss, grads = loss_and_grads(same, None, temperature=temperature, reduction="none")
    assert float(loss.abs().max()) == 0 and all(float(g.abs().max()) == 0 for g in grads)


def test_every_schedule_gives_the_same_bits(at, simt):
    from simt.fixtures import in_every_schedule

    logits, teachers, target = few(torch.bfloat16, at)
    results = in_every_schedule(simt, lambda: loss_and_grads(logits, target, teachers=teachers, ce_weight=0.5))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(a, b) for a, b in zip(grads, results[0][1], strict=True))
