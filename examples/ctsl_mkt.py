"""CTSL-MKT in a plain training loop: two peers on scikit-learn's handwritten digits.

Run: python examples/ctsl_mkt.py (seconds on a CPU). Relations need embeddings: networks of fastkd.models give them, and
with_features lets any other network do so.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastkd.methods import CE, CTSLMKT
from fastkd.models import with_features

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)  # [1797]
train_rows, test_rows = torch.arange(400), torch.arange(400, 1797)


def network(width: int) -> nn.Module:
    layers = (nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10))
    return with_features(nn.Sequential(*layers), ["2"])  # the embedding: the mean over the pixels of the third layer


def train(method, epochs: int = 10) -> nn.Module:
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in train_rows[torch.randperm(len(train_rows))].split(50):
            method.step(optimizer, images[rows], labels[rows])
    return method.deployable()


@torch.no_grad()
def accuracy_of(model: nn.Module) -> float:
    return (model.eval()(images[test_rows]).logits.argmax(1) == labels[test_rows]).float().mean().item()


torch.manual_seed(0)
widths = [4, 12]
alone = [train(CE(network(width))) for width in widths]  # stage 1
method = CTSLMKT([network(width) for width in widths], self_teachers=alone)
train(method)  # stage 2

for width, before, after in zip(widths, alone, method.peers, strict=True):
    print(f"{width:2} channels: accuracy alone {accuracy_of(before):.3f}, together {accuracy_of(after):.3f}")
accuracy = accuracy_of(method.deployable())
