"""Two processes: the run of one, what all know alike, interruptions, and runs that go on with another number."""

import contextlib
import copy
import os
import signal

import pytest
import torch
from distributed_helpers import PAPERS, processes, train
from train_helpers import last_state, one_thread, rows_without_times  # noqa: F401

from fastkd import methods
from fastkd._core.labels import IGNORE_INDEX
from fastkd.data.parts import RankPart, part_of
from fastkd.methods import RKD
from fastkd.train import Interrupted, Runner, TrainConfig, UserError
from fastkd.train import distributed as fastkd_distributed
from fastkd.train.distributed import ALONE, RemoteError, world
from fastkd.train.metrics import Divergence, Meter
from fastkd.train.steps import Steps


def assert_same_run(one, many, loss=1e-6, weight=1e-5):
    """Losses, accuracies and role changes of each epoch, and the last weights, of two folders."""
    for a, b in zip(rows_without_times(one), rows_without_times(many), strict=True):
        assert list(a) == list(b)
        for name in a:
            exact = name.startswith(("promotions", "epoch")) or "accuracy" in name
            assert a[name] == pytest.approx(b[name], abs=0 if exact else loss, nan_ok=True), (a["epoch"], name)
    first, second = last_state(one)["method"], last_state(many)["method"]
    assert list(first) == list(second)
    for name, value in first.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(second[name], value, rtol=0, atol=weight, msg=name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """What one process and two left behind."""
    folder = tmp_path_factory.mktemp("distributed")
    before = torch.get_num_threads()
    for method in PAPERS:
        train(folder / f"one-{method}", method)
    train(folder / "more", "orc", epochs=2)
    train(folder / "whole", "kd", accumulate=1)
    make_images(folder / "images")
    train(folder / "one-images", "ce", **with_images(folder))
    processes(program, 2, folder)
    torch.set_num_threads(before)
    return folder


def program(rank, folder):
    for method in PAPERS:
        train(folder / f"two-{method}", method)
    train(folder / "parts", "kd", accumulate=3)
    train(folder / "fewer", "orc", epochs=2, save_every=3)
    train(folder / "more", "orc", epochs=4, resume=True)
    train(folder / "two-images", "ce", **with_images(folder))
    interrupt(rank, folder)
    a_step_is_left_out_by_all(rank)
    state_is_alike(folder)
    unused_parameters_are_allowed(rank)
    errors_are_shared(rank)


def make_images(root):
    """Of 18 training images of two classes, four cannot be read."""
    from PIL import Image

    generator = torch.Generator().manual_seed(0)
    for part, count in (("train", 9), ("val", 3)):
        for label in ("a", "b"):
            (root / part / label).mkdir(parents=True)
            for number in range(count):
                pixels = torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()
                Image.fromarray(pixels).save(root / part / label / f"{number}.png")
    for name in ("a/1", "a/2", "b/1", "b/5"):
        (root / "train" / f"{name}.png").write_bytes(b"no image")


def with_images(folder) -> dict:
    options = {"data": f"imagefolder:{folder / 'images'}", "bad_images": "skip", "image_size": 8, "train_size": None}
    return options | {"batch_size": 6, "options": {}}


def digest(value) -> list:
    """Every process's value, everywhere."""
    found = [None] * world().size
    torch.distributed.all_gather_object(found, value)
    return found


def interrupt(rank, folder):
    """Ctrl-C reaches one process in the middle of the second epoch; both stop after the same batch and save."""
    original = Meter.end_batch

    def end_batch(self, *arguments):
        original(self, *arguments)
        if rank == 1 and self.batches == 2 and self.sums["loss"] < 1e9 and world_epoch[0] == 1:
            os.kill(os.getpid(), signal.SIGINT)

    world_epoch = [0]
    start = methods.ORC.start_epoch

    def start_epoch(self, epoch, *length):
        world_epoch[0] = epoch
        start(self, epoch, *length)

    Meter.end_batch, methods.ORC.start_epoch = end_batch, start_epoch
    try:
        with contextlib.suppress(Interrupted):
            train(folder / "stopped", "orc", epochs=4)
            raise AssertionError("the run was not interrupted")
    finally:
        Meter.end_batch, methods.ORC.start_epoch = original, start
    torch.distributed.barrier()
    state = torch.load(folder / "stopped" / "checkpoints" / "partial.pt", weights_only=True)
    assert digest((state["epoch"], state["step"], state["meter"]["images"])) == [(1, 7, 32)] * 2
    train(folder / "stopped", "orc", epochs=4, resume=True)


def state_is_alike(folder):
    """With batch normalisation, whose statistics each process has of its own rows; mean teachers among them."""
    options = dict(teacher="plain2:width=0.25", student="plain2:width=0.0625", options={}, epochs=1, out="")
    for method, extra in {"dkel": {"branches": 2}, "ce": {}}.items():
        own = {"train_size": 40, "batch_size": 16, "quiet": True, "device": "cpu", "method": method}
        runner = Runner(TrainConfig(**options | extra | own))
        fit = runner.fit(runner.stages["student"], {}, None)
        fit.run()
        state = {k: v for k, v in fit.method.state_dict().items() if isinstance(v, torch.Tensor)}
        assert any("running_mean" in name and value.any() for name, value in state.items())
        first, second = digest({name: value.tolist() for name, value in state.items()})
        assert first == second
        rows = digest([row | {"seconds": 0, "cpu_seconds": 0, "images_per_s": 0} for row in fit.rows])
        assert str(rows[0]) == str(rows[1])


def a_step_is_left_out_by_all(rank):
    """Where the loss of one process is not finite; the networks stay alike."""
    method = methods.CE(small(0))
    method.map_learners(lambda network: world().wrap(method, network, torch.device("cpu")))
    optimizer = torch.optim.SGD(method.parameter_groups(0.1))
    steps = Steps(method, optimizer, torch.device("cpu"), "skip", world=world())
    method.train()
    before = [p.clone() for p in method.parameters()]
    x, y = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    ((phase, _),) = steps.take(x / 0 if rank == 1 else x, y)
    assert phase.skipped and steps.in_row == 1
    assert all(torch.equal(a, b) for a, b in zip(method.parameters(), before, strict=True))
    ((phase, _),) = steps.take(x, y)
    assert not phase.skipped and steps.in_row == 0
    assert not all(torch.equal(a, b) for a, b in zip(method.parameters(), before, strict=True))


def small(seed):
    from fastkd.models import create

    torch.manual_seed(seed)
    return create("plain2", 10, image_size=8, channels=1, width=0.0625, norm="group")


def unused_parameters_are_allowed(rank):
    """Losses that leave the classifier without a gradient."""
    group = world().group
    cases = [
        RKD(small(0), small(1), ce_weight=0.0, process_group=group),
        methods.CTSLMKT(
            [small(0), small(1)],
            alpha=0.0,
            beta2=0.0,
            mutual_response=False,
            self_learning=False,
            process_group=group,
        ),
    ]
    x, y = torch.randn(6, 1, 8, 8), torch.randint(10, (6,))
    for method in cases:
        before = copy.deepcopy(method.state_dict())
        method.map_learners(lambda network, method=method: world().wrap(method, network, torch.device("cpu")))
        optimizer = torch.optim.SGD(method.parameter_groups(0.1))
        steps = Steps(method, optimizer, torch.device("cpu"), world=world())
        method.train()
        for _ in range(3):
            for _ in steps.take(x + rank, y):
                pass
        changed = [k for k, v in method.state_dict().items() if "weight" in k and not torch.equal(v, before[k])]
        assert changed, type(method).__name__


def errors_are_shared(rank):
    def refuse():
        raise UserError("no room", status=3)

    try:
        world().broadcast(refuse)
    except UserError as error:
        assert str(error) == "no room" and error.status == 3
        assert isinstance(error, RemoteError) == (rank == 1)
    else:
        raise AssertionError("the first process's error was lost")
    assert world().broadcast(lambda: rank + 5) == 5
    assert world().any(rank == 1) and not world().any(False)
    assert world().minimum(3 - rank) == 2
    assert world().gather(rank) == ([0, 1] if rank == 0 else [])
    meter = Meter(torch.device("cpu"), 1, world=world())
    fake = {"loss": torch.tensor(float("nan") if rank else 1.0), "parts": {}, "name": "", "networks": ()}
    phase = type("Fake", (), fake | {"skipped": False, "outputs": None})()
    meter.add(phase, 4)
    try:
        meter.end_batch(torch.zeros(4, dtype=torch.long))
    except Divergence as error:
        assert ("another process" in str(error)) == (rank == 0)
    else:
        raise AssertionError("a process went on alone")


@pytest.mark.parametrize("method", PAPERS)
def test_two_processes_do_what_one_does(folder, method):
    assert_same_run(folder / f"one-{method}", folder / f"two-{method}")
    state = last_state(folder / f"two-{method}")
    assert state["step"] == 20
    if method == "orc":
        assert min(state["method"]["promotions"].tolist()) > 0  # roles did change


def test_accumulation_in_several_processes(folder):
    assert_same_run(folder / "whole", folder / "parts")


def test_a_run_goes_on_with_another_number_of_processes(folder):
    assert_same_run(folder / "one-orc", folder / "more")
    train(folder / "fewer", "orc", epochs=4, resume=True)
    assert_same_run(folder / "one-orc", folder / "fewer")


def test_an_interrupted_run_goes_on(folder):
    assert_same_run(folder / "one-orc", folder / "stopped")


def test_images_that_cannot_be_read(folder):
    assert_same_run(folder / "one-images", folder / "two-images")
    assert [row["train_bad_images"] for row in rows_without_times(folder / "two-images")] == [4] * 4
    one, two = ((folder / name / "bad_images.txt").read_text() for name in ("one-images", "two-images"))
    assert one == two and len(two.splitlines()) == 4


def test_one_process_writes(folder):
    names = {path.name for path in (folder / "two-orc").iterdir()} - {".lock"}
    assert names == {"cache", "checkpoints", "data.json", "metrics.csv"}
    assert len(list((folder / "two-orc" / "checkpoints").iterdir())) == 4


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 14, 33])
def test_parts_of_a_batch(rows, ranks):
    parts = [part_of(rows, rank, ranks) for rank in range(ranks)]
    mine = [list(range(rows))[part] for part in parts if part is not None]
    assert [row for part in mine for row in part] == list(range(rows))
    assert all(len(part) >= min(2, rows) for part in mine)
    assert max(map(len, mine)) - min(map(len, mine)) <= 1
    assert None not in parts[: len(mine)]
    if rows >= 2 * ranks:
        assert len(mine) == ranks


