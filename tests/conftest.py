"""What all tests share: fresh memory is poisoned, and the places where an operation's kernels run."""

import contextlib
import functools
import os

import pytest
import torch

from fastkd import _backend

PLACES = ("cpu", "simt", "simt_stream", "cuda", "cuda_stream")
# Without a GPU, what runs in its places runs on the emulator instead: whether `pytest -m gpu` would go through.
STAND_IN = bool(os.environ.get("FASTKD_GPU_STAND_IN"))


@pytest.hookimpl(tryfirst=True)  # before -m
def pytest_collection_modifyitems(items):
    """A test whose place is on a GPU is marked so."""
    for item in items:
        place = item.callspec.params.get("place") if hasattr(item, "callspec") else None
        if place in ("cuda", "cuda_stream"):
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def poisoned_memory():
    """`torch.empty` holds NaN, so that a result left unwritten shows."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@pytest.fixture(scope="module")
def one_thread():
    """For modules of tiny tensors: threads that wait for each other cost more than they bring."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def values_unreadable():
    """As on a device that must not be waited for: the host looks at no tensor's values."""
    with _backend.pretend(values_readable=False):
        yield


@pytest.fixture
def at(request):
    """`at(place)` returns the device to make tensors on, with that place's kernels behind fastkd.functional.

    cpu: the CPU kernels. simt: the CUDA kernels, run on the host. simt_stream: those for long rows, whatever
    the length. cuda, cuda_stream: the same on a GPU, where kernels that are missing are an error.
    """

    def go(place: str) -> torch.device:
        stream = place.endswith("_stream")
        if place.startswith("cuda") and not STAND_IN:
            device = _on_gpu()
            pretending.enter_context(_backend.pretend(stream_always=stream))
            return device
        if place == "cpu":
            if _backend.why_not_native(torch.empty(0)) is not None:
                pytest.fail("the native library is missing: run `make build`")
            return torch.device("cpu")
        request.getfixturevalue("simt")
        _register_fakes_once()
        pretending.enter_context(_backend.pretend(cpu_namespace="fastkd_simt", cpu_kind="cuda", stream_always=stream))
        return torch.device("cpu")

    with contextlib.ExitStack() as pretending:
        yield go


def _on_gpu() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    if (reason := _backend.why_not_native(torch.empty(0, device=device))) is not None:
        pytest.fail(f"no CUDA kernels: {reason}")
    return device


@functools.cache
def _register_fakes_once() -> None:
    _backend.register_all_fakes("fastkd_simt")


from simt.fixtures import simt_module  # noqa: E402, F401
