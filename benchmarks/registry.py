"""Every operation that is benchmarked, with its shapes, its inputs, what it is compared with and its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks import inputs
from benchmarks.baselines import (
    feature_ensemble_eager,
    group_stats_eager,
    multi_teacher_eager,
    mutual_eager,
    relational_eager,
)
from benchmarks.inputs import FORWARD, TRAINING, Embeddings, Inputs, Logits, Maps, Networks
from fastkd import functional

PASSES = (FORWARD, TRAINING)
DTYPES = (torch.float32, torch.bfloat16, torch.float64)
Result = Tensor | tuple[Tensor, ...]


@dataclass(frozen=True)
class Operation:
    """One operation. `fused` and every baseline take `Inputs.arguments` and return the same.

    That is a scalar loss, or, of an operation without gradients, one or several tensors.
    baselines: name -> function that makes the callable; called once per case, so that torch.compile starts afresh.
    bytes_floor(shape, itemsize, passes): bytes of every input read once and every result and gradient written once.
    tests: pattern under the repository's root; no ratio is reported while one of these files fails.
    passes: what is timed; `--quick` times the last one.
    large: shapes that `--quick` leaves out. alone_on_cpu: those that no baseline can run on a CPU, by memory or time.
    """

    name: str
    shapes: tuple[NamedTuple, ...]
    make_inputs: Callable[[NamedTuple, torch.dtype, str, int], Inputs]
    fused: Callable[..., Result]
    baselines: dict[str, Callable[[], Callable[..., Result]]]
    bytes_floor: Callable[[NamedTuple, int, str], int]
    tests: str
    dtypes: tuple[torch.dtype, ...] = DTYPES
    passes: tuple[str, ...] = (TRAINING,)
    large: tuple[NamedTuple, ...] = field(default=())
    alone_on_cpu: tuple[NamedTuple, ...] = field(default=())


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

    def baselines(self, device: str) -> dict[str, Callable]:
        """Those of the operation that can run this shape on the device."""
        alone = self.shape in self.operation.alone_on_cpu and torch.device(device).type == "cpu"
        return {} if alone else self.operation.baselines


def cases(operation: Operation, dtypes: Sequence[torch.dtype], quick: bool = False) -> list[Case]:
    """Shapes x dtypes x passes; quick leaves out the large shapes and all passes but the last."""
    return [
        Case(operation, shape, dtype, passes)
        for shape in operation.shapes
        if not (quick and shape in operation.large)
        for dtype in dtypes
        if dtype in operation.dtypes
        for passes in (operation.passes[-1:] if quick else operation.passes)
    ]


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def eager_and_compiled(function: Callable[..., Result]) -> dict[str, Callable[[], Callable[..., Result]]]:
    return {"eager": lambda: function, "compile": partial(compiled, function)}


def multi_teacher(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    return functional.multi_teacher_kd(
        student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight
    )


def mutual(logits, target, temperature, ce_weight) -> Tensor:
    return functional.mutual_kd(logits, target, temperature=temperature, ce_weight=ce_weight).sum()


OPERATIONS = {
    operation.name: operation
    for operation in [
        Operation(
            name="multi_teacher",
            shapes=(Logits(128, 100, 4), Logits(256, 1000, 4), Logits(256, 32000, 2)),
            large=(Logits(256, 32000, 2),),
            passes=PASSES,
            make_inputs=inputs.multi_teacher,
            fused=multi_teacher,
            baselines=eager_and_compiled(multi_teacher_eager.multi_teacher),
            bytes_floor=inputs.multi_teacher_bytes,
            tests="tests/test_multi_teacher*.py",
        ),
        Operation(
            name="mutual",
            shapes=(Networks(128, 100, 4), Networks(256, 1000, 4)),
            make_inputs=inputs.mutual,
            fused=mutual,
            baselines=eager_and_compiled(mutual_eager.mutual),
            bytes_floor=inputs.mutual_bytes,
            tests="tests/test_mutual*.py",
        ),
        Operation(
            name="group_stats",
            shapes=(Networks(128, 100, 4), Networks(256, 1000, 4)),
            passes=(FORWARD,),
            make_inputs=inputs.group_stats,
            fused=functional.group_stats,
            baselines=eager_and_compiled(group_stats_eager.group_stats),
            bytes_floor=inputs.group_stats_bytes,
            tests="tests/test_group_stats*.py",
        ),
        Operation(
            name="feature_ensemble",
            shapes=(Maps(128, 64, 8, 8, 5), Maps(64, 512, 7, 7, 5)),
            make_inputs=inputs.feature_ensemble,
            fused=functional.feature_ensemble,
            baselines=eager_and_compiled(feature_ensemble_eager.feature_ensemble),
            bytes_floor=inputs.feature_ensemble_bytes,
            tests="tests/test_feature_ensemble*.py",
        ),
        Operation(
            name="rkd_distance",
            shapes=(Embeddings(256, 512),),
            dtypes=(torch.float32, torch.float64),
            make_inputs=inputs.embeddings,
            fused=functional.rkd_distance,
            baselines=eager_and_compiled(relational_eager.rkd_distance),
            bytes_floor=inputs.embeddings_bytes,
            tests="tests/test_relational*.py",
        ),
        Operation(
            name="rkd_angle",
            shapes=(Embeddings(128, 512), Embeddings(256, 512), Embeddings(1024, 2048)),
            large=(Embeddings(1024, 2048),),
            alone_on_cpu=(Embeddings(1024, 2048),),  # [N, N, D] differences of 8.6 GB each
            dtypes=(torch.float32, torch.float64),
            make_inputs=inputs.embeddings,
            fused=functional.rkd_angle,
            baselines=eager_and_compiled(relational_eager.rkd_angle),
            bytes_floor=inputs.embeddings_bytes,
            tests="tests/test_relational*.py",
        ),
    ]
}
