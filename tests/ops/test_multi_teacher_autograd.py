"""multi_teacher_kd: gradients of every kind, compile, export, opcheck, inference mode."""

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from compile_helpers import recording
from conftest import PLACES
from multi_teacher_helpers import raw
from rows_helpers import beside
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastkd
from fastkd import _backend
from fastkd.ops._multi_teacher_native import COMBINE

F = fastkd.functional
OPTIONS = [
    dict(),
    dict(ce_weight=0.7, label_smoothing=0.1, reduction="none"),
    dict(combine="probs", ce_weight=0.3, temperature=2.5),
    dict(combine="logits", weights=[0.3, -0.2, 0.6]),
    dict(temperature=[1.0, 2.0, 4.5], ce_weight=0.3, reduction="sum"),
    dict(weights=torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))),
]


def make(rows=4, classes=6, k=3, dtype=torch.float64, device="cpu", requires_grad=True):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * 2 for _ in range(k + 1)]
    target = torch.randint(0, classes, (rows,), generator=g)
    target[1] = -100
    student = logits[0].to(device, dtype).requires_grad_(requires_grad)
    return student, [t.to(device, dtype) for t in logits[1:]], target.to(device)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_gradcheck(options, place, at):
    student, teachers, target = make(device=at(place))
    options = beside(student, options)
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **options).backend == "native"
    assert gradcheck(lambda s: F.multi_teacher_kd(s, teachers, target, **options), student)


@pytest.mark.parametrize("place", ["cpu", "simt_stream"])
@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")
def test_double_backward(options, place, at):
    student, teachers, target = make(device=at(place))
    options = beside(student, options)
    assert gradgradcheck(lambda s: F.multi_teacher_kd(s, teachers, target, **options), student)


def test_double_backward_reaches_what_is_before_the_student():
    weight = torch.randn(5, 6, dtype=torch.float64, requires_grad=True)
    inputs, (_, teachers, target) = torch.randn(4, 5, dtype=torch.float64), make()

    def penalty(weight):
        loss = F.multi_teacher_kd(inputs @ weight, teachers, target, ce_weight=0.5)
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        return grad.square().sum()

    assert gradcheck(penalty, weight)


@pytest.mark.parametrize("combine", COMBINE)
def test_gradients_of_teachers_weights_and_temperature(combine):
    student, teachers, target = make()
    teachers = torch.stack(teachers).requires_grad_()
    weights = torch.tensor([0.2, 0.0, 0.7], dtype=torch.float64, requires_grad=True)
    temperature = torch.tensor(2.5, dtype=torch.float64, requires_grad=True)

    def loss(s, t, w, temperature):
        return F.multi_teacher_kd(s, t, target, weights=w, temperature=temperature, combine=combine, ce_weight=0.5)

    inputs = (student, teachers, weights + 0.1 if combine == "probs" else weights, temperature)
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


@pytest.mark.parametrize("masked", [False, True])
def test_a_temperature_per_teacher_that_learns(masked):
    student, teachers, target = make()
    if masked:
        with torch.no_grad():
            for z in (student, *teachers):
                z[:, 2] = -math.inf
        target[target == 2] = 3
    temperature = torch.tensor([1.5, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
    loss = F.multi_teacher_kd(student, teachers, target, temperature=temperature)
    (grad,) = torch.autograd.grad(loss, temperature)
    step = 1e-6
    for k in range(3):
        values = []
        for sign in (1, -1):
            moved = temperature.detach().clone()
            moved[k] += sign * step
            values.append(float(F.multi_teacher_kd(student, teachers, target, temperature=moved)))
        assert float(grad[k]) == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-6)


def test_weights_per_row_that_learn():
    student, teachers, target = make()
    weights = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda w: F.multi_teacher_kd(student, teachers, target, weights=w), weights)


