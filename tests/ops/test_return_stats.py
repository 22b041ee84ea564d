"""multi_teacher_kd(return_stats=True): the statistics of the same pass are those of the separate functions."""

import math

import pytest
import torch
from conftest import PLACES
from multi_teacher_helpers import raw
from torch.utils._python_dispatch import TorchDispatchMode

import fastkd
from fastkd import _backend
from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES, Case, over

F = fastkd.functional


def make(rows, classes, k, dtype=torch.float32, teacher_dtype=None, device="cpu"):
    """Student [R, C], teachers K x [R, C], target [R] with an ignored row, on the device."""
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * 3 for _ in range(k + 1)]
    target = torch.randint(0, classes, (rows,), generator=g)
    target[1:2] = -100
    student = logits[0].to(device, dtype).requires_grad_()
    return student, [t.to(device, teacher_dtype or dtype) for t in logits[1:]], target.to(device)


def close(a, b):
    """Equal, but for the order of a sum."""
    if not a.is_floating_point():
        assert torch.equal(a, b)
    else:
        eps = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=32 * eps, atol=32 * eps, equal_nan=True)


def bits(a, b):
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def check(place, student, teachers, target, **options):
    """Against group_stats, and each KL against the loss of that teacher alone; the loss as without statistics."""
    loss, stats = F.multi_teacher_kd(student, teachers, target, return_stats=True, **options)
    plain = F.multi_teacher_kd(student, teachers, target, **options)
    bits(loss, plain)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (loss, plain)]
    bits(*gradients)
    equal = bits if place == "cpu" else close
    for mine, networks in ((stats.student, [student]), (stats.teachers, teachers)):
        for a, b in zip(mine, F.group_stats(networks, target), strict=True):
            assert a.shape == b.shape and a.dtype == loss.dtype if a.is_floating_point() else a.dtype == b.dtype
            equal(a, b)
    temperature = options.get("temperature", 4.0)
    for k, teacher in enumerate(teachers):
        t = temperature[k] if isinstance(temperature, list) else temperature
        alone = F.multi_teacher_kd(student, [teacher], target, temperature=t, scale_by_t2=False)
        torch.testing.assert_close(stats.kl[k], alone.detach(), rtol=4e-6, atol=1e-6)
    assert stats.kl.shape == (len(teachers),) and not stats.kl.requires_grad
    assert not any(x.requires_grad for x in (*stats.student, *stats.teachers))
    return stats


CASES = [
    Case("one teacher", dict(k=1)),
    Case("33 classes, labels", dict(classes=33, ce_weight=0.5)),
    Case("a block per row", dict(classes=300, ce_weight=0.5, label_smoothing=0.1)),
    Case("1000 classes, none", dict(classes=1000, rows=3, reduction="none", ce_weight=1.0)),
    Case("no labels", dict(labels=False)),
    Case("a temperature per teacher", dict(temperature=[1.0, 2.0, 4.5], weights=[0.0, 1.0, -1.0])),
    Case("probs", dict(combine="probs", weights=[0.2, 0.0, 0.5], temperature=2.0)),
    Case("logits", dict(combine="logits", weights=[0.2, 0.0, -0.5])),
    Case("logits, 300 classes", dict(combine="logits", classes=300)),
    Case("sum", dict(reduction="sum")),
]


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    arguments = dict(rows=5, classes=50, k=3, labels=True) | case.arguments
    rows, classes, k, labels = (arguments.pop(name) for name in ("rows", "classes", "k", "labels"))
    student, teachers, target = make(rows, classes, k, dtype, device=at(place))
    check(place, student, teachers, target if labels else None, **arguments)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_float32_teachers_of_a_half_precision_student(dtype, place, at):
    student, teachers, target = make(5, 100, 3, dtype, torch.float32, device=at(place))
    check(place, student, teachers, target, ce_weight=0.5)


@pytest.mark.parametrize("place", PLACES)
def test_masks_nan_and_layouts(place, at):
    student, teachers, target = make(6, 40, 2, device=at(place))
    target[:] = torch.tensor([0, -100, 7, 9, 11, 2])
    with torch.no_grad():
        for z in (student, *teachers):
            z[0, 5:9] = -math.inf
        teachers[1][2] = math.nan
        teachers[0][1] = math.nan  # in an ignored row
    stack = torch.stack(teachers)
    loss, stats = F.multi_teacher_kd(student, stack.mT.contiguous().mT, target, return_stats=True)
    assert loss.isnan() and stats.kl.isnan().tolist() == [False, True]
    assert stats.teachers.label_rank[1, 2] == 40 and stats.teachers.label_rank[0, 1] == -1
    for a, b in zip(stats.teachers, F.group_stats(teachers, target), strict=True):
        close(a, b)


@pytest.mark.usefixtures("values_unreadable")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_target_that_cannot_be_checked(backend, place, at):
    device = at(place)
    student, target = torch.randn(4, 6, device=device, requires_grad=True), torch.tensor([0, 9, 2, -100], device=device)
    with fastkd.use_backend(backend):
        loss, stats = F.multi_teacher_kd(
            student, torch.randn(2, 4, 6, device=device), target, return_stats=True, reduction="none"
        )
        assert loss.isnan().tolist() == [False, True, False, False]
        assert stats.kl.isnan().all() and stats.student.ce.isnan().tolist() == [[False, True, False, True]]


