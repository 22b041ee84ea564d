"""linear_multi_teacher_kd: right values, in chunks as with whole logits, in every place and dtype."""

import inspect

import pytest
import torch
import torch.nn.functional as torch_functional
from linear_helpers import CLASSES, ROWS, gradients, labels, randn, results, student, teachers_of

import fastkd
from fastkd import Head
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd
from fastkd.ops._linear_inputs import Projection

pytestmark = pytest.mark.usefixtures("one_thread")


def check_same(inputs, teachers, tolerance=1e-12, **options):
    """In chunks, and with whole logits in plain PyTorch."""
    got = results(inputs, teachers, **options)
    with fastkd.use_backend("reference"):
        expected = results(inputs, teachers, **options)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def retyped(hidden, weight, bias, teachers, target, t, ce_weight, softcap, scale):
    """The mean over labelled rows, typed from the definition; teachers are pairs (hidden, weight) or logits."""
    z = (hidden @ weight.T + bias) * scale
    z = softcap * torch.tanh(z / softcap)
    valid = target >= 0
    total = ce_weight * torch_functional.cross_entropy(z[valid], target[valid], reduction="sum")
    for teacher in teachers:
        logits = teacher if isinstance(teacher, torch.Tensor) else teacher[0] @ teacher[1].T
        log_p, log_q = torch.log_softmax(logits[valid] / t, 1), torch.log_softmax(z[valid] / t, 1)
        total = total + t * t / len(teachers) * torch_functional.kl_div(log_q, log_p, log_target=True, reduction="sum")
    return total / valid.sum()


def test_is_what_its_definition_says():
    inputs, teachers, target = student(), teachers_of("both"), labels()
    expected = retyped(*inputs, teachers, target, 2.0, 0.4, 5.0, 1.3)
    loss = linear_multi_teacher_kd(
        *inputs[:2], teachers, target, bias=inputs[2], temperature=2.0, ce_weight=0.4, softcap=5.0, logit_scale=1.3,
        chunk_rows=5,
    )  # fmt: skip
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)
    for a, b in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("place", ["cpu", "simt", "simt_stream"])
@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize("kind", ["logits", "head", "both", "capped", "routed", "crossed"])
def test_chunks_equal_whole_logits(kind, reduction, place, at):
    at(place)
    options = {"softcap": 4.0, "logit_scale": 0.6} if kind == "capped" else {}
    check_same(
        student(), teachers_of(kind), target=labels(), ce_weight=0.3, label_smoothing=0.1, reduction=reduction,
        temperature=3.0, chunk_rows=5, return_terms=True, **options,
    )  # fmt: skip


@pytest.mark.parametrize("combine", ["losses", "probs", "logits"])
def test_combinations_soft_labels_and_no_labels(combine):
    check_same(student(), teachers_of("both"), combine=combine, chunk_rows=4, mask=torch.arange(ROWS) % 3 != 1)
    soft = torch.softmax(randn(ROWS, CLASSES, seed=7), -1)
    check_same(student(), teachers_of("both"), target=soft, ce_weight=0.5, combine=combine, chunk_rows=4)


