"""python -m benchmarks.language_models at small sizes: its pairs compute the same, and each part prints its ratios."""

import pytest
import torch

from benchmarks import language_models
from fastkd import TopK
from fastkd.functional import multi_teacher_kd

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd", "tvd", "skew_forward", "skew_reverse"])
def test_what_is_timed_is_one_loss(name):
    z, t = torch.randn(2, 5, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ours = multi_teacher_kd(z, [t], temperature=1.0, divergence=name)
    torch.testing.assert_close(language_models.eager_of(name)(z, t), ours, rtol=1e-10, atol=0)


@pytest.mark.parametrize("mode", ["tail", "truncate", "teacher", "both", "sampled"])
def test_what_is_timed_of_sparse_teachers_is_one_loss(mode):
    z, t = torch.randn(2, 5, 30, generator=torch.Generator().manual_seed(0))
    log_p = t.log_softmax(-1)
    values, ids = log_p.topk(4)
    tail = log_p.scatter(1, ids, -torch.inf).logsumexp(-1)
    teacher = TopK(ids, values, mode=mode, tail_log_prob=tail if mode == "tail" else None)
    eager = language_models.sparse_eager(mode, ids, values, tail)(z)
    torch.testing.assert_close(eager, multi_teacher_kd(z, teacher, temperature=1.0), rtol=1e-5, atol=1e-6)


def test_each_part_prints_its_ratios(capsys):
    language_models.divergences(4, 40, compiled=())
    language_models.linear(16, 8, 40)
    language_models.sparse([(8, 40, 5)])
    told = capsys.readouterr().out
    assert told.count("\n") == 7 + 1 + 2 * 6  # divergences, the linear form, five modes in two dtypes
    assert "four routed" in told and "truncate" in told
