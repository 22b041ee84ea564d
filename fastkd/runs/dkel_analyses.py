"""The analyses that DKEL's abstract names: student and mean teacher as points, in 2D and from many random starts.

A student s and its mean teacher t are points of the plane, the label is y = 0:

    s <- s - eta * [(s - y) + w * (s - t)] - noise,  t <- a * t + (1 - a) * s

and t starts as a copy of s ("copy", as in PCL), as that copy moved towards y ("moved", the copy after its first
cross-entropy steps), or at a point of its own ("independent", moved as well: DKEL's intention). The paper's protocol is
not known: all of this is ours (C).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastkd.runs.figures import pyplot, save_figure
from fastkd.runs.tables import write_csv

STARTS = ("copy", "moved", "independent")
EARLY = 20  # steps after the start over which diversity is measured
COLLAPSED = 0.25  # a diversity below it


class System(NamedTuple):
    """The numbers of the two points' steps.

    eta: learning rate. w: weight of the teacher. a: the teacher's momentum. moved: the part of the way to the label
    that the teacher's first steps take. noise: standard deviation of the gradient's, in each coordinate.
    """

    eta: float = 0.1
    w: float = 1.0
    a: float = 0.99
    moved: float = 0.3
    noise: float = 0.0

    def matrix(self) -> Tensor:
        """[2, 2], float64: a step without noise is (s, t) <- M (s, t) in each coordinate, with y = 0."""
        own, pull = 1 - self.eta * (1 + self.w), self.eta * self.w
        rows = [[own, pull], [(1 - self.a) * own, self.a + (1 - self.a) * pull]]
        return torch.tensor(rows, dtype=torch.float64)

    def rate(self) -> float:
        """The larger eigenvalue's magnitude, by which the distance to the label falls in each step in the end.

        About 1 - (1 - a) / (1 + w) where eta is large beside 1 - a.
        """
        trace: float = self.matrix().trace().item()
        determinant = self.a * (1 - self.eta * (1 + self.w))
        inside = trace * trace / 4 - determinant
        if inside < 0:  # a pair of complex ones
            return math.sqrt(determinant)
        return abs(trace) / 2 + math.sqrt(inside)


def starting_points(system: System, runs: int, generator: torch.Generator) -> dict[str, tuple[Tensor, Tensor]]:
    """(s, t) [runs, 2] of each start; the student is the same in all."""
    s, other = torch.randn(2, runs, 2, generator=generator, dtype=torch.float64).unbind()
    near = 1 - system.moved
    return {"copy": (s, s.clone()), "moved": (s, near * s), "independent": (s, near * other)}


def simulate(system: System, s: Tensor, t: Tensor, steps: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The paths of student and teacher [steps + 1, runs, 2] from s, t [runs, 2]."""
    students, teachers = [s], [t]
    for _ in range(steps):
        noise = system.noise * torch.randn(s.shape, generator=generator, dtype=torch.float64)
        s = s - system.eta * (s + system.w * (s - t) + noise)
        t = system.a * t + (1 - system.a) * s
        students.append(s)
        teachers.append(t)
    return torch.stack(students), torch.stack(teachers)


def closed_form(system: System, s: Tensor, t: Tensor, step: int) -> tuple[Tensor, Tensor]:
    """Student and teacher after `step` steps without noise: the power of the step's matrix."""
    power = torch.linalg.matrix_power(system.matrix(), step)
    return power[0, 0] * s + power[0, 1] * t, power[1, 0] * s + power[1, 1] * t


def diversity(students: Tensor, teachers: Tensor) -> Tensor:
    """[runs]: the mean over the first steps of |s - t| / (|s - y| + |t - y|): 0 where the two are one, 1 opposite.

    Without the start itself, where a copy is one with its student by definition.
    """
    s, t = students[1 : EARLY + 1], teachers[1 : EARLY + 1]  # each [EARLY, runs, 2]
    apart: Tensor = (s - t).norm(dim=-1) / (s.norm(dim=-1) + t.norm(dim=-1))
    return apart.mean(0)


