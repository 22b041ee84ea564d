"""The CPU kernel of sparse teachers: precision, rows that are sure or masked, reductions, layouts, autograd."""

import math

import pytest
import torch

import fastkd
from fastkd import TopK, _backend
from fastkd.functional import multi_teacher_kd
from fastkd.ops import _topk_formula as formula
from fastkd.ops.topk import MODES

ROWS, CLASSES, K = 5, 1003, 7  # no multiple of a register
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def native_alone():
    with fastkd.use_backend("native"):
        yield


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def teacher_of(mode, seed=1, sure=0.0, rows=ROWS):
    logits = 3 * randn(rows, CLASSES, seed=seed)
    logits[:, 11] += sure
    log_p = logits.log_softmax(-1)
    values, ids = log_p.topk(K)
    tail = log_p.scatter(1, ids, -math.inf).logsumexp(-1)
    return TopK(ids, values, mode=mode, tail_log_prob=tail if mode == "tail" else None)


def exact(z, teacher, weight=1.0, t=1.0):
    """Values [R] and gradients of the weighted sum, in float64, by the formula."""
    entries = formula.entries_of(teacher.mode, teacher.ids, teacher.log_probs, teacher.tail_log_prob, t)
    value, gradient = formula.divergence_and_gradient(teacher.mode, entries, z.detach().double() / t)
    weight = torch.as_tensor(weight, dtype=torch.float64).expand(len(value))
    return t * t * weight * value, t * weight[:, None] * gradient


@pytest.mark.parametrize("sure", [0.0, 25.0])
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_values_and_gradients_against_float64(mode, dtype, sure):
    z = 3 * randn(ROWS, CLASSES)
    z[:, 11] += sure
    z, teacher = z.to(dtype).requires_grad_(), teacher_of(mode, sure=sure)
    loss = multi_teacher_kd(z, teacher, temperature=1.0, reduction="none")
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    value, right = exact(z, teacher)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and gradient.dtype == dtype
    torch.testing.assert_close(loss.double(), value, rtol=1e-6, atol=1e-6 if dtype != torch.float64 else 1e-13)
    # The gradient is a difference of probabilities. Each is rounded by itself and by its exponent, the result again.
    entries = formula.entries_of(mode, teacher.ids, teacher.log_probs, teacher.tail_log_prob)
    terms = z.detach().double().softmax(-1).scatter_add(1, entries.ids, entries.log_p.exp())
    if mode == "both":
        terms = terms + right.abs().amax(-1, keepdim=True)
    if mode == "tail":
        terms = terms + formula._outside(entries, z.detach().double())[0].softmax(-1) * entries.tail().exp()[:, None]
    below = z.detach().double().amax(-1, keepdim=True) - z.detach().double()
    rounding = torch.finfo(loss.dtype).eps * (8 + below)
    error = (gradient.double() - right).abs()
    smallest = 1e-7 if dtype == torch.float16 else 0
    assert bool((error <= torch.finfo(dtype).eps * right.abs() + rounding * terms + smallest).all())


@pytest.mark.parametrize("gap", [20, 40, 80, 95, 300])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_tail_of_a_student_that_is_sure_has_its_digits(dtype, gap):
    """Also where e^-gap is no float32, and where the sum of all exponentials does not see it."""
    z = randn(ROWS, CLASSES)
    z[:, :3] += gap
    z = z.to(dtype).requires_grad_()
    ids = torch.arange(3).expand(ROWS, 3)
    log_q = z.detach().double().log_softmax(-1)
    log_tail = log_q[:, 3:].logsumexp(-1)
    teacher = TopK(ids, torch.full((ROWS, 3), math.log(0.3)), tail_log_prob=torch.full((ROWS,), math.log(0.1)))
    loss = multi_teacher_kd(z, teacher, temperature=1.0, reduction="none")
    value, right = exact(z, teacher)
    got = (math.log(0.1) - (loss.double() - (value - 0.1 * (math.log(0.1) - log_tail))) / 0.1).detach()
    assert bool((got - log_tail).abs().le(1e-4).all())
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    close = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 4e-3}[dtype]
    torch.testing.assert_close(gradient[:, 3:].double(), right[:, 3:], rtol=close, atol=0)


