"""What frozen networks say, known beforehand: `Method.phases(taught=)`, and the files of `fastkd.data.LogitsCache`."""

import json
import os
import random
import signal
import time

import numpy as np
import pytest
import torch
from methods_helpers import batch, gradients, mlp, run
from torch import nn
from train_helpers import one_thread  # noqa: F401

from fastkd import data as datasets
from fastkd.data import LogitsCache
from fastkd.data.logits import _checks, identify
from fastkd.data.parts import RankPart
from fastkd.methods import AVER, CE, CTSLMKT, DGKD, KD, TAKD, Method, Phase

CLASSES, IMAGES = 5, 40


def counted(network: nn.Module, calls: list) -> nn.Module:
    network.register_forward_hook(lambda module, args, output: calls.append(len(args[0])))
    return network


# --- Method.phases(taught=) ---


def ctsl(peers, teachers, **options):
    return CTSLMKT(peers, teachers, beta=0.0, **options)  # without relations: an mlp gives no embedding


@pytest.mark.parametrize("make", [
    lambda: KD(mlp(1), mlp(2)),
    lambda: AVER(mlp(1), [mlp(2), mlp(3)]),
    lambda: TAKD(mlp(1), [mlp(2), mlp(3)]),
    lambda: DGKD(mlp(1), [mlp(2), mlp(3), mlp(4)], lam=0.5, drop="fixed"),
    lambda: ctsl([mlp(1), mlp(5)], [mlp(2), mlp(3)]),
])  # fmt: skip
@pytest.mark.parametrize("chunks", [1, 3])
def test_known_logits_stand_for_the_networks(make, chunks):
    x, y = batch()
    plain, method, calls = make(), make(), []
    names = method.frozen_names
    known = {name: method.get_submodule(name)(x).detach() for name in names}
    for name in names:
        counted(method.get_submodule(name), calls)
    loss = run(plain, x, y, chunks)
    (phase,) = method.phases(x, y, chunks=chunks, taught=known)
    losses = [loss.backward() or loss.detach() for loss in phase.losses]
    assert not calls
    assert abs(sum(losses) - loss) < 1e-12  # float64: cut after the pass, or before it
    for name in plain.learner_names:
        found, expected = gradients(method.get_submodule(name)), gradients(plain.get_submodule(name))
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    run(method, x, y, chunks)
    assert calls  # only that batch was known


def test_a_function_is_asked_for_the_rows_of_each_chunk():
    x, y = batch()
    calls, asked = [], []
    method = DGKD(mlp(1), [counted(mlp(2), calls), mlp(3)])

    def taught(name, rows, run):
        asked.append((name, rows.start, rows.stop))
        return run()

    (phase,) = method.phases(x, y, chunks=2, taught=taught)
    assert not asked  # a chunk's networks run when it is asked for
    assert len(list(phase.losses)) == 2
    assert asked == [("guides.0", 0, 5), ("guides.1", 0, 5), ("guides.0", 5, 10), ("guides.1", 5, 10)]
    assert calls == [5, 5]


def test_a_dropped_guide_is_not_asked_for():
    asked = []
    method = DGKD(mlp(1), [mlp(2), mlp(3), mlp(4)], drop="fixed", drop_num=2)
    list(method.phases(*batch(), taught=lambda name, rows, run: asked.append(name) or run()))
    assert len(asked) == 1


def test_networks_that_are_not_known_are_run():
    x, y = batch()
    calls = [], []
    method = AVER(mlp(1), [counted(mlp(2), calls[0]), counted(mlp(3), calls[1])])
    known = {"guides.0": method.guides[0](x).detach()}
    calls[0].clear()
    list(method.phases(x, y, taught=known))
    assert calls == ([], [10])


