"""linear_multi_teacher_kd under autograd, torch.compile, torch.func, autocast and inference mode."""

import dataclasses

import pytest
import torch
from linear_helpers import CLASSES, ROWS, labels, randn, results, student, teachers_of

import fastkd
from fastkd import FallbackWarning, Head, TopK
from fastkd.functional import linear_multi_teacher_kd

pytestmark = pytest.mark.usefixtures("one_thread")


def small(*shape, seed=0):
    return randn(*shape, seed=seed).requires_grad_()


def test_first_and_second_derivative():
    teacher, head = randn(4, 2, seed=3), randn(5, 2, seed=4)
    target = torch.tensor([1, -100, 0, 3])

    def loss(hidden, weight, bias):
        return linear_multi_teacher_kd(
            hidden,
            weight,
            [(teacher, head)],
            target,
            bias=bias,
            softcap=4.0,
            temperature=2.0,
            ce_weight=0.3,
            chunk_rows=3,
        )

    inputs = small(4, 3), small(5, 3, seed=1), small(5, seed=2)
    assert torch.autograd.gradcheck(loss, inputs)
    assert torch.autograd.gradgradcheck(loss, inputs)


@pytest.mark.parametrize("reduction", ["none", "sum"])
def test_the_second_derivative_is_the_formulas(reduction):
    def penalty(inputs):
        loss = linear_multi_teacher_kd(
            *inputs[:2], teachers_of("crossed"), bias=inputs[2], reduction=reduction, chunk_rows=4
        )
        first = torch.autograd.grad(loss.pow(2).sum(), inputs, create_graph=True)
        return torch.autograd.grad(sum((g * g).sum() for g in first), inputs)

    got = penalty(student())
    with fastkd.use_backend("reference"):
        expected = penalty(student())
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.filterwarnings("ignore::fastkd.FallbackWarning")
def test_teachers_weights_and_temperatures_that_learn():
    inputs = student()
    learning = [small(7, 4, seed=3), small(CLASSES, 4, seed=4), small(ROWS, CLASSES, seed=5), small(3, ROWS, seed=6)]
    temperature = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    head, weight, logits, weights = learning
    routed = Head(head, weight, rows=torch.arange(7) * 2)

    def loss():
        value = linear_multi_teacher_kd(
            *inputs[:2], [routed, logits, Head(randn(ROWS, 3), randn(CLASSES, 3))], labels(), bias=inputs[2],
            weights=weights, temperature=temperature, chunk_rows=5,
        )  # fmt: skip
        return [value, *torch.autograd.grad(value, [*inputs, *learning, temperature])]

    got = loss()
    with fastkd.use_backend("reference"):
        expected = loss()
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    spoken = torch.zeros(ROWS, dtype=torch.bool).index_fill(0, routed.rows, True)
    assert not bool(got[7][0][~spoken].any()), "no weight matters in a row that a teacher does not speak about"


def test_a_teacher_that_learns_is_told_of_and_recomputed():
    hidden, weight, _ = student()
    teacher = (small(ROWS, 4, seed=3), randn(CLASSES, 4, seed=4))
    explained = fastkd.explain(linear_multi_teacher_kd, hidden, weight, [teacher])
    assert explained.backend == "reference" and "teachers[0] requires grad" in explained.reason
    with pytest.warns(FallbackWarning, match="teachers"):
        fastkd._backend._warned.clear()
        linear_multi_teacher_kd(hidden, weight, [teacher])
    with fastkd.use_backend("native"), pytest.raises(RuntimeError, match="requires grad"):
        linear_multi_teacher_kd(hidden, weight, [teacher])


def test_explain_says_who_does_the_rows():
    hidden, weight, _ = student()
    assert fastkd.explain(linear_multi_teacher_kd, hidden, weight, teachers_of("both")).backend == "native"
    sparse = TopK(torch.zeros(ROWS, 2, dtype=torch.int64), torch.zeros(ROWS, 2), mode="both")
    explained = fastkd.explain(linear_multi_teacher_kd, hidden, weight, [sparse])
    assert explained.backend == "reference" and "TopK" in explained.reason
    with fastkd.use_backend("native"), pytest.raises(RuntimeError, match="TopK"):
        linear_multi_teacher_kd(hidden, weight, [sparse])
    others = dataclasses.replace(sparse, mode="teacher")
    assert fastkd.explain(linear_multi_teacher_kd, hidden, weight, [others]).backend == "native"
    with fastkd.use_backend("native"):
        linear_multi_teacher_kd(hidden, weight, [others])


