"""What a network gets right of images that it is not trained on."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from fastkd.models import call_network, logits_of
from fastkd.train.devices import batch_on, rows_of
from fastkd.train.distributed import ALONE, World


@torch.no_grad()
def evaluate(
    network: nn.Module,
    batches: Iterable[Any],
    device: torch.device,
    classes: int | None = None,
    world: World = ALONE,
) -> tuple[float, float]:
    """(mean cross-entropy, accuracy in 0..1) in eval mode; the network's mode is restored.

    With several processes each has its own part of the batches, and all get the result.

    >>> network, batches = torch.nn.Linear(4, 3, bias=False), [(torch.zeros(2, 4), torch.tensor([0, 1]))]
    >>> loss, accuracy = fastkd.train.evaluate(network, batches, torch.device("cpu"))
    >>> round(loss, 4), accuracy  # of equal logits: log 3, and the first is the argmax
    (1.0986, 0.5)
    """
    was_training = network.training
    network.eval()
    total = torch.zeros(3, dtype=torch.float64, device=device)  # cross-entropy, right ones, images
    for batch in batches:
        rows = rows_of(batch[1], world)
        inputs, target = batch_on(batch, device, classes)
        logits = logits_of(call_network(network, inputs)).float()  # [B, C]
        loss = nn.functional.cross_entropy(logits, target, reduction="sum")
        total += torch.stack([loss.double(), (logits.argmax(1) == target).sum().double(), total.new_tensor(rows)])
    network.train(was_training)
    loss, correct, images = world.sum(total).tolist()
    return loss / images, correct / images
