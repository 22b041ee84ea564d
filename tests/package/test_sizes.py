"""No file of the package or of csrc is longer than a reader takes in at a time, and no function of Python's."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = {".py", ".h", ".cpp", ".cu", ".cuh"}
FILE_LINES, FUNCTION_LINES = 350, 60


def files(folder: str, *suffixes: str) -> list[Path]:
    return sorted(path for path in (ROOT / folder).rglob("*") if path.suffix in suffixes)


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Its functions and their lines, from the `def` on, without the docstring."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            lines = node.end_lineno - node.lineno + 1
            if ast.get_docstring(node) is not None:
                lines -= node.body[0].end_lineno - node.body[0].lineno + 1
            yield node.name, lines


@pytest.mark.parametrize("folder", ["fastkd", "csrc"])
def test_files(folder):
    lengths = {str(path.relative_to(ROOT)): len(path.read_text().splitlines()) for path in files(folder, *SUFFIXES)}
    assert len(lengths) > 40
    # Two subjects belong into two files; a file that only takes what another has too much of is none.
    assert {name: lines for name, lines in lengths.items() if lines > FILE_LINES} == {}


def test_functions():
    found = [(path.name, *function) for path in files("fastkd", ".py") for function in functions(path)]
    assert len(found) > 500
    assert [function for function in found if function[-1] > FUNCTION_LINES] == []
