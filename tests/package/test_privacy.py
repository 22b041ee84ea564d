"""What has an underscore is its package's own: for the rest of the package, for examples, for what tests replace."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
INSTRUMENTS = {"fastkd._backend", "fastkd._library"}  # which backend is measured, and at which level


def sources(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found
    return found


def imported(path: Path) -> Iterator[str]:
    """The names of this package that a file imports, each with its module."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastkd":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.split(".")[0] == "fastkd")


def owner(name: str) -> str | None:
    """The package whose own a name is; None for what is public."""
    parts = name.split(".")
    private = (i for i, part in enumerate(parts) if re.match("_[a-z]", part))
    first = next(private, None)
    return None if first is None else ".".join(parts[:first])


def test_owners():
    assert owner("fastkd.ops._inputs.check_logits") == "fastkd.ops" and owner("fastkd._core.checks") == "fastkd"
    assert owner("fastkd.functional.mutual_kd") is None and owner("fastkd.__version__") is None


@pytest.mark.parametrize("folder", ["fastkd", "benchmarks", "examples"])
def test_imports(folder):
    strange = []
    for path in sources(folder):
        here = ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for name in imported(path):
            package = owner(name)
            if package is not None and not f"{here}.".startswith(f"{package}."):
                strange.append((here, name))
    if folder == "benchmarks":
        strange = [(here, name) for here, name in strange if name not in INSTRUMENTS]
    assert strange == []


def test_no_test_replaces_a_private_name():
    """There are doors: `_backend.pretend`, and functions and methods without an underscore."""
    found = []
    for path in sources("tests"):
        for target, name in re.findall(r"""\.setattr\(\s*([\w.]+),\s*["'](_[a-z]\w*)["']""", path.read_text()):
            if not target.startswith("torchvision."):
                found.append((path.name, target, name))
    assert found == []
