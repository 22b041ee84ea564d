"""Data: splits, augmentation, order of the batches."""

import numpy as np
import pytest
import torch

from fastkd import data
from fastkd.data.images import Augmentation, ImageSet, InMemory, shift_and_flip
from fastkd.data.seeding import stratified_order


def stacked(dataset):
    return torch.stack([image for image, _ in dataset])


def labels_of(dataset):
    return [label for _, label in dataset]


def test_digits():
    got = data.load("digits", augment=False)
    assert (got.num_classes, got.image_size, got.channels) == (10, 8, 1)
    assert got.classes == tuple("0123456789") and got.validation is None
    assert (len(got.train), len(got.test)) == (1258, 539)
    image, label = got.train[0]
    assert image.shape == (1, 8, 8) and image.dtype == torch.float32 and type(label) is int
    everything = torch.cat([stacked(got.train), stacked(got.test)])
    assert abs(everything.mean()) < 1e-3 and abs(everything.std() - 1) < 1e-3
    assert len(everything.unique(dim=0)) == 1797  # no image is in both parts
    counts = np.bincount(labels_of(got.test))
    assert counts.min() >= 52 and counts.max() <= 55


def test_test_images_do_not_depend_on_the_seed():
    first, second = (data.load("digits", seed=s, validation=0.2, train_size=100) for s in (0, 1))
    assert torch.equal(stacked(first.test), stacked(second.test))
    assert not np.array_equal(first.train.rows, second.train.rows)


def test_image_size_resizes():
    got = data.load("digits", image_size=32)
    assert got.image_size == 32 and got.train[0][0].shape == (1, 32, 32) and got.test[0][0].shape == (1, 32, 32)
    small, large = data.load("digits").test[3][0], got.test[3][0]
    pooled = torch.nn.functional.avg_pool2d(large, 4)
    assert torch.corrcoef(torch.stack([small.flatten(), pooled.flatten()]))[0, 1] > 0.95


def test_plain_images_are_those_without_augmentation():
    augmented, plain = (data.load("digits", train_size=30, augment=on) for on in (True, False))
    assert torch.equal(stacked(augmented.with_views(2).train.plain()), stacked(plain.train))
    assert augmented.train.augmentation is not None and not torch.equal(stacked(augmented.train), stacked(plain.train))


def test_train_size_is_stratified_and_nested():
    sizes = {n: set(data.load("digits", train_size=n, seed=3).train.rows.tolist()) for n in (20, 100, 400)}
    assert [len(rows) for rows in sizes.values()] == [20, 100, 400]
    assert sizes[20] < sizes[100] < sizes[400]
    counts = np.bincount(data.load("digits", train_size=100, seed=3).train.labels)
    assert counts.min() >= 9 and counts.max() <= 11


def test_label_noise_is_the_share_asked_for_and_each_other_class_as_likely():
    clean, noisy = (data.load("digits", seed=5, label_noise=share).train for share in (0.0, 0.4))
    wrong = clean.labels != noisy.labels
    assert abs(wrong.mean() - 0.4) < 4 * (0.24 / 1258) ** 0.5  # four standard deviations
    steps = np.bincount((noisy.labels - clean.labels)[wrong] % 10, minlength=10)
    assert steps[0] == 0 and abs(steps[1:] / wrong.sum() - 1 / 9).max() < 4 * (8 / 81 / wrong.sum()) ** 0.5
    assert torch.equal(stacked(clean.plain()), stacked(noisy.plain()))
    assert labels_of(noisy) == noisy.labels.tolist() == labels_of(noisy.with_views(2)) == labels_of(noisy.plain())


def test_label_noise_is_of_the_training_images_and_of_the_seed_alone():
    clean, noisy = (data.load("digits", seed=5, validation=100, label_noise=share) for share in (0.0, 0.3))
    for part in ("validation", "test"):
        assert np.array_equal(getattr(clean, part).labels, getattr(noisy, part).labels)
    few = data.load("digits", seed=5, validation=100, label_noise=0.3, train_size=200).train
    of_image = dict(zip(noisy.train.rows.tolist(), noisy.train.labels.tolist(), strict=True))
    assert [of_image[row] for row in few.rows.tolist()] == few.labels.tolist()
    other = data.load("digits", seed=6, label_noise=0.3).train
    assert (other.labels != data.load("digits", seed=5, label_noise=0.3).train.labels).any()
    assert clean.description != noisy.description
    assert clean.description == data.load("digits", seed=5, validation=100).description
    more = data.load("digits", seed=5, validation=100, label_noise=0.6).train.labels
    wrong = noisy.train.labels != clean.train.labels
    assert (more[wrong] == noisy.train.labels[wrong]).all() and (more != clean.train.labels).sum() > wrong.sum()


