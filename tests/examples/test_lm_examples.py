"""The scripts of examples/lm on the real packages: each compares weights with those of another way, and says so."""

import subprocess
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

HERE = Path(__file__).parent
PARTS = {"tiny.py", "distil.py", "cost.py"}  # what the others share; test_lm_distil.py runs the second
SCRIPTS = sorted({path.name for path in HERE.parents[1].glob("examples/lm/*.py")} - PARTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_runs(name, run_example):
    told = run_example(f"lm/{name}").strip().splitlines()[-1]
    assert "weights" in told
    print(told)


def test_the_cost_of_a_step(run_example):
    table = run_example("lm/cost.py", "--tiny", "--classes", "300").strip().splitlines()[-3:]
    assert [row.split(" | ")[1] for row in table] == ["eager", "whole logits", "linear"]
    assert all(int(row.split(" | ")[2]) > 0 for row in table)


def test_against_the_code_of_trl_and_liger(frameworks, tmp_path):
    """lm_peers.py in the environment that has them."""
    command = [frameworks, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", HERE, HERE / "lm_peers.py"]
    done = subprocess.run([str(c) for c in command], cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert "skipped" not in done.stdout
