"""Ratios that docs/performance.md promises of losses of language models: `python -m benchmarks.language_models`.

Processor time of forward and backward, the least of a few calls taken in turns, so another load on the machine meets
both of a pair; memory by PyTorch's counter, the gradients in it.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

import fastkd
from benchmarks import measure, registry
from benchmarks.baselines import multi_teacher_eager
from benchmarks.inputs import TRAINING, Inputs
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd

CALLS = 5


def eager_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    """The divergence as people write it; TRL's for the first three, DistiLLM's for the others."""

    def loss(z: Tensor, t: Tensor) -> Tensor:
        if name in ("reverse", "jsd"):
            target = torch.zeros(z.shape[0], dtype=torch.int64)
            return getattr(multi_teacher_eager, name)(z, [t], target, [1.0], 1.0, 0.0)
        log_q, log_p = F.log_softmax(z, -1), F.log_softmax(t, -1)
        p, q = log_p.exp(), log_q.exp()
        if name == "forward":
            return F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        if name == "tvd":
            return 0.5 * (q - p).abs().sum(-1).mean()
        if name == "skew_forward":
            return (p * (log_p - (0.1 * p + 0.9 * q).log())).sum(-1).mean()
        return (q * (log_q - (0.9 * p + 0.1 * q).log())).sum(-1).mean()

    return loss


def in_turns(steps: dict[str, measure.Step]) -> dict[str, float]:
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for step in steps.values():
        step()
    for _ in range(CALLS):
        for name, step in steps.items():
            begin = time.process_time()
            step()
            seconds[name].append(time.process_time() - begin)
    return {name: min(found) for name, found in seconds.items()}


def fused_of(name: str) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda z, t: multi_teacher_kd(z, [t], temperature=1.0, divergence=name)


def divergences(rows: int = 256, classes: int = 32000, compiled: Sequence[str] = ("jsd",)) -> None:
    """`compiled`: those that torch.compile is asked for too, half a minute each."""
    z, t = torch.randn(rows, classes), torch.randn(rows, classes)
    print(f"[{rows}, {classes}], gradient {z.nbytes / 1e6:.1f} MB | fused ms | eager / fused | compile / fused | MB")
    for name in ("forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"):
        functions = {"fused": fused_of(name), "eager": eager_of(name)}
        if name in compiled:
            functions["compile"] = registry.compiled(eager_of(name))
        steps = {n: measure.Step(f, Inputs((z, t), (z,)), TRAINING) for n, f in functions.items()}
        found = in_turns(steps)
        ratios = [f"{found[n] / found['fused']:.1f}" if n in found else "" for n in ("eager", "compile")]
        memory = [f"{measure.extra_bytes(steps[n], 'cpu') / 1e6:.0f}" for n in ("fused", "eager")]
        print(f"{name} | {1e3 * found['fused']:.0f} | {' | '.join(ratios)} | {' / '.join(memory)}", flush=True)


def linear(rows: int = 1024, width: int = 512, classes: int = 32000) -> None:
    """Half of the rows ignored, and all rows routed to four heads, against one teacher of all rows."""
    hidden, weight = torch.randn(rows, width), torch.randn(classes, width) / width**0.5
    heads = [torch.randn(classes, width) / width**0.5 for _ in range(4)]
    half = torch.arange(rows) % 2 == 0
    part = [torch.arange(k, rows, 4) for k in range(4)]
    routed = [fastkd.Head(hidden[r].clone(), head, rows=r) for r, head in zip(part, heads, strict=True)]
    functions = {
        "one teacher": lambda h, w: linear_multi_teacher_kd(h, w, [(h.detach(), heads[0])]),
        "half ignored": lambda h, w: linear_multi_teacher_kd(h, w, [(h.detach(), heads[0])], mask=half),
        "four routed": lambda h, w: linear_multi_teacher_kd(h, w, routed),
    }
    found = in_turns(
        {n: measure.Step(f, Inputs((hidden, weight), (hidden, weight)), TRAINING) for n, f in functions.items()}
    )
    print(f"[{rows}, {width}] -> {classes}: {found['one teacher']:.2f} s with one teacher; times of it:", end=" ")
    print(", ".join(f"{n} {found[n] / found['one teacher']:.2f}" for n in list(functions)[1:]), flush=True)


def sparse_eager(mode: str, ids: Tensor, values: Tensor, tail: Tensor) -> Callable[[Tensor], Tensor]:
    """The divergence of a sparse teacher as trainers write it: a log-softmax in float32, a gather, 1 - sum as tail."""

    def loss(z: Tensor) -> Tensor:
        log_q, log_p = z.float().log_softmax(-1).gather(-1, ids), values
        if mode in ("teacher", "both"):
            log_p = log_p.log_softmax(-1)
        if mode == "both":
            log_q = log_q.log_softmax(-1)
        if mode == "sampled":
            return -(log_p.exp() * log_q).sum(-1).mean()
        rows = (log_p.exp() * (log_p - log_q)).sum(-1)
        if mode == "tail":
            outside = torch.log1p(-log_q.exp().sum(-1).clamp(max=1 - 1e-7))
            rows = rows + tail.exp() * (tail - outside)
        return rows.mean()

    return loss


def sparse(shapes: Sequence[tuple[int, int, int]] = ((1024, 32000, 64), (256, 128256, 100))) -> None:
    """Sparse teachers on whole logits, [rows, classes] and k entries, against plain PyTorch, mode by mode."""
    for rows, classes, k in shapes:
        log_p = (3 * torch.randn(rows, classes)).log_softmax(-1)
        values, ids = log_p.topk(k)
        tail = log_p.scatter_(1, ids, -torch.inf).logsumexp(-1)
        for dtype in (torch.float32, torch.bfloat16):
            z = (3 * torch.randn(rows, classes)).to(dtype)
            print(f"[{rows}, {classes}], k = {k}, {dtype}: mode, fused ms, eager / fused:", flush=True)
            for mode in ("tail", "truncate", "teacher", "both", "sampled"):
                top = fastkd.TopK(ids, values, mode=mode, tail_log_prob=tail if mode == "tail" else None)  # type: ignore[arg-type]
                functions = {
                    "fused": lambda z, top=top: multi_teacher_kd(z, top, temperature=1.0),
                    "eager": sparse_eager(mode, ids, values, tail),
                }
                steps = {n: measure.Step(f, Inputs((z,), (z,)), TRAINING) for n, f in functions.items()}
                found = in_turns(steps)
                memory = [f"{measure.extra_bytes(steps[n], 'cpu') / 1e6:.0f}" for n in functions]
                text = f"{mode} | {1e3 * found['fused']:.0f} | {found['eager'] / found['fused']:.1f}"
                print(f"{text} | {' / '.join(memory)} MB", flush=True)


PARTS = {"divergences": divergences, "linear": linear, "sparse": sparse}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)}; default: all")
    torch.manual_seed(0)
    for name in parser.parse_args(arguments).parts or PARTS:
        PARTS[name]()


if __name__ == "__main__":
    main()
