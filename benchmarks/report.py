"""What a benchmark run says: one JSON file per machine, and a table a person reads."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

import fastkd
from benchmarks import counts, measure, peers
from benchmarks.registry import Case, Result
from fastkd import _backend, _library

FOLDER = Path(__file__).resolve().parent / "results"
SCHEMA = 2
LEVELS = {1: "x86-64", 3: "avx2", 4: "avx512"}
QUANTILES = {"p20": float, "p50": float, "p80": float}
BUSY = 0.25  # cores taken by others, from which on a run is called disturbed

# What every file must hold: a type, a dict of the same, a list of one element, or {str: ...} for any keys.
COMPARISON = {
    "operation": str,
    "shape": {str: int},
    "dtype": str,
    "passes": str,
    "caches": str,
    "rounds": int,
    "floor_bytes": int,
    "microseconds": {str: QUANTILES},
    "ratios": {str: QUANTILES},
    "extra_bytes": {str: int},
    "others_cores": (float, type(None)),
}
# Since schema 2: of a training step the two passes one by one; operators or kernels, and the bytes they are handed.
COUNTS = {
    "parts": ({str: {"forward": QUANTILES, "backward": QUANTILES}}, {}),
    "launches": {str: int},
    "traffic_bytes": {str: int},
}
HEADER = {
    "schema": int,
    "date": str,
    "commit": str,
    "device": {"name": str, "kind": str, "cores": int, "threads": int, "level": str, "slug": str},
    "versions": {"fastkd": str, "torch": str, "python": str},
    "tests": {str: str},
    "gpu": str,
}
LAYOUT = HEADER | {"peers": {str: str}, "comparisons": [COMPARISON | COUNTS]}
LAYOUT_1 = HEADER | {"comparisons": [COMPARISON]}


def comparisons(
    case: Case,
    steps: dict[str, measure.Step],
    device: str,
    seconds: float,
    least: int = 7,
    caches: Sequence[str] = (measure.COLD, measure.WARM),
    wrong: list[str] | None = None,
) -> list[dict]:
    """One case measured with cold and with warm caches: times of all candidates and the floor, ratios, memory, counts.

    At least `least` rounds. Where a call takes as long as measure.SLOW, only with cold caches.
    wrong: where candidates do not compute the same, it is noted here and measured all the same; None: an error.
    """
    reason = _backend.why_not_native(torch.empty(0, device=device))
    if reason is not None:
        raise RuntimeError(f"{case.operation.name}: no native kernels to measure: {reason}")
    apart: dict[str, float] = {}
    results = measure.results(steps, apart)
    try:
        require_same(results, case.dtype)
        require_same_gradients(apart, case.dtype)
    except AssertionError as error:
        if wrong is None:
            raise
        wrong.append(f"{case}: {error}")
    steps = {name: steps[name] for name in results}
    counted = {"extra_bytes": {name: measure.extra_bytes(step, device) for name, step in steps.items()}}
    counted |= _counts(steps, device)
    calls = steps | {measure.FLOOR: measure.Copy(case.bytes_floor, device)}
    rounds = {"seconds": seconds, "least": least}
    found = []
    for kind in caches:
        if not found or max(q["p50"] for q in found[0]["microseconds"].values()) < measure.SLOW * 1e6:
            found.append(_compared(case, calls, device, kind, rounds) | counted)
    return found


def _counts(steps: dict[str, measure.Step], device: str) -> dict:
    """Inductor's code is no operator that could be counted; on a GPU its kernels can."""
    operators = {name: step for name, step in steps.items() if name != "compile"}
    countable = steps if torch.device(device).type == "cuda" else operators
    return {
        "launches": {name: counts.launches(step, device) for name, step in countable.items()},
        "traffic_bytes": {name: counts.traffic_bytes(step) for name, step in operators.items()},
    }


def _compared(case: Case, calls: dict, device: str, caches: str, rounds: dict) -> dict:
    others, forward = measure.Others(), {}
    times = measure.interleave(calls, device=device, caches=caches, forward=forward, **rounds)
    others_cores = others.cores()
    baselines = [name for name in calls if name not in (measure.FUSED, measure.FLOOR)]
    ratios = {name: measure.paired(times[name], times[measure.FUSED]) for name in baselines}
    ratios[measure.FLOOR] = measure.paired(times[measure.FUSED], times[measure.FLOOR])
    return {
        "operation": case.operation.name,
        "shape": case.shape._asdict(),
        "dtype": str(case.dtype).removeprefix("torch."),
        "passes": case.passes,
        "caches": caches,
        "rounds": len(times[measure.FUSED]),
        "floor_bytes": case.bytes_floor,
        "microseconds": {name: rounded([t * 1e6 for t in ts]) for name, ts in times.items()},
        "ratios": {name: digits(ratio) for name, ratio in ratios.items()},
        "parts": {name: _parts(times[name], part) for name, part in forward.items()},
        "others_cores": None if others_cores is None else round(others_cores, 2),
    }


