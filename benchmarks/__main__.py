"""`python -m benchmarks`: what the fused operations gain on this machine, and how far each is from its limit.

First the tests of what is measured; nothing is reported while one fails. Then, in turns, the fused operations, eager
PyTorch, torch.compile, other libraries that are installed, and the floor.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
KINDS = ("operations", "sweep", "steps", "scaling")


def parser() -> argparse.ArgumentParser:
    parse = argparse.ArgumentParser(
        prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parse.add_argument
    add("--sweep", action="store_true", help="instead: four operations over a size, a chart each")
    add("--steps", action="store_true", help="instead: a training step of each of five methods, networks included")
    add("--scaling", action="store_true", help="instead: how a step grows with networks, batch and classes")
    add("--all", action="store_true", help="all four, one after another")
    add("--large", action="store_true", help="of --steps: the groups that are measured on a GPU only, too")
    add("--brief", action="store_true", help="all sizes, few rounds, and only the tests of the device that is measured")
    add("--quick", action="store_true", help="as --brief, small sizes only, and no file is written")
    add("--untested", metavar="FILE", help="run no tests: all is reported beside what FILE says of them")
    add("--tiny", action="store_true", help="small shapes against eager alone: whether everything runs")
    add("--deadline", type=float, help="seconds, after which no further case is begun; what was measured is reported")
    add("--device", help="cpu or cuda; default: cuda where there is one")
    add("--dtypes", default="float32", help="of the operations, comma-separated: float32,bfloat16,float64")
    add("--results", help="folder for the files; default: benchmarks/results")
    add(
        "-k",
        dest="keyword",
        default="",
        help='only what its name has this in, as "mutual" or "vgg13 ORC"; writes nothing',
    )
    return parse


def main(argv: list[str] | None = None) -> int:
    options = parser().parse_args(argv)
    try:
        import matplotlib  # noqa: F401
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        print(f'{error}; install what the benchmarks need: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    kinds = [kind for kind in KINDS[1:] if getattr(options, kind)] or ["operations"]
    for kind in KINDS if options.all else kinds:
        status = operations(options) if kind == "operations" else _other(kind, options)
        if status:
            return status
    return 0


def operations(options: argparse.Namespace) -> int:
    import pytest

    arguments = [str(FOLDER), "-q", "-p", "no:cacheprovider", "--benchmark-enable", f"--dtypes={options.dtypes}"]
    arguments += ["--benchmark-warmup=on", "--benchmark-warmup-iterations=3", "--benchmark-disable-gc"]
    arguments += ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-group-by=group", "--benchmark-sort=name"]
    arguments += ["--benchmark-max-time=0.5", "--benchmark-min-rounds=5"]
    arguments += [f"--{name}" for name in ("quick", "brief", "tiny") if getattr(options, name)]
    arguments += [f"--deadline={options.deadline}"] if options.deadline else []
    arguments += [f"--untested={options.untested}"] if options.untested else []
    arguments += [f"--bench-device={options.device}"] if options.device else []
    arguments += [f"--results={options.results}"] if options.results else []
    arguments += ["-k", options.keyword] if options.keyword else []
    return int(pytest.main(arguments))


def _other(kind: str, options: argparse.Namespace) -> int:
    from benchmarks import guard, other

    try:
        return other.run(kind, options)
    except guard.Refused as refusal:
        print(refusal, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
