"""Every operation that is benchmarked, with its shapes, its inputs, what it is compared with and its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.baselines import multi_teacher_eager
from fastkd import functional

FORWARD, TRAINING = "forward", "forward + backward"
PASSES = (FORWARD, TRAINING)


class Inputs(NamedTuple):
    """The arguments that the operation and each baseline are called with, and which of the tensors learn."""

    arguments: tuple
    learning: tuple[Tensor, ...]


class Logits(NamedTuple):
    """Shape of an operation over one student and K teachers."""

    rows: int
    classes: int
    teachers: int

    def __str__(self) -> str:
        return f"[{self.rows}, {self.classes}] K={self.teachers}"


@dataclass(frozen=True)
class Operation:
    """One operation. `fused` and every baseline take `Inputs.arguments` and return a scalar loss.

    baselines: name -> function that makes the callable; called once per case, so that torch.compile starts afresh.
    bytes_floor(shape, itemsize, passes): bytes of every input read once and every gradient written once.
    tests: pattern under the repository's root; no ratio is reported while one of these files fails.
    """

    name: str
    shapes: tuple[NamedTuple, ...]
    dtypes: tuple[torch.dtype, ...]
    make_inputs: Callable[[NamedTuple, torch.dtype, str, int], Inputs]
    fused: Callable[..., Tensor]
    baselines: dict[str, Callable[[], Callable[..., Tensor]]]
    bytes_floor: Callable[[NamedTuple, int, str], int]
    tests: str


class Case(NamedTuple):
    operation: Operation
    shape: NamedTuple
    dtype: torch.dtype
    passes: str

    def __str__(self) -> str:
        return f"{self.operation.name} {self.shape} {str(self.dtype).removeprefix('torch.')} {self.passes}"

    @property
    def bytes_floor(self) -> int:
        return self.operation.bytes_floor(self.shape, self.dtype.itemsize, self.passes)


def cases(operation: Operation, dtypes: Sequence[torch.dtype], quick: bool = False) -> list[Case]:
    """Shapes x dtypes x passes; quick leaves out the last, largest shape."""
    shapes = operation.shapes[:-1] if quick else operation.shapes
    return [
        Case(operation, shape, dtype, passes)
        for shape in shapes
        for dtype in dtypes
        if dtype in operation.dtypes
        for passes in PASSES
    ]


def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def trained_logits(rows: int, classes: int, target: Tensor, certainty: float, generator: torch.Generator) -> Tensor:
    """Logits [R, C] like a trained network's: noise of scale 3 and a few likely classes, mostly the right one first."""
    logits = torch.randn(rows, classes, generator=generator) * 3
    likely = torch.randint(0, classes, (rows, 3), generator=generator)
    logits.scatter_add_(1, likely, torch.full((rows, 3), certainty / 2))
    return logits.scatter_add_(1, target[:, None], torch.full((rows, 1), certainty))


TEMPERATURE, CE_WEIGHT = 4.0, 1.0


def multi_teacher_inputs(shape: Logits, dtype: torch.dtype, device: str, seed: int) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    target = torch.randint(0, shape.classes, (shape.rows,), generator=generator)
    certainties = [4.0] + [10.0] * shape.teachers
    student, *teachers = (
        trained_logits(shape.rows, shape.classes, target, certainty, generator).to(device, dtype)
        for certainty in certainties
    )
    weights = [1 / shape.teachers] * shape.teachers
    student.requires_grad_()
    return Inputs((student, teachers, target.to(device), weights, TEMPERATURE, CE_WEIGHT), (student,))


def multi_teacher_fused(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    return functional.multi_teacher_kd(
        student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight
    )


def multi_teacher_bytes(shape: Logits, itemsize: int, passes: str) -> int:
    """K + 1 logits read, one gradient written when training, int64 targets read."""
    tensors = shape.teachers + 1 + (passes == TRAINING)
    return shape.rows * (tensors * shape.classes * itemsize + 8)


OPERATIONS = {
    operation.name: operation
    for operation in [
        Operation(
            name="multi_teacher",
            shapes=(Logits(128, 100, 4), Logits(256, 1000, 4), Logits(256, 32000, 2)),
            dtypes=(torch.float32, torch.bfloat16, torch.float64),
            make_inputs=multi_teacher_inputs,
            fused=multi_teacher_fused,
            baselines={
                "eager": lambda: multi_teacher_eager.multi_teacher,
                "compile": partial(compiled, multi_teacher_eager.multi_teacher),
            },
            bytes_floor=multi_teacher_bytes,
            tests="tests/test_multi_teacher*.py",
        ),
    ]
}