class Mixed(Method):
    """Asks its teacher about other inputs than the batch's."""

    teaches_logits = True

    def __init__(self, student, teacher):
        super().__init__(learners={"student": student}, frozen={"teacher": teacher})

    def iteration(self, batch, generator):
        def terms(inputs, target):
            mixed = inputs.flip(0)
            loss = (self.student(mixed) - self.teach(self.teacher, mixed)).square().mean()
            return loss, {"mse": loss.detach()}

        yield Phase([self.student], terms, batch)


def test_other_inputs_than_the_batchs_are_not_known():
    (phase,) = Mixed(mlp(1), mlp(2)).phases(*batch(), taught=lambda *arguments: pytest.fail("asked"))
    assert phase.loss > 0


def test_an_iterator_that_was_left_does_not_answer_for_the_next():
    x, y = batch()
    method = KD(mlp(1), counted(mlp(2), calls := []))
    left = method.phases(x, y, taught={"guides.0": torch.zeros(10, 7, dtype=torch.float64)})
    next(left)
    second = method.phases(x, y, taught={"guides.0": torch.ones(10, 7, dtype=torch.float64)}, chunks=2)
    phase = next(second)
    left.close()  # after the second one was begun
    assert len(list(phase.losses)) == 2 and not calls
    list(second)
    run(method, x, y)
    assert calls == [10]


def test_chunks_that_are_closed_late_do_not_hide_the_next_batch():
    """A loop takes the last chunk, but not the end behind it; that comes when the phase is collected."""
    method, asked = AVER(mlp(1), [mlp(2), mlp(3)]), []
    (before,) = method.phases(*batch(), chunks=2, taught=lambda name, rows, run: run())
    _ = [next(before.losses) for _ in range(2)]

    def taught(name, rows, run):
        before.losses.close()
        asked.append(name)
        return run()

    list(method.phases(*batch(), taught=taught))
    assert asked == ["guides.0", "guides.1"]


@pytest.mark.parametrize("make, taught, message", [
    (lambda: CE(mlp(1)), {}, "CE: taught must be None: .* or has none, got dict"),
    (lambda: ctsl([mlp(1), mlp(2)], (), self_learning=False), {}, "CTSLMKT: taught must be None"),
    (lambda: ctsl([mlp(1), mlp(2)], [mlp(3), mlp(4)], views=True), {}, "CTSLMKT: taught must be None"),
    (lambda: KD(mlp(1), mlp(2)), {"teacher": torch.zeros(10, 7)}, "KD: taught must be .* guides.0, got teacher"),
    (lambda: KD(mlp(1), mlp(2)), [torch.zeros(10, 7)], "KD: taught must be a dict .*, got list"),
])  # fmt: skip
def test_what_cannot_be_known_is_refused_at_once(make, taught, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make().phases(*batch(), taught=taught)


# --- which images a batch holds ---


def images_of(**options) -> datasets.Data:
    sizes = dict(num_classes=CLASSES, channels=1, train_images=IMAGES, test_images=10, image_size=8)
    return datasets.load("fake", **sizes | options)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_loader_says_which_images_a_batch_holds(workers):
    data = images_of()
    batches = datasets.loader(data.train, 16, shuffle=True, workers=workers)
    for epoch in range(2):
        for taken in (0, 1):
            seen = []
            for x, y in batches.go_on(epoch, taken):
                data.train.set_epoch(epoch)
                for row, image, label in zip(batches.rows.tolist(), x, y.tolist(), strict=True):
                    assert torch.equal(data.train[row][0], image) and data.train[row][1] == label
                seen += batches.rows.tolist()
            assert len(set(seen)) == len(seen) == IMAGES - 16 * taken


def test_a_process_without_rows_has_images_of_no_row():
    data = images_of(train_images=34)
    parts = [datasets.loader(RankPart(data.train, rank, 2), 32, shuffle=False) for rank in range(2)]
    rows = [[batches.rows.tolist() for _ in batches] for batches in parts]
    assert rows == [[[*range(16)], [32, 33]], [[*range(16, 32)], [-1, -1]]]


def test_other_data_sets_have_no_rows():
    batches = datasets.loader([(torch.zeros(1), 0)] * 4, 2, shuffle=False)
    assert [batches.rows for _ in batches] == [None, None]


def test_variants_repeat_the_augmentation():
    data, other = images_of(variants=2), images_of()
    seen = []
    for epoch in range(4):
        data.train.set_epoch(epoch)
        other.train.set_epoch(epoch % 2)
        assert data.train.variant == other.train.variant == epoch % 2
        seen.append(torch.stack([image for image, _ in data.train]))
        assert torch.equal(seen[-1], torch.stack([image for image, _ in other.train]))
    assert torch.equal(seen[0], seen[2]) and not torch.equal(seen[0], seen[1])
    for wrong in (-1, True, 1.5):
        with pytest.raises(ValueError, match=r"^load: variants must be an integer of at least 0"):
            images_of(variants=wrong)


# --- LogitsCache ---


def net(seed: int = 0) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Flatten(), nn.Linear(64, CLASSES)).requires_grad_(False).eval()


