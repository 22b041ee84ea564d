"""multi_label_kd: against float64 in every place its kernels run."""

import math

import pytest
import torch
from conftest import PLACES
from multi_label_helpers import F, build, check, in_float64, loss_and_grad, make
from rows_helpers import LAYOUTS

from fastkd.ops._multi_teacher_native import COMBINE
from fastkd.testing import DTYPES, Case, assert_grad_close, difficult_logits, over

CASES = [
    Case("one teacher", dict(k=1)),
    Case("one logit", dict(classes=1, k=2, labels="hard", ce_weight=0.5)),
    Case("one logit, many rows", dict(classes=1, k=1, rows=2500, labels="partial", ce_weight=0.5)),
    Case("one logit of each row, none", dict(classes=1, k=2, rows=40, weights="rows", reduction="none")),
    Case("3 classes, 700 rows", dict(classes=3, k=2, rows=700, labels="bool", ce_weight=1.0, pos_weight="classes")),
    Case("31 classes", dict(classes=31)),
    Case("33 classes, 7 rows", dict(classes=33, rows=7, mask="rows")),
    Case("260 classes, sum", dict(classes=260, k=2, rows=3, reduction="sum")),
    Case("1000 classes, labels", dict(classes=1000, k=4, rows=3, labels="soft", ce_weight=1.0)),
    Case("1700 classes, labels", dict(classes=1700, k=1, rows=2, labels="hard", ce_weight=1.0, reduction="none")),
    Case("labels in float", dict(labels="soft", ce_weight=0.5, pos_weight=3.0)),
    Case("labels at weight 0", dict(labels="partial")),
    Case("partial labels", dict(labels="partial", ce_weight=0.7, reduction="none", pos_weight="classes")),
    Case("a mask of elements", dict(mask="elements", temperature=2.0)),
    Case("masks of elements and labels", dict(mask="elements", labels="soft", ce_weight=0.4, classes=100)),
    Case("the mean over classes", dict(per_row="mean", labels="partial", ce_weight=0.4)),
    Case("no distillation", dict(kd_weight=0.0, labels="hard", ce_weight=1.0)),
    Case("T = 4", dict(temperature=4.0, labels="hard", ce_weight=1.0, kd_weight=0.5)),
    Case("T = 20, no T^2", dict(temperature=20.0, scale_by_t2=False)),
    Case("a temperature per teacher", dict(temperature=[1.0, 2.0, 4.5], labels="hard", ce_weight=0.4)),
    Case("host weights", dict(weights=[0.1, 0.0, 2.0], labels="hard", ce_weight=0.4)),
    Case("negative weight", dict(weights=[-0.5, 1.0, 2.0])),
    Case("weights per row", dict(weights="rows", labels="partial", ce_weight=0.5, temperature=[1.0, 2.0, 4.5])),
    Case("num_items", dict(labels="partial", num_items=17.0, ce_weight=0.1)),
    Case("probs", dict(combine="probs", temperature=2.0)),
    Case("probs, weights, labels", dict(combine="probs", weights=[0.2, 0.9, 0.4], labels="hard", ce_weight=0.5)),
    Case("probs per row", dict(combine="probs", weights="rows", reduction="none", mask="elements")),
    Case("logits", dict(combine="logits")),
    Case("logits, weights, labels", dict(combine="logits", weights=[0.2, -0.9, 0.4], labels="hard", ce_weight=0.5)),
    Case("logits per row", dict(combine="logits", weights="rows", classes=300, rows=3, temperature=3.0)),
]


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    arguments = dict(case.arguments)
    per_row = arguments.pop("per_row", "sum")
    student, teachers, target, options = build(at(place), dtype, **arguments)
    check(student, teachers, target, **options, classes=per_row)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_teachers_and_labels_of_other_dtypes(dtype, place, at):
    student, teachers, target = make(5, 100, 3, dtype, torch.float32, device=at(place))
    check(student, [teachers[0], teachers[1].half(), teachers[2].double()], target.bfloat16(), ce_weight=0.5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, place, at):
    student, teachers, target = make(6, 32, 2, device=at(place))
    change = LAYOUTS[layout]
    expected = F.multi_label_kd(student, teachers, target, ce_weight=0.5, reduction="none")
    laid_out = [change(z) for z in (student, *teachers, target.float())]
    actual = F.multi_label_kd(laid_out[0], laid_out[1:3], laid_out[3], ce_weight=0.5, reduction="none")
    assert torch.equal(actual, expected)
    gradients = [torch.autograd.grad(x.sum(), student)[0] for x in (actual, expected)]
    assert torch.equal(*gradients)


