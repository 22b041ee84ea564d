"""rkd_distance and rkd_angle: against float64 and the usual code, in every place their kernels run."""

import math
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from relational_helpers import FUNCTIONS, PLACES, check, embeddings, loss_and_grad, reference, rounding, usual
from rows_helpers import LAYOUTS, weighted_sum
from simt.fixtures import in_every_schedule

import fastkd
from fastkd import _backend
from fastkd.ops import _relational_kernels as kernels
from fastkd.testing import DTYPES, Case, over

F = fastkd.functional
BOTH = pytest.mark.parametrize("name", FUNCTIONS)
EVERYWHERE = pytest.mark.parametrize("place", PLACES)
CUDA = ["simt", "cuda"]
ON_CUDA = pytest.mark.parametrize("place", CUDA)


def make(n, width=7, teacher_width=9, kind="random", teacher_kind="random", dtype=torch.float32, device="cpu"):
    student = embeddings(kind, n, width, 0).to(device, dtype)
    return student, embeddings(teacher_kind, n, teacher_width, 1).to(device, dtype)


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case(f"{name}, {what}", dict(name=name, **arguments))
    for name in FUNCTIONS
    for what, arguments in {
        "3 rows": dict(n=3),
        "15 rows": dict(n=15),
        "16 rows, none": dict(n=16, reduction="none"),
        "17 rows, sum": dict(n=17, reduction="sum"),
        "31 rows, few columns": dict(n=31, width=1 if name == "rkd_distance" else 2, teacher_width=1),
        "32 rows, one width": dict(n=32, width=8, teacher_width=8),
        "33 rows, none": dict(n=33, reduction="none"),
        "47 rows, wide": dict(n=47, width=130, teacher_width=33),
        "clusters": dict(n=24, kind="clusters", teacher_kind="clusters"),
        "near rows, 1e-3": dict(n=20, kind="near 1e-3"),
        "near rows, 1e-5": dict(n=20, kind="near 1e-5", teacher_kind="near 1e-3", reduction="none"),
        "far mean": dict(n=20, kind="far mean", teacher_kind="far mean"),
        "a mask": dict(n=21, masked=3),
        "a mask, none": dict(n=33, masked=2, reduction="none", kind="near 1e-3"),
        "a mask, sum, far mean": dict(n=20, masked=5, reduction="sum", kind="far mean"),
        "num_items": dict(n=9, num_items=40.0, masked=4),
    }.items()
]


def run_case(case, device, dtype):
    arguments = dict(case.arguments)
    function, masked = FUNCTIONS[arguments.pop("name")], arguments.pop("masked", 0)
    options = {name: arguments.pop(name) for name in ("reduction", "num_items") if name in arguments}
    student, teacher = make(**arguments, dtype=dtype, device=device)
    if masked:  # every so many rows are left out
        options["mask"] = torch.arange(len(student), device=student.device) % masked != 0
    check(function, student, teacher, **options)


@over(CASES, ["cpu"])
def test_table(case, place, dtype, at):
    run_case(case, at(place), dtype)


@over(CASES[::3], CUDA, dtypes=[torch.float16, torch.bfloat16])
def test_table_in_half_precision(case, place, dtype, at):
    """These networks reach the kernels in float32, of which test_table_in_both_forms runs all cases."""
    run_case(case, at(place), dtype)


@pytest.fixture(params=[False, True], ids=["differences", "gram"])
def form(request, monkeypatch):
    """Both ways to the distances of the CUDA kernels, one of which a GPU's rate of float64 chooses."""
    monkeypatch.setattr(kernels, "GRAM_ROWS", 0)
    with _backend.pretend(fast_float64=request.param):
        yield request.param


@pytest.mark.usefixtures("form")
@over(CASES, CUDA, dtypes=[torch.float32, torch.float64])
def test_table_in_both_forms(case, place, dtype, at):
    run_case(case, at(place), dtype)


