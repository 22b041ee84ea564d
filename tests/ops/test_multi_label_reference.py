"""multi_label_kd in plain PyTorch: the formula typed again, in float64, and what no kernel is needed for."""

import itertools
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from multi_label_helpers import F, build, loss_and_grad, make, typed_again

import fastkd
from fastkd.ops._multi_teacher_native import COMBINE

pytestmark = pytest.mark.usefixtures("one_thread", "reference")


@pytest.fixture
def reference():
    with fastkd.use_backend("reference"):
        yield


def test_is_the_formula_typed_again():
    options = itertools.product(COMBINE, (None, 0.5, "classes"), (True, False), ([2.0] * 3, [1.0, 2.0, 4.5]))
    for combine, pos_weight, scale_by_t2, temperatures in options:
        if combine != "losses" and temperatures[0] != temperatures[1]:
            continue
        student, teachers, target = make(7, 19, 3, torch.float64)
        weights = torch.rand(3, 7, dtype=torch.float64)
        pos = torch.rand(19, dtype=torch.float64) * 4 if pos_weight == "classes" else pos_weight
        wide = pos if pos is None or isinstance(pos, torch.Tensor) else torch.full((19,), pos, dtype=torch.float64)
        expected = typed_again(student, teachers, target, weights, temperatures, combine, 0.6, wide, scale_by_t2)
        actual = F.multi_label_kd(
            student, teachers, target, weights=weights, combine=combine, ce_weight=0.6, pos_weight=pos,
            temperature=temperatures if combine == "losses" else temperatures[0], scale_by_t2=scale_by_t2,
            reduction="none",
        )  # fmt: skip
        torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
        gradients = [torch.autograd.grad(x.mean(), student)[0] for x in (actual, expected)]
        torch.testing.assert_close(*gradients, rtol=1e-10, atol=1e-12)


def test_is_the_papers_and_the_usual_code():
    """The paper's MLD with its "batchmean"; TextBrewer's loss, whose gradient is that of the mean over classes."""
    student, (teacher,), _ = make(6, 11, 1, torch.float64)
    p, q = torch.sigmoid(teacher), torch.sigmoid(student)
    mld = torch_functional.kl_div(q.log(), p, reduction="none") + torch_functional.kl_div(
        (1 - q).log(), 1 - p, reduction="none"
    )
    torch.testing.assert_close(F.multi_label_kd(student, [teacher]), mld.sum() / 6)
    usual = torch_functional.binary_cross_entropy_with_logits(student / 3, torch.sigmoid(teacher / 3))
    mine = F.multi_label_kd(student, [teacher], temperature=3.0, scale_by_t2=False, classes="mean")
    torch.testing.assert_close(*[torch.autograd.grad(x, student)[0] for x in (usual, mine)])


def test_one_logit_is_two_classes_of_a_softmax():
    student, teachers, target = make(9, 1, 2, torch.float64)
    pairs = [torch.cat([torch.zeros_like(z), z], 1) for z in (student, *teachers)]
    options = dict(temperature=2.5, ce_weight=0.7, weights=[0.3, 0.9], reduction="none")
    for combine in COMBINE:
        two = F.multi_teacher_kd(pairs[0], pairs[1:], target[:, 0], combine=combine, **options)
        torch.testing.assert_close(F.multi_label_kd(student, teachers, target, combine=combine, **options), two)
    vector = F.multi_label_kd(student, teachers, target[:, 0], **options)
    assert torch.equal(vector, F.multi_label_kd(student, teachers, target, **options))


@pytest.mark.parametrize("labels", ["hard", "soft", "partial"])
def test_the_mean_over_classes_and_other_divisors(labels):
    student, teachers, target, _ = build("cpu", torch.float64, labels=labels)
    whole, mean = [F.multi_label_kd(student, teachers, target, ce_weight=0.5, classes=c) for c in ("sum", "mean")]
    torch.testing.assert_close(whole / student.shape[1], mean)
    rows = F.multi_label_kd(student, teachers, target, ce_weight=0.5, reduction="none")
    counts = 5 if labels != "partial" else 4
    torch.testing.assert_close(rows.sum() / counts, whole)
    torch.testing.assert_close(F.multi_label_kd(student, teachers, target, ce_weight=0.5, num_items=7), rows.sum() / 7)


