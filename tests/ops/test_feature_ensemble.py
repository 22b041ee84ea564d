"""feature_ensemble: against float64 and against the formula typed again, in every place its kernels run."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from feature_ensemble_helpers import LAYOUTS, PLACES, F, as_list, channels_last, check, in_float64, loss_and_grads, make

import fastkd
from fastkd.ops import _formulas
from fastkd.ops import feature_ensemble as op
from fastkd.testing import DTYPES, Case, assert_grad_close, over

MIXED = ("contiguous", "channels_last", "channels_last")


def test_reference_is_the_formula_typed_again():
    flat = {"sample": lambda z: z.flatten(1), "position": lambda z: z, "channel": lambda z: z.flatten(2)}
    dim = {"sample": 1, "position": 1, "channel": 2}
    for norm, p, elements in itertools.product(op.NORMS, (1, 2), op.ELEMENTS):
        students, teachers = make([(3, 5, 4, 2), (3, 7, 3, 3)], torch.float64)
        weights = torch.rand(2, 3, dtype=torch.float64)
        expected = torch.zeros(3, dtype=torch.float64)
        for a, b, w in zip(students, teachers, weights, strict=True):
            x, y = (torch_functional.normalize(flat[norm](z), dim=dim[norm]).flatten(1) for z in (a, b))
            distance = torch_functional.l1_loss if p == 1 else torch_functional.mse_loss
            rows = distance(x, y, reduction="none")
            expected = expected + w * (rows.mean(1) if elements == "mean" else rows.sum(1))
        with fastkd.use_backend("reference"):
            actual = F.feature_ensemble(
                students, teachers, weights=weights, p=p, norm=norm, elements=elements, reduction="none"
            )
        torch.testing.assert_close(actual, expected, rtol=1e-13, atol=1e-14)
        grads = [torch.autograd.grad(x.sum(), students) for x in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


def test_feeds_l1_is_the_mean_over_all_elements():
    students, teachers = make([(4, 8, 3, 3)] * 2)
    x, y = ([z / z.flatten(1).norm(dim=1)[:, None, None, None] for z in maps] for maps in (students, teachers))
    expected = sum((a - b).abs().mean() for a, b in zip(x, y, strict=True))
    torch.testing.assert_close(F.feature_ensemble(students, teachers), expected)


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case("one pair", dict(shapes=[(3, 5, 4, 4)])),
    Case("p 2, sum", dict(shapes=[(3, 5, 4, 4)], p=2, elements="sum", reduction="sum")),
    Case("three shapes", dict(shapes=[(4, 3, 5, 5), (4, 16, 4, 4), (4, 33, 7, 7)], weights=[0.5, 2.0, -1.0])),
    Case("embeddings", dict(shapes=[(5, 31), (5, 64)], p=2, reduction="none")),
    Case("embeddings beside maps", dict(shapes=[(5, 31), (5, 6, 3, 3)], norm="position", p=2)),
    Case("sequences", dict(shapes=[(3, 6, 17)], norm="position", p=2, reduction="none")),
    Case("volumes, channels_last", dict(shapes=[(2, 5, 3, 2, 4)], norm="channel", p=2, layouts=("channels_last",))),
    Case("one channel", dict(shapes=[(3, 1, 6, 6)], norm="channel", p=2)),
    Case("positions", dict(shapes=[(3, 20, 5, 5), (3, 8, 8, 8)], norm="position", reduction="none")),
    Case("positions, channels_last", dict(shapes=[(3, 20, 5, 5)], norm="position", p=2, layouts=("channels_last",))),
    Case("channels", dict(shapes=[(3, 20, 5, 5), (3, 8, 8, 8)], norm="channel", weights="samples")),
    Case("channels, channels_last", dict(shapes=[(3, 40, 5, 5)], norm="channel", p=2, layouts=("channels_last",))),
    Case("sample, channels_last", dict(shapes=[(3, 20, 5, 5)] * 2, p=2, weights="samples", layouts=("channels_last",))),
    Case("sample, mixed layouts", dict(shapes=[(3, 20, 5, 5)] * 3, layouts=MIXED, reduction="none")),
    Case("positions, mixed layouts", dict(shapes=[(3, 20, 5, 5)] * 3, layouts=MIXED, norm="position")),
    Case("channels, mixed layouts", dict(shapes=[(3, 20, 5, 5)] * 3, layouts=MIXED, norm="channel", p=2)),
    Case("one student", dict(shapes=[(3, 20, 5, 5)] * 4, shared=True, weights="samples", reduction="none")),
    Case("one student, positions", dict(shapes=[(3, 20, 5, 5)] * 3, shared=True, layouts=MIXED, norm="position")),
    Case("one student, channels", dict(shapes=[(3, 20, 4, 4)] * 3, shared=True, layouts=MIXED, norm="channel", p=2)),
    Case("a block per row", dict(shapes=[(2, 9, 13, 13)])),
    Case("rows of several tiles", dict(shapes=[(1, 3, 60, 70)], p=2)),
    Case("long channels", dict(shapes=[(1, 2, 40, 45)], norm="channel")),
    Case("many columns", dict(shapes=[(1, 37, 20, 20)], norm="position", p=2)),
    Case("teachers of all dtypes", dict(shapes=[(3, 12, 5, 5)] * 4, teacher_dtype=DTYPES, layouts=MIXED)),
    Case("the same, one student", dict(shapes=[(3, 12, 4, 4)] * 4, teacher_dtype=DTYPES, shared=True, norm="position")),
    Case(
        "the same, channels", dict(shapes=[(2, 12, 4, 4)] * 4, teacher_dtype=DTYPES, shared=True, norm="channel", p=2)
    ),
    Case("networks of all dtypes", dict(shapes=[(3, 6, 4, 4)] * 5, others=True, teacher_dtype=DTYPES[::-1], p=2)),
    Case("a mask", dict(shapes=[(5, 12, 4, 4)] * 2, mask=(1, 3), norm="position", weights="samples", p=2)),
    Case("a mask, one student", dict(shapes=[(4, 12, 4, 4)] * 2, mask=(0,), shared=True, reduction="none")),
    Case(
        "a mask, channels", dict(shapes=[(4, 40, 3, 3)] * 2, mask=(0,), norm="channel", reduction="sum", layouts=MIXED)
    ),
    Case("a mask and num_items", dict(shapes=[(4, 12, 4, 4)], mask=(0, 1), num_items=7.0)),
    Case("num_items of a sum", dict(shapes=[(4, 12, 4, 4)], num_items=3, reduction="sum")),
    Case("weights of 0", dict(shapes=[(3, 9, 4, 4)] * 3, weights=[0.0, 1.5, 0.0])),
]


def build(device, dtype, shapes, shared=False, layouts=("contiguous",), weights=None, teacher_dtype=None, **options):
    others, left_out = options.pop("others", False), options.pop("mask", ())
    students, teachers = make(shapes, (dtype, *DTYPES) if others else dtype, teacher_dtype, layouts, device=device)
    batch = shapes[0][0]
    if weights == "samples":
        g = torch.Generator().manual_seed(1)
        weights = torch.rand(len(shapes), batch, generator=g, dtype=torch.float64)
        weights = weights.to(device, _formulas.accumulate_dtype(dtype))
    if left_out:
        options["mask"] = torch.tensor([b not in left_out for b in range(batch)], device=device)
    return students[0] if shared else students, teachers, dict(options, weights=weights)


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    students, teachers, options = build(at(place), dtype, **case.arguments)
    check(students, teachers, **options)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("norm", op.NORMS)
def test_float32_teachers_of_a_half_precision_student(norm, dtype, place, at):
    students, teachers = make([(3, 12, 5, 5)] * 2, dtype, torch.float32, MIXED, device=at(place))
    check(students, teachers, norm=norm, p=2)


# --- what is not read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_mask_is_the_batch_without_its_samples(backend, norm, place, at):
    """NaN in the others reaches nothing; "none" gives 0 there."""
    students, teachers = make([(5, 6, 3, 3)] * 2, device=at(place))
    mask = torch.tensor([True, False, True, True, False], device=students[0].device)
    few = [s.detach()[mask].requires_grad_() for s in students]
    with torch.no_grad():
        students[0][1], teachers[1][4] = math.nan, math.inf
    with fastkd.use_backend(backend):
        for reduction in ("none", "sum", "mean"):
            options = dict(norm=norm, reduction=reduction)
            loss = F.feature_ensemble(students, teachers, mask=mask, **options)
            expected = F.feature_ensemble(few, [t[mask] for t in teachers], **options)
            grads, expected_grads = (torch.autograd.grad(x.sum(), n) for x, n in ((loss, students), (expected, few)))
            torch.testing.assert_close(loss[mask] if reduction == "none" else loss, expected)
            assert reduction != "none" or loss[~mask].tolist() == [0, 0]
            for grad, expected_grad in zip(grads, expected_grads, strict=True):
                torch.testing.assert_close(grad[mask], expected_grad)
                assert float(grad[~mask].abs().max()) == 0
        assert float(F.feature_ensemble(students, teachers, mask=torch.zeros_like(mask))) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_nan_behind_a_weight_of_0_reaches_nothing(backend, shared, norm, place, at):
    students, teachers = make([(3, 6, 3, 3)] * 3, device=at(place))
    learners = students[0] if shared else students
    per_sample = torch.tensor([[1.0, 0, 2], [1, 1, 1], [0, 0, 3]], device=students[0].device)
    for weights in ([1.0, 0.0, 2.0], torch.tensor([1.0, 0.0, 2.0], device=students[0].device), per_sample):
        if isinstance(weights, torch.Tensor) and weights.dim() == 2:
            wrong = [(0, 1), (2, 0), (2, 1)]
        else:
            wrong = [(1, b) for b in range(3)]
        with fastkd.use_backend(backend):
            expected = loss_and_grads(learners, teachers, weights=weights, norm=norm)
            spoilt = [t.clone() for t in teachers]
            for k, b in wrong:
                spoilt[k][b] = math.nan
            loss, grads = loss_and_grads(learners, spoilt, weights=weights, norm=norm)
        assert torch.equal(loss, expected[0]) and bool(loss.isfinite())
        assert all(torch.equal(a, b) for a, b in zip(grads, expected[1], strict=True))


def test_a_weight_of_0_that_learns_has_its_derivative():
    students, teachers = make([(2, 3, 2, 2)] * 2, torch.float64)
    weights = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: F.feature_ensemble(students, teachers, weights=w), weights)


@pytest.mark.parametrize("place", PLACES)
def test_num_items_of_every_kind(place, at):
    """Two halves of a batch, each divided by the whole's number of samples, add up to the whole."""
    students, teachers = make([(6, 5, 3, 3)], device=at(place))
    device = students[0].device
    whole = F.feature_ensemble(students, teachers)
    for items in (6, torch.tensor(6), torch.tensor(6.0, dtype=torch.float64, device=device)):
        for reduction in ("mean", "sum"):
            halves = [
                F.feature_ensemble(students[0][part], teachers[0][part], num_items=items, reduction=reduction)
                for part in (slice(0, 2), slice(2, 6))
            ]
            assert halves[0].dtype == torch.float32
            torch.testing.assert_close(sum(halves), whole)


