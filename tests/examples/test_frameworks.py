"""The scripts of examples/frameworks against the real packages: each says by assertions of its own what must hold."""

import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parents[2] / "examples" / "frameworks"
SCRIPTS = sorted(path.name for path in FOLDER.glob("*.py"))


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs_unchanged(name, run_example):
    """By the command in its docstring."""
    run = re.search(
        rf"^Run: (torchrun|python) (.*)examples/frameworks/{name} \(", (FOLDER / name).read_text(), re.MULTILINE
    )
    launcher = ["-m", "torch.distributed.run", *run[2].split()] if run[1] == "torchrun" else []
    told = run_example(f"frameworks/{name}", launcher=launcher).strip().splitlines()[-1]
    assert re.match(r"[\w .-]+: .*\d", told), told
    print(told)
