"""What a run of CUDA kernels on the host promises: the same answer in every order of threads, and an error where a
kernel breaks a rule. The kernels are tests/simt/kernels.cuh; most have a switch that breaks them."""

import os
import re
import shutil
import subprocess
import threading
from pathlib import Path

import numpy as np
import pytest
from simt import build
from simt.fixtures import SCHEDULES, in_every_schedule

WARP = 32


def rows(n=1000, count=3):
    return np.random.default_rng(0).integers(-9, 9, (count, n)).astype(np.float32)  # sums are exact


@pytest.mark.parametrize("threads", [1, 31, 32, 33, 256, 1024])
def test_reduction_is_right_in_every_schedule(simt, threads):
    x = rows()
    for out in in_every_schedule(simt, lambda: simt.block_sum(x, threads, True)):
        np.testing.assert_array_equal(out, x.sum(1))


def test_removed_barrier_gives_wrong_sums(simt):
    simt.set_races(False)
    x = rows()
    results = in_every_schedule(simt, lambda: simt.block_sum(x, 256, False))
    assert any(not np.array_equal(out, x.sum(1)) for out in results)


def test_removed_barrier_in_a_scan_shows_in_some_schedule(simt):
    simt.set_races(False)
    x = np.arange(256)
    results = in_every_schedule(simt, lambda: simt.scan(x, False))
    assert any(not np.array_equal(out, np.cumsum(x)) for out in results)


def test_removed_syncwarp_shows_in_some_schedule(simt):
    simt.set_races(False)
    x = np.arange(WARP)
    results = in_every_schedule(simt, lambda: simt.warp_rotate(x, False))
    assert any(not np.array_equal(out, np.roll(x, -1)) for out in results)


def test_barriers_and_syncwarp_order_shared_memory(simt):
    x = np.arange(256)
    for out in in_every_schedule(simt, lambda: simt.scan(x, True)):
        np.testing.assert_array_equal(out, np.cumsum(x))
    for out in in_every_schedule(simt, lambda: simt.warp_rotate(x[:WARP], True)):
        np.testing.assert_array_equal(out, np.roll(x[:WARP], -1))


