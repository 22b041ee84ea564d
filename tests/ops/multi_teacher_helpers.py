"""What the tests of multi_teacher_kd share: inputs, and the comparison with float64."""

import inspect

import torch
import torch.nn.functional as torch_functional
from rows_helpers import weighted_sum

import fastkd
from fastkd.ops import _formulas
from fastkd.ops import _multi_teacher_inputs as inputs
from fastkd.ops import _multi_teacher_native as native
from fastkd.ops import _teacher_calls as calls
from fastkd.testing import assert_as_accurate, assert_grad_close

F = fastkd.functional


def make(rows, classes, k, dtype=torch.float32, teacher_dtype=None, scale=3.0, seed=0, device="cpu"):
    """Student [R, C], teachers K x [R, C], target [R], on the device."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(k + 1)]
    target = torch.randint(0, classes, (rows,), generator=g)
    student = logits[0].to(device, dtype).requires_grad_()
    teachers = [t.to(device, teacher_dtype or dtype) for t in logits[1:]]
    return student, teachers, target.to(device)


def loss_and_grad(student, teachers, target=None, **options):
    loss = F.multi_teacher_kd(student, teachers, target, **options)
    (grad,) = torch.autograd.grad(weighted_sum(loss), student)
    return loss.detach(), grad


def raw(student, teachers, target=None, **options):
    """The arguments of the raw operation: tensors, scalars, numbers."""
    bound = inspect.signature(F.multi_teacher_kd).bind(student, teachers, target, **options)
    bound.apply_defaults()
    tensors, checked = inputs.check(**{name: v for name, v in bound.arguments.items() if name != "activation"})
    checked, scalars = calls.split(checked)
    return list(tensors), scalars, native.numbers_of(checked)


def in_float64(student, teachers, target=None, **options):
    weights = options.get("weights")
    if isinstance(weights, torch.Tensor):
        options["weights"] = weights.double()
    with fastkd.use_backend("reference"):
        return loss_and_grad(
            student.detach().double().requires_grad_(), [t.double() for t in teachers], target, **options
        )


def largest(weights, default):
    weights = torch.as_tensor(default if weights is None else weights)
    return float(weights.abs().max()) if weights.numel() else 0.0


def size_of_terms(student, teachers, temperature=4.0, weights=None, ce_weight=0.0, scale_by_t2=True, **_):
    """The size of sum p log p and sum p log q, whose difference KL is: a rounding of it is a rounding of the loss."""
    temperatures = temperature if isinstance(temperature, list) else [temperature] * len(teachers)
    total = torch.zeros(student.shape[:-1], dtype=torch.float64, device=student.device)
    for teacher, t in zip(teachers, temperatures, strict=True):
        p = torch_functional.softmax(teacher.double() / t, -1)
        log_q = torch_functional.log_softmax(student.detach().double() / t, -1)
        total += (t * t if scale_by_t2 else 1.0) * -(p * log_q.nan_to_num(0, 0, 0)).nan_to_num(0).sum(-1)
    heaviest = largest(weights, 1 / len(teachers)) * len(teachers)
    return (float(total.max()) / len(teachers) * heaviest if total.numel() else 0.0) + abs(ce_weight)


def size_of_gradient_terms(student, teachers, temperature=4.0, weights=None, ce_weight=0.0, scale_by_t2=True, **_):
    """The L2 norm of q and p, scaled as their difference in the gradient: confident networks cancel nearly all."""
    temperatures = temperature if isinstance(temperature, list) else [temperature] * len(teachers)
    heaviest = largest(weights, 1 / len(teachers))
    total = abs(ce_weight) * torch_functional.softmax(student.detach().double(), -1)
    for teacher, t in zip(teachers, temperatures, strict=True):
        q, p = (torch_functional.softmax(z.detach().double() / t, -1) for z in (student, teacher))
        total = total + heaviest * (t if scale_by_t2 else 1 / t) * (q + p)
    return float(total.nan_to_num(0).norm())


def _in_range(gradient, dtype):
    """With 0 for what is no normal number of the dtype that is computed in: there only its sign is left."""
    return gradient.masked_fill(gradient.double().abs() < 4 * torch.finfo(dtype).tiny, 0)


def _error_of_the_oracle(teachers, temperature=4.0, **_):
    """Of float64 itself, in which 1 + 1e-17 is 1: the kernels' sums see probabilities of that size beside 1."""
    highest = max(temperature) if isinstance(temperature, list) else temperature
    return torch.finfo(torch.float64).eps * max(1.0, highest) ** 2 * len(teachers)


