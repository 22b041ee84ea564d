"""Networks replayed from graphs compute what they compute by themselves: one network, by a stand-in for CUDA graphs."""

import copy
import gc
import random

import pytest
import torch
from graphs_helpers import Notes, StandIn, graphed_network
from methods_helpers import bn_net, images
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from train_helpers import one_thread  # noqa: F401

from fastkd import graphs, methods
from fastkd.graphs import Graphed, Graphs
from fastkd.graphs import capture as _capture
from fastkd.graphs.capture import copies
from fastkd.graphs.recorder import CudaRecorder
from fastkd.models import Outputs, branched, create, with_features


def net(seed: int = 0) -> nn.Module:
    """With batch statistics, without dropout; images [B, 1, 6, 6]."""
    network = bn_net(seed)
    network[3] = nn.Identity()
    return network


def features(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return with_features(create("resnet8", 7, image_size=8, channels=1))


def pair(make=net, **options) -> tuple[nn.Module, Graphed, Graphs]:
    """The same network alone and graphed."""
    network, other = make(), make()
    wrapper, shared = graphed_network(other, **options)
    return network, wrapper, shared


def logits(output):
    return output if isinstance(output, torch.Tensor) else output.logits


def step(network, x, y, lr=0.1):
    """A step of plain SGD; the loss."""
    network.zero_grad(set_to_none=True)
    loss = nn.functional.cross_entropy(logits(network(x)), y)
    loss.backward()
    with torch.no_grad():
        for p in network.parameters():
            if p.grad is not None:
                p -= lr * p.grad
    return loss.detach()


def assert_same_state(network, wrapper):
    for (name, one), other in zip(network.state_dict().items(), wrapper.network.state_dict().values(), strict=True):
        assert torch.equal(one, other), name


def assert_same_gradients(network, wrapper):
    for one, other in zip(network.parameters(), wrapper.parameters(), strict=True):
        assert (one.grad is None) == (other.grad is None)
        assert one.grad is None or torch.equal(one.grad, other.grad)


@pytest.mark.parametrize("make", [net, features], ids=["tensor", "outputs"])
@pytest.mark.parametrize("amp", [False, True], ids=["float32", "bfloat16"])
def test_training_gives_the_same_bits(make, amp):
    network, wrapper, shared = pair(make)
    for i in range(6):
        x, y = images(rows=5 if i % 3 == 2 else 8, seed=i)  # batches of another size in between
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            assert torch.equal(step(network, x, y), step(wrapper, x, y))
    assert_same_state(network, wrapper)
    assert shared.note == [] and wrapper.replays == 4  # two sizes, each first call runs as ever


def test_channels_last_is_a_kind_of_its_own():
    network, wrapper, _ = pair()
    x, y = (torch.randn(8, 1, 6, 6), torch.arange(7).repeat(2)[:8])
    x = x.expand(8, 1, 6, 6).contiguous()
    for inputs in (x, x, x.to(memory_format=torch.channels_last), torch.randn(8, 1, 6, 6).transpose(2, 3)) * 2:
        assert torch.equal(step(network, inputs, y), step(wrapper, inputs, y))
    assert_same_state(network, wrapper)


def test_what_is_recorded_is_not_yet_computed():
    """The stand-in itself: a wrapper that forgets to replay gives NaN."""
    recorded = StandIn().record(lambda: [torch.ones(2)], 0)
    assert recorded.results[0].isnan().all()
    recorded.replay()
    assert torch.equal(recorded.results[0], torch.ones(2))


def test_warm_ups_leave_no_trace():
    network, wrapper, _ = pair()
    x, _y = images()
    for _ in range(2):  # the second call is captured
        before = torch.get_rng_state(), random.getstate()
        network(x), wrapper(x)
        assert torch.equal(torch.get_rng_state(), before[0]) and random.getstate() == before[1]
    assert wrapper.replays == 1
    assert_same_state(network, wrapper)
    assert int(wrapper.network[1].num_batches_tracked) == 2
    assert all(p.grad is None for p in wrapper.parameters())


def test_outputs_are_the_callers_own():
    _, wrapper, _ = pair()
    wrapper.eval()
    with torch.no_grad():
        found = [wrapper(images(seed=i)[0]) for i in range(4)]
        expected = [wrapper.network(images(seed=i)[0]) for i in range(4)]
    assert wrapper.replays == 3
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_gradients_are_the_callers_own(monkeypatch):
    """p.grad may be what a backward pass returned: two passes before zero_grad add up, and nothing overwrites one."""
    network, wrapper, _ = pair()
    for passes in (1, 3):
        for one in (network, wrapper):
            one.zero_grad(set_to_none=True)
            for i in range(passes):
                x, y = images(seed=i)
                nn.functional.cross_entropy(one(x), y).backward()
        assert_same_gradients(network, wrapper)
    places = []

    def noted(tensors):
        found = copies(tensors)
        places.append([tensor.data_ptr() for tensor in found])
        return found

    monkeypatch.setattr(_capture, "copies", noted)
    wrapper.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(wrapper(images(seed=8)[0]), images()[1]).backward()
    assert [p.grad.data_ptr() for p in wrapper.parameters()] == places[-1]  # taken over, not copied once more
    kept = [p.grad.clone() for p in wrapper.parameters()]
    other = [p.grad for p in wrapper.parameters()]
    wrapper.zero_grad(set_to_none=True)
    nn.functional.cross_entropy(wrapper(images(seed=9)[0]), images()[1]).backward()
    assert all(torch.equal(a, b) for a, b in zip(kept, other, strict=True))
    assert wrapper.replays == 5


def test_two_calls_before_a_backward_pass():
    """The second one runs as ever: a replay would overwrite the activations of the first one."""
    network, wrapper, _ = pair()
    for i in range(3):
        x, y = images(seed=i)
        for one in (network, wrapper):
            one.zero_grad(set_to_none=True)
            first, second = one(x), one(x.flip(0))
            nn.functional.cross_entropy(first + second.square(), y).backward()
        assert_same_gradients(network, wrapper)
    assert wrapper.replays == 3  # of 6 calls
    assert_same_state(network, wrapper)


def test_a_call_without_a_backward_pass_blocks_only_while_its_output_lives():
    _, wrapper, _ = pair()
    x, _ = images()
    wrapper(x)
    output = wrapper(x)
    wrapper(x)
    assert wrapper.replays == 1
    del output
    gc.collect()
    wrapper(x)
    assert wrapper.replays == 2


def test_passes_without_gradients_in_between_are_replayed():
    network, wrapper, _ = pair()
    for i in range(4):
        x, y = images(seed=i)
        for one in (network, wrapper):
            one.zero_grad(set_to_none=True)
            output = one(x)
            one.eval()
            with torch.no_grad():
                seen = one(x)
            one.train()
            (nn.functional.cross_entropy(output, y) + (output - seen).square().mean()).backward()
        assert_same_gradients(network, wrapper)
    assert wrapper.replays == 6


def test_a_second_backward_pass_is_an_error():
    _, wrapper, _ = pair()
    x, y = images()
    wrapper(x)
    loss = nn.functional.cross_entropy(wrapper(x), y)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="once only"):
        loss.backward()
    (output,) = torch.autograd.grad(wrapper(x).sum(), wrapper.network[0].weight, create_graph=True)
    with pytest.raises(RuntimeError, match=r"once_differentiable|does not require grad"):
        output.sum().backward()


