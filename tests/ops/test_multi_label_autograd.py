"""multi_label_kd: gradients of every kind, compile, export, opcheck, inference mode."""

import inspect
import itertools

import pytest
import torch
from compile_helpers import recording
from conftest import PLACES
from multi_label_helpers import F, build
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastkd
from fastkd import _backend
from fastkd.ops import _multi_label_inputs as inputs
from fastkd.ops import _multi_label_kernels as kernels
from fastkd.ops._multi_teacher_native import COMBINE

OPTIONS = [
    dict(),
    dict(labels="partial", ce_weight=0.7, reduction="none", pos_weight="classes"),
    dict(combine="probs", labels="soft", ce_weight=0.3, temperature=2.5, weights=[0.3, 0.2, 0.9]),
    dict(combine="logits", weights=[0.3, -0.2, 0.6], mask="elements"),
    dict(temperature=[1.0, 2.0, 4.5], labels="hard", ce_weight=0.3, reduction="sum", mask="rows"),
    dict(weights="rows", classes=1),
]
each = pytest.mark.parametrize("options", OPTIONS, ids=lambda o: " ".join(o) or "plain")


def make(device="cpu", dtype=torch.float64, **options):
    student, teachers, target, options = build(device, dtype, **{"rows": 4, "classes": 6} | options)
    return student, teachers, target, options


@pytest.mark.parametrize("place", PLACES)
@each
def test_gradcheck(options, place, at):
    student, teachers, target, options = make(at(place), **options)
    assert fastkd.explain(F.multi_label_kd, student, teachers, target, **options).backend == "native"
    assert gradcheck(lambda s: F.multi_label_kd(s, teachers, target, **options), student)


@pytest.mark.parametrize("place", ["cpu", "simt"])
@each
def test_double_backward(options, place, at):
    student, teachers, target, options = make(at(place), **options)
    assert gradgradcheck(lambda s: F.multi_label_kd(s, teachers, target, **options), student)


@pytest.mark.parametrize("combine", COMBINE)
def test_gradients_of_all_that_may_learn(combine):
    student, teachers, target, _ = make(labels="soft")
    tensors = (student, *teachers, target, torch.rand(3, 4), torch.tensor(2.5), torch.rand(6) * 3)
    tensors = [t.detach().double().requires_grad_() for t in tensors]

    def loss(s, a, b, c, y, w, t, pos):
        return F.multi_label_kd(
            s, [a, b, c], y, weights=w, temperature=t, pos_weight=pos, ce_weight=0.5, combine=combine, reduction="none"
        )

    with fastkd.use_backend("reference"):
        assert gradcheck(loss, tensors)
        masked = [t.detach().clone() for t in tensors]
        for z in masked[:4]:
            z[:, 2] = -torch.inf
        masked[4][:, 2] = 0
        results = loss(*[t.requires_grad_() for t in masked])
        assert all(bool(g.isfinite().all()) for g in torch.autograd.grad(results.sum(), masked))


def test_explain_names_the_reason():
    student, teachers, target, _ = make(dtype=torch.float32, labels="soft")
    explain = lambda *a, **k: fastkd.explain(F.multi_label_kd, *a, **k)  # noqa: E731
    assert explain(student, teachers, target).backend == "native"
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, activation="sigmoid").backend == "native"
    reasons = {
        "teachers[0] requires grad": explain(student, [teachers[0].clone().requires_grad_(), *teachers[1:]]),
        "weights require grad": explain(student, teachers, weights=torch.ones(3, requires_grad=True)),
        "temperature": explain(student, teachers, temperature=torch.tensor(2.0, requires_grad=True)),
        "kd_weight is a tensor": explain(student, teachers, kd_weight=torch.tensor(2.0, requires_grad=True)),
        "target requires grad": explain(student, teachers, target.clone().requires_grad_()),
        "pos_weight requires grad": explain(student, teachers, target, pos_weight=torch.ones(6, requires_grad=True)),
    }
    for reason, explanation in reasons.items():
        assert explanation.backend == "reference" and reason in explanation.reason
    with torch.no_grad():
        assert explain(student, [t.clone().requires_grad_() for t in teachers]).backend == "native"


def test_transforms_and_forward_mode():
    student, teachers, target, _ = make(labels="hard")
    tangent = torch.randn_like(student)

    def loss(s):
        return F.multi_label_kd(s, teachers, target, ce_weight=0.5)

    gradient = torch.autograd.grad(loss(student), student)[0]
    torch.testing.assert_close(torch.func.grad(loss)(student.detach()), gradient)
    torch.testing.assert_close(torch.func.jvp(loss, (student.detach(),), (tangent,))[1], (gradient * tangent).sum())
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(student.detach(), tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, (gradient * tangent).sum())
    per_row = torch.func.vmap(lambda s, *t: F.multi_label_kd(s, t))(student.detach(), *teachers)
    torch.testing.assert_close(per_row, F.multi_label_kd(student.detach(), teachers, reduction="none"))


# --- compile, export, opcheck -----------------------------------------------------------------------------------------


