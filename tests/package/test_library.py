"""Which GPUs a native library can serve."""

import pytest

from fastkd import _backend, _library
from fastkd._library import Library


@pytest.mark.parametrize(
    "architectures, capability, serves",
    [
        (("90-real",), (9, 0), True),
        (("90-real",), (8, 0), False),
        (("80-real",), (8, 9), True),  # machine code runs on later minor versions of its major one
        (("86-real",), (8, 0), False),
        (("80-real",), (9, 0), False),
        (("80-virtual",), (9, 0), True),
        (("90-virtual",), (8, 9), False),
        (("90a-real",), (9, 0), True),
        (("90a-virtual",), (10, 0), False),
        (("80-real", "120-real"), (12, 1), True),
        ((), (9, 0), False),
    ],
)
def test_code_for_a_gpu(architectures, capability, serves):
    assert Library(True, architectures=architectures).has_code_for(capability) is serves


def test_a_gpu_without_code_goes_to_the_reference(monkeypatch):
    monkeypatch.setattr(_library, "CUDA", Library(True, architectures=("90-real",)))
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda index: (8, 0))
    _backend._why_not_cuda.cache_clear()
    try:
        reason = _backend._why_not_cuda(0)
    finally:
        _backend._why_not_cuda.cache_clear()
    assert reason == "the library has code for 90-real, the GPU has compute capability 8.0: build it here again"
