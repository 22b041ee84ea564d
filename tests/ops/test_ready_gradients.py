"""Gradients that the CUDA kernels store with the reduction's factor: the backward makes them in place, and writes
nothing where grad_output is 1.
"""

import mutual_helpers as mutual
import pytest
import torch
from multi_teacher_helpers import make, raw

import fastkd
from fastkd import _backend

F = fastkd.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16, torch.float64]
MEAN = 2
SIGNALING = 0x7F800001  # a NaN that a product would make quiet


def factor_of(student, teachers, target, **options):
    """aux[0], what the stored gradients lack."""
    tensors, scalars, numbers = raw(student, teachers, target, **options)
    _, _, _, aux = _backend.native_ops(student).multi_teacher_forward(*tensors, scalars, *numbers, True, False)
    return float(aux.detach()[0])


def gradients(loss, networks, factor):
    """Of `loss` times a factor: by a pass that keeps the graph, and by the last one."""
    first = torch.autograd.grad(loss * factor, networks, retain_graph=True)
    return first, torch.autograd.grad(loss * factor, networks)


@pytest.fixture
def small_cache(at, simt):
    """Whatever is stored does not stay in the cache, so that labels are counted first."""
    device = at("simt")
    simt.set_device(l2_bytes=8)
    return device


@pytest.mark.parametrize("options", [{}, {"num_items": 3}, {"reduction": "sum"}, {"label_smoothing": 0.1}], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
def test_multi_teacher(dtype, options, small_cache):
    student, teachers, target = make(5, 40, 2, dtype, device=small_cache)
    target[1] = -100
    loss = F.multi_teacher_kd(student, teachers, target, ce_weight=0.5, **options)
    (kept,), (last,) = gradients(loss, student, 1.0)
    assert torch.equal(kept, last)
    with fastkd.use_backend("reference"):
        loss = F.multi_teacher_kd(student, teachers, target, ce_weight=0.5, **options)
    (exact,) = torch.autograd.grad(loss, student)
    torch.testing.assert_close(last, exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_factor_of_the_caller(dtype, small_cache):
    student, teachers, target = make(4, 24, 1, dtype, device=small_cache)
    whole = torch.autograd.grad(F.multi_teacher_kd(student, teachers, target), student)[0]
    loss = F.multi_teacher_kd(student, teachers, target)
    for times in gradients(loss, student, 4.0):
        torch.testing.assert_close(times[0], 4 * whole, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_mutual(dtype, small_cache):
    logits, _, target = mutual.make(3, 4, 24, dtype=dtype, device=small_cache)
    loss = F.mutual_kd(logits, target, ce_weight=0.5)
    kept, last = gradients(loss.sum(), logits, 1.0)
    with fastkd.use_backend("reference"):
        expected = torch.autograd.grad(F.mutual_kd(logits, target, ce_weight=0.5).sum(), logits)
    for one, other, exact in zip(kept, last, expected, strict=True):
        assert torch.equal(one, other)
        torch.testing.assert_close(one, exact, rtol=2 * torch.finfo(dtype).eps, atol=2e-6)


def test_what_is_stored_has_the_factor(at, simt):
    student, teachers, target = make(4, 24, 1, device=at("simt"))
    assert factor_of(student, teachers, None) == 1  # the number of rows is known
    assert factor_of(student, teachers, target, reduction="sum") == 1
    assert factor_of(student, teachers, target, num_items=7) == 1
    assert factor_of(student, teachers, target) == 0.25  # a count of labels would cost more than it spares
    simt.set_device(l2_bytes=8)
    assert factor_of(student, teachers, target) == 1
    assert factor_of(student.half(), teachers, target) == 0.25


@pytest.mark.parametrize("grad, written", [(1.0, False), (0.5, True)])
def test_nothing_is_written_where_nothing_is_left_to_do(grad, written, at):
    device = at("simt")
    rows = torch.full((3, 8), SIGNALING, dtype=torch.int32, device=device).view(torch.float32)
    saved, aux = torch.empty(0), torch.tensor([1.0, 0.0])
    ops = _backend.native_ops(rows)
    ops.multi_teacher_backward_(torch.tensor(grad), rows, saved, aux, MEAN)
    assert bool((rows.view(torch.int32) != SIGNALING).all()) == written
    networks = torch.full((2, 3, 8), SIGNALING, dtype=torch.int32, device=device).view(torch.float32)
    ops.mutual_backward_(torch.tensor([1.0, grad]), networks, saved.view(0, 3), aux, [0, 1], MEAN)
    assert bool((networks[0].view(torch.int32) == SIGNALING).all())
    assert bool((networks[1].view(torch.int32) != SIGNALING).all()) == written


def test_the_raw_operations_in_place(at):
    at("simt")
    ops = _backend.native_ops(torch.empty(0))
    rows, aux = torch.randn(3, 8), torch.tensor([0.5, 0.0])
    torch.library.opcheck(ops.multi_teacher_backward_.default, (torch.ones(()), rows, torch.empty(0), aux, MEAN))
    arguments = (torch.ones(2), torch.randn(2, 3, 8), torch.empty(0, 3), aux, [0, 1], MEAN)
    torch.library.opcheck(ops.mutual_backward_.default, arguments)