def cache_of(folder, data=None, network=None, **options) -> LogitsCache:
    images = (data or images_of()).train
    return LogitsCache(folder, images, {"teacher": network or net()}, classes=CLASSES, **options)


def files(folder, pattern="v*.npy"):
    return sorted(folder.glob(f"*/{pattern}"))


def ask(cache, rows, values, variant=0, part=slice(None)):
    """The logits of these rows, and whether a network was run for them; one that would say `values`."""
    calls = []
    rows = np.asarray(rows)

    def run():
        calls.append(1)
        return values[rows[part]] if isinstance(values, torch.Tensor) else values()

    return cache.taught(rows, variant)("teacher", part, run), bool(calls)


VALUES = torch.randn(IMAGES, CLASSES, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float16])
def test_rows_are_computed_once_and_read_from_then_on(tmp_path, given):
    values = VALUES.to(given)
    cache = cache_of(tmp_path)
    for again in range(2):
        for rows in ([3, 1, 7], [0, 2, 39]):
            found, ran = ask(cache, rows, values)
            assert torch.equal(found, values[rows]) and found.dtype == given and ran == (not again)
    assert not ask(cache, [1, 39, 0], values)[1]  # in other batches
    assert ask(cache, [1, 39, 0], values, variant=2)[1]  # another augmentation
    assert (cache.read, cache.computed) == (9, 9)
    later = cache_of(tmp_path)
    found, ran = ask(later, [7, 3], values)
    assert torch.equal(found, values[[7, 3]]) and found.dtype == given and not ran
    logits = np.load(files(tmp_path)[1])  # the plain file, for whoever wants it
    assert logits.shape == (IMAGES, CLASSES) and torch.equal(torch.from_numpy(logits[7]), values[7].float())


def test_a_network_is_run_for_a_batch_with_a_new_row(tmp_path):
    cache = cache_of(tmp_path)
    ask(cache, [3, 1], VALUES)
    found, ran = ask(cache, [1, 2], VALUES + 1)
    assert ran and torch.equal(found, torch.stack([VALUES[1], VALUES[2] + 1]))  # what is there stays
    assert not ask(cache, [2, 1], VALUES)[1] and (cache.read, cache.computed) == (3, 3)


def test_rows_that_count_nowhere_are_zeros_and_are_not_kept(tmp_path):
    cache = cache_of(tmp_path)
    for number in range(3):
        found, ran = ask(cache, [-1, 5, -1], VALUES)
        assert ran == (number == 0) and torch.equal(found, torch.stack([0 * VALUES[5], VALUES[5], 0 * VALUES[5]]))
        assert not ask(cache, [-1, -1], VALUES)[1]
        assert ask(cache, [IMAGES - 1], VALUES)[1] == (number == 0)  # to which -1 would point
    assert (cache.read, cache.computed) == (4, 2)


