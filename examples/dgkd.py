"""DGKD in a plain training loop: a teacher, an assistant and a student on scikit-learn's handwritten digits.

Run: python examples/dgkd.py (seconds on a CPU). Every network here is an ordinary nn.Module that returns logits.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastkd.methods import CE, DGKD

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)  # [1797]
train_rows, test_rows = torch.arange(400), torch.arange(400, 1797)


def network(width: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(1, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(width * 36, 10)
    )


def train(method, epochs: int = 15) -> nn.Module:
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in train_rows[torch.randperm(len(train_rows))].split(50):
            method.step(optimizer, images[rows], labels[rows])
    return method.deployable()


@torch.no_grad()
def accuracy_of(model: nn.Module) -> float:
    return (model.eval()(images[test_rows]).argmax(1) == labels[test_rows]).float().mean().item()


torch.manual_seed(0)
guides = [train(CE(network(32)))]  # the teacher
guides.append(train(DGKD(network(12), guides, lam=0.5)))  # an assistant, taught by the teacher
student = train(DGKD(network(4), guides, lam=0.5, drop="bernoulli", survival=0.75))  # taught by both

for name, model in [("teacher", guides[0]), ("assistant", guides[1]), ("student", student)]:
    print(f"{name:10} {sum(p.numel() for p in model.parameters()):6} parameters, accuracy {accuracy_of(model):.3f}")
accuracy = accuracy_of(student)