def _parts(both: list[float], forward: list[float]) -> dict[str, dict]:
    backward = [b - f for b, f in zip(both, forward, strict=True)]
    return {"forward": rounded([t * 1e6 for t in forward]), "backward": rounded([t * 1e6 for t in backward])}


def require_same(results: dict[str, Result], dtype: torch.dtype) -> None:
    """Each number within the square root of the dtype's eps of the largest; integers exactly."""
    tolerance = torch.finfo(dtype).eps ** 0.5
    for name, result in results.items():
        for tensor, fused in zip(_tensors(result), _tensors(results[measure.FUSED]), strict=True):
            if fused.is_floating_point():
                same = (tensor.double() - fused.double()).abs().max() <= tolerance * fused.double().abs().max()
            else:
                same = torch.equal(tensor, fused)
            if not same:
                raise AssertionError(f"{name} computes something else: {tensor}, fused {fused}")


def require_same_gradients(apart: dict[str, float], dtype: torch.dtype) -> None:
    """Each within the square root of the dtype's eps of the fused operation's, by their norms."""
    for name, distance in apart.items():
        if not distance <= torch.finfo(dtype).eps ** 0.5:
            raise AssertionError(f"{name} has other gradients: {distance:.2g} of the fused operation's norm away")


def _tensors(result: Result) -> list[torch.Tensor]:
    return [t.detach() for t in ((result,) if isinstance(result, torch.Tensor) else result)]


def rounded(values: list[float]) -> dict:
    return digits(measure.quantiles(values))


def digits(quantiles: measure.Quantiles) -> dict:
    return {name: float(f"{value:.4g}") for name, value in quantiles._asdict().items()}


def result(comparisons: list[dict], device: str, tests: dict[str, str]) -> dict:
    return header(device, tests) | {"peers": peers.report(device), "comparisons": comparisons}


def header(device: str, tests: dict[str, str]) -> dict:
    """What every file says first: when, which code, which machine, what the tests said."""
    facts = device_facts(device)
    return {
        "schema": SCHEMA,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": commit(),
        "device": facts,
        "versions": {"fastkd": fastkd.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "tests": tests,
        "gpu": facts["name"] if facts["kind"] == "cuda" else "not measured",
    }


def device_facts(device: str) -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if torch.device(device).type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, level = properties.name, f"sm_{properties.major}{properties.minor}"
        slug = name
    else:
        name, level = cpu_name(), LEVELS.get(_library.CPU.cpu_level, "generic")
        slug = f"{name} {cores} cores {level}"
    return {
        "name": name,
        "kind": torch.device(device).type,
        "cores": cores,
        "threads": torch.get_num_threads(),
        "level": level,
        "slug": re.sub(r"[^a-z0-9]+", "-", slug.lower()).strip("-"),
    }


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def commit() -> str:
    """The commit of the source tree, with "+changes" where files differ from it.

    Outside of git what the file COMMIT beside README.md says, or FASTKD_COMMIT; else "unknown".
    """
    git = ["git", "-C", str(FOLDER.parent)]
    try:
        head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True)
    except OSError:  # no git at all
        return _noted_commit()
    if head.returncode != 0:
        return _noted_commit()
    sources = [str(FOLDER.parents[1] / name) for name in ("fastkd", "csrc")]
    changes = subprocess.run([*git, "status", "--porcelain", "--", *sources], capture_output=True, text=True)
    return head.stdout.strip() + ("+changes" if changes.stdout.strip() else "")


def _noted_commit() -> str:
    file = FOLDER.parents[1] / "COMMIT"
    noted = os.environ.get("FASTKD_COMMIT") or (file.read_text().strip() if file.is_file() else "")
    return noted or "unknown"


def validate(value: object, layout: object = LAYOUT, where: str = "result") -> None:
    """Raises ValueError, naming the place, where `value` is not as LAYOUT says."""
    if isinstance(layout, tuple) and {} in layout:  # may be empty
        if value != {}:
            validate(value, layout[0], where)
    elif isinstance(layout, list):
        if not isinstance(value, list) or not value:
            raise ValueError(f"{where}: expected a list that is not empty, got {value!r}")
        for i, element in enumerate(value):
            validate(element, layout[0], f"{where}[{i}]")
    elif isinstance(layout, dict):
        named = str not in layout
        if not isinstance(value, dict) or not value or (named and set(value) != set(layout)):
            got = sorted(value) if isinstance(value, dict) else repr(value)
            raise ValueError(f"{where}: expected {sorted(layout) if named else 'names'}, got {got}")
        for key, element in value.items():
            validate(element, layout[key if named else str], f"{where}.{key}")
    elif not isinstance(value, layout) or isinstance(value, bool):
        raise ValueError(f"{where}: expected {layout}, got {value!r}")


def layout_of(result: dict) -> dict:
    """Of a file of operations, which may be an older one."""
    return LAYOUT_1 if result.get("schema") == 1 else LAYOUT


