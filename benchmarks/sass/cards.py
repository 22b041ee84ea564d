"""What a card can do, and what that makes of a kernel: predictions, since no card has run it."""

from __future__ import annotations

from typing import NamedTuple

ISSUED = 0.85  # of the issue slots, what long kernels reach at best


class Card(NamedTuple):
    """copy: bytes/s read plus written by a large copy. latency: seconds of a load while the memory is busy."""

    name: str
    multiprocessors: int
    clock: float  # Hz
    copy: float
    latency: float
    warps: int  # of a multiprocessor
    blocks: int
    shared: int  # bytes of a multiprocessor


CARDS = (
    Card("H100", 132, 1.75e9, 2.9e12, 1.0e-6, 64, 32, 228 << 10),
    Card("H200", 132, 1.75e9, 4.3e12, 1.0e-6, 64, 32, 228 << 10),
    Card("4090", 128, 2.5e9, 0.92e12, 0.7e-6, 48, 24, 100 << 10),
)
REGISTERS, RESERVED = 65536, 1024  # of a multiprocessor; bytes of shared memory that CUDA takes of each block


class Demand(NamedTuple):
    """One kernel on one shape. Instructions and special functions are a thread's for one column."""

    columns: int
    instructions: float
    special: float  # exp, log, reciprocal, root
    read: float  # bytes a column
    written: float
    flight: float  # bytes a thread has under way


def warps(card: Card, registers: int, threads: int, shared: int) -> int:
    """Of a multiprocessor: by registers (256 a warp at a time), shared memory, and what the card allows."""
    own = -(-threads // 32)
    by_registers = REGISTERS // (own * (-(-registers * 32 // 256) * 256))
    by_shared = card.shared // (shared + RESERVED)
    return own * max(0, min(by_registers, by_shared, card.warps // own, card.blocks))


def seconds(card: Card, demand: Demand, resident: int) -> dict[str, float]:
    """By what each limit alone would take; the largest is the prediction."""
    lanes = card.multiprocessors * card.clock
    under_way = card.multiprocessors * resident * 32 * demand.flight
    return {
        "memory": demand.columns * (demand.read + demand.written) / card.copy,
        "issue": demand.columns * demand.instructions / (lanes * 128 * ISSUED),
        "special": demand.columns * demand.special / (lanes * 16),
        "latency": demand.columns * demand.read * card.latency / under_way if under_way else 0.0,
    }
