"""Sparse teachers: the five divergences typed again, tails, absent and repeated entries, beside dense teachers."""

import math

import pytest
import torch

import fastkd
from fastkd import TopK, _backend
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd
from fastkd.ops.topk import MODES

ROWS, CLASSES, K = 9, 40, 5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True, params=["auto", "reference"])
def backend(request):
    """By the kernel, and by the formula in plain PyTorch."""
    with fastkd.use_backend(request.param):
        yield request.param


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def top(logits, k=K):
    """ids, log-probabilities of the teacher's k largest classes, as a server sends them."""
    values, ids = logits.log_softmax(-1).topk(k)
    return ids, values


def dense(ids, values, classes=CLASSES):
    return torch.zeros(len(ids), classes, dtype=torch.float64).scatter_add(1, ids, values.double().exp())


def typed(mode, z, ids, values, t=1.0):
    """Row by row from the definitions, on dense probabilities."""
    losses = []
    for row in range(len(z)):
        p, log_q = dense(ids[row : row + 1], values[row : row + 1])[0], torch.log_softmax(z[row] / t, 0)
        inside = p > 0
        p, rest = p[inside], torch.logsumexp(log_q[~inside], 0)
        log_q = log_q[inside]
        if mode in ("teacher", "both"):
            p = p ** (1 / t) / (p ** (1 / t)).sum()
        if mode == "both":
            log_q = log_q - torch.logsumexp(log_q, 0)
        loss = -(p * log_q).sum() if mode == "sampled" else (p * (p.log() - log_q)).sum()
        if mode == "tail":
            tail = 1 - p.sum()
            loss = loss + tail * (tail.log() - rest)
        losses.append(t * t * loss)
    return torch.stack(losses)


def gradients(loss, inputs):
    weight = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad((loss * weight).sum(), inputs)