# --- layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, norm, place, at):
    """Any layout on either side gives what contiguous maps give, and the gradient in the student's layout."""
    students, teachers = make([(3, 8, 4, 6)] * 2, device=at(place))
    expected_loss, expected = loss_and_grads(students, teachers, norm=norm, p=2)
    view = LAYOUTS[layout]
    for of_students, of_teachers in ((True, False), (False, True), (True, True)):
        moved = [(view(s.detach()) if of_students else s.detach()).requires_grad_() for s in students]
        loss, grads = loss_and_grads(moved, [view(t) if of_teachers else t for t in teachers], norm=norm, p=2)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(grads, expected)
        if of_students and layout == "channels_last":
            assert all(g.is_contiguous(memory_format=torch.channels_last) for g in grads)


@pytest.mark.parametrize("place", PLACES)
def test_broadcast_inputs(place, at):
    students, teachers = make([(5, 6, 4, 4)], device=at(place))
    check(students, [teachers[0][:1].expand(5, 6, 4, 4)])
    check(students, [teachers[0][:, :, :1].expand(5, 6, 4, 4)], norm="position", p=2)


@pytest.mark.parametrize("norm", op.NORMS)
def test_no_map_is_copied_in_contiguous_and_channels_last(norm):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    for layouts in (("contiguous",), ("channels_last",), MIXED, ("every other sample", "one of more channels")):
        students, teachers = make([(3, 8, 4, 6)] * 2, layouts=layouts)
        names = []
        with Recorder():
            torch.autograd.grad(F.feature_ensemble(students, teachers, norm=norm), students)
        allowed = {"fastkd::feature_ensemble_forward", "fastkd::feature_ensemble_backward"}
        assert set(names) <= allowed | {"aten::ones_like", "aten::detach", "aten::_local_scalar_dense"}, names