def geometry(out: Path, *, seed: int = 0, steps: int = 400, system: System | None = None) -> list[Path]:
    """One run of each start: points and distances as CSV, trajectories and distances as a picture."""
    system = system or System()
    generator = torch.Generator().manual_seed(seed)
    starts = starting_points(system, 1, generator)
    paths = {name: simulate(system, *starts[name], steps, generator) for name in STARTS}
    rows: list[list[object]] = []
    for name, (s, t) in paths.items():
        for step in range(steps + 1):
            away, apart = s[step, 0].norm().item(), (s[step, 0] - t[step, 0]).norm().item()
            rows.append([name, step, *s[step, 0].tolist(), *t[step, 0].tolist(), away, apart])
    table = write_csv(out / "dkel-geometry.csv", ["start", "step", "s_x", "s_y", "t_x", "t_y", "away", "apart"], rows)
    return [table, _draw_geometry(paths, system, out / "dkel-geometry.png")]


def _draw_geometry(paths: dict[str, tuple[Tensor, Tensor]], system: System, path: Path) -> Path:
    plt = pyplot()
    figure, panels = plt.subplots(1, 4, figsize=(16, 4), layout="constrained")
    edge = 1.15 * max(points.abs().max().item() for pair in paths.values() for points in pair)
    for panel, (name, (s, t)) in zip(panels, paths.items(), strict=False):
        for points, label, color in ((s, "student", "C0"), (t, "mean teacher", "C1")):
            panel.plot(*points[:, 0].T.tolist(), ".-", markersize=3, linewidth=0.8, color=color, label=label)
            panel.plot(*points[0, 0].tolist(), "o", color=color)
        panel.plot(0, 0, "k*", markersize=10, label="label")
        panel.set(title=f"teacher starts: {name}", aspect="equal", xlim=(-edge, edge), ylim=(-edge, edge))
        panel.legend(fontsize="small")
    for number, (name, (s, t)) in enumerate(paths.items()):
        color = f"C{number + 2}"
        panels[3].semilogy(s[:, 0].norm(dim=-1).tolist(), color=color, label=f"{name}: student to label")
        panels[3].semilogy((s - t)[:, 0].norm(dim=-1).tolist(), "--", color=color, label=f"{name}: student to teacher")
    panels[3].set(title=f"distances; rate in the end {system.rate():.4f}", xlabel="step")
    panels[3].legend(fontsize="x-small")
    save_figure(figure, path)
    plt.close(figure)
    return path


def monte_carlo(
    out: Path, *, seed: int = 0, steps: int = 400, runs: int = 2000, system: System | None = None
) -> list[Path]:
    """Many starts with noisy gradients: quantiles of the distance to the label and the share that collapsed."""
    system = system or System(noise=0.1)
    generator = torch.Generator().manual_seed(seed)
    starts = starting_points(system, runs, generator)
    share = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    rows: list[list[object]] = []
    drawn, collapse = {}, {}
    for name in STARTS:
        students, teachers = simulate(system, *starts[name], steps, generator)
        quantiles = students.norm(dim=-1).quantile(share, dim=1)  # [3, steps + 1]
        apart = diversity(students, teachers)
        drawn[name], collapse[name] = quantiles, (apart < COLLAPSED).double().mean().item()
        early = apart.median().item(), collapse[name]
        rows += [[name, step, *quantiles[:, step].tolist(), *early] for step in range(steps + 1)]
    header = ["start", "step", "away_10", "away_50", "away_90", "diversity_50", "collapse_rate"]
    table = write_csv(out / "dkel-monte-carlo.csv", header, rows)
    return [table, _draw_monte_carlo(drawn, collapse, system, out / "dkel-monte-carlo.png")]


def _draw_monte_carlo(drawn: dict[str, Tensor], collapse: dict[str, float], system: System, path: Path) -> Path:
    plt = pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for number, (name, quantiles) in enumerate(drawn.items()):
        color, steps = f"C{number}", range(quantiles.shape[1])
        left.semilogy(steps, quantiles[1].tolist(), color=color, label=f"teacher starts: {name}")
        left.fill_between(steps, quantiles[0].tolist(), quantiles[2].tolist(), color=color, alpha=0.15)
    first = next(iter(drawn.values()))[1, 0].item()
    expected = [first * system.rate() ** step for step in range(len(next(iter(drawn.values()))[1]))]
    left.semilogy(expected, "k:", label=f"closed form, rate {system.rate():.4f}")
    left.set(xlabel="step", ylabel="student to label: median, 10 to 90 %", ylim=(min(expected[-1], 1e-2), None))
    left.legend(fontsize="small")
    right.bar(
        list(collapse), [100 * value for value in collapse.values()], color=[f"C{i}" for i in range(len(collapse))]
    )
    right.set(ylabel="runs that collapsed [%]", title=f"diversity of the first {EARLY} steps below {COLLAPSED:g}")
    save_figure(figure, path)
    plt.close(figure)
    return path
