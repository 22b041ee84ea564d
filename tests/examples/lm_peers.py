"""Against the installed code of TRL and Liger-Kernel, in float64 where that works. test_lm_examples.py runs this."""

import pytest
import torch
from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss
from trl.experimental.gkd import GKDTrainer
from trl.experimental.server_distillation import server_distillation_trainer as server
from trl.trainer.distillation_trainer import _chunked_divergence_loss

from fastkd import Head, TopK
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd

ROWS, WIDTH, OTHER, CLASSES, K = 12, 6, 9, 50, 8
BETAS = pytest.mark.parametrize("beta", [0.0, 0.5, 1.0])
TEMPERATURES = pytest.mark.parametrize("temperature", [1.0, 2.0, 4.0])


def randn(*shape, seed, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def networks(dtype=torch.float64):
    """Student's hidden states, head, bias, all learning; the teacher's; labels of which some do not count."""
    student = [randn(*s, seed=k, dtype=dtype) for k, s in enumerate([(ROWS, WIDTH), (CLASSES, WIDTH), (CLASSES,)])]
    teacher = [randn(*s, seed=9 + k, dtype=dtype) for k, s in enumerate([(ROWS, OTHER), (CLASSES, OTHER), (CLASSES,)])]
    labels = (torch.arange(ROWS) * 7 % CLASSES).masked_fill(torch.arange(ROWS) % 4 == 0, -100)
    return [z.requires_grad_() for z in student], teacher, labels


def compare(ours, theirs, inputs, digits=1e-12, of_loss=None):
    torch.testing.assert_close(ours, theirs, rtol=of_loss or digits, atol=of_loss or digits, check_dtype=False)
    slopes = [torch.autograd.grad(loss, inputs, retain_graph=True) for loss in (ours, theirs)]
    torch.testing.assert_close(*slopes, rtol=digits, atol=digits)


@BETAS
@TEMPERATURES
@pytest.mark.parametrize("items", [None, 17])
def test_gkd(beta, temperature, items):
    (hidden, weight, bias), (other, head, _), labels = networks()
    z, t = torch.addmm(bias, hidden, weight.T), other @ head.T
    options = dict(divergence="jsd", divergence_beta=beta, temperature=temperature, scale_by_t2=False, num_items=items)
    theirs = GKDTrainer.generalized_jsd_loss(z, t, labels, beta, temperature, num_items_in_batch=items)
    compare(multi_teacher_kd(z, [t], labels, **options), theirs, (hidden, weight, bias))
    theirs = GKDTrainer.generalized_jsd_loss(hidden @ weight.T, t, labels, beta, temperature, num_items_in_batch=items)
    linear = linear_multi_teacher_kd(hidden, weight, [(other, head)], labels, **options)
    compare(linear, theirs, (hidden, weight))


@BETAS
@TEMPERATURES
@pytest.mark.parametrize("hard", [0.0, 0.5])
@pytest.mark.parametrize("has_bias", [False, True])
def test_liger(beta, temperature, hard, has_bias):
    """It sums the loss in float32, and works in it for the labels."""
    (hidden, weight, bias), (other, head, shift), labels = networks()
    liger = LigerFusedLinearJSDLoss(hard, 1 - hard, beta, temperature=temperature, compiled=False, chunk_size=5)
    biases = (bias, shift) if has_bias else (None, None)
    theirs = liger(hidden, weight, other, head, labels, *biases)
    ours = linear_multi_teacher_kd(
        hidden, weight, [Head(other, head, bias=biases[1])], labels, bias=biases[0], divergence="jsd",
        divergence_beta=beta, temperature=temperature, scale_by_t2=False, ce_weight=hard, kd_weight=1 - hard,
    )  # fmt: skip
    compare(ours, theirs, (hidden, weight, bias) if has_bias else (hidden, weight), 2e-6 if hard else 1e-12, 1e-6)


@BETAS
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_trl_chunked(beta, temperature):
    """In float32, with bias, softcap and scale of both networks."""
    (hidden, weight, bias), (other, head, shift), labels = networks(torch.float32)
    mask = labels != -100
    theirs, _, count = _chunked_divergence_loss(
        hidden[None],
        other[None],
        weight,
        head,
        mask[None].int(),
        beta,
        17,
        bias,
        shift,
        0.7,
        0.9,
        5.0,
        4.0,
        temperature,
    )
    assert int(count) == int(mask.sum())
    ours = linear_multi_teacher_kd(
        hidden, weight, [Head(other, head, bias=shift, softcap=4.0, logit_scale=0.9)], mask=mask, bias=bias,
        softcap=5.0, logit_scale=0.7, divergence="jsd", divergence_beta=beta, temperature=temperature,
        scale_by_t2=False, num_items=17,
    )  # fmt: skip
    compare(ours, theirs, (hidden, weight, bias), digits=2e-6)


def test_tail_of_trls_server():
    """Well conditioned here: neither tail is near its floor."""
    (hidden, weight, _), (other, head, _), labels = networks()
    keep, log_p = labels != -100, (other @ head.T).log_softmax(-1)
    values, ids = log_p.topk(K)
    log_q, found = (hidden @ weight.T).log_softmax(-1).gather(-1, ids), torch.ones_like(ids, dtype=torch.bool)
    (q, mask), (p, _) = (server._add_tail_bucket(x, found) for x in (log_q, values))
    theirs = server._jsd_divergence(q, p, 0.0, mask)[keep].sum() / keep.sum()
    ours = linear_multi_teacher_kd(hidden, weight, TopK(ids, values, mode="tail"), labels)
    compare(ours, theirs, (hidden, weight))
