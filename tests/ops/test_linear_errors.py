"""What linear_multi_teacher_kd refuses, in one sentence each."""

import pytest
import torch

from fastkd import Head, TopK
from fastkd.functional import linear_multi_teacher_kd

HIDDEN, WEIGHT = torch.zeros(4, 3), torch.zeros(7, 3)
TEACHER, HEAD = torch.zeros(4, 2), torch.zeros(7, 2)
IDS, VALUES = torch.tensor([[1, 2]] * 4), torch.full((4, 2), -1.0)

CASES = [
    ("hidden must be a floating-point tensor", {"hidden": [1.0]}),
    ("weight must be of shape [V, 3]", {"weight": torch.zeros(7, 5)}),
    ("bias must be of shape [7], got shape [5]", {"bias": torch.zeros(5)}),
    ("softcap must be a finite number > 0", {"softcap": 0.0}),
    ("logit_scale must be a finite number", {"logit_scale": float("nan")}),
    ("chunk_rows must be an integer of at least 1", {"chunk_rows": 0}),
    ("teachers must be at least one of", {"teachers": []}),
    ("teachers must be a sequence of teachers", {"teachers": 3}),
    ("teachers[0] must be logits", {"teachers": ["teacher"]}),
    ("teachers[0] must be of the student's logits' shape [4, 7]", {"teachers": [torch.zeros(4, 8)]}),
    ("teachers[0].weight must be of shape [V, 2]", {"teachers": [(TEACHER, torch.zeros(7, 3))]}),
    ("teachers[0].weight must be of shape [7, 2] as the student's", {"teachers": [(TEACHER, torch.zeros(9, 2))]}),
    ("teachers[0].weight must be of shape [6, 2]", {"teachers": [(TEACHER, torch.zeros(5, 2))], "vocab_size": 6}),
    ("teachers[0].hidden must be of shape [4, 'H_k']", {"teachers": [(torch.zeros(3, 2), HEAD)]}),
    ("teachers[0].bias must be of shape [7]", {"teachers": [Head(TEACHER, HEAD, bias=torch.zeros(6))]}),
    ("teachers[0].softcap must be", {"teachers": [Head(TEACHER, HEAD, softcap=-1.0)]}),
    ("teachers[0].rows must be an int64 tensor", {"teachers": [Head(TEACHER, HEAD, rows=torch.arange(4).int())]}),
    ("teachers[0].rows must be of shape [4]", {"teachers": [Head(TEACHER, HEAD, rows=torch.arange(3))]}),
    ("teachers[0].rows must be in [0, 4)", {"teachers": [Head(TEACHER[:2], HEAD, rows=torch.tensor([0, 4]))]}),
    ("teachers[0].rows must be of different rows", {"teachers": [Head(TEACHER[:2], HEAD, rows=torch.tensor([1, 1]))]}),
    ("combine must be 'losses' where teachers[0] is with rows",
     {"teachers": [Head(TEACHER, HEAD, rows=torch.arange(4))], "combine": "probs"}),
    ("combine must be 'losses' where teachers[0] is a TopK", {"teachers": [TopK(IDS, VALUES)], "combine": "logits"}),
    ("teachers[0].mode must be one of", {"teachers": [TopK(IDS, VALUES, mode="head")]}),
    ("teachers[0].ids must be a tensor of int64 or int32", {"teachers": [TopK(IDS.float(), VALUES)]}),
    ("teachers[0].ids must be below 7", {"teachers": [TopK(IDS + 5, VALUES)]}),
    ("teachers[0].ids must be of shape [4, k]", {"teachers": [TopK(IDS[:3], VALUES[:3])]}),
    ("teachers[0].log_probs must be of shape [4, 2]", {"teachers": [TopK(IDS, VALUES[:, :1])]}),
    ("teachers[0].log_probs must be log-probabilities, got NaN", {"teachers": [TopK(IDS, VALUES * float("nan"))]}),
    ("teachers[0].log_probs must be log-probabilities, at most 0", {"teachers": [TopK(IDS, VALUES + 3)]}),
    ("teachers[0].log_probs must be a floating-point tensor", {"teachers": [TopK(IDS)]}),
    ("teachers[0].tail_log_prob must be None for mode='both'",
     {"teachers": [TopK(IDS, VALUES, mode="both", tail_log_prob=VALUES[:, 0])]}),
    ("teachers[0].tail_log_prob must be of shape [4]", {"teachers": [TopK(IDS, VALUES, tail_log_prob=VALUES[:2, 0])]}),
    ("temperature must be 1 for teachers[0] with mode='tail'", {"teachers": [TopK(IDS, VALUES)], "temperature": 2.0}),
    ("divergence must be 'forward' where teachers[0] is a TopK",
     {"teachers": [TopK(IDS, VALUES)], "divergence": "reverse"}),
    ("divergence['forward'] must be a finite number, or a tensor of shape [4]",
     {"divergence": {"forward": torch.zeros(3)}}),
    ("divergence['reverse'] must be finite", {"divergence": {"reverse": torch.full((4,), float("inf"))}}),
    ("teachers[0].rows must be in [0, 4)", {"teachers": [Head(TEACHER[:2], HEAD, rows=torch.tensor([-1, 2]))]}),
    ("teachers[0].bias must be of shape [7], got shape [7, 1]",
     {"teachers": [Head(TEACHER, HEAD, bias=torch.zeros(7, 1))]}),
    ("teachers[0].tail_log_prob must be log-probabilities, got NaN",
     {"teachers": [TopK(IDS, VALUES, tail_log_prob=VALUES[:, 0] * float("nan"))]}),
    ("num_items must be a finite number > 0", {"num_items": -3}),
    ("num_items must be a finite number > 0", {"num_items": torch.tensor(0.0)}),
    ("num_items must be a finite number > 0", {"num_items": float("nan")}),
    ("vocab_size must be an integer in [2, 7]", {"vocab_size": 8}),
    ("num_items must be a finite number > 0", {"num_items": 0}),
    ("target must be given where ce_weight is 0.5", {"ce_weight": 0.5}),
    ("target must be of shape [4]", {"target": torch.zeros(3, dtype=torch.int64)}),
    ("target must be class indices in [0, 7)", {"target": torch.tensor([0, 1, 7, 2])}),
    ("weights must be 1 numbers, one per teacher", {"weights": [0.5, 0.5]}),
    ("temperature must be one number or 1", {"temperature": [1.0, 2.0]}),
]  # fmt: skip


@pytest.mark.parametrize("message, change", CASES, ids=[message[:50] for message, _ in CASES])
def test_is_refused_in_one_sentence(message, change):
    arguments = {"hidden": HIDDEN, "weight": WEIGHT, "teachers": [(TEACHER, HEAD)]} | change
    with pytest.raises((ValueError, TypeError)) as error:
        linear_multi_teacher_kd(**arguments)
    assert str(error.value).startswith(f"linear_multi_teacher_kd: {message}"), error.value
    assert "\n" not in str(error.value)