@pytest.mark.parametrize("share", [1, -0.1, True, "0.1", float("nan")])
def test_label_noise_is_a_probability(share):
    with pytest.raises(ValueError, match=r"^load: label_noise must be a probability from 0 to below 1, got "):
        data.load("digits", label_noise=share)


@pytest.mark.parametrize("validation, count", [(0.1, 126), (200, 200)])
def test_validation_split(validation, count):
    plain = data.load("digits", validation=validation, augment=False)
    other = data.load("digits", validation=validation, train_size=50, augment=True, views=2)
    assert len(plain.validation) == count and len(plain.train) == 1258 - count
    assert not set(plain.validation.rows) & set(plain.train.rows)
    assert np.array_equal(plain.validation.rows, other.validation.rows)
    assert not set(other.train.rows) & set(other.validation.rows)
    assert plain.validation.augmentation is None and other.validation.augmentation is None
    assert torch.equal(other.validation[0][0], plain.validation[0][0])
    counts = np.bincount(plain.validation.labels)
    assert counts.max() - counts.min() <= 3
    moved = data.load("digits", validation=validation, seed=1)
    assert not np.array_equal(plain.validation.rows, moved.validation.rows)


@pytest.mark.parametrize("counts", [(5, 5, 5), (100, 10, 1), (7, 0, 3)])
def test_prefixes_of_the_stratified_order(counts):
    labels = np.repeat(np.arange(len(counts)), counts)
    order = stratified_order(labels, 0)
    assert sorted(order) == list(range(len(labels)))
    for n in range(len(labels) + 1):
        share = np.array(counts) * n / len(labels)
        assert np.abs(np.bincount(labels[order[:n]], minlength=len(counts)) - share).max() <= 1
    assert not np.array_equal(order, stratified_order(labels, 1)) and np.array_equal(order, stratified_order(labels, 0))


def test_shift_and_flip_against_the_plain_rule():
    x = torch.arange(2 * 3 * 4 * 4, dtype=torch.float32).view(2, 3, 4, 4) + 1
    draws = np.array([[0.0, 0.99, 0.2, 0.0], [0.5, 0.5, 0.8, 0.0]])  # up-left corner, mirrored; centre, as it is
    out = shift_and_flip(x, draws, 1, True)
    padded = torch.nn.functional.pad(x, (1, 1, 1, 1))
    assert torch.equal(out[0], padded[0, :, 0:4, 2:6].flip(-1))
    assert torch.equal(out[1], x[1])
    assert torch.equal(shift_and_flip(x, draws, 0, False), x)


def test_augmentation_reaches_every_shift_and_flips_half():
    one = torch.zeros(4000, 1, 5, 5)
    one[:, :, 2, 1] = 1.0
    many = ImageSet(
        InMemory(one), np.zeros(4000, dtype=np.int64), None, 5, (0.0,), (1.0,), augmentation=Augmentation(1, True)
    )
    total = stacked(many).sum((0, 1))  # where the bright pixel went
    assert total[1:4, 0:5].gt(0).all() and total.sum() == 4000
    assert total[0].sum() == 0 and total[4].sum() == 0
    torch.testing.assert_close(total[1:4].sum(1), torch.full((3,), 4000 / 3), rtol=0.1, atol=0)
    torch.testing.assert_close(total[:, :2].sum(), total[:, 3:].sum(), rtol=0.1, atol=0)


def test_digits_are_shifted_never_mirrored():
    got = data.load("digits", train_size=200)
    plain, moved = data.load("digits", train_size=200, augment=False).train, got.train
    assert got.train.augmentation == Augmentation(padding=1)
    background = plain.mean.flatten().neg() / plain.std.flatten()
    for i in range(50):
        padded = torch.nn.functional.pad(plain[i][0], (1, 1, 1, 1), value=float(background))
        shifts = [padded[:, a : a + 8, b : b + 8] for a in range(3) for b in range(3)]
        assert any(torch.allclose(moved[i][0], s) for s in shifts)


def test_augmentation_depends_on_seed_epoch_and_image_only():
    first, second, other = (data.load("digits", seed=s).train for s in (0, 0, 1))
    batch = torch.stack([image for image, _ in first.__getitems__([3, 1, 7])])
    assert torch.equal(batch[0], second[3][0]) and torch.equal(batch[2], second[7][0])
    assert torch.equal(stacked(first), stacked(second))
    before = stacked(first)
    first.set_epoch(1)
    assert not torch.equal(before, stacked(first))
    first.set_epoch(0)
    assert torch.equal(before, stacked(first))
    by_row = {int(row): i for i, row in enumerate(other.rows)}
    same = [torch.equal(first[i][0], other[by_row[int(row)]][0]) for i, row in enumerate(first.rows[:60])]
    assert not all(same)