def test_a_chunk_has_its_own_rows(tmp_path):
    cache = cache_of(tmp_path)
    found, ran = ask(cache, [4, 5, 6, 7], VALUES, part=slice(1, 3))
    assert ran and torch.equal(found, VALUES[[5, 6]])
    assert [ask(cache, [row], VALUES)[1] for row in (4, 5, 6, 7)] == [True, False, False, True]


def test_float16(tmp_path):
    cache = cache_of(tmp_path, dtype="float16")
    first, second = (ask(cache, [1, 2], VALUES)[0] for _ in range(2))
    assert torch.equal(first, second) and first.dtype == torch.float32  # the first epoch sees what the others see
    assert torch.equal(first, VALUES[[1, 2]].half().float()) and not torch.equal(first, VALUES[[1, 2]])
    assert np.load(files(tmp_path)[1]).dtype == np.float16
    with pytest.raises(ValueError, match="float16 cannot hold the logit 70000"):
        ask(cache, [3], VALUES * 0 + 7e4)
    infinite = VALUES * 0 - float("inf")
    assert torch.equal(ask(cache, [3], infinite)[0], infinite[[3]])


def test_two_runs_at_the_same_time_agree(tmp_path):
    """The second one to write a row takes what the first one wrote."""
    first, second = cache_of(tmp_path), cache_of(tmp_path)

    def slow():
        ask(second, [1, 2], VALUES)
        return VALUES[[2, 3]] + 1

    found, _ = ask(first, [2, 3], slow)
    assert torch.equal(found, torch.stack([VALUES[2], VALUES[3] + 1]))
    for cache in (first, second, cache_of(tmp_path)):
        assert torch.equal(ask(cache, [2, 3], VALUES)[0], found)


def keys(data=None, network=None, **options) -> str:
    return json.dumps(identify((data or images_of()).train, {"teacher": network or net()}, **options)["teacher"])


def test_the_key_changes_with_what_the_logits_depend_on(tmp_path):
    with torch.no_grad():
        other = net()
        other[1].bias[2] += 1e-6
    same_weights = nn.Sequential(nn.Flatten(0), *list(net())[1:])
    found = [keys(), keys(network=other), keys(network=same_weights), keys(amp="bf16"), keys(images_of(seed=1))]
    found += [keys(images_of(augment=False)), keys(images_of(train_size=30)), keys(images_of(image_size=9))]
    assert len(set(found)) == len(found)
    assert keys(images_of(variants=3)) == keys()  # the same images under the same numbers
    assert keys(images_of(seed=1, augment=False)) == keys(images_of(augment=False))
    cache = LogitsCache(tmp_path, images_of().train, {"a": net(), "b": net(), "c": other}, classes=CLASSES)
    assert len({network.folder for network in cache.networks.values()}) == 2  # names do not matter