@ON_CUDA
@BOTH
@pytest.mark.usefixtures("form")
@pytest.mark.parametrize("kind", ["random", "clusters", "nested"])
def test_equal_networks_have_no_loss_in_both_forms(kind, name, place, at):
    student, _ = make(19, kind=kind, device=at(place))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, student.clone())
    assert float(loss) == 0 and float(grad.abs().max()) == 0


def test_the_form_is_chosen_by_the_rate_of_float64_and_by_rows():
    """On the CPU by the operation alone."""
    few, many = torch.empty(kernels.GRAM_ROWS - 1, 1), torch.empty(kernels.GRAM_ROWS, 1)
    sums = lambda: [kernels._sums_differences(x, name) for name in FUNCTIONS for x in (few, many)]  # noqa: E731
    assert list(FUNCTIONS) == ["rkd_distance", "rkd_angle"]
    assert sums() == [True, True, False, False]
    with _backend.pretend(cpu_kind="cuda"):
        assert sums() == [True, True, True, True]
        with _backend.pretend(fast_float64=True):
            assert sums() == [True, False, False, False]


@ON_CUDA
@pytest.mark.parametrize("width", [3, 33, 1100])
@pytest.mark.parametrize("kind", ["random", "clusters", "near 1e-5", "nested", "far mean", "tiny", "huge"])
def test_squares_for_angles_have_more_digits_than_float32(kind, width, place, at):
    """As many as two floats: beside a short side, the two others nearly cancel in a cosine."""
    x = embeddings(kind, 67, width).to(at(place), torch.float32)
    ops = _backend.native_ops(x)
    planes, mean, _ = ops.relational_distances(x, None, kernels.KIND_SINGLE, 0.0)
    scaled = (planes[0].double() + planes[2].double())[:, :67] * (mean[0] / mean[2]).square()
    exact = (x.double()[:, None] - x.double()).square().sum(-1)
    assert float(((scaled - exact).abs() / exact).fill_diagonal_(0).max()) <= 2.0**-42


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("counted", [0, 1, 2, 7])
def test_a_mask_is_the_batch_without_its_rows(counted, reduction, backend, name, place, at):
    """NaN in the others reaches nothing; "none" gives 0 there."""
    student, teacher = make(11, device=at(place))
    mask = torch.zeros(11, dtype=torch.bool, device=student.device)
    mask[torch.randperm(11, generator=torch.Generator().manual_seed(counted))[:counted]] = True
    with fastkd.use_backend(backend):
        expected, expected_grad = loss_and_grad(FUNCTIONS[name], student[mask], teacher[mask], reduction=reduction)
        student[~mask], teacher[~mask] = math.nan, math.inf
        student.requires_grad_()
        loss = FUNCTIONS[name](student, teacher, mask=mask, reduction=reduction)
        of_loss = loss[mask] if reduction == "none" else loss
        (grad,) = torch.autograd.grad(weighted_sum(of_loss), student)
    torch.testing.assert_close(of_loss.detach(), expected, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(grad[mask], expected_grad, rtol=1e-4, atol=1e-6)
    assert float(grad[~mask].abs().max()) == 0
    assert reduction != "none" or float(loss[~mask].detach().abs().max()) == 0


@EVERYWHERE
@BOTH
def test_num_items_divides_the_sum(name, place, at):
    student, teacher = make(9, device=at(place))
    total = FUNCTIONS[name](student, teacher, reduction="sum")
    for items in (36, torch.tensor(36), torch.tensor(36.0, dtype=torch.float64, device=student.device)):
        for reduction in ("mean", "sum"):
            loss = FUNCTIONS[name](student, teacher, num_items=items, reduction=reduction)
            assert loss.dtype == torch.float32
            torch.testing.assert_close(loss, total / 36)


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["random", "clusters", "near 1e-3", "far mean"])
def test_equal_networks_have_no_loss_and_no_gradient(kind, dtype, name, place, at):
    """Exactly, but for the CPU's cosines, one of which its compiler rounds and the other not."""
    student, _ = make(19, kind=kind, dtype=dtype, device=at(place))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, student.clone())
    if name == "rkd_angle" and place == "cpu":
        assert float(loss) <= torch.finfo(loss.dtype).eps ** 2
    else:
        assert float(loss) == 0 and float(grad.abs().max()) == 0


