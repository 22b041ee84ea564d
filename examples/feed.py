"""FEED in a plain training loop: two teachers and a student on scikit-learn's handwritten digits, by feature maps.

Run: python examples/feed.py (seconds on a CPU). FEED needs maps: networks of fastkd.models give them, and with_features
makes any other network give them.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

from fastkd.methods import CE, FEED
from fastkd.models import create, with_features

digits = load_digits()
images = torch.tensor(digits.images, dtype=torch.float32)[:, None] / 16  # [1797, 1, 8, 8]
labels = torch.tensor(digits.target)  # [1797]
train_rows, test_rows = torch.arange(400), torch.arange(400, 1797)


def own_network() -> nn.Module:
    layers = nn.Conv2d(1, 32, 3), nn.BatchNorm2d(32), nn.ReLU(), nn.Flatten(), nn.Linear(32 * 36, 10)
    return with_features(nn.Sequential(*layers), ["2"])  # the map after the ReLU


def train(method, epochs: int = 12) -> nn.Module:
    optimizer = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9, weight_decay=1e-4)
    for epoch in range(epochs):
        method.start_epoch(epoch, epochs)
        method.train()
        for rows in train_rows[torch.randperm(len(train_rows))].split(50):
            method.step(optimizer, images[rows], labels[rows])
    return method.deployable()


@torch.no_grad()
def accuracy_of(model: nn.Module) -> float:
    output = model.eval()(images[test_rows])
    return (getattr(output, "logits", output).argmax(1) == labels[test_rows]).float().mean().item()


torch.manual_seed(0)
teachers = [train(CE(own_network())), train(CE(create("plain4", 10, image_size=8, channels=1)))]
method = FEED(create("plain2", 10, image_size=8, channels=1, width=0.25), teachers, example=images[:1])
student = train(method)  # without the transforms, which only training needs

for name, model in [("teacher", teachers[0]), ("teacher", teachers[1]), ("student", student)]:
    print(f"{name:10} {sum(p.numel() for p in model.parameters()):6} parameters, accuracy {accuracy_of(model):.3f}")
accuracy = accuracy_of(student)
