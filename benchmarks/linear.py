"""Time and memory of linear_multi_teacher_kd beside eager, compiled and chunked code: `python -m benchmarks.linear`.

Each candidate runs in a process of its own: `seconds` is processor time of forward and backward, the least of a few
steps; `peak` is the highest resident size of a step above the inputs, with freed pages given back at once
(MALLOC_TRIM_THRESHOLD_=0); `counted` is the same by PyTorch's allocator. The gradients are in both.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from benchmarks import inputs, measure, registry
from benchmarks.baselines import linear_eager
from benchmarks.inputs import TRAINING, Projections
from fastkd.functional import linear_multi_teacher_kd

CANDIDATES = ("fused", "fused 256", "eager", "compile", "checkpoint", "liger", "trl", "products")


def products(hidden, weight, teachers, rows=256):
    """The matrix products that any form needs, and nothing else, in chunks of rows."""
    gradient, total = torch.zeros_like(weight), 0.0
    with torch.no_grad():
        for start in range(0, hidden.shape[0], rows):
            part = slice(start, start + rows)
            z = hidden[part] @ weight.t()
            for teacher, head in teachers:
                torch.mm(teacher[part], head.t(), out=z)
            gradient.addmm_(z.t(), hidden[part])
            total += float((z @ weight)[0, 0])
    return hidden.new_tensor(total, requires_grad=True)


def liger(hidden, weight, teachers):
    """Liger's chunked loss, beta 0, a call for each teacher: https://github.com/linkedin/Liger-Kernel"""
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    loss = LigerFusedLinearJSDLoss(0.0, 1.0, beta=0.0, compiled=False, chunk_size=256)
    labels = torch.zeros(hidden.shape[0], dtype=torch.int64)
    return sum(loss(hidden, weight, *teacher, labels) for teacher in teachers) / len(teachers)


def trl(hidden, weight, teachers):
    """TRL's chunked loss since 1.16, tiles of rows and classes made again in the backward; a call for each teacher."""
    from trl.trainer.distillation_trainer import _chunked_divergence_loss

    mask = torch.ones(1, hidden.shape[0], dtype=torch.int64)
    losses = [
        _chunked_divergence_loss(hidden[None], teacher[None], weight, head, mask, beta=0.0)[0]
        for teacher, head in teachers
    ]
    return sum(losses) / len(losses)


def function(name: str, rows: int | None):
    """`rows`: of a chunk; None for the default one."""
    return {
        "fused": lambda *a: linear_multi_teacher_kd(*a, chunk_rows=rows),
        "fused 256": lambda *a: linear_multi_teacher_kd(*a, chunk_rows=256),
        "eager": linear_eager.linear_multi_teacher,
        "compile": registry.compiled(linear_eager.linear_multi_teacher),
        "checkpoint": linear_eager.checkpointed,
        "liger": liger,
        "trl": trl,
        "products": products,
    }[name]


def function_of_rows(name: str, rows: int, counted: int):
    """The same where only the first `counted` of all rows count."""
    mask = torch.arange(rows) < counted
    return {
        "fused": lambda *a: linear_multi_teacher_kd(*a, mask=mask),
        "fused 256": lambda *a: linear_multi_teacher_kd(*a, mask=mask, chunk_rows=256),
        "eager": lambda *a: linear_eager.masked(*a, mask),
    }[name]


def peak_resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("no VmHWM in /proc/self/status")


def measured(name: str, shape: Projections, steps: int, counted: int | None) -> dict:
    call = function(name, None) if counted is None else function_of_rows(name, shape.rows, counted)
    step = measure.Step(call, inputs.linear_multi_teacher(shape, torch.float32, "cpu", 0), TRAINING)
    if name == "compile":
        step()
    step.clear()
    Path("/proc/self/clear_refs").write_text("5")  # the peak from here on
    before, seconds = peak_resident(), []
    for _ in range(steps):
        step.clear()
        begin = time.process_time()
        loss = step()
        seconds.append(time.process_time() - begin)
    found = {"seconds": min(seconds), "peak": peak_resident() - before, "loss": float(loss.detach())}
    return found | {"counted": measure.extra_bytes(step, "cpu")}


def in_a_process(name: str, shape: Projections, steps: int, counted: int | None) -> dict:
    command = [sys.executable, "-m", "benchmarks.linear", *map(str, shape), "--steps", str(steps), "--candidate", name]
    command += [] if counted is None else ["--counted", str(counted)]
    environment = os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"}
    run = subprocess.run(command, capture_output=True, text=True, env=environment)
    if run.returncode:
        return {"failed": run.stderr.strip().splitlines()[-1][:100]}
    return json.loads(run.stdout.splitlines()[-1])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs=4, type=int, metavar=("N", "H", "V", "K"))
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--only", nargs="+", default=CANDIDATES, choices=CANDIDATES)
    parser.add_argument("--counted", type=int, metavar="ROWS", help="only the first ROWS count (fused and eager)")
    parser.add_argument("--candidate", choices=CANDIDATES, help=argparse.SUPPRESS)
    given = parser.parse_args(arguments)
    shape = Projections(*given.shape)
    if given.candidate:
        print(json.dumps(measured(given.candidate, shape, given.steps, given.counted)))
        return
    print(f"{shape}, {torch.get_num_threads()} thread(s)")
    for name in given.only:
        found = in_a_process(name, shape, given.steps, given.counted)
        if "failed" in found:
            print(f"{name:12} {found['failed']}", flush=True)
            continue
        peak, counted = found["peak"] / 1e6, found["counted"] / 1e6
        print(f"{name:12} {found['seconds']:7.2f} s {peak:8.0f} MB {counted:8.0f} MB  {found['loss']:.6f}", flush=True)


if __name__ == "__main__":
    main()
