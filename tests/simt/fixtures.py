"""For tests that run CUDA kernels on the host: the fixture `simt`, which conftest.py imports, and a helper."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from simt import build

SCHEDULES = (0, 1, 2, 3, 4)  # in order, two random interleavings, two where one warp runs ahead


@pytest.fixture(name="simt")
def simt_module() -> Iterator:
    """The module `fastkd_simt`, with the default settings before and after."""
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    module = build.load()
    _reset(module)
    yield module
    _reset(module)


def _reset(module) -> None:
    module.set_schedule(0)
    module.set_races(True)
    module.set_device()
    module.reset_counters()


def in_every_schedule(module, run: Callable, schedules=SCHEDULES) -> list:
    """What `run()` returns in each order of threads and blocks; a kernel without races returns the same in all."""
    results = []
    for n in schedules:
        module.set_schedule(n)
        try:
            results.append(run())
        finally:
            module.set_schedule(0)
    return results
