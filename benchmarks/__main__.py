"""`python -m benchmarks`: the operations' tests, then their times beside eager PyTorch, torch.compile and the floor."""

import argparse
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="small shapes, few rounds, and no file is written")
    parser.add_argument("--device", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--dtypes", default="float32", help="comma-separated: float32,bfloat16,float64")
    parser.add_argument("--results", help="folder for <machine>.json; default: benchmarks/results")
    parser.add_argument("-k", dest="keyword", help="only the cases whose names match, as in pytest")
    options = parser.parse_args()
    try:
        import pytest
        import pytest_benchmark  # noqa: F401
    except ImportError as error:
        print(f'{error}; install what the benchmarks need: pip install -e ".[bench]"', file=sys.stderr)
        return 2
    arguments = [str(FOLDER), "-q", "-p", "no:cacheprovider", "--benchmark-enable", f"--dtypes={options.dtypes}"]
    arguments += ["--benchmark-warmup=on", "--benchmark-warmup-iterations=3", "--benchmark-disable-gc"]
    arguments += ["--benchmark-columns=min,median,iqr,rounds", "--benchmark-group-by=group", "--benchmark-sort=name"]
    arguments += [f"--benchmark-max-time={0.1 if options.quick else 0.5}", "--benchmark-min-rounds=5"]
    arguments += ["--quick"] * options.quick
    arguments += [f"--bench-device={options.device}"] if options.device else []
    arguments += [f"--results={options.results}"] if options.results else []
    arguments += ["-k", options.keyword] if options.keyword else []
    return int(pytest.main(arguments))


if __name__ == "__main__":
    sys.exit(main())
