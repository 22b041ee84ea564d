"""`python -m benchmarks.sass`: registers, occupancy, accesses and instructions of every CUDA kernel, from its machine
code, and what a GPU can reach with them at most. It needs nvcc, cuobjdump and nvdisasm, and no GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.sass import report, table, toolkit

DOCUMENT = toolkit.ROOT / "docs" / "sass.md"


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(prog="python -m benchmarks.sass", description=__doc__)
    add = parse.add_argument
    add("sources", nargs="*", type=Path, help="the .cu files to compile; default: all under csrc")
    add("--arch", default="sm_90", help="what is compiled for (default: sm_90)")
    add("--built", action="store_true", help="instead of compiling: the objects of the last build, in build/native")
    add("--library", type=Path, help="instead of compiling: a built libfastkd_cuda.so that has code for --arch")
    add("-k", dest="keyword", default="", help="only kernels that have this in their name")
    add(
        "--against", type=Path, help="a JSON of before: says what got worse by more than a tenth, and fails if anything"
    )
    add(
        "--write",
        type=Path,
        nargs="?",
        const=DOCUMENT,
        help=f"the table as Markdown, JSON beside it (default: {DOCUMENT.name} in docs)",
    )
    add("--all", action="store_true", help="float64 and float16, too, which are left out of the table that is printed")
    return parse


def collect(options: argparse.Namespace) -> list[toolkit.Code]:
    with tempfile.TemporaryDirectory() as folder:
        if options.built:
            return toolkit.from_objects(options.arch, Path(folder))
        if options.library:
            return toolkit.from_library(options.library.resolve(), options.arch, Path(folder))
        sources = [source.resolve() for source in options.sources] or toolkit.sources()
        with ThreadPoolExecutor(2) as pool:
            return list(pool.map(lambda source: toolkit.from_source(source, options.arch, Path(folder)), sources))


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        rows = report.rows(collect(options))
        compiler = toolkit.compiler()
    except (toolkit.Missing, RuntimeError) as error:
        print(error, file=sys.stderr)
        return 2
    rows = {name: row for name, row in rows.items() if options.keyword in name}
    result = {"compiler": compiler, "architecture": options.arch, "kernels": rows}
    print(table.text(result, everything=options.all))
    if options.write:
        options.write.write_text(table.document(result))
        options.write.with_suffix(".json").write_text(json.dumps(result, indent=1) + "\n")
    if not options.against:
        return 0
    said = report.worse(rows, json.loads(options.against.read_text())["kernels"])
    print("\n".join(["worse by more than a tenth:", *said]) if said else f"nothing is worse than in {options.against}")
    return 1 if said else 0


if __name__ == "__main__":
    sys.exit(main())