def test_weights_that_changed_before_the_backward_pass_are_an_error():
    _, wrapper, _ = pair()
    x, _ = images()
    wrapper(x)
    output = wrapper(x)
    with torch.no_grad():
        wrapper.network[0].weight.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        output.sum().backward()


@pytest.mark.parametrize("need", ["logits", "features", "both"])
def test_parameters_without_a_gradient_have_none(need):
    """An optimiser moves what has a gradient of zeros. Which outputs have one shows in the backward pass only."""
    network, wrapper, _ = pair(features)
    for i in range(5):
        x, _ = images(seed=i)
        now = need if i < 4 else "features"  # and may change
        for one in (network, wrapper):
            one.zero_grad(set_to_none=True)
            out = one(x)
            loss = {"logits": out.logits.square().mean(), "features": out.features.sum()}
            (sum(loss.values()) if now == "both" else loss[now]).backward()
        assert_same_gradients(network, wrapper)
    heads = [p.grad is None for name, p in network.named_parameters() if name.startswith("fc")]
    assert heads and all(heads)
    assert wrapper.replays == 4


def test_gradients_of_inputs():
    """FEED's transforms and DKEL's classifier learn behind the student."""
    first, second = nn.Linear(36, 5), nn.Linear(5, 7)
    wrapped = [graphed_network(copy.deepcopy(n)) for n in (first, second)]
    for i in range(4):
        x, y = images(seed=i)
        x = x.flatten(1)
        nn.functional.cross_entropy(second(first(x)), y).backward()
        nn.functional.cross_entropy(wrapped[1][0](wrapped[0][0](x)), y).backward()
    for network, (wrapper, shared) in zip((first, second), wrapped, strict=True):
        assert_same_gradients(network, wrapper)
        assert wrapper.replays == 3 and shared.note == []


