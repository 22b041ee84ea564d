"""What the tests of rkd_distance and rkd_angle share: embeddings that are hard, the usual code, the comparison."""

import torch
import torch.nn.functional as torch_functional
from rows_helpers import weighted_sum

import fastkd
from fastkd.testing import assert_as_accurate, assert_grad_close

F = fastkd.functional
FUNCTIONS = {"rkd_distance": F.rkd_distance, "rkd_angle": F.rkd_angle}
PLACES = ["cpu", "simt", "cuda"]


def embeddings(kind, n, width, seed=0):
    """[N, width] in float64, of values that float32 holds."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(n, width, generator=g, dtype=torch.float64)
    if kind == "clusters":  # three tight ones, as of a trained network
        x = torch.randn(3, width, generator=g, dtype=torch.float64)[torch.arange(n) % 3] + 1e-3 * x
    elif kind.startswith("near"):  # pairs of rows at this distance
        half = (n + 1) // 2
        x = torch.cat([x[:half], x[: n - half] + float(kind.split()[1]) * torch.randn(n - half, width, generator=g)])
    elif kind == "equal":
        x[1::3] = x[:1]
    elif kind == "collapsed":
        x = x[:1].expand(n, width).clone()
    elif kind == "nested":  # about one point, at magnitudes from 1 to 1e-4 that no magnitude of the rows tells
        x = 1 + x * 10.0 ** -(torch.arange(n) % 5).double()[:, None]
    elif kind == "far mean":
        x = x + 1000
    elif kind == "tiny":
        x = x * 1e-15
    elif kind == "huge":
        x = x * 1e15
    return x.float().double()


def loss_and_grad(function, student, teacher, **options):
    student = student.detach().requires_grad_()
    loss = function(student, teacher, **options)
    (grad,) = torch.autograd.grad(weighted_sum(loss), student)
    return loss.detach(), grad


def reference(function, student, teacher, **options):
    with fastkd.use_backend("reference"):
        return loss_and_grad(function, student, teacher, **options)


def lost_in_float64(x):
    """The factor by which rounding in float64 grows, over all pairs of rows that differ.

    norms / square in the Gram form of a squared distance (beyond 2^14 it is summed from differences); its square root
    where rows enter a product and their difference is meant: in the gradient, and in a cosine beside a short side.
    """
    x = x.detach().double()
    x = x - x.mean(0)
    squares = (x[:, None] - x[None]).square().sum(-1)
    norms = x.square().sum(1)
    factors = ((norms[:, None] + norms) / squares)[squares > 0]
    if factors.numel() == 0:
        return 1.0
    return float(torch.maximum(factors.masked_fill(factors > 2**14, 1), factors.sqrt()).max())


def rounding(dtype, student, teacher):
    """The relative error of what the kernels compute in this dtype."""
    lost = 4 * max(lost_in_float64(student), lost_in_float64(teacher)) if dtype == torch.float64 else 1
    return lost * torch.finfo(dtype).eps


def check(function, student, teacher, **options):
    """Native against float64, no worse than twice the reference in the same dtype."""
    assert fastkd.explain(function, student, teacher, **options).backend == "native"
    loss, grad = loss_and_grad(function, student, teacher, **options)
    baseline, baseline_grad = reference(function, student, teacher, **options)
    exact, exact_grad = reference(function, student.double(), teacher.double(), **options)
    assert loss.dtype == torch.promote_types(torch.float32, torch.promote_types(student.dtype, teacher.dtype))
    assert grad.dtype == student.dtype and bool(loss.isfinite().all())
    # A rounding of a cosine, or of a distance over its mean, changes the loss by as much times a slope of at most 1 and
    # of at most the square root of twice the loss.
    eps = rounding(loss.dtype, student, teacher)
    summed = student.shape[0] if options.get("reduction") == "sum" or "num_items" in options else 1
    slope = float((2 * exact.abs().max() / summed).sqrt()) if exact.numel() else 0.0
    floor = eps * (min(slope, 1.0) * summed + (float(exact.abs().max()) if exact.numel() else 0.0))
    assert_as_accurate(loss, exact, baseline, floor=floor, name="loss")
    floor = 2 * torch.finfo(grad.dtype).eps + (eps if loss.dtype == torch.float64 else 2 * eps)
    assert_grad_close(grad, exact_grad, baseline_grad, floor=floor)


def usual_angles(x):
    differences = x.unsqueeze(0) - x.unsqueeze(1)
    units = torch_functional.normalize(differences, p=2, dim=2)
    return torch.bmm(units, units.transpose(1, 2)).view(-1)


def usual_distances(x):
    squares = (x.pow(2).sum(1).unsqueeze(1) + x.pow(2).sum(1).unsqueeze(0) - 2 * (x @ x.t())).clamp(min=1e-12)
    mask = 1 - torch.eye(len(x), dtype=x.dtype)
    distances = squares.sqrt() * mask
    return distances / distances[distances > 0].mean()


def usual(name, student, teacher):
    """The loss as the papers' codes write it."""
    values = usual_angles if name == "rkd_angle" else usual_distances
    return torch_functional.smooth_l1_loss(values(student), values(teacher))
