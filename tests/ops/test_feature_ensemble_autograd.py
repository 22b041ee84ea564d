"""feature_ensemble: gradients of every kind, compile, export, opcheck, inference mode, and random cases."""

import pytest
import torch
from compile_helpers import recording
from feature_ensemble_helpers import LAYOUTS, PLACES, F, check, in_float64, loss_and_grads, make, sizes
from hypothesis import given, settings
from hypothesis import strategies as st
from rows_helpers import beside
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastkd
from fastkd import _backend
from fastkd.ops import _formulas, _inputs
from fastkd.ops import feature_ensemble as op
from fastkd.testing import DTYPES

SHAPES = [(3, 4, 2, 3), (3, 5, 3, 2)]
SMALL = [(2, 3, 2, 2), (2, 4, 1, 2)]
OPTIONS = [
    dict(),
    dict(p=2, reduction="none"),
    dict(norm="position", p=2, elements="sum", weights=[0.5, -2.0]),
    dict(norm="channel", reduction="sum"),
    dict(weights=torch.rand(2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)), p=2),
]
ids = lambda o: " ".join(o) or "plain"  # noqa: E731


def call(options, count=2):
    return lambda *maps: F.feature_ensemble(maps[:count], maps[count:], **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("options", OPTIONS, ids=ids)
@pytest.mark.parametrize("layouts", [("contiguous",), ("channels_last", "contiguous", "contiguous")])
def test_gradcheck(layouts, options, place, at):
    students, teachers = make(SHAPES, torch.float64, layouts=layouts, device=at(place))
    options = beside(students[0], options)
    assert fastkd.explain(F.feature_ensemble, students, teachers, **options).backend == "native"
    assert gradcheck(lambda *s: F.feature_ensemble(s, teachers, **options), students)
    one, others = make(SHAPES[:1] * 2, torch.float64, layouts=layouts, device=students[0].device)
    assert gradcheck(lambda s: F.feature_ensemble(s, others, **options), one[0])


@pytest.mark.parametrize("options", OPTIONS, ids=ids)
def test_double_backward(options):
    students, teachers = make(SHAPES, torch.float64)
    assert gradgradcheck(lambda *s: F.feature_ensemble(s, teachers, **options), students)


def test_double_backward_where_one_student_is_frozen():
    students, teachers = make(SHAPES, torch.float64)
    frozen = students[0].detach()
    assert gradgradcheck(lambda s: F.feature_ensemble([frozen, s], teachers, p=2), students[1])


@pytest.mark.parametrize("norm", op.NORMS)
def test_gradients_of_teachers_and_weights(norm):
    students, teachers = make(SMALL, torch.float64)
    weights = torch.rand(2, 2, dtype=torch.float64, requires_grad=True)
    inputs = (*students, *[t.requires_grad_() for t in teachers], weights)

    def loss(a, b, c, d, weights):
        return F.feature_ensemble([a, b], [c, d], weights=weights, p=2, norm=norm)

    assert gradcheck(loss, inputs) and gradgradcheck(loss, inputs)


def test_explain_names_the_reason():
    students, teachers = make(SHAPES)
    explain = lambda *a, **k: fastkd.explain(F.feature_ensemble, *a, **k)  # noqa: E731
    assert explain(students, teachers).backend == "native"
    assert explain(students[0], [teachers[0]] * 3).backend == "native"
    reasons = {
        "teachers[1] requires grad": explain(students, [teachers[0], teachers[1].clone().requires_grad_()]),
        "weights require grad": explain(students, teachers, weights=torch.ones(2, requires_grad=True)),
        "float8_e4m3fn": explain(students, [t.to(torch.float8_e4m3fn) for t in teachers]),
    }
    for reason, explanation in reasons.items():
        assert explanation.backend == "reference" and reason in explanation.reason
        assert bool(F.feature_ensemble(students, teachers).isfinite())
    with fastkd.use_backend("reference"):
        assert "chosen" in explain(students, teachers).reason
    assert "feature_ensemble" in fastkd.backend_info()


# --- transforms -------------------------------------------------------------------------------------------------------


def test_forward_mode_is_not_a_silent_zero():
    students, teachers = make(SHAPES[:1], torch.float64)
    tangent = torch.randn_like(students[0])

    def loss(s):
        return F.feature_ensemble(s, teachers, p=2)

    expected = (torch.autograd.grad(loss(students[0]), students[0])[0] * tangent).sum()
    torch.testing.assert_close(torch.func.jvp(loss, (students[0].detach(),), (tangent,))[1], expected)
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(students[0].detach(), tangent)
        torch.testing.assert_close(forward_ad.unpack_dual(loss(dual)).tangent, expected)


def test_func_grad_and_vmap():
    students, teachers = make(SHAPES[:1], torch.float64)
    expected = torch.autograd.grad(F.feature_ensemble(students, teachers), students)[0]
    found = torch.func.grad(lambda s: F.feature_ensemble(s, teachers))(students[0].detach())
    torch.testing.assert_close(found, expected)
    rows = torch.func.vmap(lambda s, t: F.feature_ensemble(s[None], t[None]))(students[0].detach(), teachers[0])
    torch.testing.assert_close(rows, F.feature_ensemble(students[0].detach(), teachers, reduction="none"))


# --- compile, export, opcheck -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS[:4], ids=ids)
@pytest.mark.parametrize("layouts", [("contiguous",), ("channels_last",)])
def test_fullgraph_compile(layouts, options):
    students, teachers = make(SHAPES, layouts=layouts)
    torch._dynamo.reset()
    graphs = []

    compiled = torch.compile(call(options), fullgraph=True, backend=recording(graphs))
    actual, expected = compiled(*students, *teachers), call(options)(*students, *teachers)
    assert any("fastkd.feature_ensemble_forward" in graph for graph in graphs)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    for found, wanted in zip(*(torch.autograd.grad(x.sum(), students) for x in (actual, expected)), strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=0)
        assert found.stride() == wanted.stride()


def test_a_schedule_of_num_items_and_a_mask_compile_to_one_graph():
    students, teachers = make(SHAPES)
    mask, graphs = torch.tensor([True, False, True]), []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    loss = lambda mask, items: F.feature_ensemble(students, teachers, mask=mask, num_items=items)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for n in range(1, 13):
        items = torch.tensor(float(n))
        torch.testing.assert_close(compiled(mask, items), loss(mask, items))
    assert len(graphs) == 1


def test_compile_with_dynamic_shapes():
    torch._dynamo.reset()
    compiled = torch.compile(call(dict(norm="position")), fullgraph=True, dynamic=True, backend="aot_eager")
    for shapes in ([(3, 4, 2, 3), (3, 5, 3, 2)], [(4, 4, 2, 3), (4, 5, 3, 2)], [(7, 6, 5, 4), (7, 9, 4, 8)]):
        students, teachers = make(shapes)
        actual, expected = compiled(*students, *teachers), F.feature_ensemble(students, teachers, norm="position")
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        torch.testing.assert_close(*(torch.autograd.grad(x, students) for x in (actual, expected)), rtol=0, atol=0)


def test_export():
    class Loss(torch.nn.Module):
        def forward(self, *maps):
            return F.feature_ensemble(maps[:2], maps[2:])

    students, teachers = make(SHAPES)
    maps = [z.detach() for z in (*students, *teachers)]
    program = torch.export.export(Loss(), tuple(maps))
    torch.testing.assert_close(program.module()(*maps), F.feature_ensemble(students, teachers))


CHECKED = [("cpu", "contiguous", norm, dtype) for norm in op.NORMS for dtype in (torch.float32, torch.float16)]
CHECKED += [("cpu", layout, "position", torch.float32) for layout in LAYOUTS if layout != "contiguous"]
CHECKED += [("simt", "contiguous", "sample", torch.float32), ("simt", "channels_last", "channel", torch.float16)]


@pytest.mark.parametrize("place, layout, norm, dtype", CHECKED)
def test_opcheck(place, layout, norm, dtype, at):
    students, teachers = make(SHAPES, dtype, layouts=(layout,), device=at(place))
    mask = torch.ones(3, dtype=torch.bool)  # the state of a sample that is not read would not be written
    given = [s.detach() for s in students], [teachers[0].double(), teachers[1]]
    head, options = op._check(*given, None, 2, norm, "mean", mask, "sum", 2)
    ops = _backend.native_ops(students[0])
    for need_grad in (True, False):
        arguments = (*head, *options.native(), need_grad, need_grad and place == "cpu")
        torch.library.opcheck(ops.feature_ensemble_forward.default, arguments)
    _, state, _ = ops.feature_ensemble_forward(*head, *options.native(), True, False)
    torch.library.opcheck(ops.feature_ensemble_backward.default, (torch.ones(()), *head, state, *options.native()))


# --- modes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_teachers_from_inference_mode(place, at):
    students, teachers = make(SHAPES, torch.float64, device=at(place))
    expected = F.feature_ensemble(students, teachers, p=2)
    grads = torch.autograd.grad(expected, students)
    with torch.inference_mode():
        inside = [t * 1 for t in teachers]
        weights = torch.ones(2, 3, dtype=torch.float64)
    actual = F.feature_ensemble(students, inside, weights=weights, p=2)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(torch.autograd.grad(actual, students, retain_graph=True), grads)
    torch.testing.assert_close(torch.autograd.grad(actual, students, create_graph=True), grads)


def test_no_graph_is_built_where_no_gradient_is_needed():
    students, teachers = make(SHAPES)
    with torch.no_grad():
        assert F.feature_ensemble(students, teachers).grad_fn is None
    assert F.feature_ensemble([s.detach() for s in students], teachers).grad_fn is None
    with torch.inference_mode():
        assert F.feature_ensemble(students, teachers).is_inference()


def test_backward_twice_and_accumulation():
    students, teachers = make(SHAPES, torch.float64)
    loss = F.feature_ensemble(students, teachers)
    once = torch.autograd.grad(loss, students, retain_graph=True)
    loss.backward(retain_graph=True)
    loss.backward()
    torch.testing.assert_close([s.grad for s in students], [2 * g for g in once], rtol=0, atol=0)


@pytest.mark.parametrize("options", [dict(), dict(reduction="none"), dict(norm="channel", p=2)], ids=ids)
@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_may_be_changed_in_place_before_the_backward(dtype, options):
    students, teachers = make(SHAPES, dtype)
    weights, mask = torch.ones(2, 3, dtype=_formulas.accumulate_dtype(dtype)), torch.tensor([True, True, False])
    expected = torch.autograd.grad(call(dict(options, mask=mask))(*students, *teachers).sum(), students)
    loss = F.feature_ensemble(students, teachers, weights=weights, mask=mask, **options).sum()
    with torch.no_grad():
        for changed in (*teachers, *students, weights):
            changed.zero_()
        mask.fill_(True)
    with pytest.raises(RuntimeError, match=r"feature_ensemble: a second derivative .* changed in place"):
        torch.autograd.grad(loss, students, create_graph=True)
    for grad, wanted in zip(torch.autograd.grad(loss, students), expected, strict=True):
        assert torch.equal(grad, wanted)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_on_cuda_a_changed_map_is_noticed_by_the_backward(at):
    students, teachers = make(SHAPES, device=at("simt"))
    loss = F.feature_ensemble(students, teachers)
    teachers[0].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_gradient_is_the_callers_own(dtype, reduction, place, at):
    """A hook that scales it in place, twice; two gradients of one graph."""
    students, teachers = make(SHAPES, dtype, device=at(place))
    expected = torch.autograd.grad(F.feature_ensemble(students, teachers, reduction=reduction).sum(), students)
    loss = F.feature_ensemble(students, teachers, reduction=reduction).sum()
    first = torch.autograd.grad(loss, students, retain_graph=True)
    second = torch.autograd.grad(loss, students, retain_graph=True)
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(first, second, strict=True))
    hook = students[0].register_hook(lambda grad: grad.mul_(2))
    for keep in (True, False):
        students[0].grad = students[1].grad = None
        loss.backward(retain_graph=keep)
        assert torch.equal(students[0].grad, 2 * expected[0]) and torch.equal(students[1].grad, expected[1])
    hook.remove()


