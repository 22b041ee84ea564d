"""Every method with its networks replayed from graphs: the same weights as without, by a stand-in on a CPU."""

import copy
from functools import partial

import pytest
import torch
from graphs_helpers import Notes, StandIn, graphed, wrappers
from methods_helpers import same, snapshot
from test_all_methods import CASES, batch, iterate, method_of, optimizer_of
from torch import nn
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import methods
from fastkd.runs.config import differences
from fastkd.train import Runner, UserError, devices
from fastkd.train.steps import Steps

STEPS = 4


def train(method, case, chunks=1, amp=False, rows=(12, 12, 7, 12)):
    optimizer, losses = optimizer_of(method), []
    for step, some in enumerate(rows):
        method.start_epoch(step, 10)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            # Backward passes under autocast, too: what is recorded does not depend on it.
            losses += iterate(method, optimizer, *batch(case, some, seed=step), chunks=chunks)
    return losses


HOW = [(case, how) for case in ("ORC", "CTSLMKT", "DKEL", "FEED") for how in ("chunks", "bfloat16", "channels-last")]


@pytest.mark.parametrize("case, how", [*((case, "plain") for case in CASES), *HOW])
def test_the_same_weights(case, how):
    plain, (other, graphs) = method_of(case), graphed(method_of(case))
    if how == "channels-last":
        for method in (plain, other):
            method.to(memory_format=torch.channels_last)
    options = {"chunks": 2 if how == "chunks" else 1, "amp": how == "bfloat16"}
    expected, found = train(plain, case, **options), train(other, case, **options)
    if case == "FEED" and how == "channels-last":
        # Its grouped transforms return slices, the graphs dense copies of them: losses add up in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
        torch.testing.assert_close(list(other.parameters()), list(plain.parameters()), rtol=1e-4, atol=1e-5)
    else:
        torch.testing.assert_close(found, expected, rtol=0, atol=0)
        assert same(snapshot(plain), snapshot(other))
    assert list(plain.state_dict()) == list(other.state_dict())
    assert graphs.note == []
    replayed = {wrapper.name: 0 for wrapper in wrappers(other)}
    for wrapper in wrappers(other):
        replayed[wrapper.name] += wrapper.replays
    assert all(replayed.values()) or case == "DGKD"  # which drops guides
    assert all(name.split(".")[0] in dict(other.named_children()) for name in replayed)


def test_roles_that_change_are_replayed_in_their_order():
    method, _graphs = graphed(method_of("ORC"))
    train(method, "ORC", rows=(12,) * 8)
    assert int((method.promotions > 0).sum()) > 1
    calls = {wrapper.name: wrapper.replays for wrapper in wrappers(method)}
    # Each student is evaluated and trained once a step, the temporary teacher observed once more; less first calls.
    assert calls["pivot"] == 2 * 8 - 2
    assert all(2 * 8 - 2 <= calls[f"students.{i}"] <= 3 * 8 for i in range(3))
    pools = {wrapper._state.pool for wrapper in wrappers(method)}
    assert len(pools) == 4


def test_copied_in_the_middle():
    method, _ = graphed(method_of("ORC"))
    train(method, "ORC")
    twin = copy.deepcopy(method)
    assert train(method, "ORC") == train(twin, "ORC")
    assert same(snapshot(method), snapshot(twin))
    assert twin.learner("pivot").network is twin.pivot


