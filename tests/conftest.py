"""What all tests share: fresh memory is poisoned, and the places where an operation's kernels run."""

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
def at(request, monkeypatch):
    """`at(place)` returns the device to make tensors on, with that place's kernels behind fastkd.functional.

    cpu: the CPU kernels. simt: the CUDA kernels, run on the host. simt_stream: those for long rows, whatever
    the length. cuda, cuda_stream: the same on a GPU, where kernels that are missing are an error.
    """

    def go(place: str) -> torch.device:
        if place.startswith("cuda") and not STAND_IN:
            return _on_gpu(monkeypatch, stream=place == "cuda_stream")
        if place == "cpu":
            if _backend.why_not_native(torch.empty(0)) is not None:
                pytest.fail("the native library is missing: run `make build`")
            return torch.device("cpu")
        request.getfixturevalue("simt")
        _on_host_kernels(monkeypatch)
        if place.endswith("_stream"):
            _stream_always(monkeypatch)
        return torch.device("cpu")

    return go


def _on_gpu(monkeypatch, stream: bool) -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    device = torch.device("cuda")
    if (reason := _backend.why_not_native(torch.empty(0, device=device))) is not None:
        pytest.fail(f"no CUDA kernels: {reason}")
    if stream:
        _stream_always(monkeypatch)
    return device


def _on_host_kernels(monkeypatch) -> None:
    monkeypatch.setattr(_backend, "_cpu_namespace", "fastkd_simt")
    monkeypatch.setattr(_backend, "_cpu_kind", "cuda")
    _register_fakes_once()


def _stream_always(monkeypatch) -> None:
    from fastkd.ops import _multi_teacher_kernels, _peer_kernels

    monkeypatch.setattr(_peer_kernels, "STREAM_ALWAYS", True)
    monkeypatch.setattr(_multi_teacher_kernels, "ON_CHIP_CLASSES", {})
    monkeypatch.setattr(_multi_teacher_kernels, "ON_CHIP_CLASSES_DEFAULT", 0)


@functools.cache
def _register_fakes_once() -> None:
    _backend.register_all_fakes("fastkd_simt")


from simt.fixtures import simt_module  # noqa: E402, F401