@each
def test_fullgraph_compile(options):
    student, teachers, target, options = make(dtype=torch.float32, **options)
    graphs = []

    def step(s, t, y):
        return F.multi_label_kd(s * 1.5, t, y, return_terms=True, **options)

    torch._dynamo.reset()
    actual = torch.compile(step, fullgraph=True, backend=recording(graphs))(student, teachers, target)
    expected = step(student, teachers, target)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(x[0].sum(), student)[0] for x in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)
    assert any("fastkd.multi_label_forward" in text for text in graphs)


def test_a_schedule_needs_one_graph():
    student, teachers, target, _ = make(dtype=torch.float32, labels="partial")
    frames = torch._dynamo.testing.CompileCounter()

    def step(t, w, n):
        return F.multi_label_kd(student, teachers, target, temperature=t, kd_weight=w, ce_weight=w, num_items=n)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend=frames)
    for values in ((1.0, 0.5, 3.0), (2.0, 0.25, 4.0)):
        scalars = [torch.tensor(v, dtype=torch.float64) for v in values]
        torch.testing.assert_close(compiled(*scalars), step(*values), rtol=0, atol=0)
    assert frames.frame_count == 1


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, s, a, b, y):
            return F.multi_label_kd(s, [a, b], y, ce_weight=0.5)

    student, teachers, target, _ = make(dtype=torch.float32, labels="partial")
    arguments = (student.detach(), *teachers[:2], target)
    program = torch.export.export(Loss(), arguments)
    torch.testing.assert_close(program.module()(*arguments), Loss()(*arguments))


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_opcheck(dtype, place, at, monkeypatch):
    for options in (OPTIONS[1], dict(return_terms=True, labels="soft", ce_weight=0.5)):
        student, teachers, target, rest = make(at(place), dtype, **options)
        bound = inspect.signature(F.multi_label_kd).bind(student.detach(), teachers, target, **rest)
        bound.apply_defaults()
        called = []
        monkeypatch.setattr(_backend, "native_ops", lambda _, called=called: _Recorder(called))
        for need_grad in (True, False):
            with pytest.raises(StopIteration):
                kernels._forward(*inputs.check(**bound.arguments), None, need_grad)
        monkeypatch.undo()
        for arguments in called:
            torch.library.opcheck(_backend.native_ops(student).multi_label_forward.default, arguments)


class _Recorder:
    def __init__(self, called):
        self.called = called

    def multi_label_forward(self, *arguments):
        self.called.append(arguments)
        raise StopIteration


# --- modes ------------------------------------------------------------------------------------------------------------


def test_teachers_from_inference_mode():
    with torch.inference_mode():
        inside = [torch.randn(4, 6, dtype=torch.float64) for _ in range(2)]
    student, _, target, _ = make(labels="hard")
    assert gradgradcheck(lambda s: F.multi_label_kd(s, inside, target, ce_weight=0.5), student)


def test_no_graph_is_built_where_no_gradient_is_needed():
    student, teachers, target, _ = make(labels="hard")
    with torch.no_grad():
        assert F.multi_label_kd(student, teachers, target).grad_fn is None
    assert F.multi_label_kd(student.detach(), teachers, target).grad_fn is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_a_gradient_is_its_receivers_own(place, dtype, at):
    student, teachers, target, _ = make(at(place), dtype, labels="hard")
    (expected,) = torch.autograd.grad(F.multi_label_kd(student, teachers, target), student)
    logits = student * 1
    logits.register_hook(lambda g: g.mul_(2))
    loss = F.multi_label_kd(logits, teachers, target)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close(student.grad, 4 * expected, rtol=1e-3, atol=0)
    loss = F.multi_label_kd(student, teachers, target)
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    first.zero_()
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("changed", range(3))
def test_inputs_may_change_between_the_loss_and_its_backward(changed):
    student, teachers, target, _ = make(labels="soft")
    (expected,) = torch.autograd.grad(F.multi_label_kd(student, teachers, target, ce_weight=0.5), student)
    loss = F.multi_label_kd(student, teachers, target, ce_weight=0.5)
    with torch.no_grad():
        (student, teachers[0], target)[changed].add_(1)
    with pytest.raises(RuntimeError, match=r"multi_label_kd: a second derivative .* changed in place"):
        torch.autograd.grad(loss, student, create_graph=True)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)


@pytest.mark.parametrize("place", PLACES)
def test_terms_are_the_parts_of_the_loss(place, at):
    device = at(place)
    for reduction, classes in itertools.product(("none", "sum", "mean"), ("sum", "mean")):
        student, teachers, target, options = make(device, torch.float32, labels="partial", weights="rows")
        options |= dict(kd_weight=0.6, ce_weight=0.3, reduction=reduction, classes=classes)
        loss, terms = F.multi_label_kd(student, teachers, target, return_terms=True, **options)
        assert not terms.kd.requires_grad and not terms.ce.requires_grad
        torch.testing.assert_close(0.6 * terms.kd + 0.3 * terms.ce, loss.detach())
        assert torch.equal(loss, F.multi_label_kd(student, teachers, target, **options))
        with fastkd.use_backend("reference"):
            again = F.multi_label_kd(student, teachers, target, return_terms=True, **options)[1]
        torch.testing.assert_close(terms, again)


def test_autocast_computes_in_float32():
    student, teachers, target, _ = make(dtype=torch.float32, labels="hard")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.multi_label_kd(student, teachers, target, ce_weight=0.5)
    assert torch.equal(inside, F.multi_label_kd(student, teachers, target, ce_weight=0.5))