def test_only_maps_that_are_dense_in_no_order_are_copied_inside():
    """What the kernels allocate, counted in bytes: the gradients, and a copy of maps in other layouts alone."""
    from torch.profiler import ProfilerActivity, profile

    def allocated(layout):
        students, teachers = make([(4, 32, 16, 16)], layouts=(layout,))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded, torch.no_grad():
            F.feature_ensemble(students, teachers)
        return sum(max(0, e.self_cpu_memory_usage) for e in recorded.events())

    map_bytes = 4 * 32 * 16 * 16 * 4
    assert allocated("contiguous") < 1000 and allocated("channels_last") < 1000
    assert allocated("every other channel") >= 2 * map_bytes


def test_stacked_teachers_and_one_map():
    students, teachers = make([(4, 6, 3, 3)] * 3)
    expected = F.feature_ensemble([students[0]] * 3, teachers)
    torch.testing.assert_close(F.feature_ensemble(students[0], teachers), expected)
    torch.testing.assert_close(F.feature_ensemble(students[0], torch.stack(teachers)), expected)
    one = F.feature_ensemble(students[0], teachers[0])
    torch.testing.assert_close(one, F.feature_ensemble(students[:1], teachers[:1]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_of_more_than_31_bits(dtype):
    """Samples that lie 2^31 elements and more from the first; the memory between them is never touched."""
    torch.use_deterministic_algorithms(False)  # or all of the memory would be filled with NaN
    stride = 2**30 + 8
    memory = torch.empty(2 * stride + 40, dtype=dtype)
    near, teacher = torch.randn(3, 10, 2, 2).to(dtype), torch.randn(3, 10, 2, 2).to(dtype)
    far = memory.as_strided((3, 10, 2, 2), (stride, 4, 2, 1))
    far.copy_(near)
    expected = loss_and_grads(near.clone().requires_grad_(), [teacher])
    actual = loss_and_grads(far.detach().requires_grad_(), [teacher])
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1][0], expected[1][0])
    assert torch.equal(F.feature_ensemble(teacher, [far]), F.feature_ensemble(teacher, [near]))


