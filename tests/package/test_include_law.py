"""What a source file of csrc may include, by its place: kernels without torch, CPU kernels without inline std code."""

import re
from pathlib import Path

import pytest

CSRC = Path(__file__).resolve().parents[2] / "csrc"
SOURCES = sorted(path for path in CSRC.rglob("*") if path.suffix in (".h", ".cpp", ".cuh", ".cu"))
OPERATIONS = sorted(path.name for path in CSRC.iterdir() if path.is_dir() and path.name != "core")
PLAIN = {"cstdint", "math.h"}  # nothing with inline functions: csrc/core/config.h says why
BELOW = {"multi_teacher": {"group_stats"}}  # operations that an operation may build on


def includes(path: Path) -> list[str]:
    return re.findall(r'^#include ["<]([^">]+)[">]', path.read_text(), re.MULTILINE)


def folder_of(include: str) -> str:
    return include.rpartition("/")[0]


def allowed(path: Path) -> tuple[set[str], set[str] | None]:
    """The folders that a file may include from, and the headers of the system; None: any, and torch's."""
    place = path.relative_to(CSRC).parent.as_posix()
    if place.startswith("core"):
        audience = {"core": set(), "core/cpu": set(), "core/cuda": {"simt/host"}, "core/torch": {"core/cpu"}}[place]
        system = {"core/torch": None, "core/cuda": PLAIN | {"cuda_runtime.h"}}.get(place, PLAIN)
        return {"core", place} | audience, system | {"cstdlib"} if path.name == "cpu_level.cpp" else system
    own = {"core", place} | BELOW.get(place, set())
    if path.name in ("op.cpp", "tensors.h"):
        return own | {"core/torch"}, None
    if path.suffix in (".cuh", ".cu"):
        return own | {"core/cuda"}, PLAIN
    return own | ({"core/cpu"} if "cpu" in path.name or path.name == "row.h" else set()), PLAIN


def test_the_places_are_those_that_the_law_knows():
    assert len(SOURCES) > 40 and len(OPERATIONS) == 7
    assert {path.parent.name for path in SOURCES} == {*OPERATIONS, "core", "cpu", "cuda", "torch"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(CSRC).as_posix())
def test_includes(path):
    folders, system = allowed(path)
    ours = [name for name in includes(path) if folder_of(name).split("/")[0] in {"core", "simt", *OPERATIONS}]
    assert [name for name in ours if folder_of(name) not in folders] == []
    if system is not None:
        assert set(includes(path)) - set(ours) <= system
