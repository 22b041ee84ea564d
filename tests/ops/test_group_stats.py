"""group_stats: against float64 and against the definitions typed again, in every place its kernels run."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as torch_functional
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rows_helpers import LAYOUTS

import fastkd
from fastkd.ops import _inputs
from fastkd.testing import DTYPES, Case, assert_as_accurate, difficult_logits, over

F = fastkd.functional
PLACES = ("cpu", "simt", "cuda")
NUMBERS = ("ce", "confidence", "entropy", "margin")
DECISIONS = ("correct", "label_rank")


def make(rows, classes, networks, dtype=torch.float32, seed=0, device="cpu", scale=3.0):
    """Logits M x [R, C] and labels [R], on the device; a third of the rows have the label among the best classes."""
    g = torch.Generator().manual_seed(seed)
    logits = [torch.randn(rows, classes, generator=g, dtype=torch.float64) * scale for _ in range(networks)]
    target = torch.randint(0, classes, (rows,), generator=g)
    if rows:
        target[::3] = logits[0][::3].argmax(-1)
    return [z.to(device, dtype) for z in logits], target.to(device)


def check(logits, target=None, **options):
    """The kernels' numbers against float64, no worse than twice the reference's; decisions exactly."""
    assert fastkd.explain(F.group_stats, logits, target, **options).backend == "native"
    stats = F.group_stats(logits, target, **options)
    if len({z.dtype for z in logits}) > 1:  # each is as accurate as its dtype allows
        for m, z in enumerate(logits):
            for a, b in zip(stats, check([z], target, **options), strict=True):
                assert torch.equal(a[m].nan_to_num(-1).double(), b[0].nan_to_num(-1).double())
        return stats
    with fastkd.use_backend("reference"):
        baseline = F.group_stats(logits, target, **options)
        exact = F.group_stats([z.double() for z in logits], target, **options)
    for name in DECISIONS:
        assert torch.equal(getattr(stats, name), getattr(exact, name)), name
    for name in NUMBERS:
        actual, right = getattr(stats, name), getattr(exact, name)
        assert actual.dtype == (torch.float64 if logits[0].dtype == torch.float64 else torch.float32)
        # In float64 the "exact" margin is itself a difference of probabilities, rounded as they are.
        terms = exact.confidence if name == "margin" and actual.dtype == torch.float64 else right
        finite = terms[terms.isfinite()].abs()
        # ce and entropy are differences of a logarithm, which a rounding of its argument near 1 moves by eps.
        largest = (float(finite.max()) if finite.numel() else 0) + (1 if name in ("ce", "entropy") else 0)
        floor = 2 * torch.finfo(actual.dtype).eps * largest
        if actual.dtype == torch.float64:  # the "exact" result is rounded too: by about sqrt(C) eps, from a sum of C
            floor *= 1 + math.sqrt(logits[0].shape[-1])
        assert_as_accurate(actual, right, getattr(baseline, name), floor=floor, name=name)
    return stats


def typed_again(z, y):
    """The statistics of one network and one row, class by class."""
    p = torch_functional.softmax(z, -1)
    order = p.sort(descending=True).values
    return dict(
        ce=float(torch_functional.cross_entropy(z, y)),
        correct=int(z.argmax()) == int(y),
        label_rank=sum(float(v) > float(z[y]) for v in z),
        confidence=float(p.max()),
        entropy=float(torch.distributions.Categorical(logits=z).entropy()),
        margin=float(order[0] - order[1]),
    )


# --- the table: cases x places x dtypes -------------------------------------------------------------------------------

CASES = [
    Case("one network", dict(networks=1)),
    Case("two classes, one row", dict(rows=1, classes=2)),
    Case("31 classes", dict(classes=31)),
    Case("32 classes", dict(classes=32)),
    Case("33 classes, 7 rows", dict(classes=33, rows=7)),
    Case("100 classes", dict(classes=100, networks=4)),
    Case("256 classes", dict(classes=256)),
    Case("257 classes, a block per row", dict(classes=257)),
    Case("1000 classes", dict(classes=1000, networks=4, rows=3)),
    Case("9000 classes, several vectors of a thread", dict(classes=9000, networks=2, rows=2)),
    Case("4101 classes, not in whole vectors", dict(classes=4101, networks=2, rows=2)),
    Case("ignored rows", dict(ignored=(0, 3))),
    Case("no labels", dict(labels=False)),
    Case("rounded to ties", dict(rounded=True, rows=40)),
    Case("each its own dtype", dict(networks=4, others=True)),
    Case("each its own dtype, 300 classes, soft", dict(networks=4, others=True, classes=300, soft=True)),
    Case("soft labels, 2 classes", dict(classes=2, soft=True)),
    Case("soft labels, 257 classes", dict(classes=257, soft=True)),
    Case("soft labels, masked", dict(classes=1000, rows=3, soft=True, mask=(1,))),
    Case("soft labels in bfloat16", dict(soft=torch.bfloat16)),
    Case("a mask", dict(mask=(0, 2), ignored=(2,))),
]


def probabilities(rows, classes, seed=3):
    """Soft labels: smooth, one-hot, of two classes in turn."""
    g = torch.Generator().manual_seed(seed)
    soft = (torch.randn(rows, classes, generator=g) * 3).softmax(-1)
    one_hot = torch_functional.one_hot(torch.randint(0, classes, (rows,), generator=g), classes).float()
    soft[1::3] = one_hot[1::3]
    soft[2::3] = 0.75 * one_hot[2::3] + 0.25 * one_hot.roll(1, 0)[2::3]
    return soft


def build(device, dtype, rows=5, classes=50, networks=3, labels=True, ignored=(), mask=(), soft=None, **looks):
    logits, target = make(rows, classes, networks, dtype, device=device)
    if looks.get("rounded"):
        logits = [(z / 3).round() for z in logits]
    if looks.get("others"):
        logits = [z.to(other) for z, other in zip(logits, (dtype, *DTYPES), strict=False)]
    target[list(ignored)] = -100
    if soft:
        target = probabilities(rows, classes).to(device, dtype if soft is True else soft)
    counted = torch.tensor([r not in mask for r in range(rows)], device=device)
    return logits, target if labels else None, dict(mask=counted) if mask else {}


@over(CASES, PLACES)
def test_table(case, place, dtype, at):
    logits, target, options = build(at(place), dtype, **case.arguments)
    check(logits, target, **options)


def test_reference_is_the_definition_typed_again():
    logits, target = make(12, 19, 3, torch.float64)
    logits[1] = logits[1].round()
    with fastkd.use_backend("reference"):
        stats = F.group_stats(logits, target)
    for m, z in enumerate(logits):
        for r in range(12):
            for name, value in typed_again(z[r], target[r]).items():
                assert getattr(stats, name)[m, r].item() == pytest.approx(value, rel=1e-12, abs=1e-12), name


def test_the_reference_with_soft_labels_is_torchs_cross_entropy():
    logits, _ = make(12, 19, 2, torch.float64)
    soft = probabilities(12, 19).double()
    with fastkd.use_backend("reference"):
        stats = F.group_stats(logits, soft)
    for m, z in enumerate(logits):
        expected = torch_functional.cross_entropy(z, soft, reduction="none")
        torch.testing.assert_close(stats.ce[m], expected, rtol=1e-13, atol=0)
        hard = F.group_stats([z], soft.argmax(-1))
        assert torch.equal(stats.label_rank[m], hard.label_rank[0]) and torch.equal(stats.correct[m], hard.correct[0])


# --- ties, specials, difficult numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [5, 40, 300, 1000, 4104])  # the last in whole vectors, also below
@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_are_broken_as_by_argmax_and_the_first_index(classes, dtype, place, at):
    device = at(place)
    g = torch.Generator().manual_seed(classes)
    logits = torch.randint(0, 3, (64, classes), generator=g).to(device, dtype)
    largest = (logits == 2).nonzero()
    target = torch.zeros(64, dtype=torch.int64, device=device)
    for r in range(64):  # the first, the last or some tied class, or another one
        tied = largest[largest[:, 0] == r, 1]
        target[r] = tied[[0, -1, len(tied) // 2][r % 3]] if len(tied) and r % 4 else r % classes
    stats = check([logits], target)
    first = torch.tensor([row.tolist().index(max(row.tolist())) for row in logits], device=device)
    assert torch.equal(logits.argmax(-1), first)  # what torch does: the first of equal logits
    assert torch.equal(stats.correct[0], first == target)
    assert bool((stats.label_rank[0][stats.correct[0]] == 0).all())
    assert bool(((stats.label_rank[0] == 0) & ~stats.correct[0]).any())  # tied with the winner, but later: rank 0


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [name for name, _ in difficult_logits((1, 3))])
def test_difficult_logits(name, place, at):
    device = at(place)
    logits = [dict(difficult_logits((6, 70), seed=seed))[name].to(device) for seed in (0, 1)]
    check(logits, torch.tensor([1, 4, 7, 10, 1, 2], device=device))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [20, 400, 4104])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_huge_logits_and_masks_by_the_smallest_number(classes, dtype, place, at):
    """A mask of finfo.min must weigh nothing, in the entropy either."""
    (logits,), target = make(6, classes, 1, dtype, device=at(place))
    lowest, largest = torch.finfo(dtype).min, torch.finfo(dtype).max
    logits[0, 1:] = lowest
    logits[1, ::2] = lowest
    logits[2, 3] = largest
    logits[3, 3], logits[3, 4] = largest, lowest
    logits[4] = lowest
    logits[5, :-1] = lowest
    target[:] = torch.tensor([0, 1, 3, 3, 2, classes - 1])
    stats = check([logits], target)
    assert float(stats.entropy[0, [0, 2, 3, 5]].max()) < 1e-30


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [40, 300, 4104])
def test_masked_classes(classes, place, at):
    logits, target = make(5, classes, 2, device=at(place))
    for z in logits:
        z[:, 5:9] = -math.inf
        z[2, 1:] = -math.inf  # one class is left
        z[3] = -math.inf  # none is
    target[:] = torch.tensor([1, 6, 0, 0, 2])
    stats = check(logits, target)
    assert stats.ce[0, 1] == math.inf and stats.label_rank[0, 1] == classes - 4
    assert stats.margin[0, 2] == stats.confidence[0, 2] == 1 and stats.entropy[0, 2] == 0
    assert stats.ce[:, 3].isnan().all() and stats.label_rank[:, 3].tolist() == [classes] * 2
    assert bool(stats.ce[:, [0, 4]].isfinite().all())


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("classes", [40, 300, 4104])
def test_nan_and_infinity_reach_the_statistics_of_their_row_alone(value, classes, place, at):
    logits, target = make(4, classes, 2, device=at(place))
    logits[1][1, 7] = value
    logits[1][3] = value
    target[1], target[3] = 7, -100
    stats = check(logits, target)
    for name in NUMBERS:
        assert getattr(stats, name)[1].isnan().tolist() == [False, True, False, True]
    assert not stats.ce[0, :3].isnan().any()
    assert stats.label_rank[1, [1, 3]].tolist() == [classes, -1] and not stats.correct[1, [1, 3]].any()


@pytest.mark.parametrize("place", PLACES)
def test_margin_of_near_ties_does_not_cancel(place, at):
    device = at(place)
    logits = torch.zeros(3, 40, device=device)
    logits[:, 3] = 5.0
    logits[:, 9] = torch.tensor([5.0, 5.0 - 2**-20, 5.0 - 2**-12], device=device)
    stats = check([logits], torch.full((3,), 9, device=device))
    exact = torch.softmax(logits.double(), -1)
    torch.testing.assert_close(stats.margin[0].double(), exact[:, 3] - exact[:, 9], rtol=1e-6, atol=0)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("classes", [40, 300, 9000])
def test_soft_labels_beside_masked_classes_and_nan(classes, place, at):
    """A class of probability 0 adds nothing, be it masked or not; one of more makes the cross-entropy infinite."""
    (logits,), _ = make(5, classes, 1, device=at(place))
    soft = torch.zeros_like(logits)
    soft[:, 0], soft[:, 9] = 0.75, 0.25
    logits[0, 20:] = -math.inf
    logits[1, 9] = -math.inf
    logits[2, 0] = -math.inf
    logits[3, 30] = math.nan
    logits[4, -1] = 60.0  # a maximum that comes late
    stats = check([logits], soft)
    assert stats.ce[0].isinf().tolist() == [False, True, True, False, False]
    assert stats.ce[0].isnan().tolist() == [False, False, False, True, False]
    masked = check([logits], soft, mask=torch.tensor([True, False, False, False, True], device=logits.device))
    assert masked.labelled()[0].tolist() == [True, False, False, False, True]


@pytest.mark.parametrize("place", PLACES)
def test_the_largest_class_of_soft_labels_may_be_ignore_index(place, at):
    """ignore_index does nothing to probabilities; a tie is the first class."""
    logits, _ = make(2, 6, 1, device=at(place))
    soft = torch.tensor([[0, 0, 0.5, 0.5, 0, 0], [0, 0, 0, 0, 0, 1.0]], device=logits[0].device)
    stats = check(logits, soft, ignore_index=2)
    hard = F.group_stats(logits, torch.tensor([2, 5], device=logits[0].device))
    assert stats.labelled().all() and torch.equal(stats.label_rank, hard.label_rank)


@pytest.mark.parametrize("place", PLACES)
def test_networks_of_other_dtypes_are_what_each_is_alone(place, at):
    logits, target = make(7, 33, 4, device=at(place))
    dtypes = torch.bfloat16, torch.float32, torch.float16, torch.bfloat16
    mixed = [z.to(dtype) for z, dtype in zip(logits, dtypes, strict=True)]
    stats = F.group_stats(mixed, target)
    for m, z in enumerate(mixed):
        for a, b in zip(stats, F.group_stats([z], target), strict=True):
            assert torch.equal(a[m], b[0])


# --- labels, shapes, layouts ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", PLACES)
def test_rows_without_a_label(place, at):
    logits, target = make(6, 20, 2, device=at(place))
    expected = F.group_stats(logits, target)
    target[[0, 4]] = 7
    stats = F.group_stats(logits, target, ignore_index=7)
    none = F.group_stats(logits)
    gone = target == 7
    assert stats.ce[:, gone].isnan().all() and none.ce.isnan().all()
    assert (stats.label_rank[:, gone] == -1).all() and (none.label_rank == -1).all()
    assert not stats.correct[:, gone].any() and not none.correct.any()
    assert torch.equal(stats.labelled(), ~gone.expand(2, 6)) and not none.labelled().any()
    assert torch.equal(stats.ce[:, ~gone], expected.ce[:, ~gone])
    for name in ("confidence", "entropy", "margin"):  # these need no label
        assert torch.equal(getattr(stats, name), getattr(expected, name))
        assert torch.equal(getattr(none, name), getattr(expected, name))


@pytest.mark.usefixtures("values_unreadable")
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("bad", [-1, 6, 2**40, -(2**62)])
def test_a_target_that_cannot_be_checked_is_no_label(bad, place, at):
    """As on a GPU, where reading the target would wait; no access out of range."""
    device = at(place)
    stats = check([torch.randn(4, 6, device=device)] * 2, torch.tensor([0, bad, 2, -100], device=device))
    assert stats.labelled().tolist() == [[True, False, True, False]] * 2
    assert stats.ce.isnan().tolist() == [[False, True, False, True]] * 2


@pytest.mark.parametrize("place", PLACES)
def test_leading_dimensions_lists_and_stacks(place, at):
    logits, target = make(6, 33, 2, device=at(place))
    flat = F.group_stats(logits, target)
    shaped = torch.stack(logits).reshape(2, 2, 3, 33)
    for given_logits in (shaped, list(shaped), tuple(shaped)):
        for a, b in zip(F.group_stats(given_logits, target.reshape(2, 3).int()), flat, strict=True):
            assert a.shape == (2, 6) and torch.equal(a, b)
    one = F.group_stats([z[0] for z in logits], target[0])
    assert one.ce.shape == (2, 1) and torch.equal(one.ce, flat.ce[:, :1])


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_class_dim_of_maps(memory_format, place, at):
    g = torch.Generator().manual_seed(0)
    maps = [torch.randn(2, 4, 4, 4, generator=g).to(memory_format=memory_format, device=at(place)) for _ in range(2)]
    target = torch.randint(0, 4, (2, 4, 4), generator=g).to(maps[0].device)
    soft, mask = maps[0].softmax(1), target > 0
    moved = [z.permute(0, 2, 3, 1).reshape(-1, 4) for z in maps]
    for labels, flat in (
        (target, target.reshape(-1)), (soft, soft.permute(0, 2, 3, 1).reshape(-1, 4)), (None, None)
    ):  # fmt: skip
        expected = F.group_stats(moved, flat, mask=mask.reshape(-1))
        for logits in (maps, torch.stack(maps)):
            for class_dim in (1, -3):
                actual = F.group_stats(logits, labels, mask=mask, class_dim=class_dim)
                torch.testing.assert_close(actual, expected, equal_nan=True)


def test_maps_without_labels_warn_once_that_their_width_is_taken_for_classes():
    _inputs._warned_of_maps.discard("group_stats")
    maps = [torch.randn(1, 2, 1, 3)]
    told = r"group_stats: the classes of logits\[0\] \[1, 2, 1, 3\] were taken from the last dimension; class_dim=1"
    with pytest.warns(UserWarning, match=told) as caught:
        F.group_stats(maps)
        F.group_stats(maps)
    assert len(caught) == 1 and caught[0].filename == __file__
    _inputs._warned_of_maps.discard("group_stats")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        F.group_stats(maps, class_dim=1)
        F.group_stats(maps, torch.zeros(1, 2, 1, dtype=torch.int64))


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("labels", [True, False])
def test_empty_batch(labels, place, at):
    logits, target = make(0, 20, 2, device=at(place))
    stats = check(logits, target if labels else None)
    assert all(t.shape == (2, 0) for t in stats)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("classes", [64, 67])
def test_layouts_give_the_same_bits(layout, classes, place, at):
    logits, target = make(5, classes, 3, device=at(place))
    expected = F.group_stats(logits, target)
    for a, b in zip(F.group_stats(LAYOUTS[layout](torch.stack(logits)), target), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", PLACES)
def test_broadcast_inputs(place, at):
    logits, target = make(5, 40, 2, device=at(place))
    check([logits[0][:1].expand(5, 40), logits[1][:, :1].expand(5, 40)], target)


def test_one_read_of_each_network_and_no_copy():
    from torch.utils._python_dispatch import TorchDispatchMode

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function.name())
            return function(*args, **(kwargs or {}))

    logits, target = make(8, 40, 3)
    stacked, padded = torch.stack(logits), torch.cat([torch.stack(logits)] * 2, -1)[..., :40]
    tokens = [z.reshape(2, 4, 40)[:, :-1] for z in logits]
    maps = [z.reshape(2, 2, 2, 40).movedim(-1, 1) for z in logits]  # channels_last
    views = {"aten::unbind.int", "aten::view", "aten::permute", "aten::reshape"}
    calls = [(given, target, -1) for given in (logits, stacked, padded, list(padded), [z.bfloat16() for z in logits])]
    calls += [(tokens, target[:6].view(2, 3), -1), (maps, target.view(2, 2, 2), 1), (logits, logits[0].softmax(-1), -1)]
    for given_logits, labels, class_dim in calls:
        names = []
        with Recorder():
            F.group_stats(given_logits, labels, class_dim=class_dim)
        looks_at_target = {"aten::aminmax", "aten::_local_scalar_dense", "aten::min", "aten::detach"}
        assert set(names) <= {"fastkd::group_stats"} | views | looks_at_target, names
        assert names.count("fastkd::group_stats") == 1


@pytest.mark.parametrize("place", PLACES)
def test_rows_of_a_slice_of_a_sequence(place, at):
    logits, target = make(40, 33, 2, device=at(place))
    longer = [z.reshape(2, 4, 5, 33)[:, :3, 1:] for z in logits]
    labels = target.reshape(2, 4, 5)[:, :3, 1:]
    expected = F.group_stats([z.reshape(-1, 33) for z in longer], labels.reshape(-1))
    for a, b in zip(F.group_stats(longer, labels), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_offsets_of_more_than_31_bits(dtype, monkeypatch):
    """Rows that lie 2^31 elements and more from the first; the memory between them is never touched."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    classes, stride = 40, 2**30 + 8
    far = torch.empty(2 * stride + classes, dtype=dtype).as_strided((3, classes), (stride, 1))
    (near,), target = make(3, classes, 1, dtype)
    far.copy_(near)
    for a, b in zip(F.group_stats([far], target), F.group_stats([near], target), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("place", ["cpu", "simt"])
@pytest.mark.parametrize("networks", [15, 16, 17, 33])
def test_more_networks_than_a_launch_takes(networks, place, at):
    logits, target = make(3, 20, networks, device=at(place))
    check(logits, target)


@pytest.mark.parametrize("classes", [1024, 1030, 4096, 4100, 8192, 8200, 20001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_every_launch_policy(classes, dtype, at):
    logits, target = make(2, classes, 2, dtype, device=at("simt"))
    check(logits, target)


@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_rows_of_several_tiles(place, at):
    """Longer than the CUDA kernel's registers: maxima that change late, masked and NaN parts, ties across tiles."""
    classes = 20001
    (logits,), target = make(9, classes, 1, device=at(place))
    logits[0, -1] = logits[0].max() + 50  # all sums so far fall by e^-50
    logits[1] = torch.arange(classes) / 100  # the maximum rises in every tile
    logits[2, :9000] = -math.inf  # a first tile without a class
    logits[3, 9000:] = -math.inf
    logits[4, [3, 19000]] = 40.0  # a tie across tiles
    logits[5, 19000] = math.nan
    logits[6, :9000] = torch.finfo(torch.float32).min
    logits[7, 100] = torch.finfo(torch.float32).min
    logits[7, -1] = 1e30
    logits[8] = -math.inf
    target[:] = torch.tensor([5, classes - 1, 10000, 3, 19000, 19000, 10000, classes - 1, 0])
    stats = check([logits], target)
    assert stats.label_rank[0, 4] == 0 and not stats.correct[0, 4] and stats.margin[0, 4] == 0


@pytest.mark.parametrize("classes", [100, 1000, 9000])
def test_every_schedule_gives_the_same_bits(classes, at, simt):
    from simt.fixtures import in_every_schedule

    logits, target = make(5 if classes < 9000 else 1, classes, 2, device=at("simt"))
    results = in_every_schedule(simt, lambda: F.group_stats(logits, target))
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_for_any_number_of_threads(dtype):
    logits, target = make(300, 257, 3, dtype)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append(F.group_stats(logits, target))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0], strict=True))


EXTREMES = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 60.0, -60.0, 3e4, -3e4, math.inf, -math.inf, math.nan])


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
@pytest.mark.parametrize("place", ["cpu", "simt"])
def test_any_shape_stride_dtype_label_and_extreme(place, at, data):
    at(place)
    draw = data.draw
    networks, rows, classes = draw(st.integers(1, 4)), draw(st.integers(0, 4)), draw(st.integers(2, 70))
    dtype, layout = draw(st.sampled_from(DTYPES)), LAYOUTS[draw(st.sampled_from(list(LAYOUTS)))]
    logits, target = make(rows, classes, networks, dtype, draw(st.integers(0, 9)), scale=draw(st.sampled_from([1, 30])))
    for z in logits:
        for value in draw(st.lists(EXTREMES, max_size=4)) if rows else ():
            z[draw(st.integers(0, rows - 1)), draw(st.integers(0, classes - 1))] = value
    for r in range(rows):
        target[r] = draw(st.one_of(st.just(-100), st.integers(0, classes - 1), st.just(int(target[r]))))
    soft = probabilities(rows, classes).to(draw(st.sampled_from(DTYPES)))
    check(list(layout(torch.stack(logits))) if rows else logits, draw(st.sampled_from([target, soft, None])))