def test_views_are_independent():
    got = data.load("digits", views=3)
    views, label = got.train[5]
    assert isinstance(views, tuple) and len(views) == 3 and type(label) is int
    batch, target = next(iter(data.loader(got.train, 64, shuffle=True)))
    assert len(batch) == 3 and all(v.shape == (64, 1, 8, 8) for v in batch) and target.shape == (64,)
    assert not torch.equal(batch[0], batch[1]) and not torch.equal(batch[1], batch[2])
    assert isinstance(got.test[0][0], torch.Tensor)
    assert torch.equal(got.train[5][0][0], data.load("digits").train[5][0])  # the first view is the single one


def batches(loader):
    return [(x.clone(), y.clone()) for x, y in loader]


def same(first, second):
    return len(first) == len(second) and all(
        torch.equal(a, c) and torch.equal(b, d) for (a, b), (c, d) in zip(first, second, strict=True)
    )


@pytest.fixture
def digits():
    return data.load("digits", train_size=70).train


@pytest.mark.parametrize("workers", [1, 2])
def test_batches_do_not_depend_on_the_workers(digits, workers):
    alone, helped = data.loader(digits, 32, shuffle=True), data.loader(digits, 32, shuffle=True, workers=workers)
    for epoch in (0, 1, 5):
        alone.sampler.set_epoch(epoch)
        helped.sampler.set_epoch(epoch)
        assert same(batches(alone), batches(helped))


def test_a_fresh_loader_continues_where_another_stopped(digits):
    first = data.loader(digits, 32, shuffle=True, seed=4)
    passes = [batches(first) for _ in range(3)]  # epochs count by themselves
    assert not same(passes[0], passes[1])
    assert sorted(passes[0][0][1].tolist() + passes[0][1][1].tolist() + passes[0][2][1].tolist()) == sorted(
        digits.labels.tolist()
    )
    resumed = data.loader(data.load("digits", train_size=70).train, 32, shuffle=True, seed=4)
    resumed.sampler.set_epoch(2)
    assert same(passes[2], batches(resumed))
    assert not same(passes[0], batches(data.loader(digits, 32, shuffle=True, seed=5)))


def test_order_changes_with_the_epoch():
    loader = data.loader(data.load("digits", train_size=70, augment=False).train, 70, shuffle=True)
    first, second = (batches(loader)[0][1] for _ in range(2))
    assert not torch.equal(first, second) and torch.equal(first.sort().values, second.sort().values)


def test_loader_without_shuffle_keeps_the_order_and_drops_only_if_asked(digits):
    loader = data.loader(digits, 32, shuffle=False)
    assert torch.cat([y for _, y in loader]).tolist() == digits.labels.tolist() and len(loader) == 3
    assert len(batches(data.loader(digits, 32, shuffle=True, drop_last=True))) == 2


class Noisy(torch.utils.data.Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(2), index


def test_workers_of_other_datasets_are_seeded_by_the_epoch():
    first, second = (data.loader(Noisy(), 2, shuffle=True, workers=1) for _ in range(2))
    batches(first)
    second.sampler.set_epoch(1)
    assert same(batches(first), batches(second))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"batch_size": 0}, ["batch_size", "0"]),
        ({"batch_size": 4, "workers": -1}, ["workers", "-1"]),
        ({"batch_size": 4, "seed": -1}, ["seed", "-1"]),
        ({"batch_size": 71, "drop_last": True}, ["71", "70 images"]),
    ],
)
def test_wrong_loaders(digits, options, words):
    with pytest.raises(ValueError, match=r"^loader: ") as caught:
        data.loader(digits, shuffle=True, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_with_views_is_the_data_loaded_with_views():
    one, three = data.load("digits", train_size=50, seed=3), data.load("digits", train_size=50, seed=3, views=3)
    other = one.with_views(3)
    for a, b in zip(other.train[7][0], three.train[7][0], strict=True):
        assert torch.equal(a, b)
    assert torch.equal(one.train[7][0], three.train[7][0][0])  # the first view stays, and the data too
    assert other.train.store is one.train.store and other.test is one.test
    with pytest.raises(ValueError, match="views must be an integer of at least 1, got 0"):
        one.with_views(0)
