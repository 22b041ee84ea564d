"""rkd_distance and rkd_angle: gradients of every kind, compile, export, opcheck, modules, wrong calls."""

import math

import pytest
import torch
from errors_helpers import assert_told, each_wrong_call, unknown_reduction
from relational_helpers import FUNCTIONS, PLACES, embeddings, loss_and_grad
from torch.autograd import forward_ad, gradcheck, gradgradcheck

import fastkd
from fastkd import _backend
from fastkd.ops import _relational_kernels as op

F = fastkd.functional
BOTH = pytest.mark.parametrize("name", FUNCTIONS)
EVERYWHERE = pytest.mark.parametrize("place", PLACES)
REDUCTIONS = pytest.mark.parametrize("reduction", ["none", "sum", "mean"])


def make(n=5, width=3, dtype=torch.float64, device="cpu", requires_grad=True):
    student = embeddings("random", n, width, 0).to(device, dtype).requires_grad_(requires_grad)
    return student, embeddings("random", n, 4, 1).to(device, dtype)


@EVERYWHERE
@BOTH
@REDUCTIONS
def test_gradcheck(name, reduction, place, at):
    student, teacher = make(device=at(place))
    function = lambda s: FUNCTIONS[name](s, teacher, reduction=reduction)  # noqa: E731
    assert fastkd.explain(FUNCTIONS[name], student, teacher).backend == "native"
    assert gradcheck(function, student)


@BOTH
@REDUCTIONS
def test_double_backward(name, reduction):
    student, teacher = make()
    assert gradgradcheck(lambda s: FUNCTIONS[name](s, teacher, reduction=reduction), student)


@BOTH
def test_gradient_of_the_teacher(name):
    student, teacher = make()
    teacher.requires_grad_()
    assert gradcheck(FUNCTIONS[name], (student, teacher))
    assert "teacher requires grad" in fastkd.explain(FUNCTIONS[name], student, teacher).reason
    with torch.no_grad():
        assert fastkd.explain(FUNCTIONS[name], student, teacher).backend == "native"


@BOTH
def test_gradients_through_equal_rows_twice_are_finite(name):
    student, teacher = make()
    with torch.no_grad():
        student[1] = student[3]
    (grad,) = torch.autograd.grad(FUNCTIONS[name](student, teacher), student, create_graph=True)
    (second,) = torch.autograd.grad(grad.square().sum(), student)
    assert bool(grad.isfinite().all()) and bool(second.isfinite().all())


@BOTH
def test_forward_mode_and_functional_transforms_take_the_reference(name):
    student, teacher = make(requires_grad=False)
    function = lambda s: FUNCTIONS[name](s, teacher)  # noqa: E731
    expected = torch.autograd.functional.jacobian(function, student)
    torch.testing.assert_close(torch.func.grad(function)(student), expected)
    direction = torch.randn_like(student)
    _, tangent = torch.func.jvp(function, (student,), (direction,))
    torch.testing.assert_close(tangent, (expected * direction).sum())
    with forward_ad.dual_level():
        out = function(forward_ad.make_dual(student, direction))
        torch.testing.assert_close(forward_ad.unpack_dual(out).tangent, tangent)
    batched = torch.stack([student, 2 * student])
    torch.testing.assert_close(torch.vmap(function)(batched), torch.stack([function(s) for s in batched]))


@BOTH
@pytest.mark.parametrize("reduction", ["none", "mean"])
def test_compile_with_dynamic_shapes(name, reduction):
    torch._dynamo.reset()

    def step(student, teacher):
        return FUNCTIONS[name](student * 2, teacher, reduction=reduction)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True, dynamic=True)
    for n in (5, 40, 33):
        student, teacher = make(n, dtype=torch.float32)
        results = []
        for function in (step, compiled):
            loss = function(student, teacher)
            results.append((loss, torch.autograd.grad(loss.sum(), student)[0]))
        torch.testing.assert_close(*results)