def write(result: dict, folder: Path = FOLDER, layout: dict = LAYOUT) -> Path:
    validate(result, layout)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{result['device']['slug']}.json"
    path.write_text(json.dumps(result, indent=1) + "\n")
    return path


def table(result: dict, folder: Path = FOLDER) -> str:
    lines = ["", machine(result)]
    comparisons = result["comparisons"]
    for operation in dict.fromkeys(c["operation"] for c in comparisons):
        own = [c for c in comparisons if c["operation"] == operation]
        lines += ["", f"{operation}: tests {result['tests'].get(operation, 'not run')}", "", *_rows(own)]
    lines += [
        "",
        "Medians over rounds in which every candidate had its turn (p20-p80): one call (cold caches), or the mean of "
        f"{measure.WARM_CALLS} calls (warm). Calls of {measure.SLOW * 1e3:.0f} ms and more are measured cold only.",
        "xFLOOR: fused against a copy of as many bytes as the operation must move. MB: peak of PyTorch's allocations.",
        f"fwd + bwd: the two passes of the fused training step. {_LAUNCHES[result['device']['kind'] == 'cuda']}",
        "bytes: what PyTorch's operators are handed, over what must move at least.",
        *["-: does not run at this shape."] * any(_missing(comparisons)),
        *[f"{name}: {said}." for name, said in result["peers"].items() if said.startswith("not measured")],
        *disturbed(comparisons, result["device"]["cores"]),
        gpu(result, folder),
    ]
    return "\n".join(lines)


_LAUNCHES = (
    "launches: operators that no other called, views among them; fused first.",
    "launches: kernels, copies and fills; fused first.",
)


def machine(result: dict) -> str:
    device, versions = result["device"], result["versions"]
    return (
        f"{device['name']}, {device['cores']} cores, {device['threads']} threads, {device['level']}; "
        f"torch {versions['torch']}, fastkd {versions['fastkd']}, commit {result['commit']}"
    )


def _missing(comparisons: list[dict]) -> list[bool]:
    most = {c["operation"]: len(c["ratios"]) for c in sorted(comparisons, key=lambda c: len(c["ratios"]))}
    return [len(c["ratios"]) < most[c["operation"]] for c in comparisons]


def _rows(comparisons: list[dict]) -> list[str]:
    """One operation's comparisons as a Markdown table."""
    baselines = list(dict.fromkeys(name for c in comparisons for name in c["ratios"] if name != measure.FLOOR))
    names = [measure.FUSED, *baselines]
    header = ["shape", "dtype", "pass", "caches", "fused us", "fwd + bwd"]
    header += [*[f"faster than {b}" for b in baselines], "xFLOOR"]
    body = [[*header, *[f"MB {name}" for name in names], "launches", "bytes fused, eager"]]
    for c in comparisons:
        shape = " ".join(f"{key}={size}" for key, size in c["shape"].items())
        ratios = [ratio(c["ratios"].get(name)) for name in [*baselines, measure.FLOOR]]
        memory = [f"{c['extra_bytes'][name] / 1e6:.2f}" if name in c["extra_bytes"] else "-" for name in names]
        fused = f"{c['microseconds'][measure.FUSED]['p50']:.0f}"
        row = [shape, c["dtype"], c["passes"], c["caches"], fused, _forward_backward(c), *ratios, *memory]
        launches = " ".join(str(c["launches"].get(name, "-")) for name in names)
        traffic = [c["traffic_bytes"].get(name) for name in (measure.FUSED, "eager")]
        traffic = " ".join("-" if t is None else f"{t / c['floor_bytes']:.1f}x" for t in traffic)
        body.append([*row, launches, traffic])
    return aligned(body)


def _forward_backward(comparison: dict) -> str:
    parts = comparison["parts"].get(measure.FUSED)
    return f"{parts['forward']['p50']:.0f} + {parts['backward']['p50']:.0f}" if parts else ""


def aligned(body: list[list[str]]) -> list[str]:
    """A Markdown table of the header and the rows."""
    widths = [max(len(row[i]) for row in body) for i in range(len(body[0]))]
    body = [body[0], ["-" * width for width in widths], *body[1:]]
    return ["| " + " | ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) + " |" for row in body]


def ratio(q: dict | None) -> str:
    return "-" if q is None else f"{q['p50']:.1f}x ({q['p20']:.1f}-{q['p80']:.1f})"


def disturbed(comparisons: list[dict], cores: int) -> list[str]:
    worst = max((c["others_cores"] or 0 for c in comparisons), default=0)
    if worst < BUSY:
        return []
    return [f"Other processes took up to {worst:.1f} of {cores} cores meanwhile: repeat this on a quiet machine."]


def gpu(result: dict, folder: Path) -> str:
    if result["device"]["kind"] == "cuda":
        return f"GPU: {result['gpu']}"
    files = sorted(folder.glob("*.json")) if folder.is_dir() else []
    measured = [p.name for p in files if json.loads(p.read_text())["device"]["kind"] == "cuda"]
    return f"GPU: measured, {', '.join(measured)}" if measured else "GPU: not measured"
