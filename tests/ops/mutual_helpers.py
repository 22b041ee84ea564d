"""What the tests of mutual_kd share: inputs, the comparison with float64 and with multi_teacher_kd."""

import torch
from multi_teacher_helpers import size_of_gradient_terms, size_of_terms
from rows_helpers import weighted_sum

import fastkd
from fastkd.ops._formulas import accumulate_dtype
from fastkd.testing import assert_as_accurate, assert_grad_close

F = fastkd.functional


def make(m, rows, classes, n=0, dtype=torch.float32, teacher_dtype=None, scale=3.0, seed=0, device="cpu"):
    """Networks M x [R, C], teachers N x [R, C], target [R], on the device."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(m + n)]
    target = torch.randint(0, classes, (rows,), generator=g)
    learners = [z.to(device, dtype).requires_grad_() for z in logits[:m]]
    return learners, [t.to(device, teacher_dtype or dtype) for t in logits[m:]], target.to(device)


def loss_and_grads(logits, target=None, **options):
    """The losses, and each network's gradient of a weighted sum of them."""
    loss = F.mutual_kd(logits, target, **options)
    return loss.detach(), torch.autograd.grad(weighted_sum(loss), logits)


def in_float64(logits, target=None, teachers=(), **options):
    doubled = {k: _double(v) for k, v in options.items()}
    with fastkd.use_backend("reference"):
        return loss_and_grads(
            [z.detach().double().requires_grad_() for z in logits], _double(target),
            teachers=[t.double() for t in teachers], **doubled,
        )  # fmt: skip


def _double(value):
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def row_of_weights(m, count, n, weights, teacher_weights):
    """What network m gives its peers and the teachers, each number or [R], in the order of multi_teacher_kd."""
    peers = [1 / (count - 1)] * count if weights is None else list(weights[m])
    frozen = [1 / max(1, n)] * n if teacher_weights is None else list(teacher_weights[m])
    return peers[:m] + peers[m + 1 :] + frozen


def as_tensor(row, like):
    dtype = accumulate_dtype(like.dtype)
    row = [torch.as_tensor(w, dtype=dtype, device=like.device) for w in row]
    return torch.stack([w.expand(like.shape[:-1]) for w in row]) if any(w.dim() for w in row) else torch.stack(row)


def by_multi_teacher(logits, target=None, teachers=(), weights=None, teacher_weights=None, temperature=1.0, **options):
    """The losses by M calls of multi_teacher_kd, the other networks detached."""
    losses = []
    for m, z in enumerate(logits):
        peers = [p.detach() for k, p in enumerate(logits) if k != m] + list(teachers)
        row = as_tensor(row_of_weights(m, len(logits), len(teachers), weights, teacher_weights), z)
        losses.append(F.multi_teacher_kd(z, peers, target, weights=row, temperature=temperature, **options))
    return torch.stack(losses)


def check(logits, target=None, teachers=(), weights=None, teacher_weights=None, **options):
    """Native against float64, no worse than twice the reference in the same dtype, network by network."""
    given = dict(options, teachers=teachers, weights=weights, teacher_weights=teacher_weights)
    assert fastkd.explain(F.mutual_kd, logits, target, **given).backend == "native"
    loss, grads = loss_and_grads(logits, target, **given)
    with fastkd.use_backend("reference"):
        baseline, baseline_grads = loss_and_grads(logits, target, **given)
    exact, exact_grads = in_float64(logits, target, **given)
    widest = torch.float64 if any(z.dtype == torch.float64 for z in logits) else torch.float32
    assert loss.dtype == widest and loss.shape[0] == len(logits)
    double = 4 if logits[0].dtype == torch.float64 else 1  # the reference is the exact result itself: both roundings
    summed = len(logits[0]) if options.get("reduction") == "sum" else 1
    eps = torch.finfo(loss.dtype).eps
    size_options = {k: v for k, v in options.items() if k in ("ce_weight", "scale_by_t2")}
    for m, z in enumerate(logits):
        peers = [p.detach() for k, p in enumerate(logits) if k != m] + list(teachers)
        row = as_tensor(row_of_weights(m, len(logits), len(teachers), weights, teacher_weights), z)
        row = (row * options.get("kd_weight", 1.0)).nan_to_num(0)
        sizes = dict(size_options, temperature=options.get("temperature", 1.0), weights=row)
        largest = float(exact[m].abs().nan_to_num(0, 0, 0).max()) if exact[m].numel() else 0.0
        floor = double * eps * (size_of_terms(z, peers, **sizes) * summed + largest)
        assert_as_accurate(loss[m], exact[m], baseline[m], floor=floor, name=f"loss {m}")
        assert grads[m].dtype == z.dtype
        norm = float(exact_grads[m].nan_to_num(0, 0, 0).norm())
        terms = max(size_of_gradient_terms(z, peers, **sizes), norm) / norm if norm > 0 else 0.0
        floor = double * (eps * terms + 2 * torch.finfo(z.dtype).eps)
        assert_grad_close(grads[m], exact_grads[m], baseline_grads[m], floor=floor, name=f"gradient {m}")
