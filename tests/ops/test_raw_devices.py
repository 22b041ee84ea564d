"""The raw operations refuse a tensor of another device, whose memory a kernel would read as its own."""

import pytest
import torch

CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
LOGITS, LABELS, PROBABILITIES = torch.zeros(4, 5), torch.zeros(4, dtype=torch.int64), torch.full((4, 5), 0.2)
MATRIX, PLANES = torch.zeros(4, 4, dtype=torch.float64), torch.zeros(1, 4, 32, dtype=torch.float64)
ONES, MEAN = torch.ones(4, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
MASK, SCALE, AUX = torch.ones(4, dtype=torch.bool), torch.empty(0), torch.ones(2)
NUMBERS = ([0.5, 0.5], [1.0], 0, 1.0, 0.0, 0.0, -100, True, 2, 0.0, True, False, False)
FORWARD = (0, [1.0, 0.0], 0, [], [])  # the divergence and its numbers; classes, softcaps and logit scales

# Operation, arguments as a kernel accepts them, and the places of the operands beside the first one.
CALLS = [
    (
        "multi_teacher_forward",
        (LOGITS, [LOGITS] * 2, LABELS, PROBABILITIES, *[torch.ones(2)] * 2, None, *NUMBERS, *FORWARD, True, False),
        (1, 2, 3, 4, 5),
    ),
    (
        "multi_teacher_forward_stats",
        (LOGITS, [LOGITS, LOGITS], LABELS, torch.ones(2), torch.ones(2), None, *NUMBERS, *FORWARD, True),
        (1, 2, 3, 4),
    ),
    ("multi_teacher_backward", (torch.ones(()), LOGITS, SCALE, AUX, 2), (0, 2, 3)),
    (
        "multi_label_forward",
        (
            LOGITS, [LOGITS] * 2, LABELS, PROBABILITIES, torch.ones(6), torch.ones(2), None, [], [1.0], 0, 1.0, 1.0,
            True, 2, 0.0, False, True, False, 1.0, True,
        ),
        (1, 2, 3, 4, 5),
    ),
    (
        "mutual_forward",
        (
            [LOGITS, LOGITS], [LOGITS], LABELS, PROBABILITIES, torch.ones(2, 2), torch.ones(2, 1), None, [],
            1.0, 1.0, 0.0, 0.0, False, 0.0, -100, True, 2, False, [0, 1], False,
        ),
        (0, 1, 2, 3, 4, 5),
    ),
    ("mutual_backward", (torch.ones(1), LOGITS[None], SCALE, AUX, [0], 2), (0, 2, 3)),
    ("group_stats", ([LOGITS, LOGITS], LABELS, PROBABILITIES, -100), (0, 1, 2)),
    (
        "feature_ensemble_forward",
        ([LOGITS, LOGITS], [LOGITS, LOGITS], torch.ones(2), MASK, [], 1, 0, True, 2, 0.0, True, False),
        (0, 1, 2, 3),
    ),
    (
        "feature_ensemble_backward",
        (torch.ones(()), [LOGITS], [LOGITS], None, MASK, torch.ones(5, 4), [1.0], 1, 0, True, 2, 0.0),
        (0, 2, 4, 5),
    ),
    ("relational_sides", (MATRIX, MATRIX, MASK, 0, 0.0), (1, 2)),
    ("relational_loss", (PLANES, PLANES, MEAN, ONES, 0, 2, True), (1, 2, 3)),
    ("relational_distances", (LOGITS, MASK, 0, 0.0), (1,)),
    ("relational_pull", (MATRIX, torch.zeros(4, 16), torch.ones(3, dtype=torch.float64), 5), (0, 2)),
]  # fmt: skip
OPERANDS = [(name, args, place) for name, args, places in CALLS for place in places]


def on_meta(operand):
    return [*operand[:-1], operand[-1].to("meta")] if isinstance(operand, list) else operand.to("meta")


def cpu_kernel(name, args):
    """The dispatcher would send a call with a meta tensor to the fake kernel."""
    return getattr(torch.ops.fastkd, name).default.redispatch(CPU, *args)


@pytest.mark.parametrize("name, args, places", CALLS, ids=[name for name, _, _ in CALLS])
def test_the_calls_are_right_but_for_the_device(name, args, places):
    cpu_kernel(name, args)


@pytest.mark.parametrize("name, args, place", OPERANDS, ids=[f"{name}-{place}" for name, _, place in OPERANDS])
def test_an_operand_on_another_device(name, args, place):
    args = [on_meta(arg) if k == place else arg for k, arg in enumerate(args)]
    with pytest.raises(RuntimeError, match="fastkd: the tensors of a call must be on one device"):
        cpu_kernel(name, args)


@pytest.mark.parametrize(
    "name, args",
    [
        ("multi_teacher_backward", (torch.ones(()), torch.zeros(5, 4).T, SCALE, AUX, 2)),
        ("mutual_backward", (torch.ones(1), torch.zeros(1, 5, 4).mT, SCALE, AUX, [0], 2)),
    ],
)
def test_a_stored_gradient_that_is_not_contiguous(name, args):
    with pytest.raises(RuntimeError, match="fastkd: expected the gradients that the forward stored"):
        cpu_kernel(name, args)