@pytest.mark.parametrize("mode, temperature", [*((mode, 1.0) for mode in MODES), ("teacher", 2.0), ("both", 0.5)])
def test_is_what_its_definition_says(mode, temperature):
    z = randn(ROWS, CLASSES).requires_grad_()
    ids, values = top(randn(ROWS, CLASSES, seed=1))
    loss = multi_teacher_kd(z, TopK(ids, values, mode=mode), temperature=temperature, reduction="none")
    expected = typed(mode, z, ids, values, temperature)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    torch.testing.assert_close(gradients(loss, [z]), gradients(expected, [z]), rtol=1e-10, atol=1e-13)
    eye = torch.eye(CLASSES, dtype=torch.float64).requires_grad_()
    linear = linear_multi_teacher_kd(
        z, eye, TopK(ids.int(), values, mode=mode), temperature=temperature, reduction="none", chunk_rows=4
    )  # fmt: skip
    torch.testing.assert_close(linear, expected, rtol=1e-11, atol=1e-13)
    got, right = gradients(linear, [z, eye]), gradients(typed(mode, z @ eye.T, ids, values, temperature), [z, eye])
    torch.testing.assert_close(got, right, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_absent_and_repeated_entries(mode):
    z = randn(ROWS, CLASSES)
    ids, values = top(randn(ROWS, CLASSES, seed=1))
    expected = typed(mode, z, ids, values)
    half = values - math.log(2)
    padding = torch.zeros(ROWS, 1, dtype=ids.dtype), torch.full((ROWS, 1), -1e9, dtype=values.dtype)
    more = torch.cat([ids, padding[0], ids, padding[0] - 1], 1)
    numbers = torch.cat([half, padding[1], half, torch.zeros_like(padding[1])], 1)
    shuffled = torch.randperm(more.shape[1], generator=torch.Generator().manual_seed(0))
    more, numbers = more[:, shuffled], numbers[:, shuffled]
    got = multi_teacher_kd(z, TopK(more, numbers, mode=mode), temperature=1.0, reduction="none")
    torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-13)
    infinite = numbers.masked_fill(numbers <= -1e3, -math.inf)
    again = multi_teacher_kd(z, TopK(more, infinite, mode=mode), temperature=1.0, reduction="none")
    torch.testing.assert_close(again, expected, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("mode", MODES)
def test_a_row_without_entries_is_0(mode):
    ids, values = top(randn(ROWS, CLASSES, seed=1))
    ids[2] = -1
    for call in (multi_teacher_kd, linear_multi_teacher_kd):
        z = randn(ROWS, CLASSES).requires_grad_()
        first = (z,) if call is multi_teacher_kd else (z, torch.eye(CLASSES, dtype=torch.float64))
        loss = call(*first, TopK(ids, values, mode=mode), temperature=1.0, reduction="none")
        (gradient,) = torch.autograd.grad(loss.sum(), z)
        assert loss[2] == 0 and not bool(gradient[2].any()) and bool(gradient[3].any())


def test_both_takes_logits_and_is_0_for_one_class():
    z = randn(ROWS, CLASSES)
    teacher = randn(ROWS, CLASSES, seed=1)
    logits, ids = teacher.topk(K)
    got = multi_teacher_kd(z, TopK(ids, logits + 3, mode="both"), temperature=1.0)
    expected = multi_teacher_kd(z, TopK(*top(teacher), mode="both"), temperature=1.0)
    torch.testing.assert_close(got, expected)
    assert multi_teacher_kd(z, TopK(ids[:, :1], logits[:, :1], mode="both"), temperature=1.0) == 0


def test_sampled_counts_draws():
    z = randn(1, CLASSES)
    ids = torch.tensor([[3, 3, 5, 7]])
    log_q = torch.log_softmax(z[0], 0)
    got = multi_teacher_kd(z, TopK(ids, mode="sampled"), temperature=1.0)
    torch.testing.assert_close(got, -(log_q[3] / 2 + log_q[5] / 4 + log_q[7] / 4))


@pytest.mark.parametrize("tail", [1e-3, 1e-6, 1e-9, 1e-12])
def test_the_tails_are_right_in_float32(tail):
    """1 - sum in float32 has no digit of these left."""
    classes = 1000
    z = torch.full((1, classes), math.log(tail / (classes - 3)))
    z[0, :3] = math.log((1 - tail) / 3)
    z += randn(1, classes).float() * 0.3
    exact = torch.log_softmax(z.double(), -1)
    log_tail = exact[:, 3:].logsumexp(-1)
    ids, values = torch.arange(3)[None], exact[:, :3]
    # With the teacher's tail e times the student's, the loss's tail term is its tail.
    teacher = TopK(ids, values, tail_log_prob=log_tail + 1)
    student = z.requires_grad_()
    loss = multi_teacher_kd(student, teacher, temperature=1.0)
    (gradient,) = torch.autograd.grad(loss, student)
    right = (values.exp().sum() + torch.e * log_tail.exp()) * exact.exp()
    right[:, :3] -= values.exp()
    right[:, 3:] -= torch.e * log_tail.exp() * (exact[:, 3:] - log_tail[:, None]).exp()
    assert float((gradient[:, 3:] - right[:, 3:]).norm() / right[:, 3:].norm()) < 1e-4
    from fastkd.ops import _topk_formula as formula

    entries = formula.entries_of("tail", ids, values, None)
    assert abs(float(entries.log_tail - log_tail)) < 1e-3  # 1 - sum of float64 values: 1e-16 / 1e-12
    found = formula._outside(entries, z.detach())[1] - z.detach().logsumexp(-1)
    assert abs(float(found - log_tail)) < 1e-4


def test_half_precision_values_and_a_sum_above_1():
    ids = torch.tensor([[0, 1, 2]])
    values = torch.tensor([[0.5, 0.25, 0.252]]).log().half()
    z = torch.randn(1, 6, dtype=torch.float16, requires_grad=True)
    loss = multi_teacher_kd(z, TopK(ids, values, mode="tail"), temperature=1.0)
    expected = multi_teacher_kd(z, TopK(ids, values, mode="truncate"), temperature=1.0)
    torch.testing.assert_close(loss, expected)  # nothing is left for a tail
    assert torch.autograd.grad(loss, z)[0].dtype == torch.float16


def test_all_classes_as_entries_is_the_dense_teacher():
    z, teacher = randn(ROWS, CLASSES), randn(ROWS, CLASSES, seed=1)
    expected = multi_teacher_kd(z, [teacher], temperature=1.0, reduction="none")
    for mode in ("tail", "truncate", "teacher", "both"):
        got = multi_teacher_kd(z, TopK(*top(teacher, CLASSES), mode=mode), temperature=1.0, reduction="none")
        torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_beside_dense_teachers_with_labels_weights_and_terms(reduction):
    z = randn(ROWS, CLASSES).requires_grad_()
    logits, (ids, values) = randn(ROWS, CLASSES, seed=2), top(randn(ROWS, CLASSES, seed=1))
    target = torch.arange(ROWS)
    target[1] = -100
    options = {"reduction": "none", "temperature": 1.0}
    weights = torch.linspace(0, 1, 3 * ROWS, dtype=torch.float64).reshape(3, ROWS)
    parts = [TopK(ids, values, mode="tail"), logits, TopK(ids, values, mode="both")]
    kd = sum(w * multi_teacher_kd(z, [t], target, **options) for w, t in zip(weights, parts, strict=True))
    ce = torch.nn.functional.cross_entropy(z, target, reduction="none")
    whole = 0.7 * kd + 0.3 * ce
    divide = {"none": lambda r: r, "sum": torch.sum, "mean": lambda r: r.sum() / (ROWS - 1)}[reduction]
    expected = divide(whole)
    loss, terms = multi_teacher_kd(
        z, parts, target, weights=weights, kd_weight=0.7, ce_weight=0.3, reduction=reduction, temperature=1.0,
        return_terms=True,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(terms.kd, divide(kd.detach()))
    torch.testing.assert_close(terms.ce, divide(ce.detach()))
    torch.testing.assert_close(gradients(loss, [z]), gradients(expected, [z]))
    inputs = (z, torch.eye(CLASSES, dtype=torch.float64))
    linear = linear_multi_teacher_kd(
        *inputs, parts, target, weights=weights, kd_weight=0.7, ce_weight=0.3, reduction=reduction, chunk_rows=4
    )  # fmt: skip
    torch.testing.assert_close(linear, expected)


def test_sequences_masks_and_nan_behind_them():
    z = randn(2, 3, CLASSES)
    ids, values = top(randn(6, CLASSES, seed=1))
    mask = torch.tensor([[True, True, False], [False, True, True]])
    dirty = z.masked_fill(~mask[..., None], math.nan).requires_grad_()
    teacher = TopK(ids.reshape(2, 3, K), values.reshape(2, 3, K))
    loss = multi_teacher_kd(dirty, teacher, mask=mask, temperature=1.0)
    expected = typed("tail", z.reshape(6, -1)[mask.flatten()], ids[mask.flatten()], values[mask.flatten()]).mean()
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, dirty)
    assert not bool(gradient[~mask].any()) and bool(gradient.isfinite().all())


def test_both_in_the_linear_form_makes_no_product_with_the_whole_head(monkeypatch):
    from fastkd.ops import _linear_chunks

    monkeypatch.setattr(_linear_chunks, "project", lambda *a: pytest.fail("a product with the whole head"))
    ids, values = top(randn(ROWS, CLASSES, seed=1))
    linear_multi_teacher_kd(randn(ROWS, 4), randn(CLASSES, 4), TopK(ids, values, mode="both"))


@pytest.mark.parametrize("mode", MODES)
def test_second_derivative(mode):
    z = randn(3, 8).requires_grad_()
    ids, values = top(randn(3, 8, seed=1), 3)
    teacher = TopK(ids, values, mode=mode)
    assert torch.autograd.gradgradcheck(lambda z: multi_teacher_kd(z, teacher, temperature=1.0), [z])


def test_layouts_and_statistics_that_do_not_go_with_it(backend):
    z, teacher = randn(ROWS, CLASSES), TopK(*top(randn(ROWS, CLASSES, seed=1)))
    for options in ({"return_stats": True}, {"combine": "probs"}, {"temperature": 4.0}):
        with pytest.raises(ValueError, match=r"^multi_teacher_kd: "):
            multi_teacher_kd(z, [teacher], **{"temperature": 1.0} | options)
    explained = fastkd.explain(multi_teacher_kd, z, [teacher], temperature=1.0)
    assert explained.backend == {"auto": "native", "reference": "reference"}[backend]


def test_compiles_as_one_graph():
    torch._dynamo.reset()
    ids, values = top(randn(ROWS, CLASSES, seed=1))
    call = lambda z: multi_teacher_kd(z, [TopK(ids, values)], temperature=1.0)  # noqa: E731
    z = randn(ROWS, CLASSES).requires_grad_()
    loss = torch.compile(call, backend="aot_eager", fullgraph=True)(z)
    torch.testing.assert_close(loss, call(z))
    torch.testing.assert_close(torch.autograd.grad(loss, z), torch.autograd.grad(call(z), z))


@pytest.mark.parametrize("mode", ["teacher", "both"])
@pytest.mark.parametrize("form", ["whole", "linear"])
def test_a_temperature_that_learns_has_its_gradient_at_1_too(form, mode):
    z, ids, values = randn(5, CLASSES), *top(randn(5, CLASSES, seed=1))
    weight = randn(CLASSES, CLASSES, seed=2)

    def slope(t: float) -> float:
        t = torch.tensor(t, dtype=torch.float64, requires_grad=True)
        teacher = TopK(ids, values, mode=mode)
        if form == "linear":
            loss = linear_multi_teacher_kd(z, weight, [teacher], temperature=t)
        else:
            loss = multi_teacher_kd(z, [teacher], temperature=t)
        return torch.autograd.grad(loss, t)[0].item()

    assert slope(1.0) == pytest.approx(slope(1 + 1e-9), abs=1e-6)


def test_a_tensor_of_a_temperature_compiles_as_one_graph():
    z, ids, values = randn(4, CLASSES), *top(randn(4, CLASSES, seed=1))

    def call(z, t):
        return multi_teacher_kd(z, TopK(ids, values, mode="teacher"), temperature=t)

    t = torch.tensor(2.0)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(z, t)
    torch.testing.assert_close(compiled, call(z, t))


@pytest.mark.parametrize("mode", MODES)
def test_an_id_that_nobody_could_check_makes_its_row_nan(mode, backend):
    z, ids, values = randn(4, CLASSES).requires_grad_(), *top(randn(4, CLASSES, seed=1))
    ids[2, 1] = CLASSES + 3
    teacher = TopK(ids, None if mode == "sampled" else values, mode=mode)
    with _backend.pretend(values_readable=False):
        loss = multi_teacher_kd(z, teacher, temperature=1.0, reduction="none")
    assert loss.isnan().tolist() == [False, False, True, False]
    (gradient,) = torch.autograd.grad(loss[[0, 1, 3]].sum(), z)
    assert bool(gradient[[0, 1, 3]].isfinite().all())


def test_what_is_no_probability_is_refused():
    z, ids = torch.zeros(1, 5), torch.tensor([[0, 1]])
    for values, mode, message in (
        ([math.inf, 0.0], "teacher", "must be log-probabilities, got infinity"),
        ([math.log(0.9), math.log(0.9)], "tail", "add up to at most 1 in a row, for mode='tail', got 1.8"),
        ([math.log(0.9), math.log(0.9)], "truncate", "add up to at most 1"),
    ):
        with pytest.raises(ValueError, match=message):
            multi_teacher_kd(z, TopK(ids, torch.tensor([values]), mode=mode), temperature=1.0)
    absent = TopK(torch.tensor([[0, -1]]), torch.log(torch.tensor([[0.9, 0.9]])))
    assert multi_teacher_kd(z, absent, temperature=1.0).isfinite()
    with pytest.raises(ValueError, match=r"of shape \[1, k\], k >= 1"):
        multi_teacher_kd(z, TopK(ids[0], torch.zeros(2)), temperature=1.0)
    with pytest.raises(ValueError, match=r"teacher_logit_scale must be 1\.0 where a teacher is a TopK"):
        multi_teacher_kd(z, absent, temperature=1.0, teacher_logit_scale=torch.ones(2))
