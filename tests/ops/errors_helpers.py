"""What a wrong call is told: the check of one table, and the rows of it that several operations have in common.

A row: what is wrong, the call, its exception, what the sentence holds (argument, expected, got). `call(**options)` of a
test file makes a call of its operation on logits [4, 6] or two maps of 4 samples, right but for these options.
"""

import math

import pytest
import torch

import fastkd

Y = torch.zeros(4, dtype=torch.int64)


def each_wrong_call(table):
    """Decorates a test of (wrong, exception, sentence, backend)."""
    rows = pytest.mark.parametrize(
        "wrong, exception, sentence", [row[1:] for row in table], ids=[row[0] for row in table]
    )
    backends = pytest.mark.parametrize("backend", ["native", "reference"])
    return lambda test: backends(rows(test))


def assert_told(wrong, exception, sentence, backend, *functions, most=200):
    """One sentence that begins with the function's name, and is not too long to read."""
    with fastkd.use_backend(backend), pytest.raises(exception, match=sentence) as caught:
        wrong()
    text = str(caught.value)
    assert text.startswith(tuple(f"{name}: " for name in functions)) and "\n" not in text and len(text) < most


def wrong_targets(call, whose):
    return [
        (
            "float target",
            call(target=Y.float()),
            (TypeError, ValueError),
            "target must be class indices.*float32",
        ),
        ("bool target", call(target=Y.bool()), TypeError, "target.*torch.bool"),
        ("target of a wrong type", call(target=[0, 1, 2, 3]), TypeError, "target must be an integer tensor.*got list"),
        (
            "target of a wrong shape",
            call(target=Y[:3]),
            ValueError,
            rf"target must be of shape \[4\], {whose}.*got shape \[3\]",
        ),
        ("target too large", call(target=Y + 6), ValueError, r"target must be class indices in \[0, 6\).*got index 6"),
        ("target negative", call(target=Y - 1), ValueError, r"target.*got index -1"),
        ("target elsewhere", call(target=Y.to("meta")), ValueError, f"target must be on {whose} device cpu"),
        (
            "ignore_index float",
            call(target=Y, ignore_index=1.0),
            TypeError,
            "ignore_index must be an integer, got float",
        ),
    ]


def unknown_reduction(call):
    return ("unknown reduction", call(reduction="batchmean"), ValueError, "reduction must be one of.*got 'batchmean'")


def wrong_losses(call):
    """Of distillation: the temperature, the cross-entropy beside it."""
    return [
        ("temperature NaN", call(temperature=math.nan), ValueError, "temperature.*got nan"),
        ("temperature tensor", call(temperature=torch.tensor(-2.0)), ValueError, "temperature.*got -2"),
        ("no target", call(ce_weight=0.5), ValueError, "target must be given where ce_weight is 0.5"),
        ("target negative, with a weight", call(target=Y - 1, ce_weight=1.0), ValueError, r"target.*got index -1"),
        ("ce_weight NaN", call(target=Y, ce_weight=math.nan), ValueError, "ce_weight must be a finite number, got nan"),
        (
            "smoothing > 1",
            call(target=Y, label_smoothing=1.5),
            ValueError,
            r"label_smoothing must be a number in \[0, 1\], got 1.5",
        ),
        unknown_reduction(call),
    ]


def wrong_weights(call):
    """Of two teachers, one of each or one of each row."""
    return [
        ("weights, wrong length", call(weights=[1.0]), ValueError, "weights must be 2 numbers.*got 1"),
        (
            "weights, wrong shape",
            call(weights=torch.ones(2, 5)),
            ValueError,
            r"weights must be of shape \[2\] or \[2, 4\], got shape \[2, 5\]",
        ),
        ("weights, a number", call(weights=0.5), TypeError, "weights must be a sequence.*got float"),
        ("weights NaN", call(weights=[1.0, math.nan]), ValueError, "weights must be finite.*nan"),
        ("bool weights", call(weights=torch.ones(2, dtype=torch.bool)), TypeError, "weights must be.*torch.bool"),
        (
            "weights elsewhere",
            call(weights=torch.ones(2, 4, device="meta")),
            ValueError,
            "weights must be on the student's device",
        ),
    ]