# --- numbers that random normal maps do not show ----------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_maps_are_finite_with_gradient_zero(dtype, p, norm, place, at):
    students, teachers = make([(4, 6, 3, 3)], dtype, device=at(place))
    with torch.no_grad():
        students[0][0] = 0
        teachers[0][1] = 0
        students[0][2] = teachers[0][2] = 0
        students[0][3, :, 1, 1] = students[0][3, 2] = 0
    loss, (grad,) = loss_and_grads(students, teachers, p=p, norm=norm, reduction="none")
    assert bool(loss.isfinite().all()) and bool(grad.isfinite().all())
    assert float(loss[2]) == 0 and float(loss[0]) > 0
    assert float(grad[0].abs().max()) == 0 and float(grad[2].abs().max()) == 0
    if norm != "sample":
        silent = grad[3, 2] if norm == "channel" else grad[3, :, 1, 1]
        assert float(silent.abs().max()) == 0
    if dtype != torch.float16:
        check(students, teachers, p=p, norm=norm, reduction="none")


EXTREMES = {torch.float32: (1e-30, 1e30, 3e38), torch.bfloat16: (1e-30, 3e38), torch.float16: (1e-6, 6e4)}
EXTREMES[torch.float64] = (1e-200, 1e-300, 1e200, 1e307)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_tiny_and_huge_maps(dtype, norm, place, at):
    """The loss does not depend on the maps' size; the gradient is the inverse of the student's size."""
    device, usual = at(place), make([(2, 6, 3, 5)], torch.float64)
    for student_scale, teacher_scale in itertools.product((*EXTREMES[dtype], 1.0), repeat=2):
        largest = max(float(z.detach().abs().max()) for z in (*usual[0], *usual[1]))
        students = [(usual[0][0].detach() / largest * student_scale).to(device, dtype).requires_grad_()]
        teachers = [(usual[1][0] / largest * teacher_scale).to(device, dtype)]
        loss, (grad,) = loss_and_grads(students, teachers, norm=norm, reduction="none")
        unit = [(z[0].detach().double() / s) for z, s in ((students, student_scale), (teachers, teacher_scale))]
        exact, (exact_grad,) = in_float64([unit[0].requires_grad_()], [unit[1]], norm=norm, reduction="none")
        torch.testing.assert_close(loss.double(), exact, rtol=1e-5, atol=1e-7)
        size = float(exact_grad.abs().max()) / student_scale
        smallest = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).tiny * 1e3
        if dtype != torch.float16 and smallest < size < torch.finfo(dtype).max:
            floor = 1e-5 + 2 * torch.finfo(dtype).eps
            assert_grad_close(grad.double() * student_scale, exact_grad, exact_grad, floor=floor)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