@BOTH
@pytest.mark.parametrize("n", [258, 270])
def test_more_rows_than_a_tile_is_wide(name, n, at):
    check(FUNCTIONS[name], *make(n, device=at("cpu")))


@BOTH
def test_several_tiles_of_the_cuda_kernels(name, at):
    check(FUNCTIONS[name], *make(70, kind="clusters", device=at("simt")))


@BOTH
def test_the_cuda_kernels_with_several_tiles_per_block(name, at):
    """Against the CPU kernels, which test_more_rows_than_a_tile_is_wide compares with float64 at such sizes."""
    student, teacher = make(258, device=at("cpu"))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher)
    at("simt")
    actual, actual_grad = loss_and_grad(FUNCTIONS[name], student, teacher)
    torch.testing.assert_close(actual, loss, rtol=1e-6, atol=0)
    assert float((actual_grad - grad).norm() / grad.norm()) <= 1e-6


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)])
def test_dtypes_that_differ(name, dtypes, place, at):
    device = at(place)
    student, teacher = make(12, device=device)
    check(FUNCTIONS[name], student.to(dtypes[0]), teacher.to(dtypes[1]))


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("scale", ["tiny", "huge"])
def test_the_scale_of_the_embeddings_does_not_matter(name, scale, place, at):
    """In float32 the squares of these would underflow or overflow."""
    student, teacher = make(16, kind=scale, teacher_kind=scale, device=at(place))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher)
    exact, exact_grad = reference(FUNCTIONS[name], student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6 * float(exact_grad.abs().max()))


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_rows_so_near_that_their_squared_distance_underflows(place, at):
    """A group of rows at the origin, 1e-25 apart, beside rows of magnitude 1 whose mean is exactly 0."""
    student, teacher = make(12, device=at(place))
    student[:4] *= 1e-25
    student[4:8] = student[8:].round()
    student[8:] = -student[4:8]
    loss, grad = loss_and_grad(F.rkd_distance, student, teacher)
    exact, exact_grad = reference(F.rkd_distance, student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    torch.testing.assert_close(grad.double(), exact_grad, rtol=1e-4, atol=1e-6 * float(exact_grad.abs().max()))


@EVERYWHERE
def test_subnormal_rows_are_scaled_up(place, at):
    """To a magnitude of 1 it would take a power of two beyond the largest number."""
    student, teacher = (x.mul(8).round() for x in make(12, dtype=torch.float64, device=at(place)))
    expected = F.rkd_distance(student, teacher)
    torch.testing.assert_close(F.rkd_distance(student * 2.0**-1060, teacher), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("width", [511, 512, 513, 1100])
@pytest.mark.parametrize("n", [31, 67, 130])
def test_distances_of_wide_rows_in_several_blocks(n, width, at):
    check(F.rkd_distance, *make(n, width=width, teacher_width=40, kind="clusters", device=at("cpu")))


@ON_CUDA
@BOTH
@pytest.mark.parametrize("n, width", [(31, 1100), (67, 513), (130, 511)])
def test_wide_rows_in_several_blocks_and_parts_of_the_cuda_kernels(n, width, name, place, at):
    check(FUNCTIONS[name], *make(n, width=width, teacher_width=40, kind="clusters", device=at(place)))


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("kind", ["near 1e-3", "near 1e-5", "far mean", "nested"])
def test_near_rows_beside_others_in_several_blocks(kind, name, place, at):
    """Digits that a Gram matrix in float32 loses, in the distances and in the gradient."""
    check(FUNCTIONS[name], *make(90, width=300, teacher_width=20, kind=kind, device=at(place)))


@EVERYWHERE
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_many_columns_are_summed_to_the_last(dtype, place, at):
    """Beyond 512 the partial sums are added more exactly; a last column that alone tells two rows apart is seen."""
    device = at(place)
    student = torch.zeros(3, 1201, dtype=dtype, device=device)
    student[1, -1], student[2] = 1, 2
    teacher = torch.eye(3, dtype=dtype, device=device)
    loss, grad = loss_and_grad(F.rkd_distance, student, teacher)
    exact, exact_grad = reference(F.rkd_distance, student.double(), teacher.double())
    torch.testing.assert_close(loss.double(), exact, rtol=1e-6, atol=0)
    assert float((grad.double() - exact_grad).norm() / exact_grad.norm()) <= 1e-6


# --- the usual code ---------------------------------------------------------------------------------------------------


@BOTH
def test_the_reference_is_the_usual_code(name):
    student, teacher = make(11, dtype=torch.float64)
    student.requires_grad_()
    expected = usual(name, student, teacher)
    with fastkd.use_backend("reference"):
        actual = FUNCTIONS[name](student, teacher)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(loss, student)[0] for loss in (actual, expected)]
    torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-14)


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("kind", ["random", "clusters", "near 1e-3", "near 1e-5"])
def test_the_kernels_against_the_usual_code_in_float64(name, kind, place, at):
    student, teacher = make(21, kind=kind, device=at(place))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher)
    exact = student.double().cpu().requires_grad_()
    expected = usual(name, exact, teacher.double().cpu())
    (expected_grad,) = torch.autograd.grad(expected * 0.5, exact)  # loss_and_grad's first weight
    assert abs(float(loss) - expected.item()) <= 1e-6 * expected.item()
    assert float((grad.cpu() - expected_grad).norm() / expected_grad.norm()) <= 5e-6


