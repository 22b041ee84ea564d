"""multi_teacher_kd: equal networks are exactly 0 apart, also where a product and a sum are fused into one rounding."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PLACES
from multi_teacher_helpers import loss_and_grad, make

ROOT = Path(__file__).resolve().parents[2]
FUSED = os.environ.get("FASTKD_SIMT_FMA") == "1"


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("temperature", [2.5, 3.0, 7.3, 20.0])
def test_equal_networks_are_exactly_0_apart(temperature, place, at):
    student, _, _ = make(16, 1000, 1, device=at(place))
    teacher = student.detach().clone()
    loss, grad = loss_and_grad(student, [teacher] * 3, temperature=temperature, reduction="none")
    assert float(loss.abs().max()) == 0 and float(grad.abs().max()) == 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("combine", ["probs", "logits"])
def test_a_mixture_of_equal_teachers_is_theirs(combine, place, at):
    student, _, _ = make(16, 1000, 1, device=at(place))
    for k in (1, 3, 5):
        teachers = [student.detach().clone()] * k
        loss, _ = loss_and_grad(student, teachers, temperature=20.0, combine=combine, reduction="none")
        assert float(loss.abs().max()) < 1e-6


@pytest.mark.slow
@pytest.mark.skipif(FUSED, reason="this is the run with fused products and sums")
def test_the_same_with_fused_products_and_sums():
    """nvcc fuses where it likes; g++ does here (tests/simt/build.py)."""
    if " fma " not in Path("/proc/cpuinfo").read_text():
        pytest.skip("this processor fuses nothing")
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "simt", __file__]
    done = subprocess.run(command, env=os.environ | {"FASTKD_SIMT_FMA": "1"}, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-4000:]