@pytest.mark.parametrize("place", PLACES)
def test_all_rows_ignored_and_the_empty_batch(place, at):
    student, teachers, target = make(4, 20, 2, device=at(place))
    stats = check(place, student, teachers, torch.full_like(target, -100), ce_weight=0.5)
    assert stats.kl.tolist() == [0, 0] and stats.student.entropy.isfinite().all()
    student, teachers, target = make(0, 20, 2, device=student.device)
    stats = check(place, student, teachers, target)
    assert stats.kl.tolist() == [0, 0] and stats.teachers.ce.shape == (2, 0)


class Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(function.name())
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("combine", COMBINE)
def test_no_second_read(combine, place, at):
    student, teachers, target = make(6, 40, 2, device=at(place))
    with Recorder() as recorder:
        F.multi_teacher_kd(student, teachers, target, combine=combine, return_stats=True)
    kernels = [name for name in recorder.names if name.startswith("fastkd")]
    assert [name.split("::")[1] for name in kernels] == ["multi_teacher_forward_stats"]


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_more_teachers_than_a_launch_takes(place, at):
    student, teachers, target = make(3, 20, 18, device=at(place))
    check(place, student, teachers, target)


@pytest.mark.parametrize("classes", [4096, 8192, 8200])
def test_long_rows_on_cuda(classes, at):
    """The last is streamed: there the statistics are a second read."""
    student, teachers, target = make(2, classes, 2, device=at("simt"))
    check("simt", student, teachers, target, ce_weight=0.5)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("classes", [100, 1000])
def test_every_schedule_gives_the_same_bits(classes, combine, at, simt):
    from simt.fixtures import in_every_schedule

    student, teachers, target = make(5, classes, 2, device=at("simt"))

    def run():
        loss, stats = F.multi_teacher_kd(student, teachers, target, combine=combine, return_stats=True)
        return loss, stats.kl, *stats.student, *stats.teachers

    first, *others = in_every_schedule(simt, run)
    for result in others:
        for a, b in zip(result, first, strict=True):
            bits(a, b)


def test_same_bits_for_any_number_of_threads():
    student, teachers, target = make(40000, 3, 1)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            loss, stats = F.multi_teacher_kd(student, teachers, target, return_stats=True)
            results.append((loss, stats.kl, *stats.student, *stats.teachers))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        for a, b in zip(result, results[0], strict=True):
            bits(a, b)


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_opcheck(dtype, place, at):
    student, teachers, target = make(5, 40, 2, dtype, device=at(place))
    target[1] = 3  # an ignored row's NaN is a difference to opcheck
    tensors, scalars, numbers = raw(student.detach(), teachers, target, ce_weight=0.5, label_smoothing=0.1)
    tensors.pop(3)  # no soft targets
    ops = _backend.native_ops(student)
    for need_grad in (True, False):
        torch.library.opcheck(ops.multi_teacher_forward_stats.default, (*tensors, scalars, *numbers, need_grad))


def test_compile_double_backward_and_modes():
    student, teachers, target = make(4, 9, 2)

    def run(s):
        loss, stats = F.multi_teacher_kd(s * 1.5, teachers, target, ce_weight=0.5, return_stats=True)
        return loss, stats.kl, *stats.student, *stats.teachers

    expected = run(student)
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")(student)
    for a, b in zip(compiled, expected, strict=True):
        bits(a, b)
    bits(*(torch.autograd.grad(x[0], student)[0] for x in (compiled, run(student))))
    double = student.detach().double().requires_grad_()
    teachers = [t.double() for t in teachers]
    assert torch.autograd.gradgradcheck(lambda s: run(s)[0], double)
    value, tangent = torch.func.jvp(lambda s: run(s)[1], (double.detach(),), (torch.ones_like(double),))
    assert float(tangent.abs().max()) == 0
    torch.testing.assert_close(value, run(double)[1])
    with torch.inference_mode():
        assert run(double)[1].is_inference()


@pytest.mark.parametrize("place", PLACES)
def test_beside_soft_labels(place, at):
    """The label is the most probable class, the cross-entropy that with the probabilities: by a second read."""
    student, teachers, _ = make(4, 20, 2, device=at(place))
    soft = torch.softmax(torch.randn(4, 20, generator=torch.Generator().manual_seed(1)), -1).to(student.device)
    mask = torch.tensor([True, True, False, True], device=student.device)
    loss, terms, stats = F.multi_teacher_kd(
        student, teachers, soft, ce_weight=0.5, mask=mask, return_terms=True, return_stats=True
    )
    close(loss, F.multi_teacher_kd(student, teachers, soft, ce_weight=0.5, mask=mask))
    for mine, networks in ((stats.student, [student]), (stats.teachers, teachers)):
        for a, b in zip(mine, F.group_stats(networks, soft, mask=mask), strict=True):
            close(a, b)
    torch.testing.assert_close(stats.student.ce[0][mask].mean(), terms.ce)
    torch.testing.assert_close(16 * stats.kl.mean(), terms.kd)
