"""Times and memory of callables that do the same thing, taken in turns: a change of the machine's load meets all."""

from __future__ import annotations

import gc
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from benchmarks.inputs import TRAINING, Inputs
from benchmarks.registry import Case, Result

FUSED, FLOOR = "fused", "floor"
COLD, WARM = "cold", "warm"
WARM_CALLS = 5
SLOW = 0.05  # seconds a call, from which on its own data leaves the caches: it is measured cold only


class Quantiles(NamedTuple):
    p20: float
    p50: float
    p80: float


def quantiles(values: list[float]) -> Quantiles:
    if len(values) == 1:
        return Quantiles(*values * 3)
    tenths = statistics.quantiles(values, n=10, method="inclusive")
    return Quantiles(tenths[1], tenths[4], tenths[7])


class Step:
    """One call of an operation, with its loss's backward pass where the case asks for it."""

    def __init__(self, function: Callable[..., Result], inputs: Inputs, passes: str) -> None:
        self.function, self.inputs, self.trains = function, inputs, passes == TRAINING
        self.between: Callable[[], None] | None = None  # called when the loss is there, before the backward pass
        for tensor in inputs.learning:  # not torch.no_grad(): entering it takes 2 us in each call
            tensor.requires_grad_(self.trains)

    def clear(self) -> None:
        for tensor in self.inputs.learning:
            tensor.grad = None

    def __call__(self) -> Result:
        if not self.trains:
            return self.function(*self.inputs.arguments)
        self.clear()
        loss = self.function(*self.inputs.arguments)
        if self.between is not None:
            self.between()
        loss.backward()
        return loss


