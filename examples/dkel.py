"""DKEL in a plain training loop: three peers on one stem and their mean teacher, on scikit-learn's handwritten digits.

Run: python examples/dkel.py (seconds on a CPU). Each peer sees its own random shift of the image: views=3.
"""

import torch

from fastkd import data
from fastkd.methods import DKEL
from fastkd.models import branched

EPOCHS, LR = 10, 0.1
torch.manual_seed(0)
digits = data.load("digits", train_size=400, views=3)
batches = data.loader(digits.train, 50, shuffle=True)  # (3 tensors [50, 1, 8, 8], labels [50])

student = branched("resnet8", digits.num_classes, branches=3, image_size=8, channels=1, width=0.5)
# The published momentum, 0.999, is for 100 000 steps: here are 80.
method = DKEL(student, c=1.0, momentum=0.9)
method.initialise(batches, LR)
optimizer = torch.optim.SGD(method.parameter_groups(LR), momentum=0.9, nesterov=True, weight_decay=5e-4)

for epoch in range(EPOCHS):
    method.start_epoch(epoch, EPOCHS)
    method.train()
    total = 0.0
    for views, labels in batches:
        total += sum(method.step(optimizer, views, labels).values()).item()
    weight = method.distillation_weight(epoch, EPOCHS)
    print(f"epoch {epoch + 1:2}  loss {total / len(batches):6.3f}  weight of the distillation {weight:.3f}")


@torch.no_grad()
def accuracy_of(model) -> float:
    images, labels = next(iter(data.loader(digits.test, len(digits.test), shuffle=False)))
    return (model.eval()(images).argmax(1) == labels).float().mean().item()


network = method.deployable()  # the teacher's first peer: an ordinary ResNet-8
accuracy = accuracy_of(network)
print(f"deployed: {sum(p.numel() for p in network.parameters())} parameters, accuracy {accuracy:.3f}")
