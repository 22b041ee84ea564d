"""How often a step of a method reads logits: once for each different loss, never again for the log."""

from collections import Counter

import pytest
import torch
from test_all_methods import batch, iterate, method_of, optimizer_of

from fastkd import functional

LOSSES = ("multi_teacher_kd", "mutual_kd", "cross_entropy", "group_stats")
PAIRS = ("feature_ensemble", "rkd_distance", "rkd_angle")


@pytest.fixture
def calls(monkeypatch) -> Counter:
    """The operations called, by name; a second call with the same first argument and the same other tensors fails."""
    counted, seen = Counter(), []

    def watched(name, function):
        def call(*args, **kwargs):
            counted[name] += 1
            tensors = tuple(id(t) for t in _tensors((args, tuple(kwargs.values()))))
            assert (name, tensors) not in seen, f"{name} was called twice with the same tensors"
            seen.append((name, tensors))
            kept.append((args, kwargs))  # no id is given twice
            return function(*args, **kwargs)

        return call

    kept = []
    for name in (*LOSSES, *PAIRS):
        monkeypatch.setattr(functional, name, watched(name, getattr(functional, name)))
    return counted


def _tensors(tree):
    if isinstance(tree, torch.Tensor):
        yield tree
    elif isinstance(tree, (tuple, list)):
        for branch in tree:
            yield from _tensors(branch)


@pytest.mark.parametrize(
    "case, expected",
    [
        ("CE", {"cross_entropy": 1}),
        ("KD", {"multi_teacher_kd": 1}),
        ("AVER", {"multi_teacher_kd": 1}),
        ("TAKD", {"multi_teacher_kd": 1}),
        ("DGKD", {"multi_teacher_kd": 1}),
        ("DML", {"mutual_kd": 1}),
        ("KDCL", {"mutual_kd": 1, "group_stats": 1}),
        # Responses of all peers; each peer's own former self, at another temperature.
        ("CTSLMKT", {"mutual_kd": 1, "multi_teacher_kd": 2, "rkd_distance": 2, "rkd_angle": 2}),
        ("DKEL", {"mutual_kd": 1}),
        ("PCL", {"mutual_kd": 1}),
        # Who is promoted; two kinds of labels of mixed images; one student and two in private and group teaching.
        ("ORC", {"group_stats": 1, "cross_entropy": 2, "multi_teacher_kd": 3}),
        ("FEED", {"cross_entropy": 1, "feature_ensemble": 1}),
        ("FT", {"cross_entropy": 1, "feature_ensemble": 1}),
        ("RKD", {"cross_entropy": 1, "rkd_distance": 1, "rkd_angle": 1}),
    ],
)
def test_a_step_reads_its_logits_once_for_each_loss(calls, case, expected):
    method = method_of(case)
    iterate(method, optimizer_of(method), *batch(case))
    assert calls == expected