def test_views_lists_and_keywords():
    torch.manual_seed(0)
    network = branched("resnet8", 7, branches=2, image_size=8, channels=1)
    wrapper, shared = graphed_network(copy.deepcopy(network))
    for i in range(3):
        views = [images(seed=2 * i + j)[0] for j in range(2)]
        for module in (network, wrapper):
            module.zero_grad(set_to_none=True)
            outputs = module(views=views)
            assert isinstance(outputs, tuple) and isinstance(outputs[0], Outputs)
            sum(o.logits.square().mean() for o in outputs).backward()
        assert_same_gradients(network, wrapper)
    assert wrapper.replays == 2 and shared.note == []


def test_outputs_without_a_gradient():
    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(36, 7)

        def forward(self, x):
            z = self.fc(x.flatten(1))
            return {"classes": z.argmax(1), "none": None, "seen": z.detach(), "logits": z}

    wrapper, shared = graphed_network(Several())
    x, y = images()
    for _ in range(3):
        found, expected = wrapper(x), wrapper.network(x)
        assert list(found) == list(expected) and found["none"] is None
        for name in ("classes", "seen", "logits"):
            assert torch.equal(found[name], expected[name]), name
            assert found[name].requires_grad == expected[name].requires_grad, name
        nn.functional.cross_entropy(found["logits"], y).backward()
    assert wrapper.replays == 2 and shared.note == []


def test_what_is_recorded_of_several_outputs():
    """Which of them have a gradient shows in the first backward pass; it is recorded before the next call."""
    wrapper, shared = graphed_network(features())
    for i in range(5):
        wrapper(images(seed=i)[0]).features.sum().backward()
    forward, backward = shared.recorder.recordings
    assert (forward.replays, backward.replays) == (4, 3)