def test_one_map_of_usual_size_beside_tiny_and_huge_ones(norm, place, at):
    """Only the norms that need it are scaled: the others keep their bits."""
    students, teachers = make([(3, 6, 4, 4)], device=at(place))
    before, (grad_before,) = loss_and_grads(students, teachers, norm=norm, reduction="none")
    with torch.no_grad():
        students[0][0] *= 1e-30
        students[0][2] *= 1e30
    after, (grad_after,) = loss_and_grads(students, teachers, norm=norm, reduction="none")
    assert torch.equal(before[1], after[1]) and torch.equal(grad_before[1], grad_after[1])
    torch.testing.assert_close(before, after)


@pytest.mark.parametrize("place", PLACES)
def test_subnormal_maps(place, at):
    students, teachers = make([(2, 6, 3, 5)], device=at(place))
    tiny = [(students[0].detach() * 2.0**-135).requires_grad_()]
    exact, _ = in_float64(tiny, teachers, reduction="none")
    torch.testing.assert_close(F.feature_ensemble(tiny, teachers, reduction="none").double(), exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_maps_have_no_distance_and_no_gradient(dtype, norm, p, place, at):
    for factor in (1.0, 4.0):  # a power of two: also the normalised maps are equal bit by bit
        students, teachers = make([(3, 21, 5, 7)], dtype, layouts=("contiguous",), device=at(place))
        teachers = [students[0].detach() * factor]
        for teacher in (teachers[0], channels_last(teachers[0])):
            loss, (grad,) = loss_and_grads(students, [teacher], norm=norm, p=p, reduction="none")
            assert float(loss.abs().max()) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
def test_a_group_of_one_element_is_its_sign(place, at):
    device = at(place)
    student = torch.tensor([[[[0.3]]], [[[-0.7]]]], device=device, requires_grad=True)
    teacher = torch.tensor([[[[5.0]]], [[[1.9]]]], device=device)
    loss = F.feature_ensemble(student, teacher, elements="sum", p=2, reduction="none")
    (grad,) = torch.autograd.grad(loss.sum(), student)
    torch.testing.assert_close(loss, torch.tensor([0.0, 4.0], device=device))
    torch.testing.assert_close(grad, torch.zeros_like(grad), rtol=0, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_equal_elements_have_subgradient_zero(place, at):
    """As many elements above as below the teacher's, and one equal: its gradient is the norm's alone."""
    device = at(place)
    student = torch.tensor([[3.0, 4.0, 0.0, 0.0]], device=device, requires_grad=True)
    teacher = torch.tensor([[3.0, 0.0, 4.0, 0.0]], device=device)
    (grad,) = torch.autograd.grad(F.feature_ensemble(student, teacher, elements="sum"), student)
    # x = (.6, .8, 0, 0), h = (0, 1, -1, 0), <h, x> = .8, gradient = (h - .8 x) / 5
    expected = torch.tensor([[-0.096, 0.072, -0.2, 0.0]], device=device)
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("p", [1, 2])
def test_near_maps_keep_their_small_distance(p, norm, place, at):
    students, teachers = make([(3, 16, 4, 4)], device=at(place))
    g = torch.Generator().manual_seed(3)
    noise = torch.randn(students[0].shape, generator=g).to(students[0].device)
    teachers = [students[0].detach() * (1 + 1e-3 * noise)]
    check(students, teachers, p=p, norm=norm, reduction="none")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["student", "teacher"])
def test_nan_and_infinity_reach_their_sample_alone(where, value, norm, place, at):
    students, teachers = make([(3, 6, 3, 3)], device=at(place))
    with torch.no_grad():
        (students if where == "student" else teachers)[0][1, 2, 1, 0] = value
    loss, (grad,) = loss_and_grads(students, teachers, norm=norm, reduction="none")
    with fastkd.use_backend("reference"):
        expected, (expected_grad,) = loss_and_grads(students, teachers, norm=norm, reduction="none")
    assert loss.isnan().tolist() == [False, True, False] == expected.isnan().tolist()
    assert torch.equal(grad.isnan(), expected_grad.isnan())
    assert grad.isnan().flatten(1).any(1).tolist() == [False, True, False]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
def test_float16_with_a_loss_scale_is_as_good_as_eager(norm, place, at):
    """The derivative of a mean over C*H*W elements underflows float16; the loss scale must still save it."""
    scale, shape = 65536.0, (4, 64, 8, 8)
    students, teachers = make([shape], torch.float16, scale=8.0, device=at(place))
    grads = {}
    for backend in ("native", "reference"):
        with fastkd.use_backend(backend):
            loss = F.feature_ensemble(students, teachers, norm=norm)
            (grads[backend],) = torch.autograd.grad(loss * scale, students)
    doubles = [students[0].detach().double().requires_grad_()]
    with fastkd.use_backend("reference"):
        exact_loss = F.feature_ensemble(doubles, [teachers[0].double()], norm=norm)
    (exact,) = torch.autograd.grad(exact_loss * scale, doubles)
    assert int((grads["native"] == 0).sum()) <= int((grads["reference"] == 0).sum())
    assert_grad_close(grads["native"], exact, grads["reference"])


# --- batches, many pairs, threads, schedules --------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
def test_empty_batch(reduction, norm, place, at):
    students, teachers = make([(0, 6, 3, 3), (0, 5)], device=at(place))
    loss, grads = loss_and_grads(students, teachers, norm=norm, reduction=reduction)
    assert loss.shape == ((0,) if reduction == "none" else ()) and float(loss.sum()) == 0
    assert [g.shape for g in grads] == [s.shape for s in students]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("k", [16, 17, 33])
@pytest.mark.parametrize("shared", [False, True])
def test_more_pairs_than_a_launch_takes(shared, k, place, at):
    students, teachers = make([(2, 6, 3, 3)] * k, device=at(place))
    weights = torch.rand(k, 2, device=students[0].device)
    check(students[0] if shared else students, teachers, weights=weights, norm="position", p=2)


@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("shape", [(3, 10, 5, 5), (1, 6, 40, 40)])
def test_every_schedule_gives_the_same_bits(shape, norm, at, simt):
    from simt.fixtures import in_every_schedule

    at("simt")
    students, teachers = make([shape] * 2, layouts=MIXED)
    results = in_every_schedule(simt, lambda: loss_and_grads(students, teachers, norm=norm, p=2))
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(g, h) for g, h in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("norm", op.NORMS)
@pytest.mark.parametrize("shared", [False, True])
def test_same_bits_for_any_number_of_threads(shared, norm, dtype):
    students, teachers = make([(64, 24, 9, 9)] * 2, dtype, layouts=MIXED)
    if shared:
        students = students[0]
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(loss_and_grads(students, teachers, norm=norm))
    finally:
        torch.set_num_threads(before)
    for loss, grads in results[1:]:
        assert torch.equal(loss, results[0][0])
        assert all(torch.equal(g, h) for g, h in zip(grads, results[0][1], strict=True))


@pytest.mark.parametrize("place", PLACES)
def test_only_some_students_learn(place, at):
    students, teachers = make([(3, 6, 3, 3)] * 2, device=at(place))
    frozen = [students[0].detach(), students[1]]
    (grad,) = torch.autograd.grad(F.feature_ensemble(frozen, teachers), frozen[1])
    (expected,) = torch.autograd.grad(F.feature_ensemble(students, teachers), students[1])
    assert torch.equal(grad, expected)
    assert as_list(students)[0].grad is None