@pytest.mark.parametrize("place", PLACES)
def test_maps_are_rows(place, at):
    device = at(place)
    maps = [torch.randn(2, 5, 3, 4, device=device) for _ in range(2)]
    target, mask = torch.randint(0, 2, (2, 5, 3, 4), device=device), torch.rand(2, 5, 3, 4, device=device) > 0.3
    loss = F.multi_label_kd(maps[0], maps[1:], target, ce_weight=1.0, class_dim=1, mask=mask, reduction="none")
    rows = [z.movedim(1, -1).reshape(-1, 5) for z in (*maps, target, mask)]
    expected = F.multi_label_kd(rows[0], [rows[1]], rows[2], ce_weight=1.0, mask=rows[3], reduction="none")
    assert loss.shape == (2, 3, 4) and torch.equal(loss.reshape(-1), expected)


# --- numbers that random normal logits do not show --------------------------------------------------------------------

DIFFICULT = [name for name, _ in difficult_logits((1, 3))]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("name", DIFFICULT)
def test_difficult_logits(name, combine, place, at):
    device = at(place)
    pick = lambda seed: dict(difficult_logits((6, 70), seed=seed))[name].to(device)  # noqa: E731
    student, teachers = pick(0).requires_grad_(), [pick(1), pick(2)]
    target = torch.randint(0, 2, (6, 70), generator=torch.Generator().manual_seed(0)).to(device)
    if name.startswith("masked"):
        target.zero_()  # else infinite
    check(student, teachers, target, combine=combine, ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("scale", [1.0, 100.0, 1e4])
@pytest.mark.parametrize("dtype", DTYPES)
def test_equal_networks_are_exactly_0_apart(scale, combine, dtype, place, at):
    scale = min(scale, 1000.0) if dtype == torch.float16 else scale
    student, _, _ = make(5, 300, 1, dtype, scale=scale, device=at(place))
    teacher = student.detach().clone()
    for temperature in (1.0, 3.0):
        loss, grad = loss_and_grad(student, [teacher] * 3, combine=combine, temperature=temperature, reduction="none")
        assert float(loss.abs().max()) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("gap", [1e-6, 1e-3, 0.1, 0.24, 0.26, 1.0])
def test_near_networks_keep_their_digits(gap, place, at):
    """Of every single divergence, from logits of -12 to 12."""
    device, g = at(place), torch.Generator().manual_seed(2)
    teacher = (torch.rand(400, 1, generator=g) * 24 - 12).to(device)
    student = (teacher + gap * (2 * torch.rand(400, 1, generator=g) - 1).to(device)).requires_grad_()
    loss, _ = loss_and_grad(student, [teacher], temperature=2.0, reduction="none")
    exact, _ = in_float64(student, [teacher], temperature=2.0, reduction="none")
    moved = exact > 0
    assert bool((loss >= 0).all()) and bool((loss[~moved] == 0).all())
    assert float(((loss - exact) / exact)[moved].abs().max()) < 1e-5


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("combine", COMBINE)
def test_masked_classes(combine, sign, place, at):
    """Infinite logits are outcomes that are certain: -inf, and inf, which is its mirror image."""
    student, teachers, _ = make(4, 40, 2, device=at(place))
    with torch.no_grad():
        for z in (student, *teachers):
            z[:, 5:9] = -math.inf  # certain everywhere: counts 0
        for z in teachers:
            z[1, 11] = -math.inf  # in the teachers only: finite
        student[2, 12] = -math.inf  # in the student only: infinite
        student[3, 12] = -math.inf
        for z in teachers:
            z[3, 12] = -500.0  # also where the teacher's probability underflows
        for z in (student, *teachers):
            z.mul_(sign)
    loss, grad = loss_and_grad(student, teachers, combine=combine, reduction="none")
    assert bool(loss[:2].isfinite().all()) and loss[2:].tolist() == [math.inf, math.inf]
    assert bool(grad.isfinite().all()) and float(grad[:2, 5:9].abs().max()) == 0
    check(student, teachers, combine=combine, reduction="none")


@pytest.mark.parametrize("place", PLACES)
def test_a_weight_of_zero_removes_an_infinite_divergence_and_nan(place, at):
    student, teachers, _ = make(2, 10, 2, device=at(place))
    with torch.no_grad():
        student[0, 3] = teachers[1][0, 3] = -math.inf
        teachers[0][1, 4] = math.nan
    for weights in ([0.0, 1.0], torch.tensor([[0.0, 0.0], [1.0, 0.5]], device=student.device)):
        loss, grad = loss_and_grad(student, teachers, weights=weights, reduction="none")
        assert bool(loss.isfinite().all() & grad.isfinite().all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("where", ["student", "teacher"])
@pytest.mark.parametrize("combine", COMBINE)
def test_nan_reaches_the_loss_of_its_row_alone(combine, where, place, at):
    student, teachers, _ = make(3, 40, 2, device=at(place))
    with torch.no_grad():
        (student if where == "student" else teachers[1])[1, 7] = math.nan
    loss, grad = loss_and_grad(student, teachers, combine=combine, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().nonzero().tolist() == [[1, 7]]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [1, 40])
def test_what_does_not_count_may_hold_nan_and_wrong_labels_are_nan(classes, place, at, values_unreadable):
    student, teachers, target = make(6, classes, 2, device=at(place))
    target[1], target[2, -1], target[3, 0] = -100, -100, 7
    with torch.no_grad():
        for z in (student, *teachers):
            z[target == -100] = math.nan
    loss, grad = loss_and_grad(student, teachers, target, ce_weight=0.5, reduction="none")
    assert loss.isnan().nonzero().tolist() == [[3]] and grad.isnan().nonzero().tolist() == [[3, 0]]
    assert loss[1] == 0 and float(grad[target == -100].abs().max()) == 0
    check(student, teachers, target, ce_weight=0.5, reduction="none")


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("pos_weight", [None, 40.0])
def test_float16_with_a_loss_scale_is_as_good_as_eager(pos_weight, place, at):
    """(q - p) / B in float16 underflows; the loss scale of mixed-precision training must still save it."""
    device, scale, batch = at(place), 65536.0, 256
    student, teachers, target = make(64 if place == "cpu" else 4, 100, 2, torch.float16, scale=4.0, device=device)
    options = dict(ce_weight=1.0, reduction="sum", pos_weight=pos_weight)
    loss = F.multi_label_kd(student, teachers, target, **options) * (scale / batch)
    (grad,) = torch.autograd.grad(loss, student)
    exact = in_float64(student, teachers, target, **options)[1] / 0.5 * (scale / batch)  # loss_and_grad's first weight
    assert_grad_close(grad, exact, exact.to(torch.float16), factor=1.5)


@pytest.mark.parametrize("place", PLACES)
def test_the_same_bits_on_every_run_and_in_any_company(place, at):
    student, teachers, target = make(9, 65, 3, device=at(place))
    options = dict(ce_weight=0.3, reduction="none")
    first, again = (loss_and_grad(student, teachers, target, **options) for _ in range(2))
    assert all(map(torch.equal, first, again))
    alone = F.multi_label_kd(student[4:5], [t[4:5] for t in teachers], target[4:5], **options)
    assert torch.equal(alone, first[0][4:5])


@pytest.mark.parametrize("place", PLACES)
def test_many_teachers(place, at):
    student, teachers, target = make(3, 20, 19, device=at(place))
    check(student, teachers, target, ce_weight=0.5, temperature=[1.0 + k / 7 for k in range(19)])