@pytest.mark.parametrize("mode", MODES)
def test_masked_classes(mode):
    z = randn(ROWS, CLASSES)
    teacher = teacher_of(mode)
    outside = torch.ones(ROWS, CLASSES, dtype=torch.bool).scatter(1, teacher.ids, False)
    z[0] = z[0].masked_fill(outside[0], -math.inf)  # nothing outside
    z[1, outside[1].nonzero()[:9, 0]] = -math.inf
    z[2, teacher.ids[2, 3]] = -math.inf  # infinitely far from the teacher
    z = z.float().requires_grad_()
    loss = multi_teacher_kd(z, teacher, temperature=1.0, reduction="none")
    value, right = exact(z, teacher)
    torch.testing.assert_close(loss.double(), value, rtol=1e-5, atol=1e-5)
    assert loss[2] == math.inf and bool(loss[[0, 1, 3, 4]].isfinite().all())
    (gradient,) = torch.autograd.grad(loss.sum(), z)
    torch.testing.assert_close(gradient[[0, 1, 3, 4]].double(), right[[0, 1, 3, 4]], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("mode", MODES)
def test_rows_of_weight_0_are_not_read_and_nan_stays_in_its_row(mode):
    z = randn(ROWS, CLASSES).float()
    z[1], z[3] = math.nan, math.nan
    teacher, weights = teacher_of(mode), torch.tensor([[1.0, 0.0, 2.0, 1.0, 0.5]])
    z.requires_grad_()
    loss = multi_teacher_kd(z, [teacher], weights=weights, temperature=1.0, reduction="none")
    assert loss[1] == 0 and loss[3].isnan() and bool(loss[[0, 2, 4]].isfinite().all())
    (gradient,) = torch.autograd.grad(loss[[0, 1, 2, 4]].sum(), z)
    value, right = exact(z, teacher, weights[0])
    torch.testing.assert_close(loss[[0, 2, 4]].double(), value[[0, 2, 4]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradient[[0, 2, 4]].double(), right[[0, 2, 4]], rtol=1e-4, atol=1e-6)
    assert not bool(gradient[1].any())


@pytest.mark.parametrize("mode, t", [("teacher", 2.0), ("both", 0.5), ("tail", 1.0)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduction, items", [("none", None), ("sum", None), ("mean", None), ("mean", 3.5)])
def test_reductions_factors_and_labels(mode, t, dtype, reduction, items):
    z, teacher = randn(ROWS, CLASSES).to(dtype).requires_grad_(), teacher_of(mode)
    target = torch.tensor([3, -100, 5, 7, 2])
    counts = target != -100
    options = {"reduction": reduction, "num_items": items, "temperature": t, "kd_weight": 0.7}
    loss = multi_teacher_kd(z, teacher, target, **options)
    value, right = exact(z, teacher, 0.7 * counts.double(), t)
    divisor = items if items else 4 if reduction == "mean" else 1
    expected = value if reduction == "none" else value.sum() / divisor
    close = dict(rtol=1e-6, atol=1e-6) if dtype != torch.float64 else dict(rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss.double(), expected, **close)
    upstream = (
        torch.linspace(0.5, 2, ROWS, dtype=loss.dtype) if reduction == "none" else torch.tensor(1.5, dtype=loss.dtype)
    )
    expected = right * (upstream.double()[:, None] if reduction == "none" else 1.5 / divisor)
    for kept in (True, False):  # the gradient that is stored is still right the second time
        (gradient,) = torch.autograd.grad((loss * upstream).sum(), z, retain_graph=kept)
        eps = torch.finfo(dtype).eps
        close = {"rtol": 4 * eps, "atol": 4 * eps * 1e-2} if dtype != torch.float64 else {"rtol": 1e-13, "atol": 1e-15}
        torch.testing.assert_close(gradient.double(), expected, **close)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.sum().backward()


def test_float16_gradients_of_many_rows_do_not_underflow():
    rows = 4096
    z = randn(rows, 40).half().requires_grad_()
    values, ids = randn(rows, 40, seed=1).log_softmax(-1).topk(3)
    teacher = TopK(ids, values, mode="teacher")
    loss = multi_teacher_kd(z, teacher, temperature=1.0)
    (gradient,) = torch.autograd.grad(1024 * loss, z)
    right = 1024 * exact(z, teacher)[1] / rows
    assert float((gradient.double() - right).norm() / right.norm()) < 1e-3


def test_layouts_are_read_as_they_lie():
    teacher = teacher_of("tail")
    z = randn(ROWS, CLASSES).float()
    expected = multi_teacher_kd(z, teacher, temperature=1.0)
    maps = z.t().contiguous()[None].requires_grad_()  # [1, C, R], classes not next to each other
    parts = TopK(teacher.ids[None], teacher.log_probs[None], tail_log_prob=teacher.tail_log_prob[None])
    loss = multi_teacher_kd(maps, parts, temperature=1.0, class_dim=1)
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, maps)
    torch.testing.assert_close(gradient[0].t().double(), exact(z, teacher)[1] / ROWS, rtol=1e-4, atol=1e-7)
    wide = torch.cat([z, z], 1).requires_grad_()
    torch.testing.assert_close(multi_teacher_kd(wide[:, :CLASSES], teacher, temperature=1.0), expected)


def test_ids_that_nobody_could_check_give_nan():
    z, teacher = randn(ROWS, CLASSES).float().requires_grad_(), teacher_of("tail")
    ids = teacher.ids.clone()
    ids[1, 2] = CLASSES
    with _backend.pretend(values_readable=False):
        loss = multi_teacher_kd(z, TopK(ids, teacher.log_probs), temperature=1.0, reduction="none")
    assert loss.isnan().tolist() == [False, True, False, False, False]
    (gradient,) = torch.autograd.grad(loss[[0, 2]].sum(), z)
    assert bool(gradient[[0, 2]].isfinite().all())


def test_what_has_no_kernel_says_so():
    z, teacher = randn(ROWS, CLASSES).float().requires_grad_(), teacher_of("teacher")
    weights = torch.ones(1, requires_grad=True)
    for options, reason in (({"weights": weights}, "weights require grad"), ({"kd_weight": weights[0]}, "kd_weight")):
        with pytest.raises(RuntimeError, match=reason):
            multi_teacher_kd(z, [teacher], temperature=1.0, **options)
        with fastkd.use_backend("auto"):
            explained = fastkd.explain(multi_teacher_kd, z, [teacher], temperature=1.0, **options)
            assert explained.backend == "reference" and reason in explained.reason
    with _backend.pretend(cpu_kind="cuda"), pytest.raises(RuntimeError, match="a kernel of the CPU alone"):
        multi_teacher_kd(z, [teacher], temperature=1.0)
    with fastkd.use_backend("auto"):
        assert fastkd.explain(multi_teacher_kd, z, teacher, temperature=1.0).backend == "native"


def test_a_label_out_of_range_raises_also_where_it_has_no_weight():
    with pytest.raises((ValueError, IndexError), match="target"):
        multi_teacher_kd(randn(ROWS, CLASSES), teacher_of("tail"), torch.full((ROWS,), CLASSES), temperature=1.0,
                         ce_weight=0.1)  # fmt: skip


def test_the_inputs_may_change_before_the_backward_but_not_before_a_second_derivative():
    z, teacher = randn(ROWS, CLASSES).requires_grad_(), teacher_of("tail")
    x = z * 1
    loss = multi_teacher_kd(x, teacher, temperature=1.0)
    right = exact(z, teacher)[1] / ROWS
    x.detach().zero_()
    torch.testing.assert_close(torch.autograd.grad(loss, z, retain_graph=True)[0], right)
    with pytest.raises(RuntimeError, match="second derivative"):
        torch.autograd.grad(loss, z, create_graph=True)


def test_threads_give_the_same_bits():
    z, teacher = randn(64, CLASSES).float().requires_grad_(), teacher_of("tail", rows=64)
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        loss = multi_teacher_kd(z, teacher, temperature=1.0)
        found.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