@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_what_is_kept_is_the_gradient_or_five_numbers_a_norm(place, norm, reduction, at):
    students, teachers = make([(4, 16, 8, 8)] * 2, device=at(place))
    mine = {t.data_ptr() for t in (*students, *teachers)}
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        loss = F.feature_ensemble(students, teachers, norm=norm, reduction=reduction)
    stored = loss.grad_fn.gradients or []
    extra = sum(t.numel() * t.element_size() for t in (*kept, *stored) if t.data_ptr() not in mine)
    if place == "cpu":
        assert extra == 4 * sum(s.numel() for s in students) and len(stored) == 2
        loss.sum().backward()
        assert loss.grad_fn.gradients is None and loss.grad_fn.inputs is None
    else:
        assert extra == 2 * 4 * 5 * 4 * {"sample": 1, "position": 64, "channel": 16}[norm]


def test_autocast_computes_in_float32():
    students, teachers = make(SHAPES)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = F.feature_ensemble(students, teachers)
        half = F.feature_ensemble([s.bfloat16() for s in students], teachers)
    assert torch.equal(inside, F.feature_ensemble(students, teachers))
    assert half.dtype == torch.float32


def test_the_module_is_the_function():
    students, teachers = make(SHAPES)
    module = fastkd.FeatureEnsemble(p=2, norm="channel", elements="sum", weights=torch.tensor([0.2, 0.3]))
    options = dict(p=2, norm="channel", elements="sum")
    expected = F.feature_ensemble(students, teachers, weights=[0.2, 0.3], **options)
    torch.testing.assert_close(module(students, teachers), expected)
    assert "weights" in module.state_dict() and "norm='channel'" in repr(module)
    per_call = module(students, teachers, weights=[1.0, 0.0])
    torch.testing.assert_close(per_call, F.feature_ensemble(students, teachers, weights=[1.0, 0.0], **options))


