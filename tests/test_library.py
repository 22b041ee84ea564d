"""Which GPUs a native library can serve."""

import pytest

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
