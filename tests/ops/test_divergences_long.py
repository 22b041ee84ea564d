"""multi_teacher_kd: the divergences besides forward of rows that no CUDA block holds, which are read three times."""

import math

import pytest
import torch
from divergence_helpers import CASES, OF_MIXTURES, exact
from multi_teacher_helpers import both, make, soft_labels

import fastkd

F = fastkd.functional
LONG = ["simt", "cuda"]  # cpu knows no such rows
OTHERS = [name for name in CASES if CASES[name]["divergence"] != "forward" and name != "jsd 0"]
NAMES = ["reverse", "jsd", "tvd", "skew_forward", "skew_reverse", "both"]
# Forward and backward in whole vectors or not, below a tile more than one, with a float64 row's tiles of half as many.
SHAPES = [
    (torch.float32, 9000),
    (torch.float32, 9001),
    (torch.float64, 2501),
    (torch.bfloat16, 9000),
    (torch.float16, 8205),
]


def rows_and_gradient(student, teachers, target=None, **options):
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **options).backend == "native"
    student = student.detach().requires_grad_()
    rows = F.multi_teacher_kd(student, teachers, target, **dict(dict(temperature=1.0, reduction="none"), **options))
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


def close(ours, expected, dtype):
    """Rows to 1e-5 (float64: 1e-12), gradients to what the dtype holds."""
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-6}.get(dtype, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    (rows, gradient), (exact_rows, slope) = ours, expected
    torch.testing.assert_close(rows.double(), exact_rows, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * float(slope.abs().max()))


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("dtype, classes", SHAPES, ids=str)
@pytest.mark.parametrize("name", OTHERS)
def test_every_divergence(name, dtype, classes, place, at):
    k = 1 + OTHERS.index(name) % 5  # 5: two groups of teachers
    student, teachers, _ = make(3, classes, k, dtype, device=at(place))
    options = dict(CASES[name], temperature=2.5, weights=[0.5, -0.2, 0.9, 0.1, 0.4][:k])
    close(rows_and_gradient(student, teachers, **options), exact(student, teachers, **options), dtype)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("name", NAMES)
def test_any_number_of_teachers(name, k, place, at):
    student, teachers, _ = make(2, 8200, k, device=at(place))
    options = dict(CASES[name], temperature=1.5)
    close(rows_and_gradient(student, teachers, **options), exact(student, teachers, **options), torch.float32)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("combine", ["probs", "logits"])
@pytest.mark.parametrize("name", [name for name in OF_MIXTURES if name in OTHERS])
def test_mixtures(name, combine, place, at):
    student, teachers, _ = make(2, 2501, 3, torch.float64, device=at(place))
    weights = torch.tensor([[0.5, 0.2], [0.3, 0.0], [0.4, 0.7]], dtype=torch.float64, device=student.device)
    options = dict(CASES[name], temperature=2.0, combine=combine)
    for w in (None, weights):
        results = list(both(lambda w=w: rows_and_results(student, teachers, weights=w, **options)))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-11, atol=1e-12)


