"""What the tests of feature_ensemble share: maps in every layout, the exact result, the size of what is added up."""

import torch
from rows_helpers import weighted_sum

import fastkd
from fastkd.testing import assert_as_accurate, assert_grad_close

F = fastkd.functional
PLACES = ("cpu", "simt", "cuda")


def channels_last(x):
    return x.movedim(1, -1).contiguous().movedim(-1, 1)


LAYOUTS = {
    "contiguous": lambda x: x,
    "channels_last": channels_last,
    "every other sample": lambda x: x.repeat_interleave(2, 0)[::2],
    "one of more channels": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],  # dense samples, far apart
    "transposed": lambda x: x.transpose(1, -1).contiguous().transpose(1, -1),
    "every other channel": lambda x: x.repeat_interleave(2, 1)[:, ::2],
    "offset": lambda x: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape),
}


def make(shapes, dtype=torch.float32, teacher_dtype=None, layouts=("contiguous",), scale=1.0, seed=0, device="cpu"):
    """Students that require grad, and teachers: one of each shape, with the layouts taken in turn.

    Several dtypes are taken in turn as well.
    """
    of_students, of_teachers = (d if isinstance(d, tuple) else (d,) for d in (dtype, teacher_dtype or dtype))
    g = torch.Generator().manual_seed(seed)
    maps = []
    for layout, shape in enumerate((*shapes, *shapes)):
        x = (torch.randn(shape, generator=g, dtype=torch.float64) * scale).relu_() + 0.01 * scale
        teacher = len(maps) >= len(shapes)
        dtypes, k = of_teachers if teacher else of_students, len(maps) % len(shapes)
        x = x.to(device, dtypes[k % len(dtypes)])
        maps.append(LAYOUTS[layouts[layout % len(layouts)]](x))
    students, teachers = maps[: len(shapes)], maps[len(shapes) :]
    return [s.requires_grad_() for s in students], teachers


def as_list(students):
    return [students] if isinstance(students, torch.Tensor) else list(students)


def loss_and_grads(students, teachers, **options):
    loss = F.feature_ensemble(students, teachers, **options)
    return loss.detach(), torch.autograd.grad(weighted_sum(loss), as_list(students))


def in_float64(students, teachers, **options):
    if isinstance(options.get("weights"), torch.Tensor):
        options["weights"] = options["weights"].double()
    doubles = [s.detach().double().requires_grad_() for s in as_list(students)]
    with fastkd.use_backend("reference"):
        one = isinstance(students, torch.Tensor)
        return loss_and_grads(doubles[0] if one else doubles, [t.double() for t in teachers], **options)


def sizes(
    students, teachers, weights=None, p=1, norm="sample", elements="mean", reduction="mean", mask=None, num_items=None
):
    """The largest sample's sum of the magnitudes that its loss adds up; the same of each gradient, as an L2 norm."""
    from fastkd.ops._feature_maps import normalised

    one, k = isinstance(students, torch.Tensor), len(teachers)
    batch = as_list(students)[0].shape[0]
    weights = torch.ones(k) if weights is None else torch.as_tensor(weights)
    weights = weights.double().cpu().abs().reshape(k, -1).expand(k, batch)
    counted = torch.ones(batch) if mask is None else mask.cpu().double()
    weights = weights * counted
    divisor = 1 if reduction == "none" else num_items or (max(1, float(counted.sum())) if reduction == "mean" else 1)
    loss, grads = torch.zeros(batch, dtype=torch.float64), []
    for student, teacher, weight in zip(as_list(students) * (k if one else 1), teachers, weights, strict=True):
        a, b = student.detach().double().cpu(), teacher.detach().double().cpu()
        x, y = (normalised(z, norm).abs() for z in (a, b))  # [B, C, places]
        slope = torch.ones_like(x) if p == 1 else 2 * (x + y)
        dims = {"sample": (1, 2), "position": (1,), "channel": (2,)}[norm]
        count = x[0].numel() if elements == "mean" else 1
        loss += weight * ((x + y) * slope).sum((1, 2)) / count
        # 1 / ||a|| from the element that is largest, scaled like the reference's own norm
        inverse = (x.amax(dims, keepdim=True) / a.reshape(x.shape).abs().amax(dims, keepdim=True)).nan_to_num(0, 0, 0)
        grad = inverse * (slope + x * (slope * x).sum(dims, keepdim=True)) * weight[:, None, None] / count
        grads.append(grad / float(divisor) * 1.5)
    norms = [sum(grads)] if one else grads
    return loss, [float(g.nan_to_num(0, 0, 0).norm()) for g in norms]


def check(students, teachers, **options):
    """The native result is as good as the reference in the same dtype, against the reference in float64."""
    assert fastkd.explain(F.feature_ensemble, students, teachers, **options).backend == "native"
    loss, grads = loss_and_grads(students, teachers, **options)
    with fastkd.use_backend("reference"):
        baseline, baseline_grads = loss_and_grads(students, teachers, **options)
    exact, exact_grads = in_float64(students, teachers, **options)
    first, dtypes = as_list(students)[0], {s.dtype for s in as_list(students)}
    assert loss.dtype == baseline.dtype == (torch.float64 if torch.float64 in dtypes else torch.float32)
    loss_sizes, grad_sizes = sizes(students, teachers, **options)
    size = float(loss_sizes.sum() if options.get("reduction") == "sum" else loss_sizes.max()) if len(first) else 0.0
    if options.get("num_items"):
        size = float(loss_sizes.sum()) / float(options["num_items"])
    # Norm, division and difference round twice each; in float64 the exact result is the reference, which rounds too.
    computed = torch.float64 if dtypes == {torch.float64} else torch.float32
    eps = 2 * torch.finfo(computed).eps * (4 if computed == torch.float64 else 1)
    assert_as_accurate(loss, exact, baseline, floor=eps * size, name="loss")
    for k, student in enumerate(as_list(students)):
        grad, exact_grad = grads[k], exact_grads[k]
        assert grad.dtype == student.dtype and grad.shape == student.shape
        norm = float(exact_grad.norm())
        relative = grad_sizes[k] / norm if norm > 0 else 0.0
        floor = eps * relative + 2 * torch.finfo(grad.dtype).eps
        assert_grad_close(grad, exact_grad, baseline_grads[k], floor=floor, name=f"gradient {k}")