@pytest.mark.parametrize("kind", ["both", "crossed"])
def test_weights_of_teachers_and_rows(kind, monkeypatch):
    from fastkd.ops import _linear_chunks

    monkeypatch.setattr(_linear_chunks, "BLOCK_BYTES", 0)
    monkeypatch.setattr(_linear_chunks, "ROWS_PER_THREAD", 2)  # several blocks in a chunk
    teachers = teachers_of(kind)
    weights = torch.rand(len(teachers), ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0, ::2] = weights[1, :5] = 0
    check_same(student(), teachers, weights=weights, target=labels(), chunk_rows=6)
    check_same(
        student(), teachers, weights=[0.0, 0.7, 0.4][: len(teachers)], temperature=[1.0, 2.0, 3.0][: len(teachers)]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_half_precision_inputs_give_float32_digits(dtype):
    """The gradient is off by its own rounding alone: products, rows and the sum over chunks are in float32."""
    inputs = student(dtype)
    teachers = teachers_of("both", dtype)
    got = results(inputs, teachers, target=labels(), ce_weight=0.2, chunk_rows=5)
    exact = [z.detach().double().requires_grad_() for z in inputs]
    teachers = [teachers[0].double(), tuple(z.double() for z in teachers[1])]
    expected = results(exact, teachers, target=labels(), ce_weight=0.2)
    assert got[0].dtype == torch.float32 and all(a.dtype == dtype for a in got[1:])
    torch.testing.assert_close(got[0].double(), expected[0], rtol=2e-6, atol=0)
    for a, b in zip(got[1:], expected[1:], strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 0.6 * torch.finfo(dtype).eps + 1e-6


@pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("noise", [0.3, 0.1, 0.03])
def test_near_networks_in_bfloat16(noise, beta):
    """Liger's chunked loss is 2 to 38 % off in these gradients: its logits are rounded to bfloat16."""
    weight = randn(500, 32, seed=1, dtype=torch.bfloat16).requires_grad_()
    hidden = randn(24, 32, dtype=torch.bfloat16).requires_grad_()
    teacher = (hidden.detach().float() + noise * randn(24, 32, seed=5, dtype=torch.float32)).bfloat16(), weight.detach()
    which = dict(divergence="jsd", divergence_beta=beta)
    loss = linear_multi_teacher_kd(hidden, weight, [teacher], reduction="none", **which)
    got = torch.autograd.grad(loss.mean(), [hidden, weight])
    inputs = [z.detach().double().requires_grad_() for z in (hidden, weight)]
    exact = linear_multi_teacher_kd(*inputs, [tuple(z.double() for z in teacher)], **which)
    assert float(loss.detach().min()) >= 0
    for a, b in zip(got, torch.autograd.grad(exact, inputs), strict=True):
        assert float((a.double() - b).norm() / b.norm()) < 5e-3


def test_equal_networks_are_exactly_0():
    hidden, weight, bias = student(torch.bfloat16)
    teacher = Head(hidden.detach(), weight.detach(), bias=bias.detach(), softcap=2.0)
    loss = linear_multi_teacher_kd(hidden, weight, [teacher], bias=bias, softcap=2.0, reduction="sum")
    assert loss.item() == 0
    assert all(not bool(g.any()) for g in torch.autograd.grad(loss, [hidden, weight, bias]))


def test_only_what_learns_gets_a_gradient(monkeypatch):
    made = []
    from fastkd.ops import _linear_kernels

    operator = _linear_kernels.call_operator
    monkeypatch.setattr(_linear_kernels, "call_operator", lambda *a: made.append(operator(*a)) or made[-1])
    for learns in ((True, False, False), (False, True, True), (False, False, True)):
        inputs = [z.detach().requires_grad_(r) for z, r in zip(student(), learns, strict=True)]
        linear_multi_teacher_kd(*inputs[:2], teachers_of("head"), bias=inputs[2]).backward()
        assert [z.grad is not None for z in inputs] == list(learns)
        assert [g.numel() > 0 for g in made[-1][1:]] == list(learns)
    with torch.no_grad():
        linear_multi_teacher_kd(*student()[:2], teachers_of("head"))
    assert not any(g.numel() for g in made[-1][1:])


def test_rows_that_do_not_count_are_not_read():
    hidden, weight, bias = student()
    target, (logits, (teacher, head)) = labels(), teachers_of("both")
    expected = results((hidden, weight, bias), [logits, (teacher, head)], target=target, ce_weight=0.5)
    out = target < 0
    dirty = hidden.detach().masked_fill(out[:, None], torch.nan).requires_grad_()
    teachers = [logits.masked_fill(out[:, None], torch.nan), (teacher.masked_fill(out[:, None], torch.inf), head)]
    for backend in ("auto", "reference"):
        with fastkd.use_backend(backend):
            got = results((dirty, weight, bias), teachers, target=target, ce_weight=0.5)
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_rows_that_do_not_count_leave_before_the_products(monkeypatch):
    from fastkd.ops import _linear_chunks

    counted, project = [], _linear_chunks.project
    monkeypatch.setattr(_linear_chunks, "project", lambda h, p, out: counted.append(len(h)) or project(h, p, out))
    mask = torch.arange(ROWS) % 2 == 0
    linear_multi_teacher_kd(*student()[:2], teachers_of("logits"), mask=mask, chunk_rows=4)
    assert sum(counted) == int(mask.sum())


def test_no_row_counts():
    inputs = student()
    mask = torch.zeros(ROWS, dtype=torch.bool)
    for value in results(inputs, teachers_of("crossed"), mask=mask):
        assert not bool(value.any())
    empty = [z.detach().requires_grad_() for z in student(rows=0)]
    for value in results(empty, [randn(0, CLASSES), (randn(0, 4), randn(CLASSES, 4))]):
        assert not bool(value.any())


def test_routing_is_each_head_on_its_rows():
    hidden, weight, _bias = student()
    first, second = teachers_of("routed")
    total = 0
    for head in (first, second):
        part = multi_teacher_kd(
            hidden[head.rows] @ weight.T, [head.hidden @ head.weight.T], temperature=1.0, reduction="sum"
        )  # fmt: skip
        total = total + part
    loss = linear_multi_teacher_kd(hidden, weight, [first, second], chunk_rows=3)
    torch.testing.assert_close(loss, total / ROWS, rtol=1e-12, atol=0)  # rows that nobody speaks about count
    for a, b in zip(
        torch.autograd.grad(loss, [hidden, weight]), torch.autograd.grad(total / ROWS, [hidden, weight]), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_routed_rows_are_worked_once(monkeypatch):
    from fastkd.ops import _linear_chunks

    counted, project = [], _linear_chunks.project
    monkeypatch.setattr(_linear_chunks, "project", lambda h, p, out: counted.append(len(h)) or project(h, p, out))
    teachers = [Head(randn(4, 3, seed=k), randn(CLASSES, 3), rows=torch.arange(4) * 4 + k) for k in range(4)]
    linear_multi_teacher_kd(*student(rows=16)[:2], teachers, torch.arange(16), ce_weight=1.0)
    assert sum(counted) == 2 * 16


@pytest.mark.parametrize("parts", [2, 8])
def test_micro_batches_with_num_items_add_up(parts):
    inputs, target = student(), labels()
    (logits, (teacher, head)), count = teachers_of("both"), int((labels() >= 0).sum())
    loss = linear_multi_teacher_kd(
        *inputs[:2], [logits, (teacher, head)], target, bias=inputs[2], ce_weight=0.5, chunk_rows=5
    )  # fmt: skip
    whole = [loss, *torch.autograd.grad(loss, inputs)]
    total = [torch.zeros_like(z) for z in whole]
    for rows in torch.arange(ROWS).tensor_split(parts):
        teachers, part = [logits[rows], (teacher[rows], head)], (inputs[0][rows], *inputs[1:])
        loss = linear_multi_teacher_kd(
            *part[:2], teachers, target[rows], bias=part[2], ce_weight=0.5, num_items=torch.tensor(count)
        )  # fmt: skip
        for z, g in zip(total, (loss, *torch.autograd.grad(loss, inputs)), strict=True):
            z += g.detach()
    for a, b in zip(total, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


def test_padded_vocabularies():
    hidden, weight, bias = student()
    logits, (teacher, head) = teachers_of("both")
    padded = [
        z.detach().requires_grad_() for z in (hidden, torch.cat([weight, weight[:5]]), torch.cat([bias, bias[:5]]))
    ]
    teachers = [torch.cat([logits, logits[:, :2]], 1), (teacher, torch.cat([head, head[:3]]))]
    got = results(padded, teachers, vocab_size=CLASSES, chunk_rows=5)
    expected = results((hidden, weight, bias), [logits, (teacher, head)])
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a[: len(b)] if a.dim() else a, b, rtol=1e-12, atol=1e-13)
    assert not bool(got[2][CLASSES:].any()) and not bool(got[3][CLASSES:].any())
    check_same(padded, teachers, vocab_size=CLASSES, target=labels(), ce_weight=0.5)


def test_leading_dimensions_are_rows():
    hidden, weight, bias = student(rows=12)
    logits, (teacher, head) = teachers_of("both")
    logits, teacher = logits[:12], teacher[:12]
    flat = linear_multi_teacher_kd(hidden, weight, [logits, (teacher, head)], labels(12), bias=bias, reduction="none")
    deep = linear_multi_teacher_kd(
        hidden.reshape(3, 4, -1), weight, [logits.reshape(3, 4, -1), (teacher.reshape(3, 4, -1), head)],
        labels(12).reshape(3, 4), bias=bias, reduction="none",
    )  # fmt: skip
    torch.testing.assert_close(deep, flat.reshape(3, 4), rtol=0, atol=0)


def test_the_default_chunk_holds_one_weight_gradient():
    from fastkd.ops import _linear_chunks as chunks

    def rows(width, heads, dtype=torch.float32):
        call = chunks.Call(*[None] * 9)._replace(
            hidden=torch.empty(1, width, dtype=dtype), chunk_rows=0,
            projection=Projection(torch.empty(1, 1, dtype=dtype), None, 0.0, 1.0),
        )  # fmt: skip
        return chunks.chunk_rows(call, heads)

    assert [rows(2048, k) for k in (1, 2, 3)] == [1024, 640, 512]
    assert rows(512, 3) == 256 and rows(2048, 1, torch.float64) == 512 and rows(2048, 1, torch.bfloat16) == 1024


def test_the_module_is_the_function():
    (hidden, weight, bias), target = student(), labels()
    options = {
        "softcap": 4.0, "logit_scale": 0.5, "chunk_rows": 5, "weights": [0.3, 0.7], "temperature": 2.0,
        "kd_weight": 0.9, "ce_weight": 0.4, "label_smoothing": 0.1, "vocab_size": CLASSES, "scale_by_t2": False,
        "reduction": "sum",
        "return_terms": True,
    }  # fmt: skip
    call = {"bias": bias, "mask": torch.arange(ROWS) > 2, "num_items": 7}
    got = fastkd.LinearMultiTeacherKD(**options)(hidden, weight, teachers_of("both"), target, **call)
    expected = linear_multi_teacher_kd(hidden, weight, teachers_of("both"), target, **call, **options)
    assert torch.equal(got[0], expected[0]) and torch.equal(got[1].kd, expected[1].kd)
    mine, whole = (set(inspect.signature(f).parameters) for f in (fastkd.LinearMultiTeacherKD, linear_multi_teacher_kd))
    assert whole - mine == {"hidden", "weight", "teachers", "target", *call}


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize(
    "divergence",
    [
        ("reverse", None),
        ("jsd", 0.3),
        ("tvd", None),
        ("skew_forward", 0.2),
        ("skew_reverse", None),
        ({"forward": 0.3, "reverse": 0.6}, None),
    ],
    ids=lambda d: str(d[0]),
)
def test_divergences_are_those_of_whole_logits(divergence, place, at):
    at(place)
    name, beta = divergence
    options = {"divergence": name, "divergence_beta": beta, "temperature": 2.0}
    (hidden, weight, _), (logits, (teacher, head)) = student(), teachers_of("both")
    expected = multi_teacher_kd(hidden @ weight.T, [logits, teacher @ head.T], labels(), **options)
    loss = linear_multi_teacher_kd(hidden, weight, [logits, (teacher, head)], labels(), chunk_rows=5, **options)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    for a, b in zip(gradients(loss, [hidden, weight]), gradients(expected, [hidden, weight]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kind", ["rows", "one", "learns", "routed"])
def test_weights_of_forward_and_reverse_may_be_tensors(kind):
    share = randn(ROWS, seed=8).abs() if kind != "one" else torch.tensor(0.3, dtype=torch.float64)
    divergence = {"forward": share.requires_grad_(kind == "learns"), "reverse": 1 - share.detach()}
    inputs, options = student(), {"temperature": 2.0, "target": labels()}
    if kind == "learns":
        inputs = [*inputs, share]
    teachers = teachers_of("crossed" if kind == "routed" else "both")
    both = [
        linear_multi_teacher_kd(*inputs[:2], teachers, bias=inputs[2], divergence=d, reduction="none", **options)
        for d in ("forward", "reverse")
    ]
    expected = (share * both[0] + (1 - share.detach()) * both[1]).sum()
    loss = linear_multi_teacher_kd(
        *inputs[:2], teachers, bias=inputs[2], divergence=divergence, reduction="sum", chunk_rows=5, **options
    )
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-13)
    for a, b in zip(gradients(loss, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_one_weight_of_forward_and_reverse_as_a_tensor_on_whole_logits():
    logits, (teacher,) = 2 * randn(ROWS, CLASSES), teachers_of("logits")
    tensor, number = (
        multi_teacher_kd(logits, [teacher], divergence={"forward": w, "reverse": 0.7})
        for w in (torch.tensor(0.3, dtype=torch.float64), 0.3)
    )
    torch.testing.assert_close(tensor, number, rtol=1e-12, atol=0)
