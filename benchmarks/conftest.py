"""Options and fixtures of the benchmarks, and the report at the end. Timed with --benchmark-enable (`make bench`)."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import charts, gpu_calls, guard, measure, registry, report

COMPARISONS = pytest.StashKey[list]()
DEADLINE = pytest.StashKey[float]()
TESTED = pytest.StashKey[dict]()
CANDIDATES = pytest.StashKey[tuple]()


def pytest_addoption(parser):
    group = parser.getgroup("fastkd")
    group.addoption("--quick", action="store_true", help="small shapes, few rounds, and no file is written")
    group.addoption("--brief", action="store_true", help="all shapes, few rounds, only in turns; the file is written")
    group.addoption(
        "--deadline", type=float, default=float("inf"), help="seconds for the comparisons, none begun later"
    )
    group.addoption("--untested", help="a JSON of what the tests said before: none is run, all is reported")
    group.addoption("--tiny", action="store_true", help="shapes of gpu_calls, against eager alone: each line runs once")
    group.addoption("--bench-device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    group.addoption("--dtypes", default="float32", help="comma-separated: float32,bfloat16,float64")
    group.addoption("--results", default=str(report.FOLDER), help="folder for <machine>.json")


def pytest_configure(config):
    config.stash[COMPARISONS], config.stash[TESTED] = [], {}


def timing(config) -> bool:
    return config.getoption("benchmark_enable") or not config.getoption("benchmark_disable")


def pytest_generate_tests(metafunc):
    """Every case of the module's OPERATIONS; with a candidate, each that can run the case."""
    if "case" not in metafunc.fixturenames:
        return
    config = metafunc.config
    try:
        dtypes = [getattr(torch, name) for name in config.getoption("dtypes").split(",")]
    except AttributeError as error:
        raise pytest.UsageError(f"--dtypes: {error}") from None
    quick, device = config.getoption("quick"), config.getoption("bench_device")
    cases = [
        case for operation in metafunc.module.OPERATIONS for case in registry.cases(operation, dtypes, quick, device)
    ]
    if config.getoption("tiny"):
        cases = [case for case in gpu_calls.small() if case.dtype == torch.float32]
    if "candidate" not in metafunc.fixturenames:
        return metafunc.parametrize("case", cases, ids=str)
    pairs = [(case, name) for case in cases for name in (measure.FUSED, *case.baselines(device))]
    metafunc.parametrize(("case", "candidate"), pairs, ids=str)


@pytest.hookimpl(trylast=True)  # after -k
def pytest_collection_modifyitems(config, items):
    if config.getoption("quick") or config.getoption("brief"):
        items[:] = [item for item in items if "candidate" not in item.fixturenames]
    if not timing(config) or config.getoption("collectonly"):
        return
    cases = {id(item): item.callspec.params["case"] for item in items if hasattr(item, "callspec")}
    planned = list(cases.values())
    if config.getoption("brief"):
        planned = registry.in_turn(planned)
    order = {case: place for place, case in reversed(list(enumerate(map(str, planned))))}
    items.sort(key=lambda item: order[str(cases[id(item)])] if id(item) in cases else -1)  # compiled once per case
    operations = {case.operation.name: case.operation for case in cases.values()}
    config.stash[TESTED].update(tested(list(operations.values()), config))


def tested(operations, config) -> dict[str, str]:
    """What pytest said of each operation's tests; --quick and --brief: of those that name the device."""
    if config.getoption("untested"):
        said = json.loads(Path(config.getoption("untested")).read_text())
        return {operation.name: said.get(operation.name, "not run") for operation in operations}
    keyword = guard.keyword(config.getoption("bench_device"), config.getoption("quick") or config.getoption("brief"))
    try:
        return guard.require_all_passing({operation.name: operation.tests for operation in operations}, keyword)
    except guard.Refused as refusal:
        raise pytest.UsageError(str(refusal)) from None


@pytest.fixture
def steps(request):
    """A case's candidates; the tests of one case follow each other and share them."""
    config = request.config

    def make(case):
        if config.stash.get(CANDIDATES, ("",))[0] != str(case):
            candidates = measure.candidates(case, config.getoption("bench_device"))
            kept = {"fused", "eager"} if config.getoption("tiny") else set(candidates)
            config.stash[CANDIDATES] = str(case), {name: step for name, step in candidates.items() if name in kept}
        return config.stash[CANDIDATES][1]

    return make


@pytest.fixture
def alone(benchmark, steps, request):
    """Times one candidate by pytest-benchmark, by itself."""
    device = request.config.getoption("bench_device")

    def run(case, candidate):
        step = steps(case)[candidate]
        if candidate not in measure.results({candidate: step}):
            pytest.skip(f"{candidate} does not fit in the GPU's memory")
        benchmark.group = str(case)
        on_gpu = torch.device(device).type == "cuda"

        def call():
            step()
            if on_gpu:
                torch.cuda.synchronize(device)

        benchmark(call)

    return run


@pytest.fixture
def compare(steps, request):
    """Times a case's candidates and its floor in turns; the report's numbers."""
    config = request.config
    if not timing(config):
        pytest.skip("timed only with --benchmark-enable")
    rounds = {"seconds": 0.5, "least": 5} if config.getoption("quick") else {"seconds": 2.0}
    if config.getoption("brief"):
        rounds = {"seconds": 0.25, "least": 5}
    if config.getoption("tiny"):
        rounds = {"seconds": 0.01, "least": 2}

    def run(case):
        end = config.stash.setdefault(DEADLINE, time.monotonic() + config.getoption("deadline"))
        if time.monotonic() > end:
            pytest.skip(f"left out: {config.getoption('deadline'):.0f} seconds have passed")
        wrong = [] if config.getoption("untested") else None
        found = report.comparisons(case, steps(case), config.getoption("bench_device"), **rounds, wrong=wrong)
        config.stash[COMPARISONS].extend(found)
        if wrong:
            config.stash[TESTED][case.operation.name] = f"FAILED: {wrong[0]}"
        if config.getoption("untested"):
            write(config)  # as it goes: what is cut off leaves what it measured

    return run


def write(config) -> tuple[dict, Path | None]:
    """The result so far, and its file where one is written."""
    folder, device = Path(config.getoption("results")), config.getoption("bench_device")
    result = report.result(config.stash[COMPARISONS], device, config.stash[TESTED])
    if config.getoption("quick") or config.getoption("keyword"):
        return result, None
    return result, report.write(result, folder)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter, exitstatus, config):
    comparisons = config.stash[COMPARISONS]
    if not comparisons:
        return
    say = terminalreporter.write_line
    if exitstatus != 0 and not config.getoption("untested"):
        return say("no ratios are reported: a benchmark failed")
    result, path = write(config)
    say(report.table(result, Path(config.getoption("results"))))
    left_out = len(terminalreporter.stats.get("skipped", []))
    if left_out:
        say(f"{left_out} benchmarks were left out (pytest -rs says why).")
    if path is None:
        return say("part of the cases or rounds: nothing was written")
    say(f"written: {path}")
    say(f"written: {charts.overview(result, path.with_suffix('.png'))}")