def test_the_key_changes_with_image_files(tmp_path):
    from PIL import Image

    for part in ("train", "test"):
        for number in range(4):
            path = tmp_path / part / "ab"[number // 2] / f"{number % 2}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (number, 0, 0)).save(path)

    def key():
        return keys(datasets.load(f"imagefolder:{tmp_path}"))

    first = key()
    assert key() == first
    os.utime(tmp_path / "train" / "a" / "1.png", ns=(1, 1))
    changed = key()
    os.rename(tmp_path / "train" / "a" / "1.png", tmp_path / "train" / "a" / "2.png")
    assert len({first, changed, key()}) == 3


@pytest.mark.parametrize("suffix", [".npy", ".check.npy"])
@pytest.mark.parametrize("damage", ["cut", "empty", "longer", "other", "gone"])
def test_a_damaged_file_is_made_anew(tmp_path, suffix, damage):
    ask(cache_of(tmp_path), [1, 2], VALUES)
    (path,) = [path for path in files(tmp_path) if path.name == f"v0000{suffix}"]
    content, notes = path.read_bytes(), []
    if damage == "gone":
        path.unlink()
    elif damage == "other":
        np.save(path, np.zeros((3, 3)))
    else:
        path.write_bytes({"cut": content[:-3], "empty": b"", "longer": content + b"\0" * 4}[damage])
    cache = cache_of(tmp_path, note=notes.append)
    found, ran = ask(cache, [1, 2], VALUES)
    assert ran and torch.equal(found, VALUES[[1, 2]])
    assert notes == ([] if damage == "gone" else [f"{path} is truncated or damaged: it is made anew"])
    found, ran = ask(cache_of(tmp_path), [2, 1], VALUES)
    assert not ran and torch.equal(found, VALUES[[2, 1]]) and path.stat().st_size == len(content)


@pytest.mark.parametrize("suffix", [".npy", ".check.npy"])
def test_an_altered_row_is_one_that_is_not_there(tmp_path, suffix):
    ask(cache_of(tmp_path), [0, 1, 2], VALUES)
    (path,) = [path for path in files(tmp_path) if path.name == f"v0000{suffix}"]
    content = bytearray(path.read_bytes())
    content[-(IMAGES - 1) * (len(content) - 128) // IMAGES + 1] ^= 4  # of row 1
    path.write_bytes(content)
    found, ran = ask(cache_of(tmp_path), [0, 1, 2], VALUES)
    assert ran and torch.equal(found, VALUES[:3])
    cache = cache_of(tmp_path)
    assert not ask(cache, [0, 1, 2], VALUES)[1] and cache.computed == 0


def test_a_damaged_meta_file_is_made_anew_and_another_one_refused(tmp_path):
    ask(cache_of(tmp_path), [1], VALUES)
    (path,) = files(tmp_path, "meta.json")
    meta, notes = json.loads(path.read_text()), []
    assert meta["facts"]["data"]["count"] == IMAGES and meta["facts"]["network"] == "Sequential"
    path.write_text(path.read_text()[:40])
    assert ask(cache_of(tmp_path, note=notes.append), [1], VALUES)[1]
    assert notes == [f"{path} is damaged: the logits in its folder are made anew"]
    assert not ask(cache_of(tmp_path), [1], VALUES)[1]
    meta["facts"]["weights"] = "0"
    path.write_text(json.dumps(meta))
    with pytest.raises(ValueError, match="is of other networks or images than its folder's name says: delete"):
        cache_of(tmp_path)


def test_a_check_is_of_its_row_and_is_never_that_of_a_hole():
    zero = np.frombuffer(b"\x9d\x0a\xd9\x6d", dtype=np.float32)[None]  # the four bytes whose CRC-32 is 0
    assert _checks(zero, np.array([0])).tolist() == [1]
    assert len(set(_checks(np.ones((9, 3), np.float32), np.arange(9)).tolist())) > 4


def test_size_says_what_is_there(tmp_path):
    cache = cache_of(tmp_path)
    whole = 3 * IMAGES * (4 * CLASSES + 4)
    assert cache.size([0, 1, 2]) == (whole, 0)
    for variant in range(3):
        ask(cache, list(range(IMAGES)), VALUES, variant)
    assert cache.size([0, 1, 2]) == (whole, whole)
    assert cache_of(tmp_path / "none", dtype="float16").size([0]) == (IMAGES * (2 * CLASSES + 4), 0)


@pytest.mark.parametrize("arguments, message", [
    (lambda: (images_of().with_views(2).train, {}), "one view each, got 2 views"),
    (lambda: (RankPart(images_of().train, 0, 2), {}), "a data set of fastkd.data, .* got RankPart"),
    (lambda: (images_of().train, {"dtype": "int8"}), "dtype must be 'float32' or 'float16', got 'int8'"),
])  # fmt: skip
def test_what_cannot_be_kept_is_refused(tmp_path, arguments, message):
    images, options = arguments()
    with pytest.raises(ValueError, match=f"^LogitsCache: .*{message}"):
        LogitsCache(tmp_path, images, {"teacher": net()}, classes=CLASSES, **options)


@pytest.mark.parametrize("logits", [VALUES[:2], VALUES[:1, :4], VALUES[:1].long(), VALUES[0]])
def test_logits_of_another_form_are_refused(tmp_path, logits):
    with pytest.raises(ValueError, match=r"^LogitsCache: logits must be floating-point \[1, 5\], got torch"):
        ask(cache_of(tmp_path), [1], lambda: logits)


def test_a_disk_that_gets_full(tmp_path, monkeypatch):
    """What fits is kept, whole; a row of which a part was written is one that is not there."""
    import resource

    cache = cache_of(tmp_path)
    ask(cache, [0], VALUES)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (128 + 10 * 4 * CLASSES + 6, before[1]))  # 10 rows, and a piece
    try:
        assert ask(cache, [5, 9], VALUES)[1]
        with pytest.raises(OSError, match=r"v0000.npy") as caught:
            ask(cache, [7, 10], VALUES)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert caught.value.errno
    later = cache_of(tmp_path)
    assert [ask(later, [row], VALUES)[1] for row in (0, 5, 9, 7, 10)] == [False] * 3 + [True] * 2


def test_sigkill_leaves_no_wrong_row(tmp_path):
    """Killed at random moments while it writes row after row; each row that is there is right."""
    rng, there = random.Random(0), 0
    for number in range(6):
        before, deadline = len(files(tmp_path, "v????.npy")), time.monotonic() + 60
        child = os.fork()
        if child == 0:
            try:
                cache = cache_of(tmp_path)
                for variant in range(number, 400):
                    for start in range(0, IMAGES, 4):
                        ask(cache, list(range(start, start + 4)), VALUES + variant, variant)
            finally:
                os._exit(1)
        while len(files(tmp_path, "v????.npy")) <= before and time.monotonic() < deadline:
            time.sleep(0.001)  # on a busy machine the child may not have run yet
        time.sleep(rng.uniform(0.0, 0.07))
        os.kill(child, signal.SIGKILL)
        assert os.waitpid(child, 0)[1] == signal.SIGKILL
        cache = cache_of(tmp_path, note=pytest.fail)
        for variant in range(len(files(tmp_path, "v????.npy"))):
            for row in range(IMAGES):
                values, found = cache.networks["teacher"].get(variant, np.array([row]))
                there += int(found[0])
                assert not found[0] or torch.equal(torch.from_numpy(values[0]), VALUES[row] + variant)
    assert there > IMAGES


def test_in_a_loop_of_ones_own(tmp_path):
    """As the documentation has it: the same weights as without, and no network runs in the second epoch."""

    def train(keep: bool) -> tuple[nn.Module, list]:
        data = images_of(variants=1)
        method, calls = AVER(net(1).requires_grad_(True), [net(2), net(3)]), []
        names = {name: method.get_submodule(name) for name in method.frozen_names}
        cache = LogitsCache(tmp_path, data.train, names, classes=data.num_classes) if keep else None
        for network in names.values():
            counted(network, calls)
        optimizer = torch.optim.SGD(method.parameter_groups(0.1))
        batches = datasets.loader(data.train, 16, shuffle=True)
        for _ in range(2):
            for inputs, target in batches:
                known = {"taught": cache.taught(batches.rows)} if keep else {}
                for phase in method.phases(inputs, target, **known):
                    optimizer.zero_grad(set_to_none=True)
                    phase.loss.backward()
                    optimizer.step()
        return method.student, calls

    (one, plain), (other, kept), (again, none) = train(False), train(True), train(True)
    assert (len(plain), len(kept), len(none)) == (12, 6, 0)
    for a, b, c in zip(one.parameters(), other.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-6)
        assert torch.equal(b, c)
