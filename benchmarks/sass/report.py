"""From machine code to rows, from rows to docs/sass.md and the JSON beside it, and what got worse since."""

from __future__ import annotations

import re
from collections.abc import Iterable

from benchmarks.sass import cards, flight, kernels, listing, toolkit
from benchmarks.sass.listing import Instruction, Kernel
from benchmarks.sass.paths import Loop, Paths

WORSE = 0.10  # of a number, from which on a row is worse
HOME = cards.CARDS[1]


def rows(code: Iterable[toolkit.Code]) -> dict[str, dict]:
    """Name -> what is known, of every kernel; one that several files bring counts once."""
    found: dict[str, dict] = {}
    for one in code:
        made = {k.symbol: k for k in listing.kernels(one.listing)}
        usage = resources(one.usage)
        names = dict(zip(made, map(kernels.short, toolkit.demangled(list(made))), strict=True))
        for symbol, kernel in made.items():
            if symbol in usage:
                found.setdefault(names[symbol], row(names[symbol], kernel, usage[symbol]))
    return dict(sorted(found.items()))


def resources(text: str) -> dict[str, dict[str, int]]:
    """Registers, bytes of stack and of shared memory by symbol."""
    found, symbol = {}, ""
    for line in text.splitlines():
        if match := re.match(r"\s*Function (\w+):", line):
            symbol = match[1]
        elif "REG:" in line:
            found[symbol] = {key: int(n) for key, n in re.findall(r"(REG|STACK|SHARED):(\d+)", line)}
    return found


def row(name: str, kernel: Kernel, usage: dict[str, int]) -> dict:
    spec = kernels.of(name)
    every = kernel.instructions
    result = {
        "registers": usage["REG"],
        "shared": usage["SHARED"],
        "load": max((i.bytes for i in every if i.loads), default=0),
        "store": max((i.bytes for i in every if i.stores), default=0),
    }
    if spec is None:
        return result
    result |= {"threads": spec.threads, "unit": spec.unit}
    return result | {"cases": {one.label: case(name, kernel, usage, spec, one) for one in spec.cases}}


def case(name: str, kernel: Kernel, usage: dict[str, int], spec: kernels.Spec, one: kernels.Case) -> dict:
    """Instructions a column, bytes under way, predicted times of one kernel on one shape."""
    path, columns = hot_path(kernel, kernels.off(name), spec, one)
    under_way = flight.in_flight(path, repeats=spec.loop in ("loads", "passes"))
    special = sum(i.kind == "MUFU" for i in path) / columns
    demand = cards.Demand(one.columns, len(path) / columns, special, one.read, one.written, under_way)
    resident = {card.name: _warps(card, usage, spec, one) for card in cards.CARDS}
    times = {card.name: cards.seconds(card, demand, resident[card.name]) for card in cards.CARDS}
    return {
        "instructions": round(demand.instructions, 1),
        "warps": resident[HOME.name],
        "in_flight": round(under_way * 32 * resident[HOME.name]),
        "hot_store": max((i.bytes for i in path if i.stores), default=0),
        "must_bytes": round(one.columns * one.must),
        "predicted": {
            card.name: _prediction(card, times[card.name], one.columns * one.must)
            for card in cards.CARDS
            if resident[card.name]
        },
    }


def _warps(card: cards.Card, usage: dict[str, int], spec: kernels.Spec, one: kernels.Case) -> int:
    return cards.warps(card, usage["REG"], spec.threads, usage["SHARED"] + one.shared)


def _prediction(card: cards.Card, times: dict[str, float], must: float) -> dict:
    limit = max(times, key=times.__getitem__)
    share = must / card.copy / times[limit] if must else 0.0
    return {"ms": float(f"{times[limit] * 1e3:.3g}"), "limit": limit, "of_copy": round(share, 3)}


def hot_path(kernel: Kernel, off, spec: kernels.Spec, one: kernels.Case) -> tuple[list[Instruction], float]:
    """One thread's instructions, and the columns that they are for."""
    paths = Paths(kernel, off, lambda loop: one.networks if _over_networks(paths, loop, bool(spec.loop)) else 1)
    if not spec.loop:
        return paths.whole(), spec.items
    if spec.loop == "work":
        innermost = [loop for loop in paths.loops if not any(other.parent is loop for other in paths.loops)]
        return max(map(paths.around, innermost), key=len), spec.items
    if spec.loop == "passes":
        return [i for loop in _passes(paths) for i in paths.around(loop)], spec.items
    best = max((paths.around(loop) for loop in paths.loops if loop.parent is None), key=_loaded)
    tiles = max(1, round(_loaded(best) / (spec.items * one.read)))  # of an unrolled loop
    return best, spec.items * tiles


def _passes(paths: Paths) -> list[Loop]:
    """The outermost loops that load and that a usual call runs."""
    outer = [loop for loop in paths.loops if loop.parent is None and paths.runs(loop)]
    return [loop for loop in outer if _loaded(paths.around(loop))]


def _over_networks(paths: Paths, loop: Loop, tiled: bool) -> bool:
    """The outermost loop that loads or stores; of a kernel with a loop over tiles, within that."""
    if not any(i.loads or i.stores for b in loop.blocks for i in paths.kernel.blocks[b].instructions):
        return False
    outer = loop.parent
    while outer is not None and not (tiled and outer.parent is None):
        if _over_networks(paths, outer, tiled):
            return False
        outer = outer.parent
    return loop.parent is not None or not tiled


def _loaded(way: list[Instruction]) -> int:
    return sum(i.bytes for i in way if i.loads)


def worse(now: dict[str, dict], before: dict[str, dict]) -> list[str]:
    """What got worse than `before` by more than a tenth, or is no longer there; new kernels have nothing to be worse
    than."""
    said = [f"{name}: no such kernel any more" for name in before if name not in now]
    for name in before.keys() & now.keys():
        said += _worse(name, {"": now[name]}, {"": before[name]}, ("registers",), ("load", "store"))
        said += _worse(name, now[name].get("cases", {}), before[name].get("cases", {}),
                       ("instructions",), ("warps", "in_flight", "hot_store"))  # fmt: skip
    return sorted(said)


def _worse(name: str, now: dict, before: dict, down: tuple[str, ...], up: tuple[str, ...]) -> list[str]:
    said = [f"{name} {label}: no such case any more" for label in before if label not in now]
    for label in before.keys() & now.keys():
        for key in (*down, *up):
            new, old = now[label][key], before[label][key]
            if new > old * (1 + WORSE) if key in down else new < old * (1 - WORSE):
                said.append(f"{name} {label}: {key} {old} -> {new}")
    return said
