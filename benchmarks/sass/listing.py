"""nvdisasm's text as kernels of instructions, each with the source lines that it was made from."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

_LINE = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(?:@(!?U?P\w+)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;")
_LABEL = re.compile(r"^(\.L\w*|\$[\w$]+):$")
_FUNCTION = re.compile(r"^(_Z\w+):$")
_SOURCE = re.compile(r'^\s*//## File "([^"]+)", line (\d+)')
_TARGETS = re.compile(r"BRANCH_TARGETS ([^\"]+)\"")
_TARGET = re.compile(r"`\((\.L\w+)\)")

Place = tuple[str, int]  # file, line


@dataclass(frozen=True)
class Instruction:
    predicate: str  # "P0", "!P1" or ""
    name: str  # "LDG.E.128"
    operands: str
    places: tuple[Place, ...]  # innermost first, then where that was inlined

    @property
    def kind(self) -> str:
        return self.name.split(".")[0]

    @property
    def bytes(self) -> int:
        """What a load or store moves for one thread."""
        width = re.search(r"\.(U8|S8|U16|S16|64|128)\b", self.name)
        return {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}[width[1]] if width else 4

    @property
    def loads(self) -> bool:
        return self.kind in ("LDG", "LD")

    @property
    def stores(self) -> bool:
        return self.kind in ("STG", "ST")


@dataclass
class Block:
    """Instructions without a branch between them, and the blocks that may follow."""

    instructions: list[Instruction] = field(default_factory=list)
    next: list[int] = field(default_factory=list)


@dataclass
class Kernel:
    symbol: str
    blocks: list[Block]

    @property
    def instructions(self) -> list[Instruction]:
        return [i for block in self.blocks for i in block.instructions]


def kernels(text: str) -> list[Kernel]:
    found, symbol, lines = [], "", []
    for line in text.splitlines():
        function = _FUNCTION.match(line)
        if function or line.startswith("//-----"):
            if symbol:
                found.append(Kernel(symbol, blocks(lines)))
            symbol, lines = function[1] if function else "", []
        elif symbol:
            lines.append(line)
    return found + ([Kernel(symbol, blocks(lines))] if symbol else [])


def blocks(lines: list[str]) -> list[Block]:
    """Of one function; subroutines after its end (divisions) are blocks that nothing leads to."""
    made, labels, places, fresh = [Block()], {}, (), False
    targets: list[list[str]] = [[]]
    falls: list[bool] = [True]

    def begin() -> None:
        if made[-1].instructions:
            made.append(Block())
            targets.append([])
            falls.append(True)

    for line in lines:
        if label := _LABEL.match(line):
            begin()
            labels[label[1]] = len(made) - 1
        elif source := _SOURCE.match(line):
            places = (*(() if fresh else places), (source[1], int(source[2])))
            fresh = False
        elif parsed := _LINE.match(line):
            fresh = True
            one = Instruction(parsed[2] or "", parsed[3], parsed[4], places)
            made[-1].instructions.append(one)
            leaves = _leaves(one, line)
            if leaves is not None:
                targets[-1], falls[-1] = leaves
                begin()
    for i, block in enumerate(made):
        block.next = [labels[name] for name in targets[i] if name in labels]
        if falls[i] and i + 1 < len(made) and i + 1 not in block.next:
            block.next.append(i + 1)
    return made


def _leaves(one: Instruction, line: str) -> tuple[list[str], bool] | None:
    """Where a branch leads, and whether the next instruction may follow; None where it is no branch.

    BRA.DIV leads to the slow form of a shuffle for threads that have parted: not taken here.
    """
    if one.kind in ("BRA", "BRX", "JMP"):
        if ".DIV" in one.name:
            return [], True
        several = _TARGETS.search(line)
        names = [name.strip() for name in several[1].split(",")] if several else _TARGET.findall(one.operands)
        conditional = bool(one.predicate) or bool(re.match(r"!?U?P\d", one.operands))
        return names, conditional
    if one.kind in ("EXIT", "RET"):
        return [], bool(one.predicate)
    return None
