"""Which GPUs a native library can serve."""

import pytest

from fastkd import _backend
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


def test_a_gpu_without_code_goes_to_the_reference():
    library = Library(True, architectures=("90-real",))
    built = "the library has code for 90-real, the GPU has compute capability"
    assert _backend.why_not_gpu(library, (8, 0)) == f"{built} 8.0: build it here again"
    assert _backend.why_not_gpu(library, (7, 5)) == "the GPU has compute capability 7.5, the kernels need 8.0 or newer"
    assert _backend.why_not_gpu(library, (9, 0)) is None