def test_explain_names_the_reason():
    student, teachers, _target = make(dtype=torch.float32)
    explain = lambda *a, **k: fastkd.explain(F.multi_teacher_kd, *a, **k)  # noqa: E731
    assert explain(student, teachers).backend == "native"
    reasons = {
        "teachers[0] requires grad": explain(student, [teachers[0].clone().requires_grad_(), *teachers[1:]]),
        "weights require grad": explain(student, teachers, weights=torch.ones(3, requires_grad=True)),
        "temperature": explain(student, teachers, temperature=torch.tensor(2.0, requires_grad=True)),
        "kd_weight is a tensor": explain(student, teachers, kd_weight=torch.tensor(2.0, requires_grad=True)),
        "target requires grad": explain(student, teachers, torch.rand(4, 6, requires_grad=True)),
    }
    for reason, explanation in reasons.items():
        assert explanation.backend == "reference" and reason in explanation.reason
    with fastkd.use_backend("reference"):
        assert "chosen" in explain(student, teachers).reason
    assert explain(student, [teachers[0].double(), teachers[1].half(), teachers[2]]).backend == "native"
    with torch.no_grad():
        assert explain(student, [t.clone().requires_grad_() for t in teachers]).backend == "native"
    with pytest.raises(ValueError, match="explain: function must be one of"):
        fastkd.explain(torch.softmax, student)
    with pytest.raises(ValueError, match=r"got MultiTeacherKD$"):
        fastkd.explain(fastkd.MultiTeacherKD(), student)


# --- transforms -------------------------------------------------------------------------------------------------------


def test_forward_mode_is_not_a_silent_zero():
    student, teachers, target = make()
    tangent = torch.randn_like(student)

    def loss(s):
        return F.multi_teacher_kd(s, teachers, target, ce_weight=0.5)

    expected = (torch.autograd.grad(loss(student), student)[0] * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (student.detach(),), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, expected)


def test_func_grad_hessian_and_vmap():
    student, teachers, target = make()

    def loss(s):
        return F.multi_teacher_kd(s, teachers, target, ce_weight=0.5)

    expected = torch.autograd.grad(loss(student), student)[0]
    torch.testing.assert_close(torch.func.grad(loss)(student.detach()), expected)
    hessian = torch.func.hessian(lambda s: loss(s.reshape(4, 6)))(student.detach().flatten())
    torch.testing.assert_close(
        hessian, torch.autograd.functional.hessian(lambda s: loss(s.reshape(4, 6)), student.detach().flatten())
    )
    per_row = torch.func.vmap(lambda s, *t: F.multi_teacher_kd(s, t))(student.detach(), *teachers)
    torch.testing.assert_close(per_row, F.multi_teacher_kd(student.detach(), teachers, reduction="none"))


# --- compile, export, opcheck -----------------------------------------------------------------------------------------


COMPILED = [o for o in OPTIONS if not isinstance(o.get("weights"), torch.Tensor)] + [dict(weights="tensor")]


@pytest.mark.parametrize("options", COMPILED, ids=lambda o: " ".join(o) or "plain")
def test_fullgraph_compile(options):
    student, teachers, target = make(dtype=torch.float32)
    if options.get("weights") == "tensor":
        options = dict(weights=torch.rand(3, 4))
    graphs = []

    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, y: F.multi_teacher_kd(s * 1.5, t, y, **options), fullgraph=True, backend=recording(graphs)
    )
    actual, expected = (
        compiled(student, teachers, target),
        F.multi_teacher_kd(student * 1.5, teachers, target, **options),
    )
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(x.sum(), student)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert any("fastkd.multi_teacher_forward" in text for text in graphs)


def test_compile_with_dynamic_batch():
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda s, t, y: F.multi_teacher_kd(s, t, y, ce_weight=0.5), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for rows in (4, 5, 9):
        student, teachers, target = make(rows=rows, dtype=torch.float32)
        actual = compiled(student, teachers, target)
        torch.testing.assert_close(actual, F.multi_teacher_kd(student, teachers, target, ce_weight=0.5), rtol=0, atol=0)


