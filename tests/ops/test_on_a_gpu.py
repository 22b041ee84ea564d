"""On a GPU alone: every operation in a CUDA graph, without waiting, on another stream, on a second GPU; large inputs
against float64.
"""

import contextlib
import sys
from pathlib import Path

import pytest
import torch
from conftest import STAND_IN
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from benchmarks.inputs import Embeddings, Logits, Maps, Networks, Projections
from benchmarks.registry import OPERATIONS

pytestmark = pytest.mark.gpu
# Each on chip and, where an operation has one, by the kernels for long rows.
SHAPES = {
    "multi_teacher": [Logits(9, 100, 3), Logits(3, 9000, 2)],
    "multi_teacher_kd_with_gradient": [Logits(9, 100, 3), Logits(3, 9000, 2)],
    "multi_teacher_reverse": [Logits(9, 100, 3)],
    "multi_teacher_jsd": [Logits(9, 100, 3)],
    "multi_label": [Logits(9, 100, 3), Logits(700, 1, 1), Logits(3, 9000, 2)],
    "mutual": [Networks(9, 100, 3), Networks(2, 9000, 2)],
    "cross_entropy": [Networks(9, 100, 3), Networks(2, 9000, 2)],
    "group_stats": [Networks(9, 100, 3), Networks(2, 9000, 2)],
    "feature_ensemble": [Maps(3, 5, 4, 4, 2)],
    "rkd_distance": [Embeddings(40, 8)],
    "rkd_angle": [Embeddings(40, 8)],
    "linear_multi_teacher": [Projections(9, 8, 100, 2)],
}
EACH = pytest.mark.parametrize("name, shape", [(n, s) for n, shapes in SHAPES.items() for s in shapes], ids=str)


class Call:
    """An operation on inputs of its own; called, it gives results and gradients."""

    def __init__(self, name, shape, device, seed=0, dtype=torch.float32):
        self.function = OPERATIONS[name].fused
        self.arguments, self.learning = OPERATIONS[name].make_inputs(shape, dtype, device, seed)

    def tensors(self):
        return [t for t in tree_leaves(self.arguments) if isinstance(t, torch.Tensor)]

    def take(self, other):
        """The data of another call, in these tensors."""
        with torch.no_grad():
            for mine, its in zip(self.tensors(), other.tensors(), strict=True):
                mine.copy_(its)

    def __call__(self):
        result = self.function(*self.arguments)
        gradients = torch.autograd.grad(result, self.learning) if self.learning else ()
        return [t.detach() for t in (*tree_leaves(result), *gradients)]


class Gpu:
    """What the tests ask of a GPU."""

    def capture(self, call):
        """The call's results, and a function that computes them again from the tensors' data then."""
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                call()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            found = call()
        return found, graph.replay

    @contextlib.contextmanager
    def no_waiting(self):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")

    @contextlib.contextmanager
    def busy_stream(self):
        """Another stream, on which a kernel of some milliseconds stands first."""
        torch.cuda.synchronize()
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(20_000_000)
            yield
        torch.cuda.synchronize()


class StandIn:
    """The same on the CPU: whether the tests themselves go through."""

    def capture(self, call):
        found = call()

        def replay():
            for old, new in zip(found, call(), strict=True):
                old.copy_(new)

        return found, replay

    no_waiting = busy_stream = staticmethod(contextlib.nullcontext)


@pytest.fixture
def device(at):
    return at("cuda")


@pytest.fixture
def gpu(device):
    return StandIn() if STAND_IN else Gpu()


def same(found, expected):
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.nan_to_num(7), other.nan_to_num(7))


@EACH
def test_in_a_cuda_graph(name, shape, device, gpu):
    call, other = Call(name, shape, device), Call(name, shape, device, seed=1)
    found, replay = gpu.capture(call)
    for data in (other, Call(name, shape, device, seed=2)):
        call.take(data)
        replay()
        same(found, data())


@EACH
def test_nothing_waits(name, shape, device, gpu):
    call = Call(name, shape, device)
    expected = call()
    with gpu.no_waiting():
        found = call()
    same(found, expected)


@EACH
def test_on_another_stream(name, shape, device, gpu):
    """The data come late on that stream: an operation that ran on the default one would read NaN."""
    call, data = Call(name, shape, device), Call(name, shape, device, seed=1)
    expected = data()
    with torch.no_grad():
        for tensor in call.tensors():
            tensor.fill_(float("nan") if tensor.is_floating_point() else 0)
    with gpu.busy_stream():
        call.take(data)
        found = call()
    same(found, expected)


@EACH
def test_on_the_second_gpu_while_the_first_is_current(name, shape, device):
    if torch.cuda.device_count() < 2:
        pytest.skip("no second GPU")
    expected = Call(name, shape, "cuda:0")()
    call = Call(name, shape, "cuda:1")
    call.take(Call(name, shape, "cuda:0"))
    with torch.cuda.device(0):
        found = call()
    assert {t.device.index for t in found} == {1}
    same([t.to("cuda:0") for t in found], expected)


ROWS = [(2, 5003), (1, 40003)] if STAND_IN else [(64, 32000), (16, 128256)]
BATCHES = [33] if STAND_IN else [300, 1100]
MAPS = Maps(1, 3, 9, 9, 1) if STAND_IN else Maps(2, 256, 56, 56, 1)
LARGE = [
    *[("multi_teacher", Logits(*rows, k)) for rows in ROWS for k in (1, 4)],
    ("multi_teacher_kd_with_gradient", Logits(*ROWS[0], 2)),
    *[(name, Networks(*rows, 3)) for name in ("mutual", "cross_entropy") for rows in ROWS],
    *[(name, Embeddings(n, 64)) for name in ("rkd_distance", "rkd_angle") for n in BATCHES],
    ("feature_ensemble", MAPS),
]
# |error| / |gradient| of a whole gradient: rounded to the dtype, which for bfloat16 is its storage.
BOUND = {torch.float32: 2e-5, torch.bfloat16: 4e-3}


@pytest.mark.parametrize("name, shape", LARGE, ids=str)
@pytest.mark.parametrize("dtype", BOUND)
def test_gradients_of_large_inputs_against_float64(name, shape, dtype, device):
    if dtype not in OPERATIONS[name].dtypes:
        pytest.skip(f"{name} is not for {dtype}")
    call, exact = Call(name, shape, device, dtype=dtype), Call(name, shape, "cpu", dtype=torch.float64)
    exact.take(call)
    for one, other in zip(call(), exact(), strict=True):
        distance = torch.linalg.vector_norm(one.cpu().double() - other) / torch.linalg.vector_norm(other)
        assert distance < BOUND[dtype]