def test_without_native_kernels(monkeypatch):
    from fastkd import _library

    hidden, weight, bias = student()
    expected = results((hidden, weight, bias), teachers_of("crossed"), target=labels(), ce_weight=0.5)
    missing = dataclasses.replace(_library.CPU, loaded=False, reason="not built")
    monkeypatch.setattr(_library, "CPU", missing)
    with pytest.warns(FallbackWarning, match="not built"):
        got = results((hidden, weight, bias), teachers_of("crossed"), target=labels(), ce_weight=0.5, chunk_rows=4)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compiles_as_one_graph(reduction):
    torch._dynamo.reset()
    inputs = student(torch.float32)
    rows, logits, k = torch.arange(4), randn(ROWS, CLASSES, dtype=torch.float32), randn(ROWS, 4, dtype=torch.float32)
    sparse = TopK(torch.arange(ROWS)[:, None] % CLASSES, torch.full((ROWS, 1), -0.5), mode="tail")

    def call(hidden, weight, bias, teacher, head):
        teachers = [logits, (teacher, head), Head(teacher[:4], head, rows=rows, softcap=3.0), sparse]
        loss, terms = linear_multi_teacher_kd(
            hidden, weight, teachers, labels(), bias=bias, ce_weight=0.3, reduction=reduction, chunk_rows=5,
            return_terms=True,
        )  # fmt: skip
        return loss, terms.kd

    head = randn(CLASSES, 4, dtype=torch.float32)
    compiled = torch.compile(call, backend="aot_eager", fullgraph=True)
    for a, b in zip(compiled(*inputs, k, head), call(*inputs, k, head), strict=True):
        torch.testing.assert_close(a, b)
    got = torch.autograd.grad(compiled(*inputs, k, head)[0].sum(), inputs)
    for a, b in zip(got, torch.autograd.grad(call(*inputs, k, head)[0].sum(), inputs), strict=True):
        torch.testing.assert_close(a, b)


def test_the_operator_agrees_with_its_fake():
    from fastkd.ops import _linear_inputs, _linear_kernels

    inputs = [z.detach() for z in student(torch.bfloat16)]
    names = (
        "hidden weight teachers target bias softcap logit_scale chunk_rows temperature weights kd_weight ce_weight "
        "label_smoothing ignore_index mask combine vocab_size scale_by_t2 reduction num_items return_terms"
    ).split()
    given = dict.fromkeys(names) | {
        "hidden": inputs[0], "weight": inputs[1], "bias": inputs[2], "teachers": teachers_of("crossed"),
        "logit_scale": 1.0, "temperature": 1.0, "kd_weight": 1.0, "ce_weight": 0.0,
        "label_smoothing": 0.0, "ignore_index": -100,
        "combine": "losses", "scale_by_t2": True, "reduction": "none", "return_terms": True,
    }  # fmt: skip
    tensors, static = _linear_kernels._flat(_linear_inputs.check_call(**given))
    operator = torch.ops.fastkd.linear_multi_teacher_forward.default
    for wants in ([True, False, True], [False] * 3):
        arguments = (*tensors[:7], tensors[7:], None, *static, wants)
        torch.library.opcheck(operator, arguments, test_utils=("test_schema", "test_faketensor"))


def test_functorch_forward_mode_autocast_and_inference():
    inputs, teachers = student(), teachers_of("head")
    expected = results(inputs, teachers)
    with fastkd.use_backend("auto"), pytest.warns(FallbackWarning):
        fastkd._backend._warned.clear()
        gradient = torch.func.grad(lambda h: linear_multi_teacher_kd(h, inputs[1], teachers, bias=inputs[2]))(inputs[0])
    torch.testing.assert_close(0.5 * gradient, expected[1])
    with torch.autocast("cpu", torch.bfloat16):
        for a, b in zip(results(student(torch.float32), teachers), results(inputs, teachers), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)
    with torch.inference_mode():
        made = [z.detach().clone() for z in inputs]
        loss = linear_multi_teacher_kd(*made[:2], teachers, bias=made[2])
    torch.testing.assert_close(loss, expected[0])
    with torch.inference_mode():
        teacher = tuple(z.clone() for z in teachers[0])
    for a, b in zip(results(inputs, [teacher]), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_the_graph_can_be_kept_and_scaled():
    inputs = student(torch.float32)
    loss = linear_multi_teacher_kd(*inputs[:2], teachers_of("head", torch.float32), bias=inputs[2])
    once = torch.autograd.grad(loss, inputs, retain_graph=True)
    scaled = torch.autograd.grad(loss, inputs, torch.tensor(3.0), retain_graph=True)
    again = torch.autograd.grad(loss, inputs)
    for a, b, c in zip(once, scaled, again, strict=True):
        torch.testing.assert_close(3 * a, b)
        assert bool((a == c).all())
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
