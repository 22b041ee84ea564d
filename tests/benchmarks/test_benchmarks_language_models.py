"""python -m benchmarks.language_models at small sizes: its pairs compute the same, and each part prints its ratios."""

import pytest
import torch

from benchmarks import language_models
from fastkd.functional import multi_teacher_kd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"])
def test_what_is_timed_is_one_loss(name):
    z, t = torch.randn(2, 5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = multi_teacher_kd(z, [t], temperature=1.0, divergence=name)
    torch.testing.assert_close(language_models.eager_of(name)(z, t), ours, rtol=1e-10, atol=0)


def test_each_part_prints_its_ratios(capsys):
    language_models.divergences(4, 40, compiled=())
    language_models.linear(16, 8, 40)
    language_models.sparse(8, 40, k=5)
    told = capsys.readouterr().out
    assert told.count("\n") == 9
    assert "four routed" in told and "truncate" in told
