"""The way that a thread takes through a kernel or its hot loop: the longest that a usual call may take.

The longest: no branch that might be taken is left out by a guess. What is left out is named by source lines
(kernels.py): other dtypes, rows without vectors, soft labels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from benchmarks.sass.listing import Block, Instruction, Kernel


@dataclass
class Loop:
    head: int
    blocks: set[int]
    parent: Loop | None = None

    def instructions(self, kernel: Kernel) -> list[Instruction]:
        return [i for b in sorted(self.blocks) for i in kernel.blocks[b].instructions]


def reachable(blocks: list[Block]) -> list[int]:
    """In reverse postorder from the entry."""
    order, seen, stack = [], {0}, [(0, iter(blocks[0].next))]
    while stack:
        at, rest = stack[-1]
        following = next(rest, None)
        if following is None:
            order.append(at)
            stack.pop()
        elif following not in seen:
            seen.add(following)
            stack.append((following, iter(blocks[following].next)))
    return order[::-1]


def dominators(blocks: list[Block], order: list[int]) -> dict[int, int]:
    """Each block's immediate dominator (Cooper, Harvey, Kennedy)."""
    rank = {b: i for i, b in enumerate(order)}
    before: dict[int, list[int]] = {b: [] for b in order}
    for b in order:
        for following in blocks[b].next:
            before[following].append(b)
    immediate = {order[0]: order[0]}
    changed = True
    while changed:
        changed = False
        for b in order[1:]:
            new = None
            for p in before[b]:
                if p in immediate:
                    new = p if new is None else _meet(p, new, immediate, rank)
            if immediate.get(b) != new:
                immediate[b], changed = new, True
    return immediate


def _meet(a: int, b: int, immediate: dict[int, int], rank: dict[int, int]) -> int:
    while a != b:
        while rank[a] > rank[b]:
            a = immediate[a]
        while rank[b] > rank[a]:
            b = immediate[b]
    return a


def loops(kernel: Kernel) -> list[Loop]:
    """Natural loops, outer ones first; back edges to one head are one loop."""
    blocks, order = kernel.blocks, reachable(kernel.blocks)
    immediate, before = dominators(blocks, order), {}
    for b in order:
        for following in blocks[b].next:
            before.setdefault(following, []).append(b)
    found: dict[int, Loop] = {}
    for b in order:
        for head in blocks[b].next:
            if _dominates(head, b, immediate):
                loop = found.setdefault(head, Loop(head, {head}))
                _gather(loop, b, before)
    result = sorted(found.values(), key=lambda loop: -len(loop.blocks))
    for i, loop in enumerate(result):
        outer = [o for o in result[:i] if loop.head in o.blocks and loop is not o]
        loop.parent = outer[-1] if outer else None
    return result


def _dominates(a: int, b: int, immediate: dict[int, int]) -> bool:
    while b != a and immediate[b] != b:
        b = immediate[b]
    return a == b


def _gather(loop: Loop, tail: int, before: dict[int, list[int]]) -> None:
    stack = [tail]
    while stack:
        b = stack.pop()
        if b not in loop.blocks:
            loop.blocks.add(b)
            stack += before.get(b, [])


@dataclass
class Way:
    """Instructions one after another, and how many of them a usual call would leave out if it could."""

    instructions: list[Instruction]
    off: int

    @property
    def runs(self) -> bool:
        return 2 * self.off <= len(self.instructions)

    @property
    def worth(self) -> int:
        return len(self.instructions) - 2 * self.off


class Paths:
    """Ways through one kernel, with the most instructions less those of blocks that are `off`.

    `trips(loop)`: how often a loop inside runs. A loop that is mostly not off is run, whatever else it holds.
    """

    def __init__(self, kernel: Kernel, off: Callable[[Block], bool], trips: Callable[[Loop], int]) -> None:
        self.kernel, self.trips = kernel, trips
        self.loops = loops(kernel)
        self.order = reachable(kernel.blocks)
        self.rank = {b: i for i, b in enumerate(self.order)}
        self.off = {b for b in self.order if off(kernel.blocks[b])}

    def whole(self) -> list[Instruction]:
        """From the entry to an exit."""
        return self._longest(None).instructions

    def around(self, loop: Loop) -> list[Instruction]:
        """One turn of a loop."""
        return self._longest(loop).instructions

    def runs(self, loop: Loop) -> bool:
        """Whether a usual call comes to the loop at all."""
        return self._longest(loop).runs

    def _inside(self, block: int, region: Loop | None) -> Loop | None:
        """The outermost loop within the region that has the block."""
        within = (loop for loop in self.loops if loop.parent is region and block in loop.blocks)
        return next(within, None)

    def _longest(self, region: Loop | None) -> Way:
        """By dynamic programming from the end; a loop inside stands for its blocks, by its head."""
        members = [b for b in self.order if region is None or b in region.blocks]
        inner = {b: self._inside(b, region) for b in members}
        key = {b: inner[b].head if inner[b] else b for b in members}
        ways = {b: self._turns(inner[b]) if inner[b] else self._block(b) for b in members if key[b] == b}
        following, ends = self._edges(members, key, region)
        best: dict[int, tuple[int, int | None]] = {}  # worth, next
        for k in sorted(ways, key=self.rank.__getitem__, reverse=True):
            rest = max(((best[n][0], n) for n in following[k] if n in best), default=None)
            if rest is None and k in ends:
                rest = (0, None)
            if rest is not None:
                best[k] = (rest[0] + ways[k].worth, rest[1])
        at: int | None = key[self.order[0] if region is None else region.head]
        whole = Way([], 0)
        while at is not None:
            whole = Way(whole.instructions + ways[at].instructions, whole.off + ways[at].off)
            at = best[at][1]
        return whole

    def _edges(
        self, members: list[int], key: dict[int, int], region: Loop | None
    ) -> tuple[dict[int, set[int]], set[int]]:
        """What follows each node without going back, and with which nodes a turn or the kernel ends."""
        following: dict[int, set[int]] = {k: set() for k in key.values()}
        ends: set[int] = set()
        for b in members:
            block = self.kernel.blocks[b]
            last = any(i.kind == "EXIT" and not i.predicate for i in block.instructions) or not block.next
            if (region is None and last) or (region is not None and region.head in block.next):
                ends.add(key[b])
            for n in block.next:
                if n in key and self.rank[key[n]] > self.rank[key[b]]:
                    following[key[b]].add(key[n])
        return following, ends

    def _block(self, b: int) -> Way:
        instructions = self.kernel.blocks[b].instructions
        return Way(instructions, len(instructions) if b in self.off else 0)

    def _turns(self, loop: Loop) -> Way:
        way, trips = self._longest(loop), self.trips(loop)
        return Way(way.instructions * trips, 0 if way.runs else len(way.instructions) * trips)
