"""group_stats, rank_networks, network_scores, hard_samples: what a wrong call is told."""

import math

import torch
from errors_helpers import Y, assert_told, each_wrong_call, wrong_targets

import fastkd

F = fastkd.functional
Z = torch.zeros(4, 6)
MAPS = torch.zeros(1, 3, 2, 2)
STATS = F.group_stats([Z, Z], Y)


def stats_of(logits=(Z, Z), target=Y, **options):
    return lambda: F.group_stats(logits, target, **options)


WRONG = [
    *[row for row in wrong_targets(stats_of, "one network's") if row[0] != "float target"],
    (
        "float target",
        stats_of(target=Y.float()),
        ValueError,
        r"target must be class indices \[4\], or probabilities of one network's shape \[4, 6\], got shape \[4\]",
    ),
    ("negative probabilities", stats_of(target=Z - 1), ValueError, "target must be probabilities, at least 0, got"),
    ("soft, stacked", stats_of(Z, Z), ValueError, r"logits must be M networks stacked.*got shape \[4, 6\] for"),
    ("a mask of numbers", stats_of(mask=Y), TypeError, "mask must be a bool tensor.*got dtype torch.int64"),
    ("mask of a wrong shape", stats_of(mask=Y[:3] > 0), ValueError, r"mask must be of shape \[4\].*got shape \[3\]"),
    ("class_dim", stats_of(class_dim=2), ValueError, r"class_dim must be a dimension.*in \[-2, 2\), got 2"),
    ("class_dim float", stats_of(class_dim=1.0), TypeError, "class_dim must be an integer, got float"),
    ("maps", stats_of([MAPS], Y.view(1, 2, 2)), ValueError, r"target.*\[1, 3, 2\].*be last, or say class_dim=1"),
    ("a vector", stats_of([Z[0]], None), ValueError, r"logits\[0\].*one sample is logits\[None\]\), got shape \[6\]"),
    ("one class", stats_of([Z[:, :1]]), ValueError, r"logits\[0\].*C >= 2 .*sigmoid.*got shape \[4, 1\]"),
    ("one network", stats_of(Z), ValueError, r"logits must be M networks stacked.*list.*got shape \[4, 6\] for"),
    ("one row", stats_of(Z[0], None), ValueError, r"logits must be M networks stacked.*got shape \[6\]"),
    ("no network", stats_of([]), ValueError, "logits must be of at least one network"),
    ("no stacked network", stats_of(torch.zeros(0, 4, 6)), ValueError, "logits must be of at least one network"),
    ("wrong type", stats_of(3), TypeError, "logits must be a sequence.*got int"),
    ("wrong element", stats_of([Z, [1.0]]), TypeError, r"logits\[1\] must be.*got list"),
    ("integers", stats_of([Z, Z.long()]), TypeError, r"logits\[1\] must be.*floating-point.*torch.int64"),
    ("shapes", stats_of([Z, Z[:, :5]]), ValueError, r"logits\[1\] .*logits\[0\]'s shape \[4, 6\], got shape \[4, 5\]"),
    ("devices", stats_of([Z, Z.to("meta")]), ValueError, r"logits\[1\] must be on logits\[0\]'s device cpu, got.*meta"),
    ("no classes", stats_of([torch.zeros(4, 0)]), ValueError, r"logits\[0\].*C >= 2"),
    ("no stats", lambda: F.rank_networks(Z), TypeError, "stats must be the GroupStats.*got Tensor"),
    ("no stats", lambda: F.network_scores([Z]), TypeError, "stats must be the GroupStats.*got list"),
    ("no stats", lambda: F.hard_samples(Z, [1], 1), TypeError, "stats must be the GroupStats.*got Tensor"),
    (
        "by",
        lambda: F.rank_networks(STATS, "loss"),
        ValueError,
        "by must be one of 'ce', 'accuracy', 'top5', got 'loss'",
    ),
    ("n", lambda: F.hard_samples(STATS, [1, 1], 2.0), TypeError, "n must be an integer, got float"),
    ("n < 0", lambda: F.hard_samples(STATS, [1, 1], -1), ValueError, "n must be at least 0, got -1"),
    ("length", lambda: F.hard_samples(STATS, [1], 1), ValueError, "proportions must be 2 numbers.*got 1 numbers"),
    (
        "shape",
        lambda: F.hard_samples(STATS, Z, 1),
        ValueError,
        r"proportions must be of shape \[2\], got shape \[4, 6\]",
    ),
    ("number", lambda: F.hard_samples(STATS, 1.0, 1), TypeError, "proportions must be a sequence.*got float"),
    ("string", lambda: F.hard_samples(STATS, ["1", 1], 1), TypeError, "proportions must be finite numbers, got str"),
    ("bool", lambda: F.hard_samples(STATS, torch.ones(2).bool(), 1), TypeError, "proportions.*torch.bool"),
    ("NaN", lambda: F.hard_samples(STATS, torch.tensor([1, math.nan]), 1), ValueError, "proportions must be finite"),
    ("negative", lambda: F.hard_samples(STATS, [1, -1], 1), ValueError, "proportions must be finite and at least 0"),
    ("all 0", lambda: F.hard_samples(STATS, [0, 0.0], 1), ValueError, "proportions must be larger than 0 for one"),
]


@each_wrong_call(WRONG)
def test_wrong_calls(wrong, exception, sentence, backend):
    functions = "group_stats", "rank_networks", "network_scores", "hard_samples"
    assert_told(wrong, exception, sentence, backend, *functions, most=220)
