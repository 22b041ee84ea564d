"""The rows as Markdown."""

from __future__ import annotations

import re

from benchmarks.sass import cards
from benchmarks.sass.kernels import NAMES

HEADER = ["kernel", "registers", "warps a SM", "load", "store", "in flight a SM", "instructions", "shape", "must move"]
ASIDE = ("double", "Half")  # as float and BFloat16, but for the accesses; the JSON has them

INTRODUCTION = """# What the compiler makes of the CUDA kernels

From machine code alone (`python -m benchmarks.sass --write`; {compiler}, {architecture}). **No number was measured,
the times are predictions.** `sass.json` beside this file has every kernel; here are those of float32 and bfloat16.

- registers of a thread; warps that a multiprocessor of an H200 holds at once; the widest load and store of a thread in
  bytes, the store of the hot path where there is one.
- in flight: bytes of loads that these warps have under way when one is waited for. About 32 KB keep the memory busy.
- instructions: of a thread for one column (a class, an element of a map, a triplet), all networks together, on the
  longest path that a usual call may take through the hot loop, or through the kernel where a row is one tile: class
  labels, rows in vectors, one temperature. An upper bound: a branch that may be taken is.
- must move: bytes of the inputs and results of this kernel, each once.
- predicted: the largest of four times, and the share of the copy rate that the bytes which must move then have:
  *memory*, all bytes that the kernel moves at the copy rate; *issue*, instructions at {issued:.0%} of the issue slots;
  *special*, exponentials and divisions at 16 a cycle and multiprocessor; *latency*, the reads at what is in flight.
  Launches, tails and waits at barriers are not in it.

| card, as assumed | multiprocessors | clock | copy | latency of a load |
| --- | --- | --- | --- | --- |
{cards}

The 4090's column is predicted from the same machine code.

"""


def shown(name: str) -> str:
    for long, short in NAMES.items():
        name = name.replace(f"<{long},", f"<{short},").replace(f", {long},", f", {short},")
    return re.sub(r"\((?:\w+::)*AtOne\)|(?:\w+::)(?=AnyType|Policy)", "", name)


def lines(result: dict, everything: bool) -> list[list[str]]:
    body = [[*HEADER, *[f"{card.name}, predicted" for card in cards.CARDS]]]
    for name, row in result["kernels"].items():
        if not everything and any(f"<{kind}" in name or f", {kind}" in name for kind in ASIDE):
            continue
        for label, case in row.get("cases", {"": {}}).items():
            body.append(_line(name, row, label, case))
    return body


def _line(name: str, row: dict, label: str, case: dict) -> list[str]:
    start = [shown(name), str(row["registers"])]
    accesses = [str(row["load"]), str(case.get("hot_store", row["store"]) or "-")]
    if not case:
        return [*start, "", *accesses, *[""] * (len(HEADER) - 5 + len(cards.CARDS))]
    must = f"{case['must_bytes'] / 1e6:.0f} MB" if case["must_bytes"] else "-"
    counted = [str(case["warps"]), *accesses, f"{case['in_flight'] / 1024:.0f} KB", f"{case['instructions']:.0f}"]
    return [*start, *counted, label, must, *[_predicted(case["predicted"].get(card.name)) for card in cards.CARDS]]


def _predicted(one: dict | None) -> str:
    if one is None:
        return "does not fit"
    share = f"{one['of_copy']:.0%}, " if one["of_copy"] else ""
    return f"{one['ms']:.3g} ms ({share}{one['limit']})"


def text(result: dict, everything: bool = False) -> str:
    body = lines(result, everything)
    widths = [max(len(line[i]) for line in body) for i in range(len(body[0]))]
    body = [body[0], ["-" * width for width in widths], *body[1:]]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(line, widths, strict=True)) + " |" for line in body)


def document(result: dict) -> str:
    assumed = [
        f"| {c.name} | {c.multiprocessors} | {c.clock / 1e9:.2f} GHz | {c.copy / 1e12:.2f} TB/s | {c.latency * 1e6} us|"
        for c in cards.CARDS
    ]
    introduction = INTRODUCTION.format(
        compiler=result["compiler"], architecture=result["architecture"], issued=cards.ISSUED, cards="\n".join(assumed)
    )
    return introduction + text(result) + "\n"
