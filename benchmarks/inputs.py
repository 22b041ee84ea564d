"""The operations' shapes, inputs like those of real networks, and the bytes that each operation must move."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

FORWARD, TRAINING = "forward", "forward + backward"
TEMPERATURE, CE_WEIGHT = 4.0, 1.0


class Inputs(NamedTuple):
    """The arguments that the operation and each baseline are called with, and which of the tensors learn."""

    arguments: tuple
    learning: tuple[Tensor, ...]


class Logits(NamedTuple):
    """One student and K teachers."""

    rows: int
    classes: int
    teachers: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.classes}] K={self.teachers}"


class Networks(NamedTuple):
    """M networks on the same samples."""

    rows: int
    classes: int
    networks: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.classes}] M={self.networks}"


class Heads(NamedTuple):
    """Hidden states of a student and of a teacher, of the same width, each with its own language-model head."""

    rows: int
    width: int
    classes: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.width}] -> {self.classes}"


class Projections(NamedTuple):
    """Hidden states of a student and of K teachers, of the same width, each with its own language-model head."""

    rows: int
    width: int
    classes: int
    teachers: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.width}] -> {self.classes} K={self.teachers}"


class Maps(NamedTuple):
    """K pairs of feature maps of one size."""

    batch: int
    channels: int
    height: int
    width: int
    pairs: int

    def __str__(self) -> str:
        return f"{list(self[:4])} K={self.pairs}"


class Embeddings(NamedTuple):
    """A batch of embeddings of a student and of a teacher, of the same width."""

    rows: int
    width: int

    def __str__(self) -> str:
        return f"N={self.rows} D={self.width}"


def trained_logits(rows: int, classes: int, target: Tensor, certainty: float, generator: torch.Generator) -> Tensor:
    """Logits [R, C] like a trained network's: noise of scale 3 and a few likely classes, mostly the right one first."""
    device = generator.device
    logits = torch.randn(rows, classes, generator=generator, device=device).mul_(3)
    likely = torch.randint(0, classes, (rows, 3), generator=generator, device=device)
    logits.scatter_add_(1, likely, torch.full((rows, 3), certainty / 2, device=device))
    return logits.scatter_add_(1, target[:, None], torch.full((rows, 1), certainty, device=device))


def _group(shape: Logits | Networks, certainties: list[float], dtype, device: str, seed: int):
    """A network's logits for each certainty, and the target [R]."""
    generator = torch.Generator(device).manual_seed(seed)
    target = torch.randint(0, shape.classes, (shape.rows,), generator=generator, device=device)
    networks = [
        trained_logits(shape.rows, shape.classes, target, certainty, generator).to(dtype) for certainty in certainties
    ]
    return networks, target


