"""Networks with embeddings, and RKD's relations typed again in plain PyTorch."""

import copy

import torch
from methods_helpers import CLASSES, mlp
from torch import nn
from torch.nn import functional as F

from fastkd.models import Outputs


class Net(nn.Module):
    """A float64 network without batch statistics: logits by its call, and its embedding [B, width]."""

    def __init__(self, seed: int, width: int = 6, classes: int = CLASSES, inputs: int = 5):
        super().__init__()
        self.body = mlp(seed, inputs, classes=width)
        self.head = mlp(seed + 50, width, classes=classes)

    def forward_features(self, inputs):
        features = self.body(inputs)
        return Outputs(self.head(features), features)

    def forward(self, inputs):
        return self.forward_features(inputs).logits


class ConvNet(nn.Module):
    """A float32 network with batch statistics and dropout, whose modes therefore matter; images [B, 1, 6, 6]."""

    def __init__(self, seed: int, width: int = 4):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.conv, self.norm, self.drop = nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.Dropout(0.2)
            self.head = nn.Linear(width, CLASSES)

    def forward_features(self, inputs):
        features = self.drop(self.norm(self.conv(inputs)).tanh()).mean((2, 3))
        return Outputs(self.head(features), features)

    def forward(self, inputs):
        return self.forward_features(inputs).logits


def plain_distance(x, t):
    """RKD's distance-wise loss, pair by pair."""

    def relative(x):
        n = len(x)
        pairs = {(i, j): (x[i] - x[j]).square().sum().sqrt() for i in range(n) for j in range(n) if i != j}
        mean = sum(pairs.values()) / max(1, len(pairs))
        return {pair: distance / mean for pair, distance in pairs.items()}

    ours, theirs = relative(x), relative(t)
    return sum((F.smooth_l1_loss(ours[pair], theirs[pair]) for pair in ours), x.sum() * 0) / max(1, len(x)) ** 2


def plain_angle(x, t):
    """RKD's angle-wise loss, vertex by vertex."""

    def cosines(x, j):
        others = [i for i in range(len(x)) if i != j]
        sides = torch.stack([(x[i] - x[j]) / (x[i] - x[j]).norm() for i in others])
        return sides @ sides.T

    if len(x) < 2:
        return x.sum() * 0
    total = sum(F.smooth_l1_loss(cosines(x, j), cosines(t, j), reduction="sum") for j in range(len(x)))
    return total / len(x) ** 3


def parts_of_batch(tensor, chunks):
    n = len(tensor)
    return [tensor[n * c // chunks : n * (c + 1) // chunks] for c in range(chunks)]


def plain_step(networks, loss, x, y, chunks=1):
    """Value and gradients (per network) of loss(networks, x, y), the mean over the chunks weighted by their rows."""
    networks = [copy.deepcopy(network) for network in networks]
    total = 0
    for xs, ys in zip(parts_of_batch(x, chunks), parts_of_batch(y, chunks), strict=True):
        total = total + len(xs) / len(x) * loss(networks, xs, ys)
    total.backward()
    return total.detach(), [[p.grad for p in network.parameters()] for network in networks]


def assert_gradients(networks, expected, atol=1e-8):
    for network, grads in zip(networks, expected, strict=True):
        for p, grad in zip(network.parameters(), grads, strict=True):
            torch.testing.assert_close(torch.zeros_like(p) if p.grad is None else p.grad, grad, rtol=0, atol=atol)