@BOTH
def test_export(name):
    class Model(torch.nn.Module):
        def forward(self, student, teacher):
            return FUNCTIONS[name](student, teacher)

    inputs = make(6, dtype=torch.float32, requires_grad=False)
    rows = torch.export.Dim("rows", min=3, max=4096)
    program = torch.export.export(Model(), inputs, dynamic_shapes=({0: rows}, {0: rows}))
    for n in (6, 35):
        inputs = make(n, dtype=torch.float32, requires_grad=False)
        torch.testing.assert_close(program.module()(*inputs), FUNCTIONS[name](*inputs))


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("kind", [op.KIND_DISTANCE, op.KIND_SINGLE, op.KIND_FULL])
def test_opcheck(kind, place, at):
    student, _ = make(33, device=at(place), requires_grad=False)
    ops, rows = _backend.native_ops(student), op.centred(student)
    for mask in (None, torch.arange(33) % 3 > 0):
        torch.library.opcheck(ops.relational_sides.default, (rows, rows @ rows.T, mask, kind, 1e-6))
        if kind == op.KIND_DISTANCE or place == "simt":  # the CPU sums no differences for angles
            own = rows.float() if kind == op.KIND_SINGLE else rows
            torch.library.opcheck(ops.relational_distances.default, (own, mask, kind, 1e-6))
    planes, mean = ops.relational_sides(rows, rows @ rows.T, None, kind, 1e-6)
    for weight, reduction, need_grad in ((None, 2, True), (torch.ones(33, dtype=torch.float64), 0, False)):
        torch.library.opcheck(ops.relational_loss.default, (planes, planes, mean, weight, kind, reduction, need_grad))


@BOTH
def test_inference_mode(name):
    student, teacher = make()
    expected = FUNCTIONS[name](student, teacher)
    (grad,) = torch.autograd.grad(expected, student)
    with torch.inference_mode():
        inside = teacher * 1
        assert FUNCTIONS[name](student, teacher).is_inference()
    actual = FUNCTIONS[name](student, inside)
    torch.testing.assert_close(torch.autograd.grad(actual, student, retain_graph=True)[0], grad)
    torch.testing.assert_close(torch.autograd.grad(actual, student, create_graph=True)[0], grad)


@BOTH
def test_no_graph_is_built_where_no_gradient_is_needed(name):
    student, teacher = make()
    with torch.no_grad():
        assert FUNCTIONS[name](student, teacher).grad_fn is None
    assert FUNCTIONS[name](student.detach(), teacher).grad_fn is None


@BOTH
def test_backward_twice(name):
    student, teacher = make()
    loss = FUNCTIONS[name](student, teacher)
    loss.backward(retain_graph=True)
    once = student.grad.clone()
    (3 * loss).backward()
    torch.testing.assert_close(student.grad, 4 * once)


@pytest.mark.parametrize("place", ["cpu", "simt"])
@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_embeddings_may_be_changed_in_place_before_the_backward(dtype, name, place, at):
    student, teacher = make(9, dtype=dtype, device=at(place))
    mask = torch.arange(9) != 4
    (expected,) = torch.autograd.grad(FUNCTIONS[name](student, teacher, mask=mask), student)
    loss, plain = FUNCTIONS[name](student, teacher, mask=mask), FUNCTIONS[name](student, teacher)
    with torch.no_grad():
        for changed in (student, teacher, mask):
            changed.zero_()
    with pytest.raises(RuntimeError, match=f"{name}: a second derivative .* changed in place"):
        torch.autograd.grad(plain, student, create_graph=True)
    assert torch.equal(torch.autograd.grad(loss, student)[0], expected)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@BOTH
@REDUCTIONS
def test_a_gradient_is_the_callers_own(name, reduction):
    student, teacher = make(7)
    loss = FUNCTIONS[name](student, teacher, reduction=reduction).sum()
    first, second = (torch.autograd.grad(loss, student, retain_graph=True)[0] for _ in range(2))
    assert first.data_ptr() != second.data_ptr() and torch.equal(first, second)
    student.register_hook(lambda grad: grad.mul_(2))
    for keep in (True, False):
        student.grad = None
        loss.backward(retain_graph=keep)
        assert torch.equal(student.grad, 2 * first)
    assert loss.grad_fn is not None


@BOTH
@REDUCTIONS
def test_double_backward_with_a_mask(name, reduction):
    student, teacher = make()
    mask = torch.tensor([True, True, False, True, True])
    function = lambda s: FUNCTIONS[name](s, teacher, mask=mask, reduction=reduction)  # noqa: E731
    assert gradcheck(function, student) and gradgradcheck(function, student)


@BOTH
def test_a_mask_and_num_items_compile_to_one_graph(name):
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    student, teacher = make(8, dtype=torch.float32)
    loss = lambda mask, items: FUNCTIONS[name](student, teacher, mask=mask, num_items=items)  # noqa: E731
    compiled = torch.compile(loss, fullgraph=True, backend=backend)
    for n in range(1, 13):
        mask, items = torch.arange(8) >= n % 5, torch.tensor(float(n))
        torch.testing.assert_close(compiled(mask, items), loss(mask, items))
    assert len(graphs) == 1


