"""Options and fixtures of the benchmarks, and the report at the end. Timed with --benchmark-enable (`make bench`)."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import guard, measure, registry, report  # noqa: E402

COMPARISONS = pytest.StashKey[list]()
TESTED = pytest.StashKey[dict]()


def pytest_addoption(parser):
    group = parser.getgroup("fastkd")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds, and no file is written")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtypes", default="float32", help="comma-separated: float32,bfloat16,float64")
    group.addoption("--results", default=str(report.FOLDER), help="folder for <machine>.json")


def pytest_configure(config):
    config.stash[COMPARISONS], config.stash[TESTED] = [], {}


def timing(config) -> bool:
    return config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")


def pytest_generate_tests(metafunc):
    if "case" not in metafunc.fixturenames:
        return
    config, operation = metafunc.config, metafunc.module.OPERATION
    try:
        dtypes = [getattr(torch, name) for name in config.getoption("dtypes").split(",")]
    except AttributeError as error:
        raise pytest.UsageError(f"--dtypes: {error}") from None
    metafunc.parametrize("case", registry.cases(operation, dtypes, config.getoption("quick")), ids=str)
    if "candidate" in metafunc.fixturenames:
        metafunc.parametrize("candidate", [measure.FUSED, *operation.baselines])


def pytest_collection_modifyitems(config, items):
    if not timing(config) or config.getoption("collectonly"):
        return
    operations = [getattr(item.module, "OPERATION", None) for item in items]
    for operation in {o.name: o for o in operations if o is not None}.values():
        try:
            config.stash[TESTED][operation.name] = guard.require_passing(operation.name, operation.tests)
        except guard.Refused as refusal:
            raise pytest.UsageError(str(refusal)) from None


@pytest.fixture
def alone(benchmark, request):
    """Times one candidate by pytest-benchmark, by itself."""
    device = request.config.getoption("bench_device")

    def run(case, candidate):
        step = measure.candidates(case, device)[candidate]
        benchmark.group = str(case)
        on_gpu = torch.device(device).type == "cuda"

        def call():
            step()
            if on_gpu:
                torch.cuda.synchronize(device)

        call()
        benchmark(call)

    return run


@pytest.fixture
def compare(request):
    """Times a case's candidates and its floor in turns; the report's numbers."""
    config = request.config
    if not timing(config):
        pytest.skip("timed only with --benchmark-enable")
    seconds = 1.0 if config.getoption("quick") else 4.0

    def run(case):
        config.stash[COMPARISONS].extend(report.comparisons(case, config.getoption("bench_device"), seconds))

    return run


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    write = terminalreporter.write_line
    if exitstatus != 0:
        return write("no ratios are reported: a benchmark failed")
    folder = Path(config.getoption("results"))
    result = report.result(comparisons, config.getoption("bench_device"), config.stash[TESTED])
    write(report.table(result, folder))
    if config.getoption("quick") or config.getoption("keyword"):
        write("part of the cases or rounds: nothing was written")
    else:
        write(f"written: {report.write(result, folder)}")
