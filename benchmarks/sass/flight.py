"""How many bytes of loads a thread has under way when it first needs one of them."""

from __future__ import annotations

import re

from benchmarks.sass.listing import Instruction

_REGISTER = re.compile(r"\bR(\d+)(\.64)?")
_WITHOUT_RESULT = ("ISETP", "FSETP", "DSETP", "HSETP2", "PLOP3", "R2P", "STS", "STG", "ST", "STL", "BAR", "BRA", "EXIT")


def registers(one: Instruction) -> tuple[set[int], set[int]]:
    """(written, read)."""
    operands = [part.strip() for part in one.operands.split(",")]
    while operands and re.match(r"!?U?P[T\d]", operands[0]):
        operands.pop(0)
    written: set[int] = set()
    if operands and one.kind not in _WITHOUT_RESULT and (first := re.fullmatch(r"R(\d+)(?:\.\w+)?", operands[0])):
        wide = -(-one.bytes // 4) if one.loads or one.kind == "LDS" else 1
        written = set(range(int(first[1]), int(first[1]) + wide))
        operands.pop(0)
    read = set()
    for part in operands:
        for number, pair in _REGISTER.findall(part):
            read |= {int(number), int(number) + 1} if pair else {int(number)}
    if one.stores and (data := re.fullmatch(r"R(\d+)", operands[-1])):
        read |= set(range(int(data[1]), int(data[1]) + -(-one.bytes // 4)))
    return written, read


def in_flight(path: list[Instruction], repeats: bool) -> float:
    """Bytes under way, as a mean over the waits of one turn of a loop in its steady state (`repeats`), or of a kernel.

    Loads without a wait between them arrive together; a wait that later loads are already under way for counts as the
    part of a latency that is left of it.
    """
    pending: list[tuple[int, set[int], int]] = []  # batch, registers, bytes
    batch, waits, moved = 0, 0.0, 0
    turns = [False, False, True] if repeats else [True]
    for counted in turns:
        for one in path:
            written, read = registers(one)
            used = [entry[0] for entry in pending if entry[1] & read]
            if used:
                depth = len({entry[0] for entry in pending})
                waits += counted / depth
                pending = [entry for entry in pending if entry[0] > max(used)]
                batch += 1
            if one.loads:
                pending.append((batch, written, one.bytes))
                moved += counted * one.bytes
    return moved / waits if waits else float(moved)
