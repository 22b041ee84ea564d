"""What a `Fit` is told besides its method and its data: the options on this machine, and what is trained for whom."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastkd.train.devices import pick_device
from fastkd.train.distributed import ALONE, World
from fastkd.train.settings import Settings


@dataclass(frozen=True)
class Setup:
    """A run's options and what they mean here, found out once.

    >>> fastkd.train.Setup.here(fastkd.train.TrainConfig(device="cpu")).device
    device(type='cpu')

    Attributes:
        settings: optimiser, batch size, precision, ... .
        device: this process's.
        world: the processes of the run.
    """

    settings: Settings
    device: torch.device
    world: World

    @classmethod
    def here(cls, settings: Settings, world: World = ALONE) -> Setup:
        """UserError for a device that is not there."""
        return cls(settings, pick_device(settings.device), world)


@dataclass(frozen=True)
class Task:
    """One training: of a network, or of several together.

    >>> fastkd.train.Task("teacher resnet14", epochs=3).seed
    0

    Attributes:
        name: who trains, for messages: "teacher resnet14".
        epochs: passes over the training images.
        seed: of the order of the images and of PyTorch's generator.
        facts: what is written into each checkpoint beside the state: plain values without paths or times. "learners"
            are the names of the networks that learn, the wanted one first.
        folder: where checkpoints and metrics.csv go; None keeps nothing.
        others: name -> the networks that learn together with the wanted one.
        guides: name -> the frozen networks.
        curves: folder for TensorBoard's event files; None writes none.
        logits: where the frozen networks' logits are kept; None runs the networks in each epoch.
    """

    name: str
    epochs: int
    seed: int = 0
    facts: Mapping[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    others: Mapping[str, nn.Module] = field(default_factory=dict)
    guides: Mapping[str, nn.Module] = field(default_factory=dict)
    curves: Path | None = None
    logits: Path | None = None
