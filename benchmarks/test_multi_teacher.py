"""multi_teacher_kd against eager PyTorch and torch.compile."""

from benchmarks.registry import OPERATIONS

OPERATION = OPERATIONS["multi_teacher"]


def test_alone(case, candidate, alone):
    alone(case, candidate)


def test_interleaved(case, compare):
    compare(case)
