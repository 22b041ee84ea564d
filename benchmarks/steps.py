"""`python -m benchmarks --steps`: a whole training step of each method, plain PyTorch's losses against the fused ones.

What a user gains: forward passes of all networks, losses, backward passes and the optimiser's step. The share of the
losses is that of the same calls, recorded in a step and made again by themselves, forward and backward. On a CPU the
fused step is made with prepared frozen networks, too, and with these and maps in channels-last order, as runs are there
by default; on a GPU with the networks replayed from CUDA graphs.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

import fastkd
from benchmarks import measure, report
from fastkd import functional, methods
from fastkd.graphs import Graphs
from fastkd.models import branched, create
from fastkd.train.devices import recorder_for

BACKENDS = {"fused": "auto", "reference": "reference"}
GRAPHS = "fused, CUDA graphs"
PREPARED, ALL = "fused, prepared", "fused, prepared, channels-last"
SMALL_SHARE = 0.05
LEARNING_RATE = 0.01

TIMES = {str: report.QUANTILES}
STEP = {
    "group": str,
    "networks": str,
    "method": str,
    "batch": int,
    "classes": int,
    "losses": int,
    "rounds": int,
    "milliseconds": TIMES,
    "ratios": TIMES,
    "images_per_second": {str: float},
    "loss_share": {str: float},
    "extra_bytes": {str: int},
    "others_cores": (float, type(None)),
}
LAYOUT = report.HEADER | {"steps": [STEP]}


class Group(NamedTuple):
    """Networks of one architecture on images [batch, 3, image_size, image_size]."""

    network: str
    batch: int
    classes: int
    image_size: int = 32
    large: bool = False

    def __str__(self) -> str:
        return f"{self.network}, [{self.batch}, 3, {self.image_size}, {self.image_size}], {self.classes} classes"


GROUPS = {
    "resnet20": Group("resnet20", 128, 100),
    "vgg13": Group("vgg13", 64, 1000),
    "resnet56": Group("resnet56", 128, 100, large=True),
}

# (so many fresh networks, group, how many guides, students, peers, branches or teachers) -> the method
Make = Callable[[int], list[nn.Module]]
METHODS: dict[str, Callable[[Make, Group, int], methods.Method]] = {
    "DGKD": lambda make, group, number: methods.DGKD(*make(1), make(number), lam=0.5),
    "ORC": lambda make, group, number: methods.ORC(*make(1), make(number)),
    "CTSL-MKT": lambda make, group, number: methods.CTSLMKT(make(number), make(number)),
    "DKEL": lambda make, group, number: methods.DKEL(
        branched(group.network, group.classes, number, image_size=group.image_size), init=None
    ),
    "FEED": lambda make, group, number: methods.FEED(*make(1), make(number)),
}
BASELINES: dict[str, Callable[[Make, Group, int], methods.Method]] = {
    "KD": lambda make, group, number: methods.KD(*make(1), *make(1)),
    "AVER": lambda make, group, number: methods.AVER(*make(1), make(number)),
}
EVERY = METHODS | BASELINES
NUMBERS = {"DGKD": 3, "ORC": 3, "CTSL-MKT": 2, "DKEL": 3, "FEED": 3, "KD": 1, "AVER": 3}  # networks in a step
VIEWED = ("DKEL",)  # each of these networks has its own view of the images
ABOUT = {
    "DGKD": "a student, 3 frozen guides",
    "ORC": "a pivot and 3 students, all learn; three updates",
    "CTSL-MKT": "2 peers, their 2 frozen selves",
    "DKEL": "3 peers on one stem, their 3 mean teachers",
    "FEED": "a student, 3 frozen teachers, last maps",
    "KD": "a student, a frozen teacher",
    "AVER": "a student, 3 frozen teachers",
}
TESTS = {
    "DGKD": "tests/methods/test_dgkd*.py",
    "ORC": "tests/methods/test_orc*.py",
    "CTSL-MKT": "tests/methods/test_ctsl_mkt*.py",
    "DKEL": "tests/methods/test_dkel*.py",
    "FEED": "tests/methods/test_feed*.py",
    "KD": "tests/methods/test_baselines.py",
    "AVER": "tests/methods/test_baselines.py",
}


def chosen(keyword: str, device: str, large: bool) -> list[tuple[str, str]]:
    """(group, method) of those whose "group method" contains the keyword; large groups on a GPU or where asked for."""
    large = large or torch.device(device).type == "cuda"
    names = [g for g, group in GROUPS.items() if large or not group.large]
    return [(g, m) for g in names for m in EVERY if keyword.lower() in f"{g} {m}".lower()]


class TrainingStep:
    """A method with its networks, optimiser and a batch; called, it makes one step with the chosen backend.

    number: of its guides, students, peers, branches or teachers; None takes NUMBERS.
    """

    def __init__(self, method: str, group: Group, device: str, seed: int = 0, number: int | None = None) -> None:
        torch.manual_seed(seed)
        number = number or NUMBERS[method]

        def make(count: int) -> list[nn.Module]:
            return [create(group.network, group.classes, image_size=group.image_size) for _ in range(count)]

        self.method = EVERY[method](make, group, number).to(device)
        self.method.start_epoch(0, 300)
        self.method.train()
        parameters = self.method.parameter_groups(LEARNING_RATE)
        self.optimizer = torch.optim.SGD(parameters, momentum=0.9, weight_decay=5e-4)
        size = (group.batch, 3, group.image_size, group.image_size)
        views = [torch.randn(size).to(device) for _ in range(number if method in VIEWED else 1)]
        self.images = views if len(views) > 1 else views[0]
        self.target = torch.randint(0, group.classes, (group.batch,)).to(device)

    def clear(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def losses(self) -> Iterator[Tensor]:
        """Makes one step; the losses of its updates, detached."""
        for phase in self.method.phases(self.images, self.target):
            self.clear()
            phase.loss.backward()
            self.optimizer.step()
            yield phase.loss.detach()

    def __call__(self) -> list[Tensor]:
        return list(self.losses())


class Call(NamedTuple):
    function: Callable
    args: tuple
    kwargs: dict[str, Any]


class Losses:
    """The calls of fastkd.functional that a step made, again: forward, and backward where a result has a graph."""

    def __init__(self, calls: list[Call]) -> None:
        self.calls = [Call(call.function, *_leaves((call.args, call.kwargs))) for call in calls]
        tensors = [t for call in self.calls for t in tree_leaves((call.args, call.kwargs)) if isinstance(t, Tensor)]
        self.learning = [t for t in tensors if t.requires_grad]

    def clear(self) -> None:
        for tensor in self.learning:
            tensor.grad = None

    def __call__(self) -> None:
        self.clear()
        for function, args, kwargs in self.calls:
            found = [t for t in tree_leaves(function(*args, **kwargs)) if isinstance(t, Tensor) and t.requires_grad]
            if found:
                torch.autograd.backward(found, [torch.ones_like(t) for t in found])


def _leaves(arguments: tuple) -> tuple:
    return tree_map_only(Tensor, lambda t: t.detach().clone().requires_grad_(t.requires_grad), arguments)


@contextlib.contextmanager
def recorded() -> Iterator[list[Call]]:
    """Within the block, the calls of fastkd.functional are made and noted."""
    calls: list[Call] = []

    def noting(function: Callable) -> Callable:
        def call(*args, **kwargs):
            calls.append(Call(function, args, kwargs))
            return function(*args, **kwargs)

        return call

    functions = {n: f for n in functional.__all__ if inspect.isfunction(f := getattr(functional, n))}
    for name, function in functions.items():
        setattr(functional, name, noting(function))
    try:
        yield calls
    finally:
        for name, function in functions.items():
            setattr(functional, name, function)


class With:
    """A step, or its losses, with one backend."""

    def __init__(self, backend: str, step: TrainingStep | Losses) -> None:
        self.backend, self.step = backend, step

    def clear(self) -> None:
        self.step.clear()

    def __call__(self) -> Any:
        with fastkd.use_backend(self.backend):
            return self.step()


def require_same(step: TrainingStep) -> None:
    """From the same weights, both backends give the same losses. After the first update, rounding may have grown."""
    before = copy.deepcopy(step.method.state_dict())
    found = {}
    for name, backend in BACKENDS.items():
        step.method.load_state_dict(copy.deepcopy(before))
        found[name] = With(backend, step)()
        step.optimizer.state.clear()
    for i, (fused, reference) in enumerate(zip(*found.values(), strict=True)):
        tolerance = 1e-4 if i == 0 else 1e-2
        if not abs(float(fused) - float(reference)) <= tolerance * abs(float(reference)):
            raise AssertionError(f"loss {i}: fused {float(fused)}, reference {float(reference)}")


def both(step: TrainingStep) -> tuple[dict[str, With], dict[str, With], int]:
    """The step with each backend, its losses alone with each ("fused loss"), and how many calls the losses are."""
    require_same(step)
    with recorded() as calls:
        step()
    losses = Losses(calls)
    whole = {backend: With(chosen, step) for backend, chosen in BACKENDS.items()}
    alone = {f"{backend} loss": With(chosen, losses) for backend, chosen in BACKENDS.items()}
    return whole, alone, len(calls)


def as_run(method: str, group: Group, device: str) -> dict[str, With]:
    """The fused step as runs make it by default on a CPU, in two stages."""
    found = {}
    for called in (PREPARED, ALL):
        step = TrainingStep(method, group, device)
        if called == ALL:
            step.method.to(memory_format=torch.channels_last)
        step.method.prepare_teachers()
        found[called] = With(BACKENDS["fused"], step)
    return found


def measured(name: str, method: str, device: str, seconds: float, least: int = 5) -> dict:
    """One entry of a file's "steps": both backends' steps, and their losses alone, in turns."""
    group = GROUPS[name]
    whole, alone, calls = both(TrainingStep(method, group, device))
    if (recorder := recorder_for(torch.device(device))) is not None:
        replayed = TrainingStep(method, group, device)
        Graphs(recorder.device, recorder=recorder).wrap(replayed.method)
        whole[GRAPHS] = With(BACKENDS["fused"], replayed)
    else:
        whole |= as_run(method, group, device)
    others = measure.Others()
    times = measure.interleave(whole | alone, device=device, seconds=seconds, least=least)
    others_cores = others.cores()
    memory = {backend: measure.extra_bytes(call, device) for backend, call in (whole | alone).items()}
    median = {called: measure.quantiles(ts).p50 for called, ts in times.items()}
    shares = {b: measure.paired(times[f"{b} loss"], times[b]).p50 for b in BACKENDS}
    ratios = {"step": ("reference", "fused"), "loss": ("reference loss", "fused loss")}
    if GRAPHS in whole:
        ratios["graphs"] = ("fused", GRAPHS)
    else:
        ratios |= {"prepared": ("reference", PREPARED), "all": ("reference", ALL)}
    return {
        "group": name,
        "networks": str(group),
        "method": method,
        "batch": group.batch,
        "classes": group.classes,
        "losses": calls,
        "rounds": len(times["fused"]),
        "milliseconds": {called: report.rounded([t * 1e3 for t in ts]) for called, ts in times.items()},
        "ratios": {what: report.digits(measure.paired(times[a], times[b])) for what, (a, b) in ratios.items()},
        "images_per_second": {backend: float(f"{group.batch / median[backend]:.4g}") for backend in BACKENDS},
        "loss_share": {backend: float(f"{share:.3g}") for backend, share in shares.items()},
        "extra_bytes": memory,
        "others_cores": None if others_cores is None else round(others_cores, 2),
    }


def table(result: dict, folder: Path) -> str:
    lines = ["", report.machine(result)]
    entries = result["steps"]
    for group in dict.fromkeys(entry["group"] for entry in entries):
        own = [entry for entry in entries if entry["group"] == group]
        body = [["method", "networks", "reference ms", "fused ms", "faster", "images/s", "losses", "of the step", "MB"]]
        body += [_row(entry) for entry in own]
        lines += ["", f"A training step, {own[0]['networks']}", "", *report.aligned(body)]
        graphs = [f"{e['method']} {e['ratios']['graphs']['p50']:.2f}x" for e in own if "graphs" in e["ratios"]]
        lines += ["", f"Faster than fused with CUDA graphs: {', '.join(graphs)}"] if graphs else []
        lines += _ladder([e for e in own if "all" in e["ratios"]])
    lines += [
        "",
        "reference: the same method with fastkd's formulas in plain PyTorch. Medians of steps in turns (p20-p80).",
        "losses: how many times faster, forward and backward. of the step: their share, reference > fused.",
        "MB: peak of what PyTorch allocated during the step, activations included, reference > fused.",
    ]
    small = [e for e in entries if e["loss_share"]["reference"] < SMALL_SHARE]
    if small:
        shares = [f"{100 * e['loss_share']['reference']:.1f} %" for e in small]
        names = ", ".join(f"{e['method']} on {e['group']} ({s})" for e, s in zip(small, shares, strict=True))
        lines += [
            f"Losses are under {100 * SMALL_SHARE:.0f} % of the reference's step of {names}: the networks decide, "
            "and the fastest loss gains no more than that share; a larger ratio there is noise."
        ]
    return "\n".join([*lines, *report.disturbed(entries, result["device"]["cores"]), report.gpu(result, folder)])


def _ladder(entries: list[dict]) -> list[str]:
    """How many times faster than the reference each stage makes a step."""
    if not entries:
        return []
    body = [["method", "fused losses", "and prepared teachers", "and channels-last"]]
    for entry in entries:
        found = [entry["ratios"][what] for what in ("step", "prepared", "all")]
        body.append([entry["method"], *(f"{r['p50']:.2f}x ({r['p20']:.2f}-{r['p80']:.2f})" for r in found)])
    return ["", "Times faster than the reference's step, stage by stage", "", *report.aligned(body)]


def _row(entry: dict) -> list[str]:
    times, share, memory = entry["milliseconds"], entry["loss_share"], entry["extra_bytes"]
    ratio = entry["ratios"]["step"]
    speeds = " > ".join(f"{entry['images_per_second'][b]:.0f}" for b in ("reference", "fused"))
    return [
        entry["method"],
        ABOUT[entry["method"]],
        f"{times['reference']['p50']:.1f}",
        f"{times['fused']['p50']:.1f}",
        f"{ratio['p50']:.2f}x ({ratio['p20']:.2f}-{ratio['p80']:.2f})",
        speeds,
        f"{entry['ratios']['loss']['p50']:.1f}x",
        f"{100 * share['reference']:.1f} % > {100 * share['fused']:.1f} %",
        f"{memory['reference'] / 1e6:.0f} > {memory['fused'] / 1e6:.0f}",
    ]