def test_teachers_are_run_as_they_were_wrapped():
    seen = []

    class Spy(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            seen.append(self.network)
            return self.network(x)

    method = method_of("CTSLMKT")
    assert method.teacher_names == ("self_teachers.0", "self_teachers.1")
    names = list(method.state_dict())
    assert method.map_teachers(Spy) is method
    train(method, "CTSLMKT", rows=(12,))
    assert seen == list(method.self_teachers) and list(method.state_dict()) == names
    assert method_of("DKEL").teacher_names == ("teacher",) and method_of("CE").teacher_names == ()
    with pytest.raises(TypeError, match=r"wrap must be a function that returns a callable network for self_teachers.0"):
        method.map_teachers(lambda network: None)


# The command.


@pytest.fixture
def stand_in(monkeypatch):
    """--cuda-graph on a CPU."""
    notes = Notes()
    monkeypatch.setattr(devices, "recorder_for", lambda device: StandIn())
    monkeypatch.setattr(devices, "note", notes)
    return notes


def both(tmp_path, **options):
    """The same run with and without graphs, in steps of one size."""
    options = {"batch_size": 12, "guide_epochs": 1, "own_epochs": 1, "prepare_teachers": False} | options
    for name, on in (("plain", False), ("graphs", True)):
        run(config(tmp_path / name, cuda_graph=on, **options))
    return [tmp_path / name / "run" for name in ("plain", "graphs")]


def assert_same_runs(plain, graphs):
    rows = [rows_without_times(folder) for folder in (plain, graphs)]
    assert rows[0] == rows[1]
    assert_same(last_state(plain), last_state(graphs))


@pytest.mark.parametrize(
    "method, options",
    [
        ("orc", {"accumulate": 2}),
        ("dkel", {"non_finite": "skip"}),
        ("feed-parallel", {"amp": "bf16", "channels_last": False}),
        ("ctsl-mkt", {}),
        ("dgkd", {"options": {"drop": "bernoulli"}, "channels_last": True}),
    ],
)
def test_runs_are_the_same(tmp_path, stand_in, method, options):
    assert_same_runs(*both(tmp_path, method=method, **options))
    assert stand_in == []


def test_resumed_in_the_middle(tmp_path, stand_in, monkeypatch):
    """A run with graphs that is killed goes on with or without them to the same bits."""
    options = {"method": "orc", "guide_epochs": 1, "batch_size": 12}
    whole, _ = both(tmp_path, epochs=3, **options)
    for on in (True, False):
        out = tmp_path / f"resumed-{on}"
        run(config(out, epochs=1, cuda_graph=True, **options))
        run(config(out, epochs=3, cuda_graph=on, resume=True, **options))
        assert rows_without_times(whole) == rows_without_times(out / "run")
        left, right = last_state(whole), last_state(out / "run")
        assert_same(left["method"], right["method"])
    assert differences({"cuda_graph": False}, {"cuda_graph": True}) == []


def test_a_loss_that_is_not_finite(tmp_path, stand_in):
    """What a skipped step leaves behind is put back in place: graphs go on with it."""
    states = []
    for on in (False, True):
        runner = Runner(config(tmp_path, non_finite="skip", cuda_graph=on))
        fit = runner.fit(runner.stages["student"], {}, None)
        fit.method.train()
        for i in range(6):
            x = torch.full((8, 1, 8, 8), torch.nan) if i == 3 else torch.randn(8, 1, 8, 8)
            list(fit.steps.take(x.nan_to_num(i) if i != 3 else x, torch.arange(8)))
            torch.manual_seed(i)
        states.append(snapshot(fit.method))
    assert fit.method.learner("student").replays == 5
    assert same(*states)
    assert all(bool(v.isfinite().all()) for v in states[0].values() if isinstance(v, torch.Tensor))


def test_a_gradient_scaler():
    x, y = batch("ORC")
    plain, (other, _) = method_of("ORC"), graphed(method_of("ORC"))
    for method in (plain, other):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=2)
        steps = Steps(method, optimizer_of(method), torch.device("cpu"), scaler=scaler)
        for _ in range(STEPS):
            list(steps.take(x, y))
    assert same(snapshot(plain), snapshot(other))


def test_the_training_accuracy_is_that_of_the_replayed_outputs(tmp_path, stand_in):
    plain, graphs = both(tmp_path, method="kd")
    rows = rows_without_times(graphs)
    assert rows == rows_without_times(plain) and rows[1]["train_accuracy"] >= 0


def test_on_a_cpu_it_goes_on_without_and_says_so(tmp_path, capsys):
    devices._note_once.cache_clear()
    run(config(tmp_path, cuda_graph=True, epochs=1))
    run(config(tmp_path / "again", cuda_graph=True, epochs=1))
    found = capsys.readouterr().err
    assert found.count("note: --cuda-graph needs a GPU: on the cpu the run goes on without it") == 1


def test_what_it_is_refused_with(tmp_path, monkeypatch):
    with pytest.raises(UserError, match="--cuda-graph and --compile cannot be used together: leave out one of them"):
        config(tmp_path, cuda_graph=True, compile=True)
    several = partial(devices.World, rank=0, size=2)
    with pytest.raises(UserError, match="--cuda-graph is for one process, got 2: leave it out"):
        devices.check_cuda_graph(config(tmp_path, cuda_graph=True), torch.device("cpu"), several())
    devices.check_cuda_graph(config(tmp_path), torch.device("cpu"), several())


def test_a_network_that_cannot_be_captured_is_named(capsys):
    class Restless(nn.Module):
        def __init__(self, network):
            super().__init__()
            self.network = network

        def forward(self, x):
            return self.network(x) + torch.rand(())

    method, graphs = graphed(methods.KD(Restless(method_of("CE").student), method_of("CE").student))
    train(method, "KD")
    assert graphs.note == ["student runs without CUDA graphs: it draws random numbers on the CPU"]
    replays = {wrapper.name: wrapper.replays for wrapper in wrappers(method) if wrapper.replays}
    assert replays == {"guides.0": 2}