def test_gradients_in_another_order_of_memory_have_a_recording_of_their_own():
    network, wrapper, shared = pair(lambda: nn.Linear(6, 7))
    torch.manual_seed(0)
    x, slope = torch.randn(5, 6), torch.randn(7, 5)
    for i in range(7):
        for one in (network, wrapper):
            one.zero_grad(set_to_none=True)
            one(x).backward(slope.t() if i % 2 else slope.t().contiguous())
        assert_same_gradients(network, wrapper)
    assert len(shared.recorder.recordings) == 3
    for _ in range(6):  # the number of them is bounded
        slope = torch.randn(7, len(slope.untyped_storage()) // 28 + 1)
        wrapper(x).backward(slope[:, :5].t())
    assert len(shared.recorder.recordings) == 1 + _capture.CHOICES


def test_weights_cast_by_autocast_are_those_of_the_call():
    """Autocast keeps them while its block lasts: neither old ones come into a graph, nor a graph's own get out."""
    network = nn.Linear(36, 7)
    wrapper, _ = graphed_network(network)
    x = images()[0].flatten(1)

    def changed():
        network.weight.data.add_(1)
        with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
            return network(x)

    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wrapper(x)
        for _ in range(2):
            expected = changed()
            assert torch.equal(wrapper(x), expected)
        expected = changed()
        assert torch.equal(network(x), expected)
    assert wrapper.replays == 2


def test_autocast_is_a_kind_of_its_own_and_does_not_reach_backward_passes():
    seen = []

    class Spy(torch.autograd.Function):
        @staticmethod
        def forward(ctx, z):
            return z.clone()

        @staticmethod
        def backward(ctx, grad):
            seen.append(torch.is_autocast_enabled("cpu"))
            return grad

    class Spied(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(36, 7)

        def forward(self, x):
            return Spy.apply(self.fc(x.flatten(1)))

    wrapper, _ = graphed_network(Spied())
    x, _ = images()
    for i in range(8):
        with torch.autocast("cpu", torch.bfloat16, enabled=i % 2 == 0):
            output, expected = wrapper(x), wrapper.network(x)
        assert output.dtype == expected.dtype == (torch.float32 if i % 2 else torch.bfloat16)
        output.sum().backward()
    assert wrapper.replays == 6 and seen and not any(seen)


def test_modes_and_frozen_parts_are_kinds_of_their_own():
    network, wrapper, _ = pair()
    x, y = images()
    for i in range(8):
        for one in (network, wrapper.network):
            one[1].train(i % 4 < 2)  # batch normalisation alone
            one[0].requires_grad_(i < 4)
        assert torch.equal(step(network, x, y), step(wrapper, x, y))
        assert_same_gradients(network, wrapper)
    assert_same_state(network, wrapper)
    assert wrapper.replays == 4


@pytest.mark.parametrize("how", ["to", "data", "buffer", "parameter", "module", "loaded"])
def test_tensors_that_moved(how):
    network, wrapper, shared = pair()
    x, y = images()
    for i in range(6):
        if i == 3:
            for one in (network, wrapper.network):
                if how == "to":
                    one.double().float()  # as `method.to`: the same parameters, elsewhere
                elif how == "data":
                    one[5].weight.data = one[5].weight.detach().clone()
                elif how == "buffer":
                    one[1].running_mean = torch.ones(4)
                elif how == "parameter":
                    one[0].weight = nn.Parameter(one[0].weight.detach() * 2)
                elif how == "module":
                    one[5] = copy.deepcopy(net(7)[5])
                else:
                    one.load_state_dict(net(5).state_dict())
        assert torch.equal(step(network, x, y), step(wrapper, x, y))
    assert_same_state(network, wrapper)
    made = len(shared.recorder.recordings)
    assert made == (2 if how == "loaded" else 4)


def test_tensors_that_move_in_every_step():
    network, wrapper, shared = pair()
    x, y = images()
    for _ in range(20):
        for one in (network, wrapper.network):
            one[1].running_mean = one[1].running_mean.clone()
        assert torch.equal(step(network, x, y), step(wrapper, x, y))
    assert len(shared.note) == 1 and "again and again" in shared.note[0]
    assert_same_state(network, wrapper)


class Strange(nn.Module):
    def __init__(self, does):
        super().__init__()
        self.fc, self.does = nn.Linear(36, 7), does
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        return self.does(self, self.fc(x.flatten(1)))


def replaces(network, z):
    network.seen = network.seen + 1
    return z


class Answer:
    def __init__(self, z):
        self.logits = z


STRANGE = {
    "draws random numbers on the CPU": lambda network, z: z * random.random(),
    "returns Answer instead of tensors": lambda network, z: Answer(z),
    "replaces its buffers": replaces,
}


@pytest.mark.parametrize("reason", [*STRANGE, "dropout"])
def test_networks_that_cannot_be_captured_run_as_ever(reason):
    def make():
        torch.manual_seed(0)
        return bn_net(0) if reason == "dropout" else Strange(STRANGE[reason])

    network, wrapper, shared = pair(make)
    for i in range(3):
        x, y = images(seed=i)
        states = torch.get_rng_state(), random.getstate()
        expected = step(network, x, y)
        after = torch.get_rng_state(), random.getstate()
        torch.set_rng_state(states[0]), random.setstate(states[1])
        assert torch.equal(step(wrapper, x, y), expected)
        assert torch.equal(torch.get_rng_state(), after[0]) and random.getstate() == after[1]
    assert_same_state(network, wrapper)
    reason = "draws random numbers on the CPU" if reason == "dropout" else reason
    assert len(shared.note) == 1
    assert shared.note[0].startswith("net runs without CUDA graphs: it ") and reason in shared.note[0]
    assert wrapper.replays == 0


def test_a_capture_that_fails():
    network, wrapper, shared = pair(fails=RuntimeError("operation not permitted\nwhen stream is capturing"))
    pool = shared.pool
    for i in range(3):
        assert torch.equal(step(network, *images(seed=i)), step(wrapper, *images(seed=i)))
    assert_same_state(network, wrapper)
    assert shared.note == [
        "net runs without CUDA graphs: RuntimeError: operation not permitted when stream is capturing"
    ]
    assert shared.pool != pool


def test_hooks_and_parameters_from_elsewhere():
    for how, reason in (("hook", "0 has hooks"), ("parameter", "elsewhere than its modules")):
        network, wrapper, shared = pair()
        calls = []
        if how == "hook":
            wrapper.network[0].register_forward_hook(lambda *call, calls=calls: calls.append(call))
        else:
            wrapper.network[5] = Functional(wrapper.network[5].weight, wrapper.network[5].bias)
        for i in range(3):
            assert torch.equal(step(network, *images(seed=i)), step(wrapper, *images(seed=i)))
        assert len(shared.note) == 1 and reason in shared.note[0]
        assert len(calls) == (4 if how == "hook" else 0)  # the check's run, too


def test_hooks_of_modules_that_are_not_called():
    """A run watches its deployable network, of which a method may run parts only (DKEL)."""
    network = net()
    network[3].register_module("other", nn.Linear(1, 1))
    network[3].other.register_forward_hook(lambda *call: None)
    wrapper, shared = graphed_network(network)
    for i in range(3):
        step(wrapper, *images(seed=i))
    assert wrapper.replays == 2 and shared.note == []


class Functional(nn.Module):
    """Computes with the parameters that it was made with."""

    def __init__(self, weight, bias):
        super().__init__()
        self.weight, self.bias = weight, bias
        self.flat = [weight, bias]

    def forward(self, x):
        return nn.functional.linear(x, *self.flat)


def test_other_devices():
    wrapper, shared = graphed_network(net())
    shared.recorder.device = torch.device("meta")
    x, y = images()
    step(wrapper, x, y), step(wrapper, x, y)
    assert shared.note == ["net runs without CUDA graphs: it or its inputs are on cpu, not meta"]


def test_the_number_of_kinds_is_bounded():
    network, wrapper, shared = pair()
    network.eval(), wrapper.eval()
    with torch.no_grad():
        for rows in (*range(1, 12), *range(1, 12)) * 2:
            x, _ = images(rows)
            assert torch.equal(network(x), wrapper(x))
    assert len(shared.recorder.recordings) == graphs.KINDS and shared.note == []


def test_copies_have_no_graphs():
    _, wrapper, _shared = pair()
    x, y = images()
    step(wrapper, x, y), step(wrapper, x, y)
    twin = copy.deepcopy(wrapper)
    assert twin.network is not wrapper.network and not twin._state.captures and wrapper._state.captures
    for i in range(3):
        assert torch.equal(step(wrapper, *images(seed=i)), step(twin, *images(seed=i)))
    assert twin.replays > wrapper.replays - 3 and list(twin.state_dict()) == list(wrapper.state_dict())


def test_where_recordings_have_their_memory():
    """Activations must outlive other networks' replays; what is computed without gradients need not."""
    shared = Graphs(torch.device("cpu"), Notes(), StandIn())
    first, second = Graphed(net(), shared), Graphed(net(1), shared)
    x, y = images()
    for wrapper in (first, second):
        for _ in range(2):
            step(wrapper, x, y)
            with torch.no_grad():
                wrapper(x)
    pools = [recording.pool for recording in shared.recorder.recordings]  # forward, backward, without gradients
    assert len(pools) == 6
    assert pools[0] == pools[1] != pools[3] == pools[4] and pools[2] == pools[5] == shared.pool
    assert pools[2] not in (pools[0], pools[3])


def test_what_cannot_be_wrapped():
    class Compiled(nn.Module):
        def __init__(self, network):
            super().__init__()
            self._orig_mod = network

    method = methods.CE(net())
    method.map_learners(Compiled)
    with pytest.raises(ValueError, match=r"neither compiled nor in parallel, got a Compiled"):
        Graphs(torch.device("cpu"), Notes(), StandIn()).wrap(method)
    assert issubclass(DistributedDataParallel, nn.Module)


def test_the_recorder_has_what_the_stand_in_has():
    public = {name for name in vars(CudaRecorder) if not name.startswith("_")}
    assert public == {name for name in vars(StandIn) if not name.startswith("_")}
