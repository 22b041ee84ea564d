"""`python -m benchmarks.gpu_calls`: every fused operation on the GPU, small for compute-sanitizer, large for ncu."""

from __future__ import annotations

import argparse
import sys

import torch

import fastkd
from benchmarks import measure, report
from benchmarks.inputs import Embeddings, Heads, Logits, Maps, Networks, Projections
from benchmarks.registry import OPERATIONS, Case
from fastkd import _backend

# Odd sizes: rows that no vector width divides, more than a block's, and of two numbers.
SMALL = {
    "multi_teacher": [Logits(3, 37, 2), Logits(2, 2, 1), Logits(2, 5003, 3), Logits(1, 40003, 1)],
    "multi_teacher_reverse": [Logits(3, 37, 2)],
    "multi_teacher_jsd": [Logits(3, 37, 2)],
    "multi_teacher_kd_with_gradient": [Logits(3, 37, 2)],
    "multi_label": [Logits(3, 37, 2), Logits(5, 1, 1), Logits(2, 5003, 3)],
    "mutual": [Networks(3, 37, 3), Networks(2, 5003, 2), Networks(2, 8216, 2)],  # the last in several parts a row
    "cross_entropy": [Networks(3, 37, 3), Networks(2, 5003, 2)],
    "group_stats": [Networks(3, 37, 3), Networks(2, 5003, 2)],
    "feature_ensemble": [Maps(2, 5, 3, 3, 2), Maps(2, 64, 9, 9, 1)],
    "rkd_distance": [Embeddings(7, 5), Embeddings(33, 17)],
    "rkd_angle": [Embeddings(7, 5), Embeddings(33, 17)],
    "linear_kd": [Heads(3, 8, 37)],
    "linear_multi_teacher": [Projections(3, 8, 37, 2)],
}


def small() -> list[Case]:
    dtypes = (torch.float32, torch.bfloat16)
    return [
        Case(OPERATIONS[name], shape, dtype, OPERATIONS[name].passes[-1])
        for name, shapes in SMALL.items()
        for shape in shapes
        for dtype in dtypes
        if dtype in OPERATIONS[name].dtypes
    ]


def large() -> list[Case]:
    """The largest case of each operation that is a kernel of its own."""
    found = []
    for name, operation in OPERATIONS.items():
        if name not in ("linear_kd", "linear_multi_teacher"):
            shape, dtype = operation.gpu[0] if operation.gpu else (operation.shapes[-1], torch.float32)
            found.append(Case(operation, shape, dtype, operation.passes[-1]))
    return found


def make(cases: list[Case], device: str, profiled: bool = False) -> None:
    """One call of each, forward and backward; `profiled`: after one that a profiler does not see."""
    for case in cases:
        inputs = case.operation.make_inputs(case.shape, case.dtype, device, 0)
        step = measure.Step(case.operation.fused, inputs, case.passes)
        on_gpu = torch.device(device).type == "cuda"
        if profiled:
            step()
        if profiled and on_gpu:
            torch.cuda.synchronize()
            torch.cuda.profiler.start()
        step()
        if on_gpu:
            torch.cuda.synchronize()
        if profiled and on_gpu:
            torch.cuda.profiler.stop()
        print(f"{case}: floor {case.bytes_floor} bytes", flush=True)


def machine(device: str) -> int:
    """Which device, its copy rate, and whether the kernels take it."""
    print(f"torch {torch.__version__}, CUDA {torch.version.cuda}, commit {report.commit()}")
    on_gpu = torch.device(device).type == "cuda"
    if on_gpu and not torch.cuda.is_available():
        print("no GPU")
        return 1
    moved = 2**33 if on_gpu else 2**24
    copy = measure.Copy(moved, device)
    copy()
    seconds = sorted(measure.timed(copy, device)[0] for _ in range(9))[4]
    facts, memory = report.device_facts(device), ""
    if on_gpu:
        memory = f", {torch.cuda.get_device_properties(0).total_memory / 1e9:.0f} GB"
    print(f"{facts['name']}, {facts['level']}{memory}, copy {moved / seconds / 1e12:.3g} TB/s")
    return without_kernels(device)


def without_kernels(device: str) -> int:
    reason = _backend.why_not_native(torch.empty(0, device=device))
    print(f"no native kernels: {reason}" if reason is not None else f"kernels of {fastkd.__version__} take {device}")
    return int(reason is not None)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu_calls", description=__doc__)
    parser.add_argument("--machine", action="store_true", help="only say which GPU, and its copy bandwidth")
    parser.add_argument(
        "--profiled", action="store_true", help="large shapes, the second call of each between profiler marks"
    )
    parser.add_argument("--device", default="cuda")
    options = parser.parse_args(argv)
    if options.machine:
        return machine(options.device)
    if without_kernels(options.device):
        return 1
    few = small if options.device == "cpu" or not options.profiled else large
    make(few(), options.device, options.profiled)
    return 0


if __name__ == "__main__":
    sys.exit(main())
