"""Networks with feature maps and the steps that the tests of FEED take."""

import torch
import torch.nn.functional as torch_functional
from methods_helpers import CLASSES
from torch import nn

from fastkd.models import Outputs, create


class Net(nn.Module):
    """Float64, images [B, 1, 12, 12], maps [B, 3, 12, 12] and [B, channels, *size]; without statistics of the batch."""

    def __init__(self, seed, channels=4, size=(6, 6)):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.first, self.last = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, channels, 3, padding=1)
            self.fc = nn.Linear(channels, CLASSES)
        self.size, self.calls = size, 0
        self.double()

    def forward(self, x):
        self.calls += 1
        first = torch.tanh(self.first(x))
        last = torch.tanh(self.last(torch_functional.interpolate(first, self.size, mode="bilinear")))
        features = last.mean((2, 3))
        return Outputs(self.fc(features), features, (first, last))


def batch(rows=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 1, 12, 12, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def bn_net(seed, name="plain2", width=0.125):
    """A network of fastkd.models in float32, with batch statistics, for images [B, 1, 8, 8]."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return create(name, CLASSES, image_size=8, channels=1, width=width)


def images(rows=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 1, 8, 8, generator=generator), torch.randint(CLASSES, (rows,), generator=generator)


def step(method, x, y, chunks=1):
    """Loss and gradients by name of one iteration without an optimiser's step."""
    (phase,) = method.phases(x, y, chunks=chunks)
    method.zero_grad(set_to_none=True)
    total = 0
    for loss in phase.losses:
        loss.backward()
        total += loss.detach()
    return total, {name: p.grad.clone() for name, p in method.named_parameters() if p.grad is not None}