def check(student, teachers, target=None, **options):
    """Native against float64, no worse than twice the reference in the same dtype."""
    assert fastkd.explain(F.multi_teacher_kd, student, teachers, target, **options).backend == "native"
    loss, grad = loss_and_grad(student, teachers, target, **options)
    with fastkd.use_backend("reference"):
        baseline, baseline_grad = loss_and_grad(student, teachers, target, **options)
    exact, exact_grad = in_float64(student, teachers, target, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert grad.dtype == student.dtype
    summed = len(student) if options.get("reduction") == "sum" else 1
    largest = float(exact.abs().nan_to_num(0, 0, 0).max()) if exact.numel() else 0.0
    floor = torch.finfo(loss.dtype).eps * (size_of_terms(student, teachers, **options) * summed + largest)
    floor += _error_of_the_oracle(teachers, **options)
    if student.dtype == torch.float64:  # the reference is the exact result itself: the floor has to hold both roundings
        floor *= 4
    assert_as_accurate(loss, exact, baseline, floor=floor, name="loss")
    grad, baseline_grad, exact_grad = (_in_range(g, loss.dtype) for g in (grad, baseline_grad, exact_grad))
    finite = exact_grad.double().nan_to_num(0, 0, 0)
    highest = float(finite.abs().max()) if finite.numel() else 0.0
    norm = highest * float((finite / highest).norm()) if highest > 0 else 0.0  # squares of 1e-200 are 0
    terms = max(size_of_gradient_terms(student, teachers, **options), norm) / norm if norm > 0 else 0.0
    eps = torch.finfo(loss.dtype).eps * terms + 2 * torch.finfo(grad.dtype).eps
    assert_grad_close(grad, exact_grad, baseline_grad, floor=4 * eps if student.dtype == torch.float64 else eps)


def build_options(device, dtype, rows=5, classes=50, k=3, labels="hard", mask=False, weights=None, **options):
    student, teachers, target = make(rows, classes, k, dtype, device=device)
    accumulate = _formulas.accumulate_dtype(dtype)
    if labels == "soft":
        target = soft_labels(rows, classes, device, dtype)
    if mask:
        options["mask"] = torch.arange(rows, device=device) % 3 != 1
    if weights == "rows":  # the last row has no teacher
        weights = torch.rand(k, rows, generator=torch.Generator().manual_seed(1)).to(device, accumulate)
        weights[0, ::2] = weights[1, 1:3] = weights[:, -1] = 0
    elif weights == "device":
        weights = torch.tensor([[0.2], [0.0], [0.7]]).expand(k, rows).to(device, accumulate)
    return student, teachers, target if labels else None, dict(options, weights=weights)


def soft_labels(rows, classes, device="cpu", dtype=torch.float32):
    """Mixed-up labels, with zeros; one row that sums to 0.9."""
    g = torch.Generator().manual_seed(5)
    one_hot = torch_functional.one_hot(torch.randint(0, classes, (2, rows), generator=g), classes).double()
    soft = 0.7 * one_hot[0] + 0.3 * one_hot[1]
    soft[0] = torch.softmax(torch.randn(classes, generator=g).double(), -1) * 0.9
    return soft.to(device, dtype)


def both(function):
    """The results by the kernels of the place, then by the reference."""
    for backend in ("auto", "reference"):
        with fastkd.use_backend(backend):
            yield function()
