"""No speed-up is reported for an operation whose tests fail."""

from __future__ import annotations

import fnmatch
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from xml.etree import ElementTree

ROOT = Path(__file__).resolve().parents[1]


class Refused(Exception):
    """One sentence: why nothing is reported."""


def require_passing(name: str, tests: str, root: Path | None = None, keyword: str = "") -> str:
    """Runs the test files `root / tests` (a pattern) in their own process of one thread; returns pytest's last line.

    `keyword`: only the tests whose names match it, as in pytest. Raises Refused where a test fails, or where none ran.
    """
    root = root or ROOT
    files = sorted(str(path.relative_to(root)) for path in root.glob(tests))
    if not files:
        raise Refused(f"{name}: no speed-up is reported, because it has no tests ({tests} matches no file).")
    command = ["-m", "pytest", "-q", "-x", "-m", "not slow", "-p", "no:cacheprovider", "-k", keyword, *files]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, *command], cwd=root, env=environment, capture_output=True, text=True)
    lines = [line for line in run.stdout.splitlines() if line.strip()] or ["pytest said nothing"]
    last = lines[-1].strip("= ")
    if run.returncode != 0:
        again = f"python -m pytest {' '.join(files)}"
        raise Refused(f"{name}: no speed-up is reported while its tests fail ({last}); see `{again}`.")
    return last


def read(file: Path, patterns: dict[str, str]) -> dict[str, str]:
    """From pytest's junit XML, what each name's tests (a pattern of files) said: "312 passed", "FAILED: 3 of 315"."""
    cases = list(ElementTree.parse(file).getroot().iter("testcase"))
    return {name: _said([case for case in cases if _comes_from(case, pattern)]) for name, pattern in patterns.items()}


def _comes_from(case: ElementTree.Element, pattern: str) -> bool:
    parts = case.get("classname", "").split(".")  # a package's path, and maybe a class
    paths = ("/".join(parts[:n]) + ".py" for n in range(len(parts), 0, -1))
    return any(fnmatch.fnmatch(path, pattern) for path in paths)


def _said(cases: list[ElementTree.Element]) -> str:
    failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    ran = sum(case.find("skipped") is None for case in cases)
    return f"FAILED: {failed} of {ran}" if failed else f"{ran} passed" if ran else "not run"


def keyword(device: str, less: bool) -> str:
    """Which of an operation's tests must pass: not those of CUDA kernels on the host, which nothing here times.

    less: only those that name the device.
    """
    return device.partition(":")[0] if less else "not simt"


def require_all_passing(tests: dict[str, str], keyword: str = "") -> dict[str, str]:
    """`require_passing` for each name -> pattern, two at a time, equal patterns once; name -> pytest's last line."""
    names = {pattern: name for name, pattern in tests.items()}
    with ThreadPoolExecutor(2) as pool:
        jobs = {p: pool.submit(require_passing, name, p, keyword=keyword) for p, name in names.items()}
        try:
            said = {pattern: job.result() for pattern, job in jobs.items()}
        except Refused:
            pool.shutdown(cancel_futures=True)
            raise
    return {name: said[pattern] for name, pattern in tests.items()}