@pytest.mark.slow
def test_compile_by_inductor():
    student, teachers, target = make(rows=64, classes=100, dtype=torch.float32)
    layer = torch.nn.Linear(100, 100)
    torch._dynamo.reset()

    def step(x):
        return F.multi_teacher_kd(layer(x).relu(), teachers, target, ce_weight=0.5)

    expected = step(student)
    expected.backward()
    gradient, layer.weight.grad = layer.weight.grad, None
    actual = torch.compile(step, fullgraph=True)(student)
    actual.backward()
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(layer.weight.grad, gradient)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, s, a, b, y):
            return F.multi_teacher_kd(s, [a, b], y, ce_weight=0.5)

    student, teachers, target = make(dtype=torch.float32, requires_grad=False)
    program = torch.export.export(Loss(), (student, *teachers[:2], target))
    torch.testing.assert_close(
        program.module()(student, *teachers[:2], target),
        F.multi_teacher_kd(student, teachers[:2], target, ce_weight=0.5),
    )


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, place, at):
    student, teachers, target = make(dtype=dtype, requires_grad=False, device=at(place))
    ops, stream = _backend.native_ops(student), place == "simt_stream"
    soft = torch.softmax(student.float(), -1)
    for labels, options in (
        (target, dict(ce_weight=0.5, label_smoothing=0.1)),
        (soft, dict(ce_weight=0.5, return_terms=True, num_items=3)),
    ):
        tensors, scalars, shared = raw(student, teachers, labels, **options)
        for need_grad in (True, False):
            torch.library.opcheck(ops.multi_teacher_forward.default, (*tensors, scalars, *shared, need_grad, stream))
        _, rows, saved, aux = ops.multi_teacher_forward(*tensors, scalars, *shared, True, stream)
        if stream:
            args = (torch.ones(()), *tensors, scalars, saved, aux, *shared)
            torch.library.opcheck(ops.multi_teacher_stream_backward.default, args)
    if stream:
        return
    torch.library.opcheck(ops.multi_teacher_backward.default, (torch.ones(()), rows, saved, aux, 2))


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_labels_from_inference_mode(place, at):
    student, teachers, target = make(device=at(place))
    expected = F.multi_teacher_kd(student, teachers, target, ce_weight=0.3)
    with torch.inference_mode():
        inside = target + 0
    actual = F.multi_teacher_kd(student, teachers, inside, ce_weight=0.3)
    for create_graph in (False, True):
        grads = [torch.autograd.grad(z * 0.7, student, create_graph=create_graph)[0] for z in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)
        actual, expected = (F.multi_teacher_kd(student, teachers, t, ce_weight=0.3) for t in (inside, target))


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_teachers_from_inference_mode(place, at):
    student, teachers, target = make(device=at(place))
    expected = F.multi_teacher_kd(student, teachers, target)
    grad = torch.autograd.grad(expected, student)[0]
    with torch.inference_mode():
        inside = [t * 1 for t in teachers]
        weights = torch.full((3, 4), 1 / 3, dtype=torch.float64)
    actual = F.multi_teacher_kd(student, inside, target, weights=weights)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, student, retain_graph=True)[0], grad)
    (again,) = torch.autograd.grad(actual, student, create_graph=True)
    torch.testing.assert_close(again, grad)
    assert gradgradcheck(lambda s: F.multi_teacher_kd(s, inside, target, weights=weights), student)


def test_no_graph_is_built_where_no_gradient_is_needed():
    student, teachers, target = make()
    with torch.no_grad():
        assert F.multi_teacher_kd(student, teachers, target).grad_fn is None
    assert F.multi_teacher_kd(student.detach(), teachers, target).grad_fn is None
    with torch.inference_mode():
        assert F.multi_teacher_kd(student, teachers, target).is_inference()


def test_backward_twice_and_accumulation():
    student, teachers, target = make()
    loss = F.multi_teacher_kd(student, teachers, target)
    (once,) = torch.autograd.grad(loss, student, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 2 * once, rtol=0, atol=0)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("changed", range(3))
