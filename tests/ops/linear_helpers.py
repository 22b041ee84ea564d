"""What the tests of linear_multi_teacher_kd share: networks, labels, results with gradients."""

import torch

from fastkd import Head
from fastkd.functional import linear_multi_teacher_kd

ROWS, WIDTH, CLASSES = 19, 6, 31


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def student(dtype=torch.float64, rows=ROWS):
    """hidden, weight, bias."""
    return [
        z.to(dtype).requires_grad_()
        for z in (randn(rows, WIDTH), randn(CLASSES, WIDTH, seed=1), randn(CLASSES, seed=2))
    ]


def labels(rows=ROWS):
    target = torch.arange(rows) * 7 % CLASSES
    target[::4] = -100
    return target


def teachers_of(kind, dtype=torch.float64):
    hidden, weight = randn(ROWS, 4, seed=3, dtype=dtype), randn(CLASSES, 4, seed=4, dtype=dtype)
    logits = 2 * randn(ROWS, CLASSES, seed=5, dtype=dtype)
    rows = torch.tensor([3, 1, 8, 12, 15, 16, 2])
    return {
        "logits": [logits],
        "head": [(hidden, weight)],
        "both": [logits, (hidden, weight)],
        "capped": [Head(hidden, weight, bias=randn(CLASSES, seed=6), softcap=3.0, logit_scale=0.7), logits],
        "routed": [Head(hidden[:7], weight, rows=rows), Head(hidden[:4], -weight, rows=torch.tensor([0, 5, 6, 9]))],
        "crossed": [logits, Head(hidden[:7], weight, rows=rows), Head(hidden[:9], -weight, rows=torch.arange(9))],
    }[kind]


def gradients(loss, inputs):
    weight = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).reshape(loss.shape)
    return torch.autograd.grad((loss * weight).sum(), inputs)


def results(inputs, teachers, **options):
    hidden, weight, bias = inputs
    out = linear_multi_teacher_kd(hidden, weight, teachers, bias=bias, **options)
    loss, *terms = [out] if isinstance(out, torch.Tensor) else [out[0], *out[1]]
    return [loss, *terms, *gradients(loss, inputs)]
