"""Every operation that is benchmarked, with its shapes, its inputs, what it is compared with and its floor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

import fastkd
from benchmarks import inputs, peers
from benchmarks.baselines import (
    cross_entropy_eager,
    feature_ensemble_eager,
    group_stats_eager,
    linear_eager,
    linear_kd_eager,
    multi_label_eager,
    multi_teacher_eager,
    mutual_eager,
    relational_eager,
)
from benchmarks.inputs import FORWARD, TRAINING, Embeddings, Heads, Inputs, Logits, Maps, Networks, Projections
from fastkd import functional

PASSES = (FORWARD, TRAINING)
REFERENCE = "reference"  # a baseline
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
    gpu: shapes with their dtype that are measured on a GPU besides; large ones.
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
    gpu: tuple[tuple[NamedTuple, torch.dtype], ...] = field(default=())


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
        """Those of the operation that can run this shape on the device, other libraries among them."""
        if self.shape in self.operation.alone_on_cpu and torch.device(device).type == "cpu":
            return {}
        others = peers.baselines(self.operation.name, device)
        return self.operation.baselines | {name: partial(_itself, function) for name, function in others.items()}


def in_turn(cases: Sequence[Case]) -> list[Case]:
    """The first case of each operation, then the second of each: what a deadline leaves out is of all alike. An
    operation's large cases of a GPU come before its others.
    """
    queues: dict[str, list[Case]] = {}
    for case in sorted(cases, key=lambda case: (case.shape, case.dtype) not in case.operation.gpu):
        queues.setdefault(case.operation.name, []).append(case)
    names = list(dict.fromkeys(case.operation.name for case in cases))
    return [queues[name][i] for i in range(max(map(len, queues.values()), default=0)) for name in names
            if i < len(queues[name])]  # fmt: skip


def _itself(function: Callable) -> Callable:
    return function


def cases(operation: Operation, dtypes: Sequence[torch.dtype], quick: bool = False, device: str = "cpu") -> list[Case]:
    """Shapes x dtypes x passes; quick leaves out the large shapes and all passes but the last."""
    pairs = [
        (shape, dtype)
        for shape in operation.shapes
        if not (quick and shape in operation.large)
        for dtype in dtypes
        if dtype in operation.dtypes
    ]
    if torch.device(device).type == "cuda" and not quick:
        pairs += [(shape, dtype) for shape, dtype in operation.gpu if (shape, dtype) not in pairs]
    kinds = operation.passes[-1:] if quick else operation.passes
    return [Case(operation, shape, dtype, passes) for shape, dtype in pairs for passes in kinds]


def compiled(function: Callable[..., Result]) -> Callable[..., Result]:
    return torch.compile(function, dynamic=False, fullgraph=True)


def eager_and_compiled(function: Callable[..., Result]) -> dict[str, Callable[[], Callable[..., Result]]]:
    return {"eager": lambda: function, "compile": partial(compiled, function)}


def with_reference(fused: Callable[..., Result], eager: Callable[..., Result]) -> dict[str, Callable]:
    """Also the library's own formula, which runs where no kernel can: it must not be slower than the eager loop."""

    def reference(*arguments) -> Result:
        with fastkd.use_backend("reference"):
            return fused(*arguments)

    return eager_and_compiled(eager) | {REFERENCE: lambda: reference}