def test_elements_that_do_not_count_hold_anything_and_others_are_as_alone():
    student, teachers, target, _ = build("cpu", torch.float64, labels="partial")
    with torch.no_grad():
        for z in (student, *teachers):
            z[target == -100] = math.nan
    loss, grad = loss_and_grad(student, teachers, target, ce_weight=0.5, reduction="none")
    clean = [z.detach().nan_to_num(0.3).requires_grad_() for z in (student, *teachers)]
    counted = target != -100
    alone = typed_again(clean[0], clean[1:], target.clamp(min=0), torch.full((3, 5), 1 / 3).double(), [1.0] * 3,
                        "losses", 0.5, None, True)  # fmt: skip
    assert loss[0] == 0 and bool(loss.isfinite().all()) and float(grad[~counted].abs().max()) == 0
    masked = F.multi_label_kd(clean[0], clean[1:], target.clamp(min=0), mask=counted, ce_weight=0.5, reduction="none")
    torch.testing.assert_close(loss, masked.detach())
    one_class = F.multi_label_kd(clean[0][:, :1], [t[:, :1] for t in clean[1:]], target[:, :1], reduction="none")
    assert one_class[target[:, 0] == -100].abs().sum() == 0
    assert bool((loss <= alone.detach() + 1e-12).all())


def test_dtypes_of_labels_say_the_same():
    student, teachers, target = make(5, 7, 2)
    results = [
        F.multi_label_kd(student, teachers, y, ce_weight=1.0)
        for y in (target, target.bool(), target.to(torch.uint8), target.int(), target.float(), target.half())
    ]
    assert all(torch.equal(result, results[0]) for result in results)


def test_multi_teacher_kd_with_sigmoid_is_the_same_call():
    student, teachers, target, options = build("cpu", torch.float32, labels="partial", weights="rows", mask="rows")
    options.pop("pos_weight")
    options |= dict(ce_weight=0.4, temperature=2.0, return_terms=True)
    one = F.multi_teacher_kd(student, teachers, target, activation="sigmoid", **options)
    other = F.multi_label_kd(student, teachers, target, **options)
    assert torch.equal(one[0], other[0]) and all(map(torch.equal, one[1], other[1]))
    module = fastkd.MultiTeacherKD(activation="sigmoid", temperature=2.0, ce_weight=0.4)
    rest = dict(mask=options["mask"], weights=options["weights"])
    assert torch.equal(module(student, teachers, target, **rest), other[0])
    value, gradient = F.multi_teacher_kd_with_gradient(student, teachers, temperature=2.0, activation="sigmoid")
    loss = F.multi_label_kd(student, teachers, temperature=2.0)
    assert torch.equal(value, loss.detach()) and torch.equal(gradient, torch.autograd.grad(loss, student)[0])
    with pytest.raises(ValueError, match=r"^multi_teacher_kd: divergence must be 'forward' for activation='sigmoid'"):
        F.multi_teacher_kd(student, teachers, activation="sigmoid", divergence="reverse")
    with pytest.raises(ValueError, match=r"^multi_teacher_kd: activation must be one of 'softmax', 'sigmoid'"):
        F.multi_teacher_kd(student, teachers, activation="tanh")


def test_the_module_is_the_function():
    student, teachers, target, options = build("cpu", torch.float32, labels="hard", pos_weight="classes", mask="rows")
    module = fastkd.MultiLabelKD(
        pos_weight=options["pos_weight"], temperature=torch.tensor([1.0, 2.0, 3.0]), ce_weight=0.3, return_terms=True
    )
    assert set(module.state_dict()) == {"pos_weight", "temperature"}
    loss, terms = module({"logits": student}, teachers, target, mask=options["mask"], weights=[0.1, 0.2, 0.3])
    expected = F.multi_label_kd(
        student, teachers, target, temperature=[1.0, 2.0, 3.0], ce_weight=0.3, return_terms=True,
        **options | {"weights": [0.1, 0.2, 0.3]},
    )  # fmt: skip
    assert torch.equal(loss, expected[0]) and torch.equal(terms.ce, expected[1].ce)
    torch.testing.assert_close(terms.kd + 0.3 * terms.ce, loss.detach())


def test_a_wrong_label_is_nan_where_values_are_not_read(values_unreadable):
    student, teachers, target = make(3, 6, 1)
    target[1, 2] = 5
    target[2, 2] = -100
    loss, grad = loss_and_grad(student, teachers, target, reduction="none")
    assert loss.isnan().tolist() == [False, True, False]
    assert grad.isnan().nonzero().tolist() == [[1, 2]]


def test_empty_batches_and_rows_that_do_not_count_are_zero():
    student, teachers, target = make(4, 6, 2)
    assert F.multi_label_kd(student[:0], [t[:0] for t in teachers], target[:0], ce_weight=1.0).item() == 0
    loss, grad = loss_and_grad(student, teachers, torch.full_like(target, -100), ce_weight=1.0)
    assert loss.item() == 0 and float(grad.abs().max()) == 0
