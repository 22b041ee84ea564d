"""`fastkd bench`: the benchmarks of the source tree that this package is part of, or where to get it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
GET = (
    "fastkd bench needs the source tree, which holds the tests and the benchmarks: unpack the source distribution or "
    'clone the repository, and there run: pip install -e ".[bench]" && fastkd bench'
)


def run(arguments: list[str], root: Path | None = None) -> int:
    """`python -m benchmarks` with these arguments; FileNotFoundError in one sentence where there is no source tree."""
    root = root or ROOT
    wanted = [root / "benchmarks" / "__main__.py", root / "tests", root / "csrc"]
    if not all(path.exists() for path in wanted):
        raise FileNotFoundError(GET)
    # In a process of its own: its folder must come first in the path, and pytest start before torch is imported.
    before = ["", *arguments[:-1]]
    here = [str(Path(a).resolve()) if b == "--results" else a for a, b in zip(arguments, before, strict=False)]
    return subprocess.run([sys.executable, "-m", "benchmarks", *here], cwd=root).returncode
