"""multi_teacher_kd: the divergences besides forward, against the formulas of other libraries, and their traps."""

import math

import pytest
import torch
from conftest import PLACES
from divergence_helpers import CASES, OF_MIXTURES, distillm, exact, kl, plain, torchtune, trl
from multi_teacher_helpers import both, make

import fastkd

F = fastkd.functional
ROWS = dict(temperature=1.0, reduction="none")


def rows_and_gradient(student, teachers, **options):
    student = student.detach().requires_grad_()
    rows = F.multi_teacher_kd(student, teachers, **dict(ROWS, **options))
    (gradient,) = torch.autograd.grad(rows.sum(), student)
    return rows.detach(), gradient


def compare(formula, student, teacher, plus=0.0, **options):
    """Rows and gradients in float64 against `formula(log_p, log_q)`, which `plus` of log_p is added to."""
    log_p, z = torch.log_softmax(teacher, -1), student.detach().clone().requires_grad_()
    expected = formula(log_p, torch.log_softmax(z, -1))
    (gradient,) = torch.autograd.grad(expected.sum(), z)
    rows, ours = rows_and_gradient(student, [teacher], **options)
    torch.testing.assert_close(rows, expected.detach() + (plus(log_p) if plus else 0), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(ours, gradient, rtol=1e-12, atol=1e-12)


def negative_entropy(log_p):
    return (log_p.exp() * log_p).sum(-1)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("beta", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_jsd_is_trls(beta, place, at):
    student, (teacher,), _ = make(6, 37, 1, torch.float64, device=at(place))
    compare(lambda p, q: trl(p, q, beta), student, teacher, divergence="jsd", divergence_beta=beta)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("lam", [0.1, 0.6])
@pytest.mark.parametrize("name", ["skew_forward", "skew_reverse", "tvd", "jsd"])
def test_others_are_distillms(name, lam, place, at):
    student, (teacher,), _ = make(6, 37, 1, torch.float64, device=at(place))
    beta = {"tvd": None, "jsd": 1 - lam}.get(name, lam)
    plus = negative_entropy if name == "skew_forward" else None
    formula = lambda p, q: distillm(name, p, q, lam)  # noqa: E731
    compare(formula, student, teacher, plus, divergence=name, divergence_beta=beta)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("ratio", [0.0, 0.3, 1.0])
def test_a_sum_of_both_is_torchtunes(ratio, place, at):
    student, (teacher,), _ = make(6, 37, 1, torch.float64, device=at(place))
    formula = lambda p, q: torchtune(p, q, ratio)  # noqa: E731
    shares = {"forward": ratio, "reverse": 1 - ratio}
    compare(formula, student, teacher, lambda p: ratio * negative_entropy(p), divergence=shares)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_three_teachers_at_a_temperature(name, dtype, place, at):
    student, teachers, _ = make(5, 50, 3, dtype, device=at(place))
    options = dict(CASES[name], temperature=2.5, weights=[0.5, -0.2, 0.9])
    rows, gradient = rows_and_gradient(student, teachers, **options)
    expected, slope = exact(student, teachers, **options)
    tolerance = {torch.float64: 1e-12, torch.float32: 3e-6}.get(dtype, 1e-2 if dtype == torch.bfloat16 else 2e-3)
    torch.testing.assert_close(rows.double(), expected, rtol=min(tolerance, 1e-5), atol=min(tolerance, 1e-5))
    torch.testing.assert_close(gradient.double(), slope, rtol=tolerance, atol=tolerance * float(slope.abs().max()))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["probs", "logits"])
@pytest.mark.parametrize("name", OF_MIXTURES)
def test_of_mixtures(name, combine, place, at):
    student, teachers, _ = make(5, 50, 3, torch.float64, device=at(place))
    weights, t = [0.5, 0.2, 0.4], 2.0  # which sum to 1.1: the mixture is not normalised
    z, log_p = student.detach().clone().requires_grad_(), torch.stack(teachers).div(t).log_softmax(-1)
    w = torch.tensor(weights, dtype=torch.float64, device=z.device)[:, None, None]
    if combine == "probs":
        mixed = (w * log_p.exp()).sum(0).log()
    else:
        mixed = ((w * torch.stack(teachers)).sum(0) / t).log_softmax(-1)
    expected = t**2 * plain(mixed, torch.log_softmax(z / t, -1), **CASES[name])
    (slope,) = torch.autograd.grad(expected.sum(), z)
    rows, gradient = rows_and_gradient(
        student, teachers, weights=weights, temperature=t, combine=combine, **CASES[name]
    )
    torch.testing.assert_close(rows, expected.detach(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["losses", "probs"])
def test_weights_of_both_from_row_to_row(combine, place, at):
    student, teachers, _ = make(7, 40, 2, torch.float64, device=at(place))
    forward = torch.linspace(0, 1, 7, dtype=torch.float64, device=student.device)
    options = dict(temperature=2.0, combine=combine, reduction="none")
    f, r = (F.multi_teacher_kd(student, teachers, divergence=d, **options) for d in ("forward", "reverse"))
    rows, gradient = rows_and_gradient(
        student, teachers, divergence={"forward": forward, "reverse": 1 - forward}, **options
    )
    expected = forward * f + (1 - forward) * r
    torch.testing.assert_close(rows, expected.detach(), rtol=1e-12, atol=1e-12)
    (slope,) = torch.autograd.grad(expected.sum(), student)
    torch.testing.assert_close(gradient, slope, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_equal_networks_are_exactly_0_apart(name, dtype, combine, place, at):
    if combine != "losses" and name not in OF_MIXTURES:
        return
    student, _, _ = make(4, 333, 1, dtype, device=at(place))
    teacher = student.detach().clone()
    for t in (1.0, 2.3):
        options = dict(CASES[name], temperature=t, combine=combine)
        rows, gradient = rows_and_gradient(student, [teacher] * 3, **options)
        native = fastkd.explain(F.multi_teacher_kd, student, [teacher] * 3, **options).backend == "native"
        rounded = combine == "probs" and (not native or CASES[name].get("divergence") == "forward" or name == "jsd 0")
        assert float(rows.abs().max()) <= (1e-6 if rounded else 0)
        assert float(gradient.abs().max()) <= (1e-6 if rounded or not native else 0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.03])
@pytest.mark.parametrize("name", CASES)
def test_near_networks_in_bfloat16(name, noise, place, at):
    """Gradients to 0.5 %, and no row below 0."""
    student, _, _ = make(6, 4000, 1, torch.bfloat16, device=at(place))
    g = torch.Generator().manual_seed(3)
    teacher = (student.detach().float() + noise * torch.randn(6, 4000, generator=g).to(student.device)).bfloat16()
    rows, gradient = rows_and_gradient(student, [teacher], **CASES[name])
    expected, slope = exact(student, [teacher], **CASES[name])
    assert float(rows.min()) >= 0
    assert float((gradient.double() - slope).norm() / slope.norm()) < 5e-3
    assert float(abs(rows.double().mean() - expected.mean()) / expected.mean()) < 5e-3


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_a_low_temperature_has_finite_gradients(name, dtype, place, at):
    student, teachers, _ = make(6, 61, 2, dtype, scale=8.0, device=at(place))
    rows, gradient = rows_and_gradient(student, teachers, temperature=0.05, **CASES[name])
    expected, slope = exact(student, teachers, temperature=0.05, **CASES[name])
    assert bool(gradient.isfinite().all())
    torch.testing.assert_close(rows.double(), expected, rtol=1e-4, atol=1e-6)
    atol = 2e-3 * max(float(slope.abs().max()), 1e-6)
    torch.testing.assert_close(gradient.double(), slope, rtol=2e-3, atol=atol)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
@pytest.mark.parametrize("name", CASES)
def test_classes_where_both_underflow(name, combine, place, at):
    if combine != "losses" and name not in OF_MIXTURES:
        return
    device = at(place)
    student = torch.tensor([[0.0, 1.0, -500.0, -3e38], [0.0, -900.0, -1000.0, -1e4]], device=device)
    teacher = torch.tensor([[0.5, 0.0, -700.0, -3e38], [-1.0, -1000.0, -900.0, -2e4]], device=device)
    rows, gradient = rows_and_gradient(student, [teacher], combine=combine, **CASES[name])
    expected, slope = exact(student, [teacher], **CASES[name])
    torch.testing.assert_close(rows.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(gradient.double(), slope.nan_to_num(0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
def test_masked_classes(place, at):
    """-inf in one network or in both, against the sums of the other classes."""
    inf = math.inf
    student = torch.tensor([[0.0, 1.0, -inf, -inf], [0.3, 0.1, 2.0, -inf]], device=at(place))
    teacher = torch.tensor([[0.5, -inf, 1.0, -inf], [0.5, 1.0, -1.0, -inf]], device=student.device)
    p, q = (torch.softmax(z[0].double(), -1) for z in (teacher, student))
    both_masked = exact(student[1:, :3], [teacher[1:, :3]], divergence="jsd")[0]
    m = (p + q) / 2
    expected = {
        "forward": inf,
        "reverse": inf,
        "tvd": float((p - q).abs().sum() / 2),
        "jsd": float((torch.xlogy(p, p) + torch.xlogy(q, q) - 2 * torch.xlogy(m, m)).sum() / 2),
        "skew_forward": float((torch.xlogy(p, p) - torch.xlogy(p, 0.1 * p + 0.9 * q)).sum()),
        "skew_reverse": float((torch.xlogy(q, q) - torch.xlogy(q, 0.9 * p + 0.1 * q)).sum()),
    }
    for name, value in expected.items():
        rows, gradient = rows_and_gradient(student, [teacher], divergence=name)
        assert float(rows[0]) == pytest.approx(value, rel=1e-5), name
        assert name == "reverse" or bool(gradient.isfinite().all())
        assert float(gradient[1, 3]) == 0 and bool(gradient[1].isfinite().all())
        if name == "jsd":
            torch.testing.assert_close(rows[1:].double(), both_masked, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["reverse", "jsd", "both", "skew_reverse"])
def test_a_float16_gradient_stays_in_its_range(name, place, at):
    """Of reverse, whose elements are not bounded by the weights, and scaled by the mean over many rows."""
    student, teachers, target = make(64, 30, 1, torch.float16, scale=30.0, device=at(place))
    options = dict(CASES[name], temperature=0.5, ce_weight=0.5)
    z = student.detach().double().requires_grad_()
    (slope,) = torch.autograd.grad(F.multi_teacher_kd(z, [teachers[0].double()], target, **options) * 4096, z)
    (gradient,) = torch.autograd.grad(F.multi_teacher_kd(student, teachers, target, **options) * 4096, student)
    assert float((gradient.double() - slope).norm() / slope.norm()) < 1e-3


def test_a_second_derivative_and_what_learns():
    student, teachers, _ = make(3, 7, 2, torch.float64, scale=1.0)
    teachers = [t.requires_grad_() for t in teachers]
    t = torch.tensor(1.7, dtype=torch.float64, requires_grad=True)
    share = torch.rand(3, dtype=torch.float64, requires_grad=True)
    for which in ("reverse", "jsd", "skew_forward", "skew_reverse", {"forward": 0.5, "reverse": share}):

        def loss(s, a, b, t, share, which=which):
            which = {"forward": 0.5, "reverse": share} if isinstance(which, dict) else which
            with fastkd.use_backend("reference"):
                return F.multi_teacher_kd(s, [a, b], temperature=t, divergence=which)

        assert torch.autograd.gradcheck(loss, (student, *teachers, t, share))
        assert torch.autograd.gradgradcheck(lambda s, f=loss: f(s, *teachers, t, share), (student,))


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
@pytest.mark.parametrize("name", ["jsd", "both"])
def test_create_graph_through_the_kernels(name, place, at):
    student, teachers, _ = make(3, 7, 2, torch.float64, scale=1.0, device=at(place))
    loss = lambda s: F.multi_teacher_kd(s, teachers, temperature=1.5, **CASES[name])  # noqa: E731
    assert torch.autograd.gradgradcheck(loss, (student,))


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
def test_one_compiled_graph(place, at):
    student, teachers, target = make(6, 20, 2, device=at(place))
    rows, target = torch.linspace(0.1, 0.7, 6), target % 18

    def loss(s, w):
        total = 0
        for which in ("reverse", "jsd", "tvd", {"forward": w, "reverse": 0.5}):
            total = total + F.multi_teacher_kd(s, teachers, target, divergence=which, ce_weight=0.5, vocab_size=18)
        return total

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for function in (loss, compiled):
        student.grad = None
        value = function(student, rows)
        value.backward()
        if function is loss:
            expected, slope = value.detach(), student.grad
    torch.testing.assert_close(value.detach(), expected)
    torch.testing.assert_close(student.grad, slope)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", ["reverse", "both", "jsd"])
def test_labels_terms_and_statistics(name, place, at):
    """The statistics' divergence stays forward; terms are without their weights; ignored rows count nowhere."""
    student, teachers, target = make(8, 30, 3, device=at(place))
    target[2] = -100
    student.data[2, 3] = teachers[0][2, 1] = math.nan
    weights = torch.tensor([[1.0], [0.0], [0.5]], device=student.device).expand(3, 8)
    teachers[1][4, 4] = math.nan
    options = dict(CASES[name], weights=weights, ce_weight=0.3, kd_weight=0.7, return_terms=True)
    results = []
    for loss, terms in both(lambda: F.multi_teacher_kd(student, teachers, target, **options)):
        results.append((loss.detach(), *terms, *torch.autograd.grad(loss, student)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected, rtol=2e-5, atol=2e-6)
    clean = [t.nan_to_num(0) for t in teachers]
    options = dict(options, return_stats=True)
    loss, _, stats = F.multi_teacher_kd(student, clean, target, **options)
    forward = F.multi_teacher_kd(student, clean, target, return_stats=True)[1]
    torch.testing.assert_close(loss.detach(), results[0][0], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(stats.kl, forward.kl, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [31, 300, 1500, 5000])
def test_rows_of_each_length_beside_labels(classes, place, at):
    """CUDA has a kernel for each; temperatures differ, so that the labels' exponentials are made anew or are powers."""
    student, teachers, target = make(3, classes, 2, device=at(place))
    for options in (dict(divergence="reverse", temperature=[2.0, 3.5]), dict(divergence="jsd", temperature=3.0)):
        options |= dict(ce_weight=0.7, label_smoothing=0.1)
        assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **options).backend == "native"
        results = []
        for loss in both(lambda o=options: F.multi_teacher_kd(student, teachers, target, **o)):
            results.append((loss.detach(), *torch.autograd.grad(loss, student)))
        for ours, expected in zip(*results, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-6)


WRONG = [
    (dict(divergence="kl"), ValueError, "divergence must be one of 'forward', 'reverse', 'jsd', .*got 'kl'"),
    (dict(divergence=3), TypeError, "divergence must be a name or a dict .*got int"),
    (dict(divergence={}), ValueError, 'divergence must be a dict with weights of "forward" and "reverse", got keys'),
    (dict(divergence={"jsd": 1.0}), ValueError, r"divergence must be .*got keys \['jsd'\]"),
    (dict(divergence={"forward": "1"}), TypeError, r"divergence\['forward'\] must be a finite number.*got str"),
    (dict(divergence={"reverse": torch.ones(3)}), ValueError, r"divergence\['reverse'\] .*shape \[4\], got .*\[3\]"),
    (dict(divergence={"reverse": torch.full((4,), math.nan)}), ValueError, "must be finite, got a NaN"),
    (dict(divergence={"forward": 1.0}, divergence_beta=0.5), ValueError, "divergence_beta must be None beside weights"),
    (dict(divergence="reverse", divergence_beta=0.5), ValueError, "divergence_beta must be None for .*'reverse'"),
    (dict(divergence_beta=0.5), ValueError, "divergence_beta must be None for divergence='forward'"),
    (dict(divergence="jsd", divergence_beta=1.5), ValueError, r"divergence_beta must be a number in \[0, 1\], got 1.5"),
    (dict(divergence="jsd", divergence_beta="0"), TypeError, r"divergence_beta must be a number in \[0, 1\], got str"),
    (dict(divergence="skew_forward", divergence_beta=1), ValueError, "divergence_beta must be below 1"),
    (dict(divergence="tvd", combine="probs"), ValueError, "divergence must be 'forward', 'reverse', 'jsd' .*got 'tvd'"),
]


@pytest.mark.parametrize("options, error, message", WRONG)
def test_a_wrong_divergence_is_told(options, error, message):
    logits = torch.zeros(4, 6)
    with pytest.raises(error, match=message):
        F.multi_teacher_kd(logits, [logits], **options)


def test_names_without_a_beta_are_their_limits():
    student, teachers, _ = make(4, 9, 1, torch.float64)
    for name, beta, limit in (("skew_forward", 0, "forward"), ("skew_reverse", 0, "reverse"), ("jsd", 1, "reverse")):
        ours, expected = (
            F.multi_teacher_kd(student, teachers, divergence=d, divergence_beta=b)
            for d, b in ((name, beta), (limit, None))
        )
        assert float(ours) == float(expected)


def test_the_module_has_it_too():
    student, teachers, _ = make(4, 9, 2)
    module = fastkd.losses.MultiTeacherKD(divergence="jsd", divergence_beta=0.2, vocab_size=7, softcap=5.0)
    options = dict(divergence="jsd", divergence_beta=0.2, vocab_size=7, softcap=5.0)
    assert float(module(student, teachers)) == float(F.multi_teacher_kd(student, teachers, **options))
    assert "divergence='jsd', divergence_beta=0.2" in repr(module)


def test_kl_of_the_helpers_is_torchs():
    log_p, log_q = (torch.randn(2, 5, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    torch.testing.assert_close(kl(log_p, log_q), (log_p.exp() * (log_p - log_q)).sum(-1))


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["grad", "no grad", "mutual", "statistics", "logits"])
def test_near_networks_keep_their_digits(kind, backend):
    """The mean of KL near 1e-5 in float32, to 1e-5."""
    generator = torch.Generator().manual_seed(0)
    teacher = torch.randn(64, 500, generator=generator) * 3
    teacher[:, -1], teacher[:, -2] = -math.inf, torch.finfo(torch.float32).min
    student = (teacher + 4.5e-3 * torch.randn(64, 500, generator=generator)).requires_grad_(kind != "no grad")
    expected = kl(*(torch.log_softmax(x.detach()[:, :-2].double(), -1) for x in (teacher, student))).mean()
    assert 3e-6 < expected < 3e-5
    with fastkd.use_backend(backend):
        if kind == "mutual":
            value = F.mutual_kd([student, teacher])[0]
        elif kind == "statistics":
            value = F.multi_teacher_kd(student, [teacher], temperature=1.0, return_stats=True)[1].kl.mean()
        else:
            combine = "logits" if kind == "logits" else "losses"
            value = F.multi_teacher_kd(student, [teacher], temperature=1.0, combine=combine)
    assert abs(float(value.detach()) / float(expected) - 1) < 1e-5


@pytest.mark.parametrize("classes", [2, 3, 10, 100, 1000])
@pytest.mark.parametrize("combine", ["losses", "logits"])
def test_rows_below_a_64th_keep_their_digits(combine, classes):
    """Few classes with |log(p / q)| above 1/8 were rounded by 1e-7 of p, 1e-5 of a divergence of 2^-8."""
    generator = torch.Generator().manual_seed(1)
    student, change, size = (torch.randn(20_000, n, generator=generator) for n in (classes, classes, 1))
    teacher = student + change * size
    options = dict(temperature=3.0, reduction="none", scale_by_t2=False, combine=combine)
    with fastkd.use_backend("native"):
        value = F.multi_teacher_kd(student, [teacher], **options).double()
    exact = F.multi_teacher_kd(student.double(), [teacher.double()], **options)
    rows = (exact > 2.0**-10) & (exact < 2.0**-6)
    assert int(rows.sum()) > 1000
    assert float((value / exact - 1)[rows].abs().max()) < 6e-6


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("kind", ["losses", "logits", "mutual", "statistics"])
@pytest.mark.parametrize("gap", [40.0, 120.0, 300.0, 3000.0])
def test_a_class_that_a_sure_student_has_given_up(gap, kind, backend):
    """The divergence is small, since p is, but log(p / q) is not: nothing may bound it."""
    teacher, student = torch.tensor([[0.0, 17.0]]), torch.tensor([[0.0, gap]])
    expected = kl(*(torch.log_softmax(x.double(), -1) for x in (teacher, student))).item()
    with fastkd.use_backend(backend):
        if kind == "mutual":
            value = F.mutual_kd([student, teacher])[0]
        elif kind == "statistics":
            value = F.multi_teacher_kd(student, [teacher], temperature=1.0, return_stats=True)[1].kl
        else:
            value = F.multi_teacher_kd(student, [teacher], temperature=1.0, combine=kind)
    assert float(value) == pytest.approx(expected, rel=1e-4)
