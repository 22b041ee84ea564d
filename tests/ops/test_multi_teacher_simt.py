"""multi_teacher_kd: the CUDA kernels for long rows in whole vectors, several vectors of a thread."""

import math

import pytest
import torch
from multi_teacher_helpers import check, in_float64, loss_and_grad, make, raw

import fastkd

F = fastkd.functional
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0, 3.0, 0.7])
def test_rows_of_several_vectors_a_thread(temperature, k, dtype, at):
    student, teachers, target = make(3, 6400, k, dtype, device=at("simt_stream"), seed=k)
    target[1] = -100
    check(student, teachers, target, temperature=temperature, ce_weight=0.5)


def test_sixteen_teachers_in_double_fit_the_smallest_shared_memory(at, simt):
    """99 KiB of a block, as GPUs of compute capability 8.6, 8.9 and 12.0 have."""
    simt.set_device(shared_optin=99 << 10)
    student, teachers, target = make(2, 2100, 16, torch.float64, device=at("simt_stream"))
    check(student, teachers, target, temperature=2.0, ce_weight=0.5)


@pytest.mark.parametrize("dtype", DTYPES)
def test_without_labels(dtype, at):
    student, teachers, _ = make(2, 2056, 2, dtype, device=at("simt_stream"))
    check(student, teachers, temperature=2.0, reduction="none")


@pytest.mark.parametrize("scale", [1e-3, 30.0, 1000.0])
def test_near_equal_confident_and_large_logits(scale, at):
    student, teachers, target = make(3, 3200, 2, scale=scale, device=at("simt_stream"))
    check(student, teachers, target, ce_weight=0.5, reduction="none")
    check(student, [student.detach() * 1.001, teachers[0] + 1000], target, ce_weight=0.5)


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("temperature", [1.0, 3.0, 4.0, 7.3])
def test_equal_networks_are_exactly_0_apart(temperature, k, at):
    student, _, _ = make(2, 4096, 1, device=at("simt_stream"))
    teacher = student.detach().clone()
    loss, grad = loss_and_grad(student, [teacher] * k, temperature=temperature, reduction="none")
    assert float(loss.abs().max()) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("wide", [False, True])  # a teacher of another dtype takes the kernel for any row
@pytest.mark.parametrize("masked", ["student", "teacher", "both"])
@pytest.mark.parametrize("part", [slice(0, 2048), slice(2048, 4096), slice(0, 4096, 4)])
def test_parts_masked_by_the_most_negative_number(part, masked, wide, at):
    """Of a whole pass of all threads too: their maximum so far is that number, and all of it is given up later."""
    student, teachers, target = make(2, 4096, 2, device=at("simt_stream"))
    lowest = torch.finfo(torch.float32).min
    with torch.no_grad():
        for z in (student, *teachers) if masked == "both" else teachers if masked == "teacher" else (student,):
            z[:, part] = lowest
    target[:] = 4095
    teachers = [t.double() if wide else t for t in teachers]
    loss, grad = loss_and_grad(student, teachers, target, ce_weight=0.5, reduction="none")
    exact, exact_grad = in_float64(student, teachers, target, ce_weight=0.5, reduction="none")
    if masked == "student":  # the teachers' part of the masked classes times 3e38
        assert bool((loss > 1e38).all()) and bool((exact > 1e38).all())
    else:
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("logit", [0.0, -1000.0])
def test_only_the_student_is_minus_infinity(logit, at):
    """Infinite, also where the teacher's exponential is 0 in float32."""
    student, teachers, target = make(2, 2048, 1, device=at("simt_stream"))
    with torch.no_grad():
        student[0, 77] = -math.inf
        teachers[0][0, 77] = logit
        student[:, 300:310] = -math.inf
        teachers[0][:, 300:310] = -math.inf
    target[:] = 5
    loss, _ = loss_and_grad(student, teachers, target, ce_weight=0.5, reduction="none")
    assert loss[0] == math.inf and bool(loss[1].isfinite())


def test_a_teacher_of_weight_0_is_not_read(at):
    student, teachers, target = make(3, 2048, 3, device=at("simt_stream"))
    weights = torch.tensor([[0.2, 0.0, 0.0], [0.5, 0.3, 0.0], [0.0, 0.7, 0.0]])
    unread = [t.masked_fill(w[:, None] == 0, math.nan) for t, w in zip(teachers, weights, strict=True)]
    loss, grad = loss_and_grad(student, unread, target, weights=weights, ce_weight=0.5, reduction="none")
    expected = loss_and_grad(student, teachers, target, weights=weights, ce_weight=0.5, reduction="none")
    assert torch.equal(loss, expected[0]) and torch.equal(grad, expected[1])
    check(student, teachers, target, weights=weights, ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("dtype", DTYPES)
def test_states_are_those_of_the_kernel_for_any_row(dtype, at):
    """A teacher of another dtype takes that kernel; the backward of either reads what the other saved."""
    student, teachers, target = make(3, 2560, 2, dtype, device=at("simt_stream"))
    assert fastkd._backend.machine.stream_always
    results = []
    for wide in (False, True):
        mixed = [t.double() if wide else t for t in teachers]
        tensors, scalars, numbers = raw(student, mixed, target, ce_weight=0.5)
        ops = fastkd._backend.native_ops(student)
        results.append(ops.multi_teacher_forward(*tensors, scalars, *numbers, True, True))
    for one, other in zip(results[0], results[1], strict=True):
        torch.testing.assert_close(one, other, rtol=2e-5, atol=2e-5)


def test_every_schedule_gives_the_same_bits(at, simt):
    from simt.fixtures import in_every_schedule

    student, teachers, target = make(3, 2560, 3, torch.bfloat16, device=at("simt_stream"))
    results = in_every_schedule(simt, lambda: loss_and_grad(student, teachers, target, ce_weight=0.5))
    for loss, grad in results[1:]:
        assert torch.equal(loss, results[0][0]) and torch.equal(grad, results[0][1])


@pytest.mark.parametrize("classes, launches", [(1024, 2), (6400, 3)])
def test_few_rows_are_split_over_blocks(classes, launches, at, simt):
    student, teachers, target = make(2, classes, 2, device=at("simt_stream"))
    simt.reset_counters()
    options = dict(ce_weight=0.5, reduction="none")
    loss = F.multi_teacher_kd(student.detach(), teachers, target, **options)
    assert simt.counters()["launches"] == launches  # rows, then with parts their merge, and the sum over rows
    whole = F.multi_teacher_kd(student.detach().double(), teachers, target, **options)
    torch.testing.assert_close(loss.double(), whole, rtol=1e-5, atol=1e-6)