def test_a_process_without_rows_reads_some_that_do_not_count():
    data = [(torch.full((1,), float(i)), i) for i in range(9)]
    parts = [RankPart(data, rank, 3) for rank in range(3)]
    assert [[label for _, label in part.__getitems__([4, 7, 1, 0])] for part in parts] == [
        [4, 7],
        [1, 0],
        [IGNORE_INDEX] * 2,
    ]
    assert len(parts[0]) == 9


def test_options_of_several_processes(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    from fastkd.train.devices import pick_device

    assert pick_device("auto") == pick_device("cuda") == torch.device("cuda", 1)
    with pytest.raises(UserError, match="cuda:0 is one GPU for 2 processes: use --device cuda"):
        pick_device("cuda:0")
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match=r"there is no GPU for process 2 of this machine \(2 GPUs\)"):
        pick_device("cuda")
    monkeypatch.setenv("RANK", "1")
    assert not fastkd_distributed.reports_errors()


def test_one_process_needs_no_group():
    assert world() is ALONE and ALONE.first and ALONE.minimum(4) == 4 and ALONE.any(True)
    assert ALONE.broadcast(lambda: 7) == 7 and ALONE.gather(3) == [3]
    values = torch.ones(2)
    assert ALONE.sum(values) is values


def test_compare_is_refused(monkeypatch, tmp_path):
    from fastkd.runs.commands import compare
    from fastkd.train import CompareConfig

    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="fastkd compare runs in one process: start it without torchrun"):
        compare(CompareConfig(out=str(tmp_path / "c")), "fastkd compare")
