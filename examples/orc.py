"""ORC in a plain training loop: a pivot teacher and a group of three students on scikit-learn's handwritten digits.

Run: python examples/orc.py (seconds on a CPU). Every network here is an ordinary nn.Module that returns logits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastkd.methods import CE, ORC

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)  # [1797]
train_rows, test_rows = torch.arange(400), torch.arange(400, 1797)


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10)
    )


def train(method, epochs: int) -> nn.Module:
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in train_rows[torch.randperm(len(train_rows))].split(50):
            method.step(optimizer, images[rows], labels[rows])  # intensive, private and group teaching
    return method.deployable()


@torch.no_grad()
def accuracy_of(model: nn.Module) -> float:
    return (model.eval()(images[test_rows]).argmax(1) == labels[test_rows]).float().mean().item()


torch.manual_seed(0)
pivot = train(CE(network(32)), epochs=5)  # trained before; it learns on
print(f"pivot before      accuracy {accuracy_of(pivot):.3f}")
method = ORC(pivot, [network(4), network(8), network(12)])  # the first is the one to ship
student = train(method, epochs=15)

print(f"pivot after       accuracy {accuracy_of(pivot):.3f}")
for i, model in enumerate(method.students):
    size = sum(p.numel() for p in model.parameters())
    print(f"student {i} {size:6}  accuracy {accuracy_of(model):.3f}, promoted {method.promotions[i]} times")
accuracy = accuracy_of(student)