# --- rounding ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shape", [(1, 3, 3, 4), (1, 5, 2, 2), (1, 16, 8, 8)], ids=str)
def test_sums_of_few_and_of_many_elements_round_little(shape, dtype):
    """Over many maps the largest error is at most twice PyTorch's: one long chain of additions does not pass."""
    errors = []
    for seed in range(100):
        maps = make([shape], dtype, seed=seed)
        exact, size = in_float64(*maps, reduction="none")[0], sizes(*maps, reduction="none")[0]
        native = loss_and_grads(*maps, reduction="none")[0]
        with fastkd.use_backend("reference"):
            baseline = loss_and_grads(*maps, reduction="none")[0]
        errors.append(torch.stack([native.double() - exact, baseline.double() - exact]).abs().amax(1) / size.max())
    worst, pytorch = torch.stack(errors).amax(0).tolist()
    assert worst <= 2 * pytorch


# --- random cases -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    batch=st.integers(1, 4),
    shapes=st.lists(st.tuples(st.integers(1, 40), st.integers(2, 9), st.integers(1, 9)), min_size=1, max_size=3),
    layouts=st.lists(st.sampled_from(sorted(LAYOUTS)), min_size=1, max_size=4),
    dtype=st.sampled_from(DTYPES),
    exponent=st.integers(-10, 10),
    weights=st.sampled_from(["none", "pairs", "samples"]),
    options=st.fixed_dictionaries(
        dict(
            p=st.sampled_from([1, 2]),
            norm=st.sampled_from(["sample", "position"]),
            elements=st.sampled_from(op.ELEMENTS),
            reduction=st.sampled_from(_inputs.REDUCTIONS),
        )
    ),
)
def test_random_cases(batch, shapes, layouts, dtype, exponent, weights, options):
    scale = 2.0 ** (
        exponent if dtype != torch.float16 else min(exponent, 0)
    )  # a gradient is 1 / scale: float16 holds it
    shapes = [(batch, c + 1, h, w) for c, h, w in shapes]
    students, teachers = make(shapes, dtype, layouts=layouts, scale=scale)
    if weights == "pairs":
        options = dict(options, weights=[1.5 - k for k in range(len(shapes))])
    elif weights == "samples":
        options = dict(options, weights=torch.rand(len(shapes), batch, dtype=_formulas.accumulate_dtype(dtype)))
    check(students, teachers, **options)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_random_samples_do_not_see_each_other(data):
    """Each sample's loss and gradient are those of a batch of one, bit by bit."""
    norm, p = data.draw(st.sampled_from(op.NORMS)), data.draw(st.sampled_from([1, 2]))
    shape = (3, data.draw(st.integers(1, 20)), data.draw(st.integers(1, 6)), data.draw(st.integers(1, 6)))
    exponents = data.draw(st.lists(st.sampled_from([-100, -30, 0, 30, 100]), min_size=3, max_size=3))
    students, teachers = make([shape])
    with torch.no_grad():
        students[0].mul_(torch.tensor([2.0**e for e in exponents])[:, None, None, None])
    options = dict(norm=norm, p=p, reduction="none")
    loss = F.feature_ensemble(students, teachers, **options)
    (grad,) = torch.autograd.grad(loss.sum(), students)
    for b in range(3):
        alone = students[0][b : b + 1].detach().requires_grad_()
        one = F.feature_ensemble(alone, teachers[0][b : b + 1], **options)
        assert torch.equal(one, loss[b : b + 1])
        assert torch.equal(torch.autograd.grad(one.sum(), alone)[0], grad[b : b + 1])


def test_loss_and_gradient_do_not_depend_on_the_size_of_the_maps():
    students, teachers = make(SHAPES, torch.float64)
    loss, grads = loss_and_grads(students, teachers)
    larger = [(s.detach() * 1e9).requires_grad_() for s in students]
    moved, moved_grads = loss_and_grads(larger, [t * 1e-7 for t in teachers])
    torch.testing.assert_close(moved, loss)
    torch.testing.assert_close([g * 1e9 for g in moved_grads], list(grads))
