"""Each operation against eager PyTorch and torch.compile."""

from benchmarks import registry

OPERATIONS = list(registry.OPERATIONS.values())


def test_alone(case, candidate, alone):
    alone(case, candidate)


def test_interleaved(case, compare):
    compare(case)