@BOTH
def test_a_gram_matrix_in_float32_would_not_do(name, at):
    """The near rows of this test tell float64 from float32: a Gram matrix in float32 is wrong by more than 1 %."""
    at("cpu")
    student, teacher = make(20, width=64, kind="near 1e-3")
    exact = reference(FUNCTIONS[name], student.double(), teacher.double())[1]
    wrong = lambda grad: float((grad.double() - exact).norm() / exact.norm())  # noqa: E731
    assert wrong(loss_and_grad(FUNCTIONS[name], student, teacher)[1]) < 1e-5
    gram = student @ student.T
    squares = gram.diag()[:, None] + gram.diag() - 2 * gram
    true = torch.cdist(student.double(), student.double()).square()
    assert float(((squares - true).abs() / true).fill_diagonal_(0).max()) > 0.01


# --- equal rows, collapsed embeddings, few rows -----------------------------------------------------------------------


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("kinds", [("equal", "equal"), ("equal", "random"), ("random", "equal")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_equal_rows(name, kinds, dtype, place, at):
    student, teacher = make(14, kind=kinds[0], teacher_kind=kinds[1], dtype=dtype, device=at(place))
    check(FUNCTIONS[name], student, teacher, reduction="none")
    same, grad = loss_and_grad(FUNCTIONS[name], student, student)  # the difference of cosines is at most their rounding
    assert float(same) <= torch.finfo(same.dtype).eps ** 2 and bool(grad.isfinite().all())


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("kinds", [("collapsed", "random"), ("random", "collapsed"), ("collapsed", "collapsed")])
@pytest.mark.parametrize("dtype", DTYPES)
def test_collapsed_embeddings(name, kinds, dtype, place, at):
    student, teacher = make(9, kind=kinds[0], teacher_kind=kinds[1], dtype=dtype, device=at(place))
    student, teacher = student + 0.1, teacher + 0.1  # a mean that is no sum of powers of two
    loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher, reduction="none")
    expected, expected_grad = reference(FUNCTIONS[name], student.double(), teacher.double(), reduction="none")
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-12)
    if kinds[0] == "collapsed":
        assert float(grad.abs().max()) == 0 == float(expected_grad.abs().max())
    else:
        assert float(grad.abs().max()) > 0


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_rows(n, reduction, name, place, at):
    """Zero but where one network tells two rows apart and the other does not, up to rounding."""
    student, teacher = make(n, device=at(place))
    loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher, reduction=reduction)
    assert loss.shape == ((n,) if reduction == "none" else ()) and grad.shape == student.shape
    assert float(loss.abs().sum()) <= 1e-12 and float(grad.abs().sum()) <= 1e-6
    if n == 2:
        one = reference(FUNCTIONS[name], student.double(), teacher.double() * 0, reduction=reduction)
        loss, grad = loss_and_grad(FUNCTIONS[name], student, teacher * 0, reduction=reduction)
        torch.testing.assert_close(loss.double(), one[0], rtol=1e-6, atol=0)
        assert float(loss.sum()) > 0 and bool(grad.isfinite().all())