def multi_teacher(shape: Logits, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    (student, *teachers), target = _group(shape, [4.0] + [10.0] * shape.teachers, dtype, device, seed)
    weights = [1 / shape.teachers] * shape.teachers
    student.requires_grad_()
    return Inputs((student, teachers, target, weights, TEMPERATURE, CE_WEIGHT), (student,))


def multi_teacher_alone(shape: Logits, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """The same without a graph: of what gives its gradient back itself."""
    student, *rest = multi_teacher(shape, dtype, device, seed).arguments
    return Inputs((student.detach(), *rest), ())


def multi_label(shape: Logits, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Logits like those of a multi-label network, sure of most classes that they are not there; floating labels."""
    generator = torch.Generator(device).manual_seed(seed)

    def randn() -> Tensor:
        return torch.randn(shape.rows, shape.classes, generator=generator, device=device)

    common = randn().mul_(2).sub_(3)
    student, *teachers = [(common + randn()).to(dtype) for _ in range(shape.teachers + 1)]
    target = (common + randn() > 0).to(dtype)
    weights = [1 / shape.teachers] * shape.teachers
    return Inputs((student.requires_grad_(), teachers, target, weights, 2.0, CE_WEIGHT), (student,))


def mutual(shape: Networks, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    networks, target = _group(shape, [6.0] * shape.networks, dtype, device, seed)
    networks = [z.requires_grad_() for z in networks]
    return Inputs((networks, target, TEMPERATURE, CE_WEIGHT), tuple(networks))


def cross_entropy(shape: Networks, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    made = mutual(shape, dtype, device, seed)
    return Inputs(made.arguments[:2], made.learning)


def group_stats(shape: Networks, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    return Inputs(_group(shape, [6.0] * shape.networks, dtype, device, seed), ())


def feature_ensemble(shape: Maps, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Teachers' maps after a ReLU, students' as transforms give them."""
    generator = torch.Generator(device).manual_seed(seed)
    maps = [torch.randn(shape[:4], generator=generator, device=device) for _ in range(2 * shape.pairs)]
    students = [z.to(dtype).requires_grad_() for z in maps[: shape.pairs]]
    teachers = [z.relu_().to(dtype) for z in maps[shape.pairs :]]
    return Inputs((students, teachers), tuple(students))


def embeddings(shape: Embeddings, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Ten classes, the samples of one as far from each other as from the class's centre."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.randint(0, 10, (shape.rows,), generator=generator)
    student, teacher = (
        (torch.randn(10, shape.width, generator=generator)[label] + torch.randn(shape, generator=generator))
        .to(device, dtype)
        for _ in range(2)
    )  # fmt: skip
    return Inputs((student.requires_grad_(), teacher), (student,))


def linear_multi_teacher(shape: Projections, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Heads whose logits have a scale of 3, teachers that are networks of their own."""
    generator = torch.Generator(device).manual_seed(seed)
    rows, width, classes, teachers = shape

    def network() -> tuple[Tensor, Tensor]:
        hidden = torch.randn(rows, width, generator=generator, device=device)
        head = torch.randn(classes, width, generator=generator, device=device) * (3 / width**0.5)
        return hidden.to(dtype), head.to(dtype)

    (hidden, weight), *others = [network() for _ in range(teachers + 1)]
    return Inputs((hidden.requires_grad_(), weight.requires_grad_(), others), (hidden, weight))


def linear_kd(shape: Heads, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    """Heads that give logits of scale 3, the teacher's of scale 4."""
    generator = torch.Generator(device).manual_seed(seed)
    sizes = [(shape.rows, shape.width)] * 2 + [(shape.classes, shape.width)] * 2
    scales = [1.0, 1.0, 3 / shape.width**0.5, 4 / shape.width**0.5]
    student, teacher, head, teacher_head = (
        torch.randn(size, generator=generator, device=device).mul_(scale).to(dtype)
        for size, scale in zip(sizes, scales, strict=True)
    )
    learning = student.requires_grad_(), head.requires_grad_()
    return Inputs((student, teacher, head, teacher_head), learning)


def _labels(rows: int) -> int:
    return 8 * rows  # int64


def multi_teacher_bytes(shape: Logits, itemsize: int, passes: str) -> int:
    """K + 1 logits read, one gradient written when training, the targets read."""
    tensors = shape.teachers + 1 + (passes == TRAINING)
    return tensors * shape.rows * shape.classes * itemsize + _labels(shape.rows)


def multi_label_bytes(shape: Logits, itemsize: int, passes: str) -> int:
    """K + 1 logits and the labels read, one gradient written when training."""
    return (shape.teachers + 2 + (passes == TRAINING)) * shape.rows * shape.classes * itemsize


def multi_teacher_alone_bytes(shape: Logits, itemsize: int, passes: str) -> int:
    """K + 1 logits and the targets read, the gradient and a loss written."""
    return multi_teacher_bytes(shape, itemsize, TRAINING) + max(4, itemsize)


def mutual_bytes(shape: Networks, itemsize: int, passes: str) -> int:
    """M logits read, M gradients written when training, the targets read."""
    tensors = shape.networks * (2 if passes == TRAINING else 1)
    return tensors * shape.rows * shape.classes * itemsize + _labels(shape.rows)


def group_stats_bytes(shape: Networks, itemsize: int, passes: str) -> int:
    """M logits and the targets read; written for each network and row: four numbers, int64 and bool."""
    statistics = 4 * max(4, itemsize) + 8 + 1
    return shape.networks * shape.rows * (shape.classes * itemsize + statistics) + _labels(shape.rows)


def feature_ensemble_bytes(shape: Maps, itemsize: int, passes: str) -> int:
    """Of each pair: both maps read, one gradient written when training."""
    elements = shape.batch * shape.channels * shape.height * shape.width
    return shape.pairs * (3 if passes == TRAINING else 2) * elements * itemsize


def embeddings_bytes(shape: Embeddings, itemsize: int, passes: str) -> int:
    """Both embeddings read, one gradient written when training. The time goes into operations: O(N^2 D), or O(N^3)."""
    return (3 if passes == TRAINING else 2) * shape.rows * shape.width * itemsize


def linear_kd_bytes(shape: Heads, itemsize: int, passes: str) -> int:
    """Hidden states and heads read, the student's gradients written when training. The matrix products take longer."""
    own = (shape.rows + shape.classes) * shape.width
    return (3 if passes == TRAINING else 2) * own * itemsize


def linear_multi_teacher_bytes(shape: Projections, itemsize: int, passes: str) -> int:
    """Hidden states and heads read, the student's gradients written when training. The matrix products take longer."""
    networks = shape.teachers + 1 + (passes == TRAINING)
    return networks * (shape.rows + shape.classes) * shape.width * itemsize
