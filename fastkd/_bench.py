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


def run(arguments: list[str], root: Path = ROOT) -> int:
    """`python -m benchmarks` with these arguments; FileNotFoundError in one sentence where there is no source tree."""
    wanted = [root / "benchmarks" / "__main__.py", root / "tests", root / "csrc"]
    if not all(path.exists() for path in wanted):
        raise FileNotFoundError(GET)
    # In a process of its own: its folder must come first in the path, and pytest start before torch is imported.
    here = [str(Path(a).resolve()) if before == "--results" else a for before, a in zip(["", *arguments], arguments)]
    return subprocess.run([sys.executable, "-m", "benchmarks", *here], cwd=root).returncode
