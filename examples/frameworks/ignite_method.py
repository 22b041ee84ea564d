"""Ignite: a method's step as an Engine, with its loss in the engine's metrics.

Run: python examples/frameworks/ignite_method.py (seconds on a CPU; pip install pytorch-ignite). What is ours: `step`,
and the handler that tells the method its epoch. Any method fits in, those of several phases, too. The weights that come
out are those of a plain loop.
"""

import copy

import torch
import torch.nn.functional as F
from ignite.engine import Engine, Events
from ignite.metrics import RunningAverage
from torch import nn

from fastkd.methods import AVER

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
batches = list(zip(images.split(32), labels.split(32), strict=True))


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


student, teachers = network(4), [network(16), network(8)]
copied = copy.deepcopy(student)
method = AVER(student, teachers, temperature=4.0, lam=0.9)
optimizer = torch.optim.SGD(method.parameter_groups(0.05), momentum=0.9)


def step(engine: Engine, batch: tuple[torch.Tensor, torch.Tensor]) -> dict[str, float]:
    return {name: value.item() for name, value in method.step(optimizer, *batch).items()}


trainer = Engine(step)
RunningAverage(output_transform=lambda terms: sum(terms.values())).attach(trainer, "loss")


@trainer.on(Events.EPOCH_STARTED)
def start_epoch(engine: Engine) -> None:
    method.start_epoch(engine.state.epoch - 1, engine.state.max_epochs, engine.state.epoch_length)
    method.train()


seen = []
trainer.add_event_handler(Events.EPOCH_COMPLETED, lambda engine: seen.append(dict(engine.state.metrics)))
trainer.run(batches, max_epochs=4)

optimizer = torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
for x, y in batches * 4:
    z = copied(x)
    loss = 0.1 * F.cross_entropy(z, y)
    for teacher in teachers:
        p = F.softmax(teacher(x) / 4, -1)
        loss += 0.9 * 16 / 2 * F.kl_div(F.log_softmax(z / 4, -1), p, reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for ours, plain in zip(method.deployable().parameters(), copied.parameters(), strict=True):
    torch.testing.assert_close(ours, plain)
assert seen[-1]["loss"] < seen[0]["loss"]
print(f"Ignite: {trainer.state.iteration} iterations, loss {seen[0]['loss']:.3f} -> {seen[-1]['loss']:.3f}")
