"""docs/language_models.md says which mode gives whose number: their formulas, typed again, on arrays [B, T, k]."""

import pytest
import torch
import torch.nn.functional as torch_functional

from fastkd import TopK
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd

BATCH, LENGTH, CLASSES, K = 2, 5, 50, 8
pytestmark = pytest.mark.usefixtures("one_thread")


def randn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def arrays():
    """Student's logits [B, T, V]; ids and log-probabilities [B, T, k], and the teacher's top-k logits."""
    z, teacher = randn(BATCH, LENGTH, CLASSES, seed=0), randn(BATCH, LENGTH, CLASSES, seed=1)
    logits, ids = teacher.topk(K)
    return z, ids, teacher.log_softmax(-1).gather(-1, ids), logits


def trl_server(z, ids, log_p):
    """TRL's trainers with a server teacher: the k classes and one bucket for the rest, by 1 - sum."""
    log_q = torch.log_softmax(z, -1).gather(-1, ids)
    rest_p, rest_q = (torch.log1p(-x.exp().sum(-1, keepdim=True)) for x in (log_p, log_q))
    log_p, log_q = torch.cat([log_p, rest_p], -1), torch.cat([log_q, rest_q], -1)
    return torch_functional.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1)


def verl(z, ids, log_p):
    """verl's forward KL on the teacher's top-k, before its clamp."""
    log_q = torch.log_softmax(z, -1).gather(-1, ids)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def distillkit_zero(z, ids, log_p):
    """DistillKit's sparse KL with missing probability "zero": the teacher renormalised, the student on all classes."""
    log_p = log_p - log_p.logsumexp(-1, keepdim=True)
    return (log_p.exp() * (log_p - torch.log_softmax(z, -1).gather(-1, ids))).sum(-1)


def nemo_rl(z, ids, logits):
    """NeMo-RL's forward KL on the teacher's top-k logits: both renormalised on them."""
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(z.gather(-1, ids), -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


CASES = {"tail": trl_server, "truncate": verl, "teacher": distillkit_zero, "both": nemo_rl}


@pytest.mark.parametrize("mode", CASES)
def test_whose_number_a_mode_gives(mode):
    z, ids, log_p, logits = arrays()
    values = logits if mode == "both" else log_p
    labels = torch.arange(BATCH * LENGTH).reshape(BATCH, LENGTH).masked_fill(torch.arange(LENGTH) < 2, -100)
    rows = CASES[mode](z, ids, values)[labels != -100]
    teacher = TopK(ids, values, mode=mode)
    loss = multi_teacher_kd(z, teacher, labels, temperature=1.0, num_items=torch.tensor(11))
    torch.testing.assert_close(loss, rows.sum() / 11, rtol=1e-12, atol=0)
    eye = torch.eye(CLASSES, dtype=torch.float64)
    torch.testing.assert_close(linear_multi_teacher_kd(z, eye, teacher, labels), rows.mean(), rtol=1e-12, atol=0)