@EVERYWHERE
def test_eps_is_relative_to_the_mean_side(place, at):
    student, teacher = make(12, kind="near 1e-3", device=at(place))
    for eps in (0.0, 1e-6, 1e-2, 0.9):
        exact = reference(F.rkd_angle, student.double(), teacher.double(), eps=eps)
        for scale in (1.0, 1024.0):
            loss, grad = loss_and_grad(F.rkd_angle, student * scale, teacher, eps=eps)
            torch.testing.assert_close(loss.double(), exact[0], rtol=1e-5, atol=0)
            assert float((grad * scale - exact[1]).norm()) <= 1e-4 * float(exact[1].norm())


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("where", [0, 1])
def test_nan_and_infinity_make_all_of_it_nan(name, value, where, place, at):
    networks = make(6, device=at(place))
    networks[where][2, 3] = value
    for loss, grad in (
        loss_and_grad(FUNCTIONS[name], *networks, reduction="none"),
        reference(FUNCTIONS[name], *networks, reduction="none"),
    ):
        assert bool(loss.isnan().all()) and bool(grad.isnan().any() or where == 1)


# --- reductions, layouts, threads, settings ---------------------------------------------------------------------------


@EVERYWHERE
@BOTH
def test_reductions_agree(name, place, at):
    student, teacher = make(19, device=at(place))
    rows, total, mean = (FUNCTIONS[name](student, teacher, reduction=r) for r in ("none", "sum", "mean"))
    torch.testing.assert_close(rows.sum(), total)
    torch.testing.assert_close(rows.mean(), mean)


@EVERYWHERE
@BOTH
@pytest.mark.parametrize("layout", ["row stride", "transposed", "every other row", "offset"])
def test_layouts(name, layout, place, at):
    student, teacher = make(13, device=at(place))
    expected = loss_and_grad(FUNCTIONS[name], student, teacher)
    view = LAYOUTS[layout]
    actual = loss_and_grad(FUNCTIONS[name], view(student), view(teacher))
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-7)


@EVERYWHERE
@BOTH
def test_broadcast_inputs(name, place, at):
    student, teacher = make(8, device=at(place))
    check(FUNCTIONS[name], student, teacher[:, :1].expand(8, 5))
    loss, grad = loss_and_grad(FUNCTIONS[name], student[:1].expand(8, 7), teacher)
    assert bool(loss.isfinite()) and float(grad.abs().max()) == 0


@BOTH
@pytest.mark.parametrize("n, width", [(5, 7), (70, 33), (260, 64)])
def test_any_number_of_threads_gives_the_same_bits(name, n, width, at):
    at("cpu")
    student, teacher = make(n, width)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 7):
            torch.set_num_threads(threads)
            results.append(loss_and_grad(FUNCTIONS[name], student, teacher, reduction="none"))
            results[-1] += loss_and_grad(FUNCTIONS[name], student, teacher)
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_schedule_gives_the_same_bits(name, dtype, simt, at):
    at("simt")
    student, teacher = make(40, kind="equal", dtype=dtype)
    results = in_every_schedule(simt, lambda: loss_and_grad(FUNCTIONS[name], student, teacher, reduction="mean"))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@EVERYWHERE