RACES = {
    "block_sum": lambda simt: simt.block_sum(rows(), 256, False),
    "scan": lambda simt: simt.scan(np.arange(256), False),
    "warp_rotate": lambda simt: simt.warp_rotate(np.arange(WARP), False),
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("kernel", RACES)
def test_race_is_found_whatever_the_schedule(simt, kernel, schedule):
    simt.set_schedule(schedule)
    where = rf"{kernel}<false>, block \d+, thread \d+: data race .* byte \d+ of shared array"
    with pytest.raises(simt.Error, match=where):
        RACES[kernel](simt)


def test_a_schedule_repeats_exactly(simt):
    simt.set_races(False)
    x = np.arange(WARP)
    first = in_every_schedule(simt, lambda: simt.warp_rotate(x, False))
    second = in_every_schedule(simt, lambda: simt.warp_rotate(x, False))
    np.testing.assert_array_equal(first, second)
    assert len({tuple(out) for out in first}) == len(SCHEDULES)


FAULTS = {
    "divergent_barrier": r"thread \d+: __syncthreads\(\) at kernels.cuh:\d+ is divergent, thread \d+ waits at "
    r"__syncthreads\(\) at kernels.cuh:\d+",
    "barrier_after_exit": r"thread 1: __syncthreads\(\) at kernels.cuh:\d+ is divergent, thread \d+ has exited",
    "exit_before_barrier": r"thread 40: it exits while thread \d+ waits at __syncthreads\(\)"
    r"|__syncthreads\(\) at kernels.cuh:\d+ is divergent, thread 40 has exited",
    "exited_lane": r"__shfl_xor_sync\(\) at kernels.cuh:\d+ with mask 0xffffffff names lane 5, which has exited"
    r"|thread 5: it exits while thread \d+ waits at __shfl_xor_sync\(\) .* which names its lane",
    "lane_not_in_mask": r"thread 3: __shfl_xor_sync\(\) .* mask 0xfffffff7 does not name the calling lane 3",
    "other_operation": r"__shfl_(xor|down)_sync\(\) .* is divergent, thread \d+ waits at __shfl_(xor|down)_sync\(\)",
    "other_mask": r"mask 0x0000000f is divergent, thread \d+ waits at .* with mask 0xffffffff",
    "deadlock": r"deadlock: thread \d+ waits at __shfl_xor_sync\(\) .*, while thread 5 waits at __syncthreads\(\)",
    "past_dynamic": r"thread 9: it writes byte 256 of dynamic shared memory, which has 256 bytes",
    "before_dynamic": r"thread 9: it writes a byte before the start of dynamic shared memory",
    "past_static": r"thread 9: it writes byte 64 of shared array 'fixed', which has 64 bytes",
    "bad_width": r"__shfl_xor_sync\(\) got width 12, not a power of two up to 32",
    "nested_launch": "a kernel launches a kernel",
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("fault", FAULTS)
def test_fault_is_named(simt, fault, schedule):
    simt.set_schedule(schedule)
    with pytest.raises(simt.Error, match=FAULTS[fault]) as caught:
        simt.faulty(fault, 64)
    assert str(caught.value).startswith("simt: faulty, block 0, ")
    assert "\n" not in str(caught.value)
    np.testing.assert_array_equal(simt.faulty("none", 64), np.arange(64) ^ 1)


def test_lane_that_the_block_lacks(simt):
    with pytest.raises(simt.Error, match="names lane 8, which a block of 40 threads does not have"):
        simt.faulty("none", 40)


def test_exception_leaves_nothing_behind(simt):
    before = simt.destroyed_objects()
    with pytest.raises(RuntimeError, match=r"^thrown by a kernel$"):
        simt.faulty("exception", 64)
    assert simt.destroyed_objects() - before == 8  # threads 0 to 6 wait at a barrier, thread 7 throws
    np.testing.assert_array_equal(simt.faulty("none", 64), np.arange(64) ^ 1)


def test_shared_arrays_do_not_alias(simt):
    for out in in_every_schedule(simt, simt.arrays):
        assert out.all()


def test_uninitialised_shared_memory_is_nan_in_every_block(simt):
    for out in in_every_schedule(simt, lambda: simt.uninitialised(3)):
        assert np.isnan(out).all()


@pytest.mark.parametrize("asserted", [True, False])
def test_vector_access_must_be_aligned(simt, asserted):
    np.testing.assert_array_equal(simt.vector_copy(0, asserted), np.arange(16))
    for offset in (1, 2, 3):
        with pytest.raises(simt.Error, match=f"a 16-byte access is misaligned: its address is {4 * offset} modulo 16"):
            simt.vector_copy(offset, asserted)
    np.testing.assert_array_equal(simt.vector_copy(4, asserted), np.arange(16) + 4)


def test_launch_limits(simt):
    simt.empty(1, 1024)
    with pytest.raises(simt.Error, match=r"empty<0>: a block of 1025 threads passes the limit of 1024"):
        simt.empty(1, 1025)
    with pytest.raises(simt.Error, match="a dimension of the grid or the block is 0"):
        simt.empty(0, 32)
    with pytest.raises(simt.Error, match="past the limit of 49152"):
        simt.large_static()


def test_dynamic_shared_memory_must_be_asked_for(simt):
    simt.empty(1, 32, dynamic_bytes=48 << 10)
    with pytest.raises(simt.Error, match=r"49153 bytes of dynamic .* need cudaFuncSetAttribute"):
        simt.empty(1, 32, dynamic_bytes=(48 << 10) + 1)
    simt.empty(1, 32, dynamic_bytes=227 << 10, opt_in=True)
    with pytest.raises(simt.Error, match="232449 bytes of dynamic shared memory pass the device's limit of 232448"):
        simt.empty(1, 32, dynamic_bytes=(227 << 10) + 1, opt_in=True)
    simt.set_device(shared_optin=99 << 10)
    with pytest.raises(simt.Error, match="pass the device's limit of 101376"):
        simt.empty(1, 32, dynamic_bytes=100 << 10, opt_in=True)
    with pytest.raises(TypeError, match="unknown property 'cores'"):
        simt.set_device(cores=1)


def shuffled(x, argument, width):
    """The four shuffles as the CUDA guide defines them: [4, threads]."""
    t = np.arange(len(x))
    lane, first = t % WARP, t % WARP // width * width
    base = t - lane
    idx = first + argument % width
    up = np.where(lane - argument >= first, lane - argument, lane)
    down = np.where(lane + argument < first + width, lane + argument, lane)
    xor = np.where((lane ^ argument) < first + width, lane ^ argument, lane)
    return np.stack([x[base + source] for source in (idx, up, down, xor)])


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64])
@pytest.mark.parametrize("width", [1, 2, 8, 32])
def test_shuffles(simt, dtype, width):
    x = np.random.default_rng(1).normal(0, 1e6, 96).astype(dtype)
    for argument in (0, 1, 3, 7, 16, 31):
        for out in in_every_schedule(simt, lambda a=argument: simt.shuffles(x, a, width), schedules=(0, 1, 2)):
            assert out.dtype == dtype
            np.testing.assert_array_equal(out, shuffled(x, argument, width))


@pytest.mark.parametrize("values", ["mixed", "positive", "negative"])
def test_votes_and_reductions(simt, values):
    x = np.random.default_rng(2).integers(-100, 100, 96).astype(np.int32)
    x = {"mixed": x, "positive": abs(x) + 1, "negative": -abs(x)}[values]
    groups = x.reshape(-1, 16)  # half-warps
    positive = groups > 0
    shift = 16 * (np.arange(len(groups)) % 2)
    ballot = ((positive << np.arange(16)).sum(1) << shift).astype(np.uint32).astype(np.int32)
    bits = [np.bitwise_and, np.bitwise_or, np.bitwise_xor]
    per_group = [ballot, positive.any(1), positive.all(1), groups.sum(1), groups.min(1), groups.max(1)]
    per_group += [f.reduce(groups, axis=1) for f in bits]
    per_block = [(x > 0).sum(), (x > 0).all(), (x > 0).any()]
    expected = [np.repeat(v, 16) for v in per_group] + [np.full(96, v) for v in per_block]
    for out in in_every_schedule(simt, lambda: simt.votes(x)):
        np.testing.assert_array_equal(out, np.stack(expected))


