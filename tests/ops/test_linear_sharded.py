"""linear_multi_teacher_kd with the vocabulary in shards: two and four processes give what one gives."""

import datetime

import pytest
import torch
from linear_helpers import CLASSES, ROWS, labels, randn, student, teachers_of
from processes_helpers import together

import fastkd
from fastkd import Head
from fastkd.functional import linear_multi_teacher_kd

SHARDS = {2: (12, 19), 4: (5, 2, 14, 10)}


def options_of(case):
    weights = torch.rand(2, ROWS, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights[0, ::2] = 0
    return {
        "mean": {"target": labels(), "ce_weight": 0.4, "label_smoothing": 0.1, "temperature": 2.0},
        "sum": {"reduction": "sum", "weights": weights, "scale_by_t2": False, "temperature": [1.0, 3.0]},
        "capped": {"target": labels(), "softcap": 3.0, "logit_scale": 0.6, "num_items": 5, "ce_weight": 1.0},
    }[case] | {"return_terms": True, "chunk_rows": 6}


def value(inputs, teachers, **options):
    loss, terms = linear_multi_teacher_kd(*inputs[:2], teachers, bias=inputs[2], **options)
    return [loss.detach(), *terms, *torch.autograd.grad(2 * loss, inputs)]


def heads():
    (_, (hidden, weight)), (capped, _) = teachers_of("both"), teachers_of("capped")
    return [teachers_of("logits")[0].masked_fill(torch.arange(CLASSES) == 3, -torch.inf), capped], hidden, weight


def cut(teachers, classes):
    logits, head = teachers
    shard = Head(
        head.hidden, head.weight[classes], bias=head.bias[classes], softcap=head.softcap, logit_scale=head.logit_scale
    )
    return [logits[:, classes], shard]


def compare(rank, world, group):
    start = sum(SHARDS[world][:rank])
    classes = slice(start, start + SHARDS[world][rank])
    hidden, weight, bias = student()
    teachers = heads()[0]
    mine = [hidden, *[z.detach()[classes].clone().requires_grad_() for z in (weight, bias)]]
    for case in ("mean", "sum", "capped"):
        expected = value((hidden, weight, bias), teachers, **options_of(case))
        got = value(mine, cut(teachers, classes), **options_of(case), process_group=group)
        for a, b in zip(got, expected, strict=True):
            b = b[classes] if b.shape != a.shape else b
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    same = [Head(hidden.detach(), mine[1].detach(), bias=mine[2].detach())]
    loss = linear_multi_teacher_kd(*mine[:2], same, bias=mine[2], process_group=group)
    assert loss.item() == 0 and not bool(torch.autograd.grad(loss, mine)[1].any())


def worker(rank, store, failures):
    torch.set_num_threads(1)
    distributed = torch.distributed
    distributed.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=4, timeout=datetime.timedelta(seconds=300)
    )
    try:
        pair = distributed.new_group([0, 1])
        compare(rank, 4, distributed.group.WORLD)
        if rank < 2:
            compare(rank, 2, pair)
    except BaseException as error:
        failures.put(f"rank {rank}: {type(error).__name__}: {error}")
        raise
    distributed.barrier()
    distributed.destroy_process_group()


def test_shards_of_two_and_of_four_processes_equal_one(tmp_path):
    together(worker, 4, tmp_path / "store", seconds=300)


@pytest.fixture
def alone(tmp_path):
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/one", rank=0, world_size=1)
    yield torch.distributed.group.WORLD
    torch.distributed.destroy_process_group()


def test_what_shards_do_not_take(alone):
    inputs, head = student(), (randn(ROWS, 4), randn(CLASSES, 4))
    routed = Head(head[0][:2], head[1], rows=torch.arange(2))
    for message, change in {
        "combine must be 'losses'": {"combine": "probs"},
        "reduction must be 'mean' or 'sum'": {"reduction": "none"},
        "target must be class indices with process_group": {"target": torch.rand(ROWS, CLASSES), "ce_weight": 1.0},
        "target must be class indices in": {"target": torch.full((ROWS,), CLASSES), "ce_weight": 1.0},
        "vocab_size must be None": {"vocab_size": 7},
        "teachers[0] must be logits or a head of all rows": {"teachers": [routed]},
        "teachers[0] must be detached": {"teachers": [(head[0].requires_grad_(), head[1])]},
        "process_group must be None or a": {"process_group": "gloo"},
    }.items():
        arguments = {"teachers": [(head[0].detach(), head[1])], "process_group": alone} | change
        with pytest.raises((ValueError, TypeError)) as error:
            linear_multi_teacher_kd(*inputs[:2], **arguments)
        assert str(error.value).startswith(f"linear_multi_teacher_kd: {message}"), error.value
    explained = fastkd.explain(linear_multi_teacher_kd, *inputs[:2], [(head[0].detach(), head[1])], process_group=alone)
    assert explained.backend == "reference" and "shards" in explained.reason
