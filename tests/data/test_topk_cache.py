"""LogitsCache(topk=k): what is kept of the k likeliest classes, and losses that take it as `fastkd.TopK`."""

import functools
import math

import numpy as np
import pytest
import torch
from methods_helpers import batch, gradients, mlp
from test_logits_cache import CLASSES, IMAGES, VALUES, ask, cache_of, files
from train_helpers import one_thread  # noqa: F401

import fastkd
from fastkd import methods
from fastkd.data._logit_rows import TopClasses
from fastkd.methods import AEKD, AVER, BAN, CTSLMKT, DGKD, DIST, DKD, KD, TAKD

ROWS = [3, 1, 7]


def expected(values: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """ids, log-probabilities, and that of the others, in float64."""
    log_p = values.double().log_softmax(-1)
    order = log_p.argsort(-1, descending=True)
    tail = log_p.gather(-1, order[:, k:]).exp().sum(-1).log()
    return order[:, :k], log_p.gather(-1, order[:, :k]), tail


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
def test_rows_are_the_k_likeliest_classes_and_the_others_sum(tmp_path, given):
    values = VALUES.to(given)
    cache = cache_of(tmp_path, topk=2)
    for again in range(2):
        found, ran = ask(cache, ROWS, values)
        ids, log_probs, tail = expected(values[ROWS], 2)
        assert isinstance(found, fastkd.TopK) and found.mode == "tail" and ran == (not again)
        assert found.ids.dtype == torch.int32 and torch.equal(found.ids.long(), ids)
        assert found.log_probs.dtype == torch.float16 and torch.equal(found.log_probs, log_probs.half())
        assert found.tail_log_prob.dtype == torch.float32
        torch.testing.assert_close(found.tail_log_prob.double(), tail, rtol=1e-7, atol=0)
    assert not ask(cache_of(tmp_path, topk=2), [7, 3], values)[1]  # the next run reads them
    rows = np.load(files(tmp_path)[1])  # the plain file, for whoever wants it
    assert (
        rows.shape == (IMAGES,) and rows["ids"][7].tolist() == ids[2].tolist() and rows["log_tail"].shape == (IMAGES,)
    )


@pytest.mark.parametrize("gap", [7, 14, 28, 60])
def test_the_tail_of_a_sure_network_has_its_digits(tmp_path, gap):
    values = VALUES.clone()
    values[:, 2] += gap
    found, _ = ask(cache_of(tmp_path, topk=1), ROWS, values)
    torch.testing.assert_close(found.tail_log_prob.double(), expected(values[ROWS], 1)[2], rtol=1e-6, atol=0)


def test_all_classes_leave_nothing_and_masked_ones_are_no_entries(tmp_path):
    values = VALUES.clone()
    values[:, 1:4] = -math.inf
    found, _ = ask(cache_of(tmp_path, topk=CLASSES), ROWS, values)
    assert (found.tail_log_prob == -math.inf).all()
    assert ((found.log_probs > -math.inf).sum(-1) == 2).all()
    student = torch.randn(3, CLASSES, dtype=torch.float64)
    loss = fastkd.functional.multi_teacher_kd(student, found, temperature=1.0)
    dense = fastkd.functional.multi_teacher_kd(student, [values[ROWS]], temperature=1.0)
    assert loss == pytest.approx(dense.item(), abs=2e-3)  # 11 bits of log p


def test_rows_that_count_nowhere_have_no_entry_and_are_not_kept(tmp_path):
    cache = cache_of(tmp_path, topk=2)
    for number in range(2):
        found, ran = ask(cache, [-1, 5, -1], VALUES)
        assert ran == (number == 0) and (found.ids < 0).all(-1).tolist() == [True, False, True]
        loss = fastkd.functional.multi_teacher_kd(VALUES[:3] * 2, found, temperature=1.0, reduction="none")
        assert loss[[0, 2]].tolist() == [0, 0] and loss[1] > 0
        assert ask(cache, [IMAGES - 1], VALUES)[1] == (number == 0)  # to which -1 would point
    assert (cache.read, cache.computed) == (2, 2)


def test_the_key_holds_k_and_the_size_follows_it(tmp_path):
    caches = [cache_of(tmp_path), *(cache_of(tmp_path, topk=k) for k in (2, 3))]
    for cache in caches:
        ask(cache, list(range(IMAGES)), VALUES)
    assert len({network.key for cache in caches for network in cache.networks.values()}) == 3
    assert [cache.size([0]) for cache in caches] == [(IMAGES * (row + 4),) * 2 for row in (4 * CLASSES, 16, 22)]
    for network in caches[1].networks.values():
        path = network.folder / "v0000.npy"
        assert IMAGES * 16 < path.stat().st_size <= IMAGES * 16 + 256


@pytest.mark.parametrize("damage", ["cut", "altered"])
def test_damage_is_seen(tmp_path, damage):
    ask(cache_of(tmp_path, topk=2), ROWS, VALUES)
    (path,) = [path for path in files(tmp_path) if path.name == "v0000.npy"]
    content = bytearray(path.read_bytes())
    if damage == "cut":
        content = content[:-3]
    else:
        content[len(content) - (IMAGES - 3) * 16 + 2] ^= 1  # of row 3
    path.write_bytes(content)
    notes = []
    found, ran = ask(cache_of(tmp_path, topk=2, note=notes.append), ROWS, VALUES)
    assert ran and len(notes) == (damage == "cut")
    assert torch.equal(found.ids.long(), expected(VALUES[ROWS], 2)[0])
    assert not ask(cache_of(tmp_path, topk=2), ROWS, VALUES)[1]


@pytest.mark.parametrize("options, message", [
    ({"topk": 0}, "topk must be an integer from 1 to 5, the classes, got 0"),
    ({"topk": 6}, "topk must be an integer from 1 to 5, the classes, got 6"),
    ({"topk": True}, "topk must be an integer from 1 to 5, the classes, got True"),
    ({"topk": 2, "dtype": "float16"}, "dtype must be left out where topk is given, whose form is fixed, got 'float16'"),
])  # fmt: skip
def test_what_cannot_be_is_refused(tmp_path, options, message):
    with pytest.raises(ValueError, match=f"^LogitsCache: {message}$"):
        cache_of(tmp_path, **options)


# --- methods ---


def known(method: methods.Method, x: torch.Tensor, k: int) -> dict[str, fastkd.TopK]:
    """What a cache would give, but in float64."""
    found = {}
    for name in method.frozen_names:
        ids, log_probs, tail = expected(method.get_submodule(name)(x).detach(), k)
        found[name] = fastkd.TopK(ids, log_probs, tail_log_prob=tail)
    return found


def part(teacher: fastkd.TopK, rows: slice) -> fastkd.TopK:
    return fastkd.TopK(teacher.ids[rows], teacher.log_probs[rows], tail_log_prob=teacher.tail_log_prob[rows])


THREE = [mlp(2), mlp(3), mlp(4)]
TAKE = {
    "kd": lambda: KD(mlp(1), mlp(2), temperature=1.0),
    "ban": lambda: BAN(mlp(1), mlp(2)),
    "aver": lambda: AVER(mlp(1), THREE, temperature=1.0),
    "takd": lambda: TAKD(mlp(1), THREE, temperature=1.0),
    "dgkd": lambda: DGKD(mlp(1), THREE, temperature=1.0, drop="fixed"),
    "dgkd code": lambda: DGKD(mlp(1), THREE, temperature=1.0, scale="code"),
}


@pytest.mark.parametrize("name", TAKE)
@pytest.mark.parametrize("chunks", [1, 3])
def test_the_loss_is_that_of_topk_and_with_all_classes_that_of_logits(name, chunks):
    x, y = batch()
    found = {}
    for k in (2, 7, None):
        method = TAKE[name]()
        assert method.no_topk == ""
        taught = (
            None
            if k is None
            else functools.partial(lambda of, name, rows, run: part(of[name], rows), known(method, x, k))
        )
        (phase,) = method.phases(x, y, chunks=chunks, taught=taught)
        loss = sum(loss.backward() or loss.detach() for loss in phase.losses)
        found[k] = loss, gradients(method.student), phase.parts["kd"]
    assert abs(found[7][0] - found[None][0]) < 1e-12 and abs(found[7][2] - found[None][2]) < 1e-12
    torch.testing.assert_close(found[7][1], found[None][1], rtol=0, atol=1e-12)
    assert abs(found[2][0] - found[None][0]) > 1e-4  # two classes and the rest are another loss


def test_the_kept_classes_give_the_loss_of_topk_from_whole_logits(tmp_path):
    student, k = torch.randn(3, CLASSES, dtype=torch.float64), 2
    kept, _ = ask(cache_of(tmp_path, topk=k), ROWS, VALUES)
    ids, log_probs, tail = expected(VALUES[ROWS], k)
    exact = fastkd.TopK(ids, log_probs, tail_log_prob=tail)
    rounded = fastkd.TopK(ids, log_probs.half(), tail_log_prob=tail.float())
    loss = [fastkd.functional.multi_teacher_kd(student, t, temperature=1.0).item() for t in (kept, rounded, exact)]
    assert loss[0] == pytest.approx(loss[1], abs=1e-7) and loss[0] == pytest.approx(loss[2], abs=1e-3)


REFUSE = {
    "temperature 4, other than 1, the pro": lambda: KD(mlp(1), mlp(2)),
    "standardize takes mean and deviation": lambda: KD(mlp(1), mlp(2), temperature=1.0, standardize=True),
    "weights='entropy' reads the teachers'": lambda: AVER(mlp(1), THREE, temperature=1.0, weights="entropy"),
    "the teachers' weights come from their": lambda: AEKD(mlp(1), THREE, temperature=1.0),
    "its loss reads the logits of all clas": lambda: DKD(mlp(1), mlp(2)),
    "its loss reads the logits of all class": lambda: DIST(mlp(1), mlp(2)),
    "its loss reads the logits of all classe": lambda: CTSLMKT([mlp(1), mlp(5)], [mlp(2), mlp(3)], beta=0.0),
}


@pytest.mark.parametrize("why", REFUSE)
def test_methods_that_cannot_say_why(why):
    x, y = batch()
    method = REFUSE[why]()
    assert why in method.no_topk
    with pytest.raises(ValueError, match=rf"^\w+: taught must be logits of all classes \(.*{why}.*\), got a TopK$"):
        list(method.phases(x, y, taught=lambda name, rows, run: part(known(method, x, 2)[name], rows)))


def test_a_topk_of_another_shape_is_refused():
    x, y = batch()
    method = BAN(mlp(1), mlp(2))
    with pytest.raises(ValueError, match=r"multi_teacher_kd: teachers\[0\].ids must be of shape \[10, k\]"):
        list(method.phases(x, y, taught=lambda name, rows, run: part(known(method, x, 2)[name], slice(3))))


def test_a_dict_of_topk_is_cut_with_the_batch():
    x, y = batch()
    method = AVER(mlp(1), THREE, temperature=1.0)
    parts = []
    for chunks in (1, 4):
        (phase,) = method.phases(x, y, chunks=chunks, taught=known(method, x, 2))
        parts.append(sum(loss.detach() for loss in phase.losses))
    assert abs(parts[0] - parts[1]) < 1e-12


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_rows_without_a_softmax_are_not_kept(wrong):
    logits = torch.zeros(2, 4)
    logits[1, 2] = wrong
    with pytest.raises(ValueError, match="LogitsCache: logits must leave each row a softmax, got NaN or infinite ones"):
        TopClasses(4, 2).kept(logits, 2)
