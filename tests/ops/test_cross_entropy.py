"""cross_entropy: PyTorch's own, of one network or several, in every place its kernels run."""

import math

import pytest
import torch
import torch.nn.functional as torch_functional
from conftest import PLACES

import fastkd
from fastkd.testing import DTYPES, assert_as_accurate, assert_grad_close

F = fastkd.functional


def make(rows=5, classes=70, m=3, dtype=torch.float32, device="cpu"):
    g = torch.Generator().manual_seed(0)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * 3 for _ in range(m)]
    target = torch.randint(0, classes, (rows,), generator=g)
    target[1] = -100
    soft = torch.rand(rows, classes, generator=g, dtype=torch.float64).pow(8)
    soft[0, 3:] = 0
    logits = [z.to(device, dtype).requires_grad_() for z in logits]
    return logits, target.to(device), (soft / soft.sum(-1, keepdim=True)).to(device, dtype)


def torchs(z, target, **options):
    """In the accumulate dtype, as losses are returned."""
    target = target.to(z.dtype) if target.is_floating_point() else target
    return torch_functional.cross_entropy(z, target, **options)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ["labels", "smoothing", "soft", "none", "sum"])
def test_is_pytorchs(kind, place, dtype, at):
    logits, target, soft = make(dtype=dtype, device=at(place))
    if kind == "soft":
        target = soft
    options = dict(label_smoothing=0.1 if kind in ("smoothing", "soft") else 0.0)
    options["reduction"] = kind if kind in ("none", "sum") else "mean"
    assert fastkd.explain(F.cross_entropy, logits, target, **options).backend == "native"
    several, one = F.cross_entropy(logits, target, **options), F.cross_entropy(logits[0], target, **options)
    assert torch.equal(several[0], one) and one.dim() == (1 if kind == "none" else 0)
    upstream = torch.linspace(0.5, 1.5, several.numel(), dtype=several.dtype, device=several.device)
    grads = torch.autograd.grad(several, logits, upstream.reshape(several.shape), retain_graph=True)
    for m, z in enumerate(logits):
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        results = []
        for d in (torch.float64, wide):
            x = z.detach().to(d).requires_grad_()
            loss = torchs(x, target, **options)
            weight = upstream.reshape(several.shape)[m].to(d)
            results.append((loss.detach(), torch.autograd.grad(loss, x, weight)[0]))
        (exact, exact_grad), (baseline, baseline_grad) = results
        assert_as_accurate(several[m].detach(), exact, baseline, floor=8 * torch.finfo(several.dtype).eps * 20)
        assert_grad_close(grads[m], exact_grad, baseline_grad.to(dtype), floor=8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_masks_divisors_maps_and_dtypes_of_their_own(backend, place, at):
    device = at(place)
    maps = torch.randn(2, 6, 3, 5, device=device, requires_grad=True)
    target, mask = torch.randint(0, 6, (2, 3, 5), device=device), torch.rand(2, 3, 5, device=device) > 0.4
    with fastkd.use_backend(backend):
        loss = F.cross_entropy(maps, target, class_dim=1, mask=mask, num_items=40)
        rows = F.cross_entropy(maps, target, class_dim=1, mask=mask, reduction="none")
        mixed = F.cross_entropy([maps, maps.detach().double()], target, class_dim=1)
    expected = torch_functional.cross_entropy(maps, target, reduction="none") * mask
    assert loss.dim() == 0 and rows.shape == mask.shape and mixed.dtype == torch.float64
    torch.testing.assert_close(rows, expected)
    torch.testing.assert_close(loss, expected.sum() / 40)
    torch.testing.assert_close(mixed[1].float(), torch_functional.cross_entropy(maps, target).detach())
    grads = [torch.autograd.grad(x, maps)[0] for x in (loss, expected.sum() / 40)]
    torch.testing.assert_close(*grads)


def test_no_row_that_counts_is_zero_and_others_hold_anything():
    logits, target, _ = make()
    with torch.no_grad():
        logits[0][1] = math.nan
    assert bool(F.cross_entropy(logits, target).isfinite().all())
    loss = F.cross_entropy(logits[0], torch.full_like(target, -100))
    assert loss.item() == 0 and float(torch.autograd.grad(loss, logits[0])[0].abs().max()) == 0


def test_second_derivatives_and_one_network_after_the_other():
    logits, target, _ = make(classes=6, dtype=torch.float64)
    assert torch.autograd.gradgradcheck(lambda z: F.cross_entropy(z, target, label_smoothing=0.1), logits[0])
    losses = F.cross_entropy(logits, target)
    losses[1].backward()
    assert [z.grad is None for z in logits] == [True, False, True]
    losses[0].backward()


def test_wrong_calls():
    logits, target, _ = make()
    wrong = [
        (lambda: F.cross_entropy(logits[0], None), TypeError, "target must be class indices or probabilities"),
        (lambda: F.cross_entropy([], target), ValueError, "logits must be at least one network's logits, got 0"),
        (lambda: F.cross_entropy(logits[0][:, :1], target), ValueError, "logits must be .* C >= 2 classes"),
        (lambda: F.cross_entropy(logits, target + 70), ValueError, r"target must be class indices in \[0, 70\)"),
        (lambda: F.cross_entropy(logits[0], target[:2]), ValueError, r"target must be of shape \[5\], the logits'"),
        (lambda: F.cross_entropy(logits[0], target, mask=target), TypeError, "mask must be a bool tensor"),
        (lambda: F.cross_entropy(logits[0], target, class_dim=2), ValueError, r"class_dim must be a dimension"),
    ]
    for call, exception, sentence in wrong:
        with pytest.raises(exception, match=f"cross_entropy: {sentence}"):
            call()
