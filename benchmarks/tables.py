"""The tables of README.md and docs/performance.md from the results that were measured: `python -m benchmarks.tables`.

A table stands between `<!-- measured: KIND FILE OPERATION ... -->` and `<!-- /measured -->`; FILE is one of
benchmarks/results, an OPERATION one of the registry or, for one shape of it, such as mutual@256x1000x4.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = "README.md", "docs/performance.md"
BLOCK = re.compile(r"(<!-- measured: ([^\n]*) -->\n)(.*?)(<!-- /measured -->)", re.DOTALL)
PUBLIC = {
    "multi_teacher": "multi_teacher_kd",
    "mutual": "mutual_kd",
    "multi_label": "multi_label_kd",
    "multi_teacher_reverse": "multi_teacher_kd, reverse",
    "multi_teacher_jsd": "multi_teacher_kd, jsd",
}
BOTH = "forward + backward"


def shape(comparison: dict[str, Any]) -> str:
    """{"rows": 128, "classes": 100, "teachers": 4} > "[128, 100] K=4"."""
    sizes = dict(comparison["shape"])
    count = [f"K={sizes.pop(name)}" for name in ("teachers", "pairs") if name in sizes]
    count += [f"M={sizes.pop('networks')}"] if "networks" in sizes else []
    return " ".join(["[" + ", ".join(map(str, sizes.values())) + "]", *count])


def number(value: float) -> str:
    """Three digits at most: 5.63 > "5.6", 14.47 > "14.5", 107.3 > "107"."""
    return f"{value:.1f}" if value < 99.95 else f"{value:.0f}"


def ratio(comparison: dict[str, Any], other: str) -> str:
    """Median with the 20 % and 80 % quantiles of the pairs: "14.4 (12.1-16.0)"."""
    if other not in comparison["ratios"]:
        return "-"
    found = comparison["ratios"][other]
    return f"{number(found['p50'])} ({number(found['p20'])}-{number(found['p80'])})"


def megabytes(comparison: dict[str, Any]) -> str:
    """Of fused, eager, compile: "0.05 / 0.61 / 0.27"."""
    extra = comparison["extra_bytes"]
    return " / ".join(f"{extra[name] / 1e6:.3g}" if name in extra else "-" for name in ("fused", "eager", "compile"))


def times(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each operation and shape, pass and state of the caches."""
    yield ["operation", "pass", "caches", "fused, us", "eager / fused", "compile / fused", "fused / floor"]
    for one in found:
        which = f"`{PUBLIC.get(one['operation'], one['operation'])}` {shape(one)}"
        floor = number(one["ratios"]["floor"]["p50"])
        fused = f"{one['microseconds']['fused']['p50']:.0f}"
        yield [which, one["passes"], one["caches"], fused, ratio(one, "eager"), ratio(one, "compile"), floor]


def memory(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each operation and shape, forward and backward."""
    yield ["operation", "extra MB: fused / eager / compile"]
    seen = set()
    for one in found:
        which = f"`{PUBLIC.get(one['operation'], one['operation'])}` {shape(one)}"
        if which not in seen and _last_passes(one, found):
            seen.add(which)
            yield [which, megabytes(one)]


def _last_passes(one: dict[str, Any], found: list[dict[str, Any]]) -> bool:
    """With the backward where there is one."""
    return one["passes"] == BOTH or not any(o["passes"] == BOTH for o in found if o["operation"] == one["operation"])


def short(found: list[dict[str, Any]]) -> Iterator[list[str]]:
    """A row for each operation and shape: calls in a row, cold ones where no others were measured."""
    yield ["operation", "shape", "faster than eager", "than `torch.compile`"]
    rows = {}
    for one in found:
        if _last_passes(one, found) and "eager" in one["ratios"]:
            rows[one["operation"], shape(one)] = one  # warm comes after cold
    for (name, which), one in rows.items():
        passes = " (forward)" if one["passes"] != BOTH else ""
        which += ", cold" if one["caches"] == "cold" else ""
        yield [f"`{PUBLIC.get(name, name)}`{passes}", which, ratio(one, "eager"), ratio(one, "compile")]


KINDS: dict[str, Callable[[list[dict[str, Any]]], Iterator[list[str]]]] = {
    "times": times,
    "memory": memory,
    "short": short,
}


def table(words: str) -> str:
    """The block's rows: "times amd-epyc-2-cores-avx512 multi_teacher" > a table."""
    kind, file, *operations = words.split()
    results = json.loads((RESULTS / f"{file}.json").read_text())
    asked = [word.split("@") for word in operations]
    found = [
        one
        for name, *sizes in asked
        for one in results["comparisons"]
        if one["operation"] == name and (not sizes or "x".join(map(str, one["shape"].values())) == sizes[0])
    ]
    header, *rows = KINDS[kind](found)
    head = (
        f"Commit {results['commit']}, {results['date'][:10]}, torch {results['versions']['torch'].split('+')[0]}:\n\n"
    )
    lines = [header, ["---"] * len(header), *rows]
    return head + "".join(f"| {' | '.join(line)} |\n" for line in lines)


def rewritten(text: str) -> str:
    """The document with its tables as the results have them."""
    return BLOCK.sub(lambda found: f"{found[1]}{table(found[2])}{found[4]}", text)


def main() -> int:
    """Rewrite the documents; the status is 0."""
    for name in DOCUMENTS:
        path = ROOT / name
        path.write_text(rewritten(path.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