def rows_and_results(student, teachers, target=None, **options):
    """Rows, terms where they are wanted, gradient, by whichever backend is on."""
    student = student.detach().requires_grad_()
    result = F.multi_teacher_kd(student, teachers, target, **dict(dict(reduction="none"), **options))
    rows, terms = result if options.get("return_terms") else (result, ())
    return rows.detach(), *terms, torch.autograd.grad(rows.sum(), student)[0]


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("labels", ["hard", "smooth", "soft"])
@pytest.mark.parametrize("name", ["reverse", "jsd", "tvd"])
def test_labels_terms_weights_and_ignored_rows(name, labels, place, at):
    """A weight of 0 and an ignored row keep a NaN from loss and gradient; temperatures differ."""
    student, teachers, target = make(4, 9000, 3, device=at(place))
    target[2] = -100
    student.data[2, 3] = teachers[0][2, 8500] = teachers[1][1, 4] = math.nan
    weights = torch.tensor([[0.5], [0.0], [0.7]], device=student.device).expand(3, 4).contiguous()
    weights[:, 3] = 0
    options = dict(CASES[name], weights=weights, temperature=[2.0, 1.0, 3.5], kd_weight=0.7, ce_weight=0.3)
    options |= dict(return_terms=True, label_smoothing=0.1 if labels == "smooth" else 0.0)
    if labels == "soft":
        options["mask"] = target != -100
        target = soft_labels(4, 9000, student.device)
    for ours, expected in zip(*both(lambda: rows_and_results(student, teachers, target, **options)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("kind", ["loss alone", "no kd_weight", "no rows"])
@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_without_gradient_teachers_or_rows(name, kind, place, at):
    student, teachers, target = make(0 if kind == "no rows" else 3, 8200, 2, device=at(place))
    options = dict(CASES[name], ce_weight=0.5, kd_weight=0.0 if kind == "no kd_weight" else 1.0)
    if kind == "loss alone":
        student = student.detach()
        losses = list(both(lambda: F.multi_teacher_kd(student, teachers, target, **options)))
        torch.testing.assert_close(losses[0], losses[1], rtol=1e-5, atol=1e-6)
        return
    for ours, expected in zip(*both(lambda: rows_and_results(student, teachers, target, **options)), strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_reductions_and_a_gradient_from_outside(reduction, place, at):
    student, teachers, target = make(3, 8200, 2, device=at(place))
    target[1] = -100
    results = []
    for loss in both(lambda: F.multi_teacher_kd(student, teachers, target, divergence="jsd", reduction=reduction)):
        results.append((loss.detach(), *torch.autograd.grad(loss * 3, student)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
@pytest.mark.parametrize("dtype, classes", SHAPES, ids=str)
def test_equal_networks_are_exactly_0_apart(dtype, classes, combine, place, at):
    student, _, _ = make(2, classes, 1, dtype, device=at(place))
    student.data[1, ::3] = -math.inf
    teachers = [student.detach().clone()] * 3
    for name in NAMES:
        if combine != "losses" and name not in OF_MIXTURES:
            continue
        rows, gradient = rows_and_gradient(student, teachers, temperature=2.3, combine=combine, **CASES[name])
        assert float(rows.abs().max()) == 0 and float(gradient.abs().max()) == 0, name


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("noise", [0.3, 0.03])
@pytest.mark.parametrize("name", NAMES)
def test_near_networks_in_bfloat16(name, noise, place, at):
    """Gradients to 0.5 %, and no row below 0."""
    student, _, _ = make(3, 12000, 1, torch.bfloat16, device=at(place))
    g = torch.Generator().manual_seed(3)
    teacher = (student.detach().float() + noise * torch.randn(3, 12000, generator=g).to(student.device)).bfloat16()
    rows, gradient = rows_and_gradient(student, [teacher], **CASES[name])
    expected, slope = exact(student, [teacher], **CASES[name])
    assert float(rows.min()) >= 0
    assert float((gradient.double() - slope).norm() / slope.norm()) < 5e-3
    assert float((abs(rows.double() - expected) / expected).max()) < 5e-3


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("classes", [9000, 9001])
@pytest.mark.parametrize("name", NAMES)
def test_near_networks_in_float32(name, classes, place, at):
    """Divergences near 1e-5, to 1e-5; tvd near 2e-3."""
    student, _, _ = make(3, classes, 1, device=at(place))
    teacher = student.detach() + 4.5e-3 * torch.randn(3, classes, generator=torch.Generator().manual_seed(3)).to(
        student.device
    )
    rows, gradient = rows_and_gradient(student, [teacher], **CASES[name])
    expected, slope = exact(student, [teacher], **CASES[name])
    assert float((rows.double() / expected - 1).abs().max()) < 1e-5
    assert float((gradient.double() - slope).norm() / slope.norm()) < 1e-4


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("scale", [0.5, 8.0])
@pytest.mark.parametrize("name", NAMES)
def test_a_low_temperature_has_finite_gradients(name, scale, dtype, place, at):
    """Of a few classes that count, and of one, where most exponents are below -126."""
    student, teachers, _ = make(2, 8200, 2, dtype, scale=scale, device=at(place))
    teachers = [student.detach() + t / 8 for t in teachers]
    rows, gradient = rows_and_gradient(student, teachers, temperature=0.05, **CASES[name])
    expected, slope = exact(student, teachers, temperature=0.05, **CASES[name])
    assert bool(gradient.isfinite().all()) and (scale == 8.0 or float(slope.abs().max()) > 1e-4)
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-6)
    atol = 2e-3 * max(float(slope.abs().max()), 1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("mask", [-math.inf, "finite"])
@pytest.mark.parametrize("name", NAMES)
def test_masked_classes(name, mask, dtype, place, at):
    """Masked in both networks, whole tiles of them: as if they were not there; no normal number in their gradient."""
    student, teachers, _ = make(2, 9000, 2, dtype, device=at(place))
    masked = torch.zeros(9000, dtype=torch.bool, device=student.device)
    masked[:4500] = masked[6000:6007] = masked[-1] = True
    for z in (student.data, *teachers):
        z[:, masked] = torch.finfo(dtype).min if mask == "finite" else mask
    rows, gradient = rows_and_gradient(student, teachers, temperature=1.7, **CASES[name])
    left = [z[:, ~masked] for z in (student.detach(), *teachers)]
    expected = exact(left[0], left[1:], temperature=1.7, **CASES[name])
    close((rows, gradient[:, ~masked]), expected, dtype)
    assert float(gradient[:, masked].abs().max()) < (torch.finfo(dtype).tiny if mask == "finite" else 1e-300)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_classes_masked_in_one_network(which, place, at):
    """A divergence that is infinite there is so; the others are finite, as is their gradient."""
    student, teachers, _ = make(2, 9000, 1, device=at(place))
    (student.data if which == "student" else teachers[0])[0, 8000:] = -math.inf
    p, q = (torch.softmax(z.detach().double(), -1) for z in (teachers[0], student))
    m, m_f, m_r = (p + q) / 2, 0.1 * p + 0.9 * q, 0.9 * p + 0.1 * q
    expected = {
        "reverse": (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1),
        "both": 0.3 * (torch.xlogy(p, p) - torch.xlogy(p, q)).sum(-1)
        + 0.9 * (torch.xlogy(q, q) - torch.xlogy(q, p)).sum(-1),
        "tvd": (p - q).abs().sum(-1) / 2,
        "jsd": (torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(m, m)).sum(-1) / 2,
        "skew_forward": (torch.xlogy(p, p) - torch.xlogy(p, m_f)).sum(-1),
        "skew_reverse": (torch.xlogy(q, q) - torch.xlogy(q, m_r)).sum(-1),
    }
    for name, value in expected.items():
        rows, gradient = rows_and_gradient(student, teachers, **CASES[name])
        torch.testing.assert_close(rows.double(), value, rtol=1e-5, atol=1e-6, msg=lambda m, name=name: f"{name}: {m}")
        assert bool(gradient[1].isfinite().all())
        assert math.isinf(value[0]) or bool(gradient[0].isfinite().all())


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("name", ["reverse", "jsd", "tvd"])
@pytest.mark.parametrize("which", ["student", "teacher"])
def test_a_row_masked_as_a_whole_is_nan(which, name, place, at):
    """The gradient of tvd, q sign(q - p) / 2, does not know."""
    student, teachers, _ = make(2, 9000, 1, device=at(place))
    (student.data if which == "student" else teachers[0])[0] = -math.inf
    rows, gradient = rows_and_gradient(student, teachers, **CASES[name])
    assert bool(rows[0].isnan()) and (name == "tvd" or bool(gradient[0].isnan().all()))
    assert bool(rows[1].isfinite()) and bool(gradient[1].isfinite().all())


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("combine", ["losses", "probs"])
def test_weights_of_both_from_row_to_row(combine, place, at):
    student, teachers, _ = make(4, 2501, 2, torch.float64, device=at(place))
    share = torch.linspace(0, 1, 4, dtype=torch.float64, device=student.device)
    options = dict(temperature=2.0, combine=combine)
    f, r = (rows_and_gradient(student, teachers, divergence=d, **options) for d in ("forward", "reverse"))
    rows, gradient = rows_and_gradient(
        student, teachers, divergence={"forward": share, "reverse": 1 - share}, **options
    )
    torch.testing.assert_close(rows, share * f[0] + (1 - share) * r[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, share[:, None] * f[1] + (1 - share[:, None]) * r[1], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", LONG)
@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_a_padded_vocabulary(name, place, at):
    student, teachers, target = make(3, 9100, 2, device=at(place))
    left = [z[:, :9001] for z in (student.detach(), *teachers)]
    options = dict(CASES[name], ce_weight=0.5)
    rows, gradient = rows_and_gradient(student, teachers, target % 9001, vocab_size=9001, **options)
    expected = rows_and_gradient(left[0].contiguous(), [t.contiguous() for t in left[1:]], target % 9001, **options)
    torch.testing.assert_close(rows, expected[0], rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(gradient[:, :9001], expected[1], rtol=1e-5, atol=1e-8)
    assert float(gradient[:, 9001:].abs().max()) == 0


@pytest.mark.parametrize("place", LONG)
def test_dtypes_and_strides_of_networks_may_differ(place, at):
    student, teachers, _ = make(3, 9000, 3, device=at(place))
    teachers = [teachers[0].double(), teachers[1].bfloat16(), torch.stack([teachers[2]] * 2, -1)[..., 0]]
    wide = student.detach().t().contiguous().t().requires_grad_()
    for name in ("reverse", "jsd"):
        expected = exact(wide, teachers, temperature=2.0, **CASES[name])
        close(rows_and_gradient(wide, teachers, temperature=2.0, **CASES[name]), expected, torch.float32)


@pytest.mark.parametrize("place", LONG)
def test_a_label_out_of_range_is_nan(place, at, values_unreadable):
    student, teachers, target = make(3, 9000, 1, device=at(place))
    target[1] = 9000
    rows, gradient = rows_and_gradient(student, teachers, target, divergence="jsd", ce_weight=0.5)
    assert rows.isnan().tolist() == [False, True, False]
    assert gradient.isnan().all(-1).tolist() == [False, True, False] and not bool(gradient[::2].isnan().any())


@pytest.mark.parametrize("place", ["simt", "simt_stream"])
@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
def test_every_schedule_gives_the_same_bits(combine, place, at, simt):
    from simt.fixtures import in_every_schedule

    student, teachers, target = make(2, 8200 if place == "simt" else 100, 2, device=at(place))
    options = dict(CASES["jsd"], combine=combine, ce_weight=0.5)
    results = in_every_schedule(simt, lambda: rows_and_results(student, teachers, target, **options))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))


@pytest.mark.parametrize("place", ["simt", "cuda"])
@pytest.mark.parametrize("name", ["reverse", "jsd", "both"])
def test_the_linear_form(name, place, at):
    g, device = torch.Generator().manual_seed(2), at(place)
    hidden, weight = (torch.randn(n, 16, generator=g).to(device).requires_grad_() for n in (6, 9000))
    teacher, head = (torch.randn(n, 24, generator=g).to(device) / 4 for n in (6, 9000))
    options = dict(CASES[name], temperature=2.0)
    assert fastkd.explain(F.linear_multi_teacher_kd, hidden, weight, [(teacher, head)], **options).backend == "native"
    loss = F.linear_multi_teacher_kd(hidden, weight, [(teacher, head)], chunk_rows=4, **options)
    ours = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    with fastkd.use_backend("reference"):
        logits = hidden.double() @ weight.double().T
        loss = F.multi_teacher_kd(logits, [teacher.double() @ head.double().T], **options)
    expected = (loss.detach(), *torch.autograd.grad(loss, (hidden, weight)))
    for a, b in zip(ours, expected, strict=True):
        torch.testing.assert_close(a.double(), b.double(), rtol=1e-4, atol=1e-5 * float(b.abs().max()))
