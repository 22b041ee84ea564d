"""examples/README.md names every script and the versions that are pinned."""

import re
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
TABLE = (EXAMPLES / "README.md").read_text()


def test_every_script_is_named():
    links = re.findall(r"\]\(([^)]+)\)", TABLE)
    scripts = {path.relative_to(EXAMPLES).as_posix() for path in EXAMPLES.glob("frameworks/*.py")}
    assert scripts <= set(links) and len(scripts) >= 13


def test_the_versions_are_those_that_the_tests_install():
    pinned = (EXAMPLES / "requirements.txt").read_text() + (EXAMPLES.parent / "constraints.txt").read_text()
    named = re.findall(r"^\| [^|]* \| ([\w-]+) ([\d.]+) \|", TABLE, re.MULTILINE)
    assert len(named) >= 11
    assert [f"{name}=={version}" for name, version in named if f"{name}=={version}" not in pinned.split()] == []