def test_modules_are_the_functions():
    student, teacher = make()
    distance, angle = fastkd.RKDDistance(reduction="sum"), fastkd.RKDAngle(reduction="none", eps=0.1)
    assert torch.equal(distance(student, teacher), F.rkd_distance(student, teacher, reduction="sum"))
    assert torch.equal(angle(student, teacher), F.rkd_angle(student, teacher, reduction="none", eps=0.1))
    assert "eps=0.1" in repr(angle) and "reduction='sum'" in repr(distance)


# --- wrong calls ------------------------------------------------------------------------------------------------------

S, T = torch.zeros(4, 6), torch.zeros(4, 5)


def calls_of(function):
    return lambda student=S, teacher=T, **options: lambda: function(student, teacher, **options)


def wrong_calls(call):
    return [
        (
            "student of a wrong type",
            call(student=[1.0]),
            TypeError,
            "student must be a floating-point tensor.*got list",
        ),
        ("teacher of a wrong type", call(teacher=None), TypeError, "teacher must be.*got NoneType"),
        ("integers", call(student=S.long()), TypeError, "student must be.*embeddings, got dtype torch.int64"),
        ("feature maps", call(teacher=torch.zeros(4, 5, 2)), ValueError, r"teacher .*\[N, D\].*got shape \[4, 5, 2\]"),
        ("no width", call(student=torch.zeros(4, 0)), ValueError, r"student .*D >= 1, got shape \[4, 0\]"),
        ("numbers of rows", call(teacher=T[:3]), ValueError, r"teacher must be of 4 rows.*got shape \[3, 5\]"),
        (
            "devices",
            call(teacher=T.to("meta")),
            ValueError,
            "teacher must be on the student's device cpu, got device meta",
        ),
        unknown_reduction(call),
        (
            "a mask of numbers",
            call(mask=torch.ones(4)),
            TypeError,
            "mask must be a bool tensor.*got dtype torch.float32",
        ),
        ("mask of a wrong shape", call(mask=S > 0), ValueError, r"mask must be of shape \[4\].*got shape \[4, 6\]"),
        ("num_items 0", call(num_items=0.0), ValueError, "num_items must be a finite number > 0.*got 0"),
        (
            "num_items of none",
            call(num_items=1, reduction="none"),
            ValueError,
            "num_items must be None for reduction='n",
        ),
        (
            "process group",
            call(process_group="gloo"),
            TypeError,
            "process_group must be None or a .*ProcessGroup.*got str",
        ),
    ]


@each_wrong_call(wrong_calls(calls_of(F.rkd_distance)))
def test_wrong_calls_of_distances(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "rkd_distance")


angles = calls_of(F.rkd_angle)
WRONG_EPS = [
    ("eps < 0", angles(eps=-1.0), ValueError, "eps must be a finite number >= 0, got -1.0"),
    ("eps NaN", angles(eps=math.nan), ValueError, "eps must be.*got nan"),
    ("eps tensor", angles(eps=torch.tensor(0.1)), TypeError, "eps must be.*got Tensor"),
]


@each_wrong_call(wrong_calls(angles) + WRONG_EPS)
def test_wrong_calls_of_angles(wrong, exception, sentence, backend):
    assert_told(wrong, exception, sentence, backend, "rkd_angle")


@BOTH
def test_the_reference_compiles_and_keeps_its_values_when_float32_products_may_be_rounded(name):
    student, teacher = make(16, 8, dtype=torch.float32)
    precision = torch.get_float32_matmul_precision()
    results = []
    with fastkd.use_backend("reference"):
        compiled = torch.compile(FUNCTIONS[name], fullgraph=True, backend="aot_eager")
        try:
            for each in ("highest", "medium"):  # the second call must not keep the choice of the first one
                torch.set_float32_matmul_precision(each)
                results += [loss_and_grad(call, student, teacher) for call in (compiled, FUNCTIONS[name])]
        finally:
            torch.set_float32_matmul_precision(precision)
    for loss, grad in results[1:]:
        torch.testing.assert_close(loss, results[0][0], rtol=1e-5, atol=0)
        assert float((grad - results[0][1]).norm() / results[0][1].norm()) <= 1e-5


@BOTH
def test_the_reference_keeps_its_values_where_a_backend_says_how_products_are_rounded(name):
    student, teacher = make(16, 8, dtype=torch.float32)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    with fastkd.use_backend("reference"):
        expected = loss_and_grad(FUNCTIONS[name], student, teacher)
        try:
            matmul.fp32_precision = "bf16"
            actual = loss_and_grad(FUNCTIONS[name], student, teacher)
        finally:
            matmul.fp32_precision = before
    for a, b in zip(actual, expected, strict=True):
        assert float((a - b).norm() / b.norm()) <= 1e-5