def multi_teacher(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    return functional.multi_teacher_kd(
        student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight
    )


def multi_label(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    return functional.multi_label_kd(
        student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight
    )


def multi_teacher_with_gradient(student, teachers, target, weights, temperature, ce_weight) -> tuple[Tensor, ...]:
    return functional.multi_teacher_kd_with_gradient(
        student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight
    )


def divergence_of(name: str) -> Callable[..., Tensor]:
    """multi_teacher with another divergence than forward."""

    def divergence(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
        return functional.multi_teacher_kd(
            student, teachers, target, weights=weights, temperature=temperature, ce_weight=ce_weight, divergence=name
        )

    return divergence


def mutual(logits, target, temperature, ce_weight) -> Tensor:
    return functional.mutual_kd(logits, target, temperature=temperature, ce_weight=ce_weight).sum()


def cross_entropy(logits, target) -> Tensor:
    return functional.cross_entropy(logits, target).sum()


def linear_kd(student, teacher, head, teacher_head) -> Tensor:
    """PyTorch's matrix products, then the fused divergence: what flash-linear-attention cuts into parts."""
    logits = torch.nn.functional.linear(student, head)
    with torch.no_grad():
        target = torch.nn.functional.linear(teacher, teacher_head)
    return functional.multi_teacher_kd(logits, [target], temperature=1.0)


BF16 = torch.bfloat16

OPERATIONS = {
    operation.name: operation
    for operation in [
        Operation(
            name="multi_teacher",
            shapes=(Logits(128, 100, 4), Logits(256, 1000, 4), Logits(256, 32000, 2)),
            large=(Logits(256, 32000, 2),),
            gpu=((Logits(8192, 32000, 1), BF16), (Logits(8192, 32000, 4), BF16), (Logits(4096, 128256, 1), BF16)),
            passes=PASSES,
            make_inputs=inputs.multi_teacher,
            fused=multi_teacher,
            baselines=with_reference(multi_teacher, multi_teacher_eager.multi_teacher),
            bytes_floor=inputs.multi_teacher_bytes,
            tests="tests/ops/test_multi_teacher*.py",
        ),
        *[
            Operation(
                name=f"multi_teacher_{name}",
                shapes=(Logits(256, 1000, 4), Logits(256, 32000, 1)),
                large=(Logits(256, 32000, 1),),
                make_inputs=inputs.multi_teacher,
                fused=divergence_of(name),
                baselines=with_reference(divergence_of(name), eager),
                bytes_floor=inputs.multi_teacher_bytes,
                tests="tests/ops/test_divergences.py",
            )
            for name, eager in (("reverse", multi_teacher_eager.reverse), ("jsd", multi_teacher_eager.jsd))
        ],
        Operation(
            name="multi_teacher_kd_with_gradient",
            shapes=(Logits(128, 100, 4), Logits(256, 1000, 4)),
            passes=(FORWARD,),
            make_inputs=inputs.multi_teacher_alone,
            fused=multi_teacher_with_gradient,
            baselines={
                "eager": lambda: multi_teacher_eager.with_gradient,
                "compile": lambda: compiled(multi_teacher_eager.gradient_and_value),
            },
            bytes_floor=inputs.multi_teacher_alone_bytes,
            tests="tests/ops/test_multi_teacher*.py",
        ),
        Operation(
            name="multi_label",
            shapes=(Logits(256, 80, 1), Logits(256, 1000, 4), Logits(65536, 1, 1)),
            passes=PASSES,
            make_inputs=inputs.multi_label,
            fused=multi_label,
            baselines=eager_and_compiled(multi_label_eager.multi_label),
            bytes_floor=inputs.multi_label_bytes,
            gpu=((Logits(8192, 9600, 1), BF16),),
            tests="tests/ops/test_multi_label*.py",
        ),
        Operation(
            name="mutual",
            shapes=(Networks(128, 100, 4), Networks(256, 1000, 4)),
            make_inputs=inputs.mutual,
            fused=mutual,
            baselines=with_reference(mutual, mutual_eager.mutual),
            bytes_floor=inputs.mutual_bytes,
            gpu=((Networks(8192, 32000, 3), BF16), (Networks(16, 128256, 2), BF16)),
            tests="tests/ops/test_mutual*.py",
        ),
        Operation(
            name="cross_entropy",
            shapes=(Networks(256, 1000, 4),),
            make_inputs=inputs.cross_entropy,
            fused=cross_entropy,
            baselines=eager_and_compiled(cross_entropy_eager.cross_entropy),
            bytes_floor=inputs.mutual_bytes,
            tests="tests/ops/test_cross_entropy*.py",
        ),
        Operation(
            name="group_stats",
            shapes=(Networks(128, 100, 4), Networks(256, 1000, 4)),
            passes=(FORWARD,),
            make_inputs=inputs.group_stats,
            fused=functional.group_stats,
            baselines=eager_and_compiled(group_stats_eager.group_stats),
            bytes_floor=inputs.group_stats_bytes,
            tests="tests/ops/test_group_stats*.py",
        ),
        Operation(
            name="feature_ensemble",
            shapes=(Maps(128, 64, 8, 8, 5), Maps(64, 512, 7, 7, 5)),
            make_inputs=inputs.feature_ensemble,
            fused=functional.feature_ensemble,
            baselines=eager_and_compiled(feature_ensemble_eager.feature_ensemble),
            bytes_floor=inputs.feature_ensemble_bytes,
            gpu=((Maps(256, 256, 56, 56, 1), torch.float32), (Maps(256, 512, 28, 28, 5), BF16)),
            tests="tests/ops/test_feature_ensemble*.py",
        ),
        Operation(
            name="rkd_distance",
            shapes=(Embeddings(256, 512),),
            dtypes=(torch.float32, torch.float64),
            make_inputs=inputs.embeddings,
            fused=functional.rkd_distance,
            baselines=eager_and_compiled(relational_eager.rkd_distance),
            bytes_floor=inputs.embeddings_bytes,
            tests="tests/ops/test_relational*.py",
        ),
        Operation(
            name="rkd_angle",
            shapes=(Embeddings(128, 512), Embeddings(256, 512), Embeddings(1024, 2048)),
            large=(Embeddings(1024, 2048),),
            alone_on_cpu=(Embeddings(1024, 2048),),  # [N, N, D] differences of 8.6 GB each
            gpu=((Embeddings(4096, 2048), torch.float32),),
            dtypes=(torch.float32, torch.float64),
            make_inputs=inputs.embeddings,
            fused=functional.rkd_angle,
            baselines=eager_and_compiled(relational_eager.rkd_angle),
            bytes_floor=inputs.embeddings_bytes,
            tests="tests/ops/test_relational*.py",
        ),
        Operation(
            name="linear_kd",
            shapes=(),
            gpu=((Heads(8192, 2048, 32000), BF16),),
            make_inputs=inputs.linear_kd,
            fused=linear_kd,
            baselines=eager_and_compiled(linear_kd_eager.linear_kd),
            bytes_floor=inputs.linear_kd_bytes,
            tests="tests/ops/test_multi_teacher*.py",
        ),
        Operation(
            name="linear_multi_teacher",
            shapes=(Projections(512, 256, 8000, 2),),
            gpu=((Projections(4096, 2048, 128256, 1), BF16),),
            make_inputs=inputs.linear_multi_teacher,
            fused=functional.linear_multi_teacher_kd,
            baselines=eager_and_compiled(linear_eager.linear_multi_teacher)
            | {"checkpoint": lambda: linear_eager.checkpointed},
            bytes_floor=inputs.linear_multi_teacher_bytes,
            tests="tests/ops/test_linear*.py",
        ),
    ]
}