@BOTH
def test_autocast_and_matmul_precision_change_nothing(name, place, at):
    device = at(place)
    student, teacher = make(16, kind="near 1e-3", device=device)
    expected = loss_and_grad(FUNCTIONS[name], student, teacher)
    precision = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast(device.type, dtype=torch.bfloat16):
            actual = loss_and_grad(FUNCTIONS[name], student, teacher)
            with fastkd.use_backend("reference"):
                slow = FUNCTIONS[name](student, teacher)
    finally:
        torch.set_float32_matmul_precision(precision)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))
    torch.testing.assert_close(slow, expected[0], rtol=1e-5, atol=0)


@EVERYWHERE
@BOTH
def test_float16_with_a_loss_scale_keeps_small_gradients(name, place, at):
    student, teacher = make(24, 40, dtype=torch.float16, device=at(place))
    scale = 65536.0
    student.requires_grad_()
    (grad,) = torch.autograd.grad(FUNCTIONS[name](student, teacher) * scale, student)
    exact = reference(FUNCTIONS[name], student.double(), teacher.double())[1] * 2 * scale
    assert float((grad.double() - exact).norm() / exact.norm()) <= 2 * torch.finfo(torch.float16).eps
    assert int((grad == 0).sum()) <= int((exact.half() == 0).sum())


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(FUNCTIONS)),
    n=st.integers(0, 40),
    widths=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    kinds=st.tuples(*[st.sampled_from(["random", "clusters", "near 1e-3", "equal", "far mean"])] * 2),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(list(LAYOUTS.values())),
    reduction=st.sampled_from(["none", "sum", "mean"]),
)
def test_any_shape_and_content_is_finite_and_near_float64(name, n, widths, kinds, dtype, layout, reduction):
    student, teacher = make(n, *widths, *kinds, dtype=dtype)
    loss, grad = loss_and_grad(FUNCTIONS[name], layout(student), layout(teacher), reduction=reduction)
    exact, exact_grad = reference(FUNCTIONS[name], student.double(), teacher.double(), reduction=reduction)
    torch.testing.assert_close(loss.double(), exact, rtol=1e-4, atol=1e-6)
    assert grad.shape == student.shape and bool(grad.isfinite().all())
    if n < 2:
        return
    # Derivatives of cosines, each up to 1 / side and in N triplets of N^2 (N^3 for the mean), are what is left to round
    # where they cancel: with two rows, or on a line.
    sides = torch.pdist(student.double())
    largest = float((1 / sides[sides > 1e-6 * sides.mean()]).nan_to_num(0).sum()) if bool((sides > 0).any()) else 0.0
    terms = 8 * rounding(loss.dtype, student, teacher) * largest / (n * n if reduction == "mean" else n)
    allowed = (4 * torch.finfo(dtype).eps + 1e-5) * float(exact_grad.norm()) + terms
    assert float((grad.double() - exact_grad).norm()) <= allowed


# --- memory -----------------------------------------------------------------------------------------------------------

MEMORY = """
import resource, torch, fastkd
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
F = fastkd.functional
def step(n, width):
    student, teacher = torch.randn(n, width, requires_grad=True), torch.randn(n, width)
    before = peak()
    F.rkd_angle(student, teacher).backward()
    F.rkd_distance(student, teacher).backward()
    assert bool(student.grad.isfinite().all())
    return before
step(64, 64)
before = step(1024, 2048)
print(peak() - before)
step(1448, 64)
print(peak() - before)
"""


def test_memory_grows_with_the_square(at):
    """The usual code needs 8.6 GB for [1024, 1024, 2048] and 12 GB for [1448, 1448, 1448], several times."""
    at("cpu")
    out = subprocess.run([sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True).stdout.split()
    assert float(out[0]) < 200 and float(out[1]) < 250, out