def test_inputs_may_change_between_the_loss_and_its_backward(changed):
    """Static buffers of teachers do; only a second derivative reads them again, and says so."""
    student, teachers, target = make()
    (expected,) = torch.autograd.grad(F.multi_teacher_kd(student, teachers, target, ce_weight=0.5), student)
    loss = F.multi_teacher_kd(student, teachers, target, ce_weight=0.5)
    with torch.no_grad():
        (student, teachers[0], target)[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"multi_teacher_kd: a second derivative .* changed in place"):
        torch.autograd.grad(loss, student, create_graph=True)
    (actual,) = torch.autograd.grad(loss, student)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_gradient_is_its_receivers_own(dtype):
    """A hook that scales it in place, two gradients of one graph, and no copy where the graph is gone."""
    student, teachers, target = make(dtype=dtype)
    (expected,) = torch.autograd.grad(F.multi_teacher_kd(student, teachers, target), student)
    logits = student * 1
    logits.register_hook(lambda g: g.mul_(2))
    loss = F.multi_teacher_kd(logits, teachers, target)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 4 * expected, rtol=1e-3, atol=0)
    loss = F.multi_teacher_kd(student, teachers, target)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_autocast_computes_in_float32():
    student, teachers, target = make(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.multi_teacher_kd(student, teachers, target, ce_weight=0.5)
        half = F.multi_teacher_kd(student.bfloat16(), teachers, target, ce_weight=0.5)
    assert torch.equal(inside, F.multi_teacher_kd(student, teachers, target, ce_weight=0.5))
    assert half.dtype == torch.float32


def test_saved_memory_is_one_gradient_and_inputs_that_exist_anyway():
    student, teachers, target = make(rows=64, classes=100, dtype=torch.float32)
    mine = {t.data_ptr() for t in (student, *teachers, target)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        F.multi_teacher_kd(student, teachers, target, ce_weight=0.5)
    extra = sum(t.numel() * t.element_size() for t in kept if t.data_ptr() not in mine)
    assert extra <= student.numel() * 4 + 64


def test_the_module_is_the_function():
    student, teachers, target = make(dtype=torch.float32)
    module = fastkd.MultiTeacherKD(temperature=2.0, ce_weight=0.5, weights=torch.tensor([0.2, 0.3, 0.5]))
    expected = F.multi_teacher_kd(student, teachers, target, temperature=2.0, ce_weight=0.5, weights=[0.2, 0.3, 0.5])
    torch.testing.assert_close(module(student, teachers, target), expected)
    assert "weights" in module.state_dict() and "temperature=2.0" in repr(module)
    per_call = module(student, teachers, target, weights=[1.0, 0.0, 0.0])
    torch.testing.assert_close(
        per_call, F.multi_teacher_kd(student, teachers, target, temperature=2.0, ce_weight=0.5, weights=[1, 0, 0])
    )
    learned = fastkd.MultiTeacherKD(temperature=torch.nn.Parameter(torch.tensor(2.0)))
    learned(student, teachers, target).backward()
    assert learned.temperature.grad is not None


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_return_stats(place, at):
    student, teachers, target = make(device=at(place))
    loss, stats = F.multi_teacher_kd(student, teachers, target, temperature=2.0, return_stats=True)
    torch.testing.assert_close(loss, F.multi_teacher_kd(student, teachers, target, temperature=2.0))
    keep = target != -100
    for k, teacher in enumerate(teachers):
        alone = F.multi_teacher_kd(student[keep], teacher[keep], temperature=2.0, scale_by_t2=False)
        torch.testing.assert_close(stats.kl[k], alone.detach())
        assert stats.teachers.correct[k][keep].tolist() == (teacher[keep].argmax(-1) == target[keep]).tolist()
    ce = torch_functional.cross_entropy(student.detach()[keep], target[keep], reduction="none")
    torch.testing.assert_close(stats.student.ce[0][keep], ce)
    assert stats.student.ce[0][~keep].isnan().all() and stats.student.label_rank[0][~keep].tolist() == [-1]
    assert not stats.kl.requires_grad