def test_atomics(simt):
    x = np.random.default_rng(3).integers(-50, 50, 203).astype(np.int32)
    n = len(x)
    expected = [x.sum(), n, n * (n - 1) // 2, n, x.max(), x.min(), n % 10, n]
    for out in in_every_schedule(simt, lambda: simt.atomics(x)):
        np.testing.assert_array_equal(out, expected)


def test_lost_updates_are_races_and_atomics_are_not(simt):
    x = np.random.default_rng(4).integers(0, 100, 96).astype(np.int32)
    for out in in_every_schedule(simt, lambda: simt.histogram(x, True)):
        np.testing.assert_array_equal(out, np.bincount(x % 4, minlength=4))
    with pytest.raises(simt.Error, match=r"data race in shared memory: thread .* of shared array 'count'"):
        simt.histogram(x, False)


@pytest.mark.parametrize("grid, block", [((5, 1, 1), (33, 1, 1)), ((3, 4, 2), (7, 1, 1)), ((2, 1, 3), (4, 3, 2))])
def test_indices(simt, grid, block):
    def points(size):
        z, y, x = np.meshgrid(*(np.arange(s) for s in reversed(size)), indexing="ij")
        return np.stack([x, y, z], -1).reshape(-1, 3)

    threads, blocks = points(block), points(grid)
    expected = np.empty((len(blocks), len(threads), 6))
    expected[..., :3] = threads
    expected[..., 3:] = blocks[:, None]
    for out in in_every_schedule(simt, lambda: simt.indices(grid, block)):
        np.testing.assert_array_equal(out, expected)


def test_functions(simt):
    x, bits = 0.75, 0xF0
    expected = [np.exp(x), 2**x, np.log(x), x**-0.5, 2, x / 4, x * x + 1, x, 4, 5, 24, 0x0F00, 7, x, np.exp(x), x]
    np.testing.assert_allclose(simt.functions(x, bits), expected, rtol=1e-6)
    assert simt.functions(-1.0, 1)[7] == 0 and simt.functions(3.0, 1)[7] == 1  # __saturatef


def test_counters(simt):
    simt.reset_counters()
    simt.block_sum(rows(count=2), 64, True)
    counts = simt.counters()
    assert (counts["launches"], counts["blocks"], counts["barriers"]) == (1, 2, 2)
    assert counts["warp_operations"] == 2 * 2 * 5  # blocks, warps, steps


def test_host_threads_do_not_disturb_each_other(simt):
    x, wrong = rows(), []

    def work():
        for _ in range(20):
            if not np.array_equal(simt.block_sum(x, 128, True), x.sum(1)):
                wrong.append(1)

    workers = [threading.Thread(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert not wrong


def test_an_up_to_date_library_is_not_built_again(simt):
    library = build.build()
    before = library.stat().st_mtime_ns
    assert build.build() == library
    assert library.stat().st_mtime_ns == before


def nvcc():
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    return os.environ.get("CUDACXX") or shutil.which("nvcc") or shutil.which(f"{home}/bin/nvcc")


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90"])
def test_the_same_kernels_compile_with_nvcc(architecture, tmp_path):
    if nvcc() is None:
        pytest.skip("no nvcc")
    source, include = build.HOST / "selftest.cu", [f"-I{build.ROOT / 'csrc'}", f"-I{build.HOST.parent}"]
    command = [nvcc(), "-std=c++20", f"-arch={architecture}", *include]
    done = subprocess.run([*command, "-c", source, "-o", tmp_path / "selftest.o"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = subprocess.run([*command, "-E", source], capture_output=True, text=True, check=True).stdout
    assert not re.search(r"tests/simt/host/|namespace simt\b", listed)  # nothing of the scheduler


@pytest.mark.slow
@pytest.mark.parametrize("flags", [["-DSIMT_UCONTEXT"], ["-fsanitize=address"]], ids=["swapcontext", "asan"])
def test_other_builds_of_the_scheduler(flags, tmp_path):
    if build.compiler() is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "standalone"
    sources = [build.HOST / name for name in ("machine.cpp", "meeting.cpp", "api.cpp", "standalone.cpp")]
    kernels = ["-x", "c++", build.HOST / "selftest.cu"]
    subprocess.run([build.compiler(), *build.COMMON, *flags, *sources, *kernels, "-o", program], check=True)
    done = subprocess.run([program], capture_output=True, text=True, cwd=Path(tmp_path))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "none: nothing" in done.stdout
    # Without race.cpp the guards around the arrays show the write, not who made it.
    assert "past_static: simt: faulty, block 0, a thread wrote byte 64 of shared array 'fixed'" in done.stdout
    assert done.stdout.count("nothing") == done.stdout.count("none: nothing")