class Copy:
    """The floor: a copy that moves `nbytes`, half of them read and half of them written."""

    def __init__(self, nbytes: int, device: str) -> None:
        self.source = torch.ones(nbytes // 8, device=device)  # float32, half of nbytes
        self.destination = torch.zeros_like(self.source)

    def clear(self) -> None:
        pass

    def __call__(self) -> Tensor:
        return self.destination.copy_(self.source)


def candidates(case: Case, device: str, seed: int = 0) -> dict[str, Step]:
    """The fused operation first, then its baselines, on the same input tensors."""
    torch.compiler.reset()
    operation = case.operation
    inputs = operation.make_inputs(case.shape, case.dtype, device, seed)
    functions = {FUSED: operation.fused} | {name: make() for name, make in case.baselines(device).items()}
    return {name: Step(function, inputs, case.passes) for name, function in functions.items()}


def results(steps: dict[str, Step], apart: dict[str, float] | None = None) -> dict[str, Result]:
    """What each returns, but for those that do not fit in the GPU's memory; the fused operation must.

    apart: filled with how far each one's gradients are from the fused operation's, |difference| / |gradient|, the worst
    of them; NaN where one was not written, since fresh memory is filled with NaN before each call.
    """
    found, fused = {}, []
    for name, step in steps.items():
        try:
            step.clear()
            if apart is not None:
                _poison(step)
            found[name] = step()
            if apart is not None and step.trains:
                own = [tensor.grad for tensor in step.inputs.learning]
                fused = [grad.clone() for grad in own] if name == FUSED else fused
                apart[name] = max(map(_apart, own, fused))
        except torch.OutOfMemoryError:
            if name == FUSED:
                raise
            step.clear()
            torch.cuda.empty_cache()
    return found


def _poison(step: Step) -> None:
    """What the allocator gives next for a gradient of this size is then full of NaN."""
    for tensor in step.inputs.learning:
        torch.full_like(tensor, float("nan"), requires_grad=False)


def _apart(grad: Tensor, fused: Tensor) -> float:
    difference = torch.linalg.vector_norm(grad - fused, dtype=torch.float64)
    return float(difference / torch.linalg.vector_norm(fused, dtype=torch.float64))


class Clock:
    """The host's clock, or on a GPU its events: `seconds` between two marks once the device has come to the later."""

    def __init__(self, device: str) -> None:
        self.device = device if torch.device(device).type == "cuda" else None

    def mark(self) -> float | torch.cuda.Event:
        if self.device is None:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def start(self) -> float | torch.cuda.Event:
        if self.device is not None:
            torch.cuda.synchronize(self.device)
        return self.mark()

    def seconds(self, begin, end) -> float:
        if self.device is None:
            return end - begin
        end.synchronize()
        return begin.elapsed_time(end) / 1e3


def timed(call: Callable, device: str, calls: int = 1) -> tuple[float, float | None]:
    """Seconds per call of `calls` calls, and of these the forward passes' where the call is a training `Step`."""
    clock = Clock(device)
    if not getattr(call, "trains", False):
        begin = clock.start()
        for _ in range(calls):
            call()
        return clock.seconds(begin, clock.mark()) / calls, None
    middles: list = []
    call.between = lambda: middles.append(clock.mark())
    try:
        marks = [clock.start()]
        for _ in range(calls):
            call()
            marks.append(clock.mark())
    finally:
        call.between = None
    total = clock.seconds(marks[0], marks[-1]) / calls
    return total, sum(map(clock.seconds, marks[:-1], middles)) / calls


def interleave(
    calls: dict[str, Callable],
    *,
    device: str = "cpu",
    caches: str = COLD,
    seconds: float = 4.0,
    least: int = 7,
    most: int = 1000,
    forward: dict[str, list[float]] | None = None,
) -> dict[str, list[float]]:
    """Seconds per call, one sample of each candidate a round, for `seconds` but between `least` and `most` rounds.

    forward: filled with the part of these seconds that was the forward pass, for the training steps among the calls.

    caches: "cold", a sample is one call, right after another candidate's: data and code left the near caches meanwhile,
    as in a training step; "warm", a sample is the mean of WARM_CALLS calls after one that is not counted.
    The order turns by one each round: what a candidate leaves behind does not always meet the same one.
    """
    for call in calls.values():
        warm = time.perf_counter()
        for _ in range(3):
            call()
            if time.perf_counter() - warm > SLOW:
                break
    times, order = {name: [] for name in calls}, list(calls)
    end, collecting = time.perf_counter() + seconds, gc.isenabled()
    gc.disable()
    try:
        for done in range(most):
            if done >= least and time.perf_counter() > end:
                break
            for name in order:
                if caches == WARM:
                    calls[name]()
                both, part = timed(calls[name], device, WARM_CALLS if caches == WARM else 1)
                times[name].append(both)
                if forward is not None and part is not None:
                    forward.setdefault(name, []).append(part)
            order.append(order.pop(0))
    finally:
        if collecting:
            gc.enable()
    return times


def paired(numerator: list[float], denominator: list[float]) -> Quantiles:
    """Quantiles of the ratios within each round."""
    return quantiles([a / b for a, b in zip(numerator, denominator, strict=True)])


def extra_bytes(step: Step, device: str) -> int:
    """Peak of the tensor memory allocated during a step that ran before, above what stood; the gradient counts.

    On the CPU: every allocation and release of PyTorch's CPU allocator, recorded by torch.profiler. A kernel's own
    scratch memory outside of that allocator is not in it. On CUDA: the caching allocator's peak.
    """
    step.clear()
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        step()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    peak = total = 0
    for change in _allocations(profile):
        total += change
        peak = max(peak, total)
    return peak


def _allocations(profile: torch.profiler.profile) -> list[int]:
    """Bytes allocated (> 0) and released (< 0), in the order of time."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("name") == "[memory]"]
    return [e["args"]["Bytes"] for e in sorted(events, key=lambda e: (float(e["ts"]), e["args"]["Ev Idx"]))]


class Others:
    """CPU time that other processes took while ours ran, in cores; None where /proc/stat is missing."""

    def __init__(self) -> None:
        self.begin = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            fields = [int(n) for n in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
        except OSError:
            return None
        ticks = os.sysconf("SC_CLK_TCK")
        idle = fields[3] + fields[4]
        return time.perf_counter(), (sum(fields) - idle) / ticks, sum(os.times()[:4])

    def cores(self) -> float | None:
        if self.begin is None:
            return None
        wall, busy, own = (now - then for now, then in zip(self._now(), self.begin, strict=True))
        return max(0.0, busy - own) / wall
