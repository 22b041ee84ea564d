"""CE, KD, AVER and TAKD: their formulas, how each is a case of DGKD, and what they refuse."""

from functools import partial

import pytest
import torch
from methods_helpers import batch, gradients, guides_of, mlp, plain_ce, plain_gradients, plain_kd, run
from torch import nn

from fastkd.methods import AVER, CE, DGKD, KD, TAKD

T, LAM = 3.0, 0.7


def assert_same_step(first, second, factor=1.0, tolerance=1e-12):
    x, y = batch()
    for chunks in (1, 2):
        a, b = run(first, x, y, chunks), run(second, x, y, chunks)
        assert abs(a - factor * b) <= tolerance
        for grad, other in zip(gradients(first.student), gradients(second.student), strict=True):
            torch.testing.assert_close(grad, factor * other, rtol=0, atol=tolerance)


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
def test_kd_is_dgkd_with_one_guide(lam):
    options = {"temperature": T, "lam": lam}
    assert_same_step(KD(mlp(1), mlp(2), **options), DGKD(mlp(1), [mlp(2)], **options), tolerance=0)


def test_takd_is_dgkd_with_only_the_last_guide():
    takd = TAKD(mlp(1), guides_of(), temperature=T, lam=LAM)
    assert len(takd.guides) == 1
    assert_same_step(takd, DGKD(mlp(1), guides_of()[-1:], temperature=T, lam=LAM), tolerance=0)
    assert_same_step(takd, KD(mlp(1), guides_of()[-1], temperature=T, lam=LAM), tolerance=0)


def test_aver_is_the_mean_of_the_teachers_kd():
    aver = AVER(mlp(1), guides_of(), temperature=T, lam=LAM)
    assert_same_step(aver, DGKD(mlp(1), guides_of(), temperature=T, lam=LAM), factor=1 / 4)
    assert_same_step(AVER(mlp(1), [mlp(2)], temperature=T, lam=LAM), KD(mlp(1), mlp(2), temperature=T, lam=LAM), 1.0)
    x, y = batch()
    one_by_one = [run(KD(mlp(1), g, temperature=T, lam=LAM), x, y) for g in guides_of()]
    assert abs(run(aver, x, y) - sum(one_by_one) / 4) < 1e-12


def test_ce_is_kd_without_its_teacher():
    assert_same_step(CE(mlp(1)), KD(mlp(1), mlp(2), lam=0.0))


@pytest.mark.parametrize("chunks", [1, 3])
def test_baselines_are_their_formulas(chunks):
    x, y = batch()
    targets = [g(x).detach() for g in guides_of()]
    kd = partial(plain_kd, temperature=T)
    table = [
        (CE(mlp(1)), lambda z: plain_ce(z, y)),
        (KD(mlp(1), guides_of()[0], temperature=T, lam=LAM), lambda z: 0.3 * plain_ce(z, y) + 0.7 * kd(z, targets[0])),
        (
            KD(mlp(1), guides_of()[0], temperature=T, lam=LAM, ce_weight=1.0),
            lambda z: plain_ce(z, y) + 0.7 * kd(z, targets[0]),
        ),
        (TAKD(mlp(1), guides_of(), temperature=T, lam=LAM), lambda z: 0.3 * plain_ce(z, y) + 0.7 * kd(z, targets[3])),
        (
            AVER(mlp(1), guides_of(), temperature=T, lam=LAM),
            lambda z: 0.3 * plain_ce(z, y) + 0.7 * sum(kd(z, t) for t in targets) / 4,
        ),
    ]
    for method, formula in table:
        loss = run(method, x, y, chunks)
        value, grads = plain_gradients(mlp(1), lambda s: formula(s(x)))  # noqa: B023
        assert abs(loss - value) < 1e-10, type(method).__name__
        for grad, expected in zip(gradients(method.student), grads, strict=True):
            torch.testing.assert_close(grad, expected, rtol=0, atol=1e-8)


SHARED = mlp(4)
BAD = {
    "no guide": (lambda: DGKD(mlp(1), []), "guides"),
    "one guide outside a list": (lambda: DGKD(mlp(1), mlp(2)), "guides"),
    "no network": (lambda: DGKD("resnet20", [mlp(2)]), "student"),
    "a class": (lambda: KD(nn.Linear, mlp(2)), "student"),
    "no network among the guides": (lambda: DGKD(mlp(1), [mlp(2), None]), r"guides\[1\]"),
    "a function": (lambda: KD(mlp(1), torch.relu), "teacher"),
    "student among the guides": (lambda: DGKD(SHARED, [mlp(2), SHARED]), r"guides\.1"),
    "part of the student": (lambda: KD(SHARED, nn.Sequential(SHARED[0])), r"guides\.0"),
    "a guide twice": (lambda: DGKD(mlp(1), [SHARED] * 2), r"guides\.1"),
    "frozen student": (lambda: CE(mlp(1).requires_grad_(False)), "student"),
    "lam": (lambda: DGKD(mlp(1), guides_of(), lam=1.5), "lam"),
    "lam below": (lambda: KD(mlp(1), mlp(2), lam=-0.1), "lam"),
    "temperature": (lambda: DGKD(mlp(1), guides_of(), temperature=0), "temperature"),
    "temperature nan": (lambda: AVER(mlp(1), guides_of(), temperature=float("nan")), "temperature"),
    "temperature tensor": (lambda: TAKD(mlp(1), guides_of(), temperature=torch.tensor(4.0)), "temperature"),
    "scale": (lambda: DGKD(mlp(1), guides_of(), scale="batchmean"), "scale"),
    "drop": (lambda: DGKD(mlp(1), guides_of(), drop=True), "drop"),
    "survival": (lambda: DGKD(mlp(1), guides_of(), drop="bernoulli", survival=1.1), "survival"),
    "every guide dropped": (lambda: DGKD(mlp(1), guides_of(2), drop="fixed", drop_num=2), "drop_num"),
    "drop_num": (lambda: DGKD(mlp(1), guides_of(2), drop="fixed", drop_num=0.5), "drop_num"),
    "seed": (lambda: DGKD(mlp(1), guides_of(2), seed=None), "seed"),
    "ce_weight": (lambda: KD(mlp(1), mlp(2), ce_weight=-1.0), "ce_weight"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_set_up_is_one_sentence(case):
    make, argument = BAD[case]
    sentence = rf"^(DGKD|KD|TAKD|AVER|CE): {argument} must be .*, got "
    with pytest.raises((ValueError, TypeError), match=sentence) as error:
        make()
    assert "\n" not in str(error.value)
