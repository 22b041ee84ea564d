"""What the tests of multi_label_kd share: inputs, the formula typed again, and the comparison with float64."""

import torch
import torch.nn.functional as torch_functional
from rows_helpers import weighted_sum

import fastkd
from fastkd.ops._formulas import accumulate_dtype
from fastkd.testing import assert_as_accurate, assert_grad_close

F = fastkd.functional
KEYS = ("weights", "target")  # what is turned into float64 with the logits


def make(rows, classes, k, dtype=torch.float32, teacher_dtype=None, scale=3.0, seed=0, device="cpu"):
    """Student [R, C], teachers K x [R, C], labels int64 [R, C], on the device."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale - 1 for _ in range(k + 1)]
    target = torch.randint(0, 2, (rows, classes), generator=g)
    student = logits[0].to(device, dtype).requires_grad_()
    teachers = [t.to(device, teacher_dtype or dtype) for t in logits[1:]]
    return student, teachers, target.to(device)


def build(device, dtype, rows=5, classes=50, k=3, labels=None, mask=None, weights=None, pos_weight=None, **options):
    """Student, teachers, target, options: labels "hard", "bool", "soft" or "partial", masks of "rows" or "elements"."""
    g = torch.Generator().manual_seed(1)
    student, teachers, hard = make(rows, classes, k, dtype, device=device)
    soft = torch.rand(rows, classes, generator=g, dtype=torch.float64).to(device, dtype)
    partial = hard.masked_fill((torch.rand(rows, classes, generator=g) < 0.4).to(device), -100)
    partial[0] = -100  # a row without a label
    target = {None: None, "hard": hard, "bool": hard.bool(), "soft": soft, "partial": partial}[labels]
    accumulate = accumulate_dtype(dtype)
    if weights == "rows":  # the last row has no teacher
        weights = torch.rand(k, rows, generator=g).to(device, accumulate)
        weights[0, ::2] = weights[:, -1] = 0
    if mask == "rows":
        options["mask"] = torch.arange(rows, device=device) % 3 != 1
    elif mask == "elements":
        options["mask"] = (torch.rand(rows, classes, generator=g) < 0.6).to(device)
        options["mask"][-1] = False
    if pos_weight == "classes":
        pos_weight = torch.rand(classes, generator=g).mul(9).to(device)
    return student, teachers, target, dict(options, weights=weights, pos_weight=pos_weight)


def loss_and_grad(student, teachers, target=None, **options):
    loss = F.multi_label_kd(student, teachers, target, **options)
    (grad,) = torch.autograd.grad(weighted_sum(loss), student)
    return loss.detach(), grad


def in_float64(student, teachers, target=None, **options):
    weights = options.get("weights")
    if isinstance(weights, torch.Tensor):
        options["weights"] = weights.double()
    if target is not None and target.is_floating_point():
        target = target.double()
    with fastkd.use_backend("reference"):
        return loss_and_grad(
            student.detach().double().requires_grad_(), [t.double() for t in teachers], target, **options
        )


def typed_again(student, teachers, target, weights, temperatures, combine, ce_weight, pos_weight, scale_by_t2):
    """Row losses as training codes write them, by torch's binary cross-entropies: KL is that with p minus p's own."""

    def divergence(p, z):
        q = torch.sigmoid(z)
        return sum(torch.special.xlogy(a, a) - torch.special.xlogy(a, b) for a, b in ((p, q), (1 - p, 1 - q)))

    square = [t * t if scale_by_t2 else 1.0 for t in temperatures]
    if combine == "losses":
        total = 0
        for z, w, t, s in zip(teachers, weights, temperatures, square, strict=True):
            total = total + w[:, None] * s * divergence(torch.sigmoid(z / t), student / t)
    elif combine == "logits":
        mean = sum(w[:, None] * z for w, z in zip(weights, teachers, strict=True))
        total = square[0] * divergence(torch.sigmoid(mean / temperatures[0]), student / temperatures[0])
    else:
        t, mass = temperatures[0], sum(weights)[:, None]
        p = sum(w[:, None] * torch.sigmoid(z / t) for w, z in zip(weights, teachers, strict=True)) / mass
        total = square[0] * mass * (divergence(p, student / t) + mass.log())
    ce = torch_functional.binary_cross_entropy_with_logits(
        student, target.to(student.dtype), pos_weight=pos_weight, reduction="none"
    )
    return (total + ce_weight * ce).sum(-1)


def size_of_terms(exact, student, options):
    """What a rounding of the loss is relative to. No part of a divergence cancels, but the masses of mixtures do."""
    largest = float(exact.abs().nan_to_num(0, 0, 0).max()) if exact.numel() else 0.0
    if options.get("combine") != "probs" or not student.numel():
        return largest
    temperature = options.get("temperature", 1.0)
    rows = len(student) if options.get("reduction") == "sum" else 1
    return largest + student.shape[-1] * temperature**2 * rows


def check(student, teachers, target=None, factor=2.0, **options):
    """By kernels against float64, no worse than twice the reference in the same dtype."""
    assert fastkd.explain(F.multi_label_kd, student, teachers, target, **options).backend == "native"
    loss, grad = loss_and_grad(student, teachers, target, **options)
    with fastkd.use_backend("reference"):
        baseline, baseline_grad = loss_and_grad(student, teachers, target, **options)
    exact, exact_grad = in_float64(student, teachers, target, **options)
    assert loss.dtype == (torch.float64 if student.dtype == torch.float64 else torch.float32)
    assert grad.dtype == student.dtype and grad.shape == student.shape
    eps = torch.finfo(loss.dtype).eps
    assert_as_accurate(loss, exact, baseline, factor=factor, floor=8 * eps * size_of_terms(exact, student, options))
    floor = 8 * eps + 2 * torch.finfo(grad.dtype).eps
    assert_grad_close(grad, exact_grad, baseline_grad, factor=factor, floor=floor)
