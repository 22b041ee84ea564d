"""`fastkd analyze`: the closed form against the simulation, what the three starts do, and the files that come out."""

import csv
import math

import pytest
import torch

from fastkd.cli import main
from fastkd.runs.dkel_analyses import STARTS, System, closed_form, diversity, monte_carlo, simulate, starting_points
from fastkd.runs.folder import read
from fastkd.runs.revisit import revisited
from fastkd.runs.roles import Effect
from fastkd.train.metrics import read_csv


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("system", [System(), System(eta=0.5, w=0.3, a=0.9), System(eta=0.9, w=1.0, a=0.5)], ids=str)
def test_steps_without_noise_are_powers_of_the_matrix(system):
    s, t = torch.randn(2, 5, 2, generator=generator(), dtype=torch.float64).unbind()
    students, teachers = simulate(system, s, t, 60, generator())
    for step in (0, 1, 7, 60):
        expected = closed_form(system, s, t, step)
        torch.testing.assert_close((students[step], teachers[step]), expected, rtol=1e-9, atol=1e-12)
    assert system.rate() == pytest.approx(torch.linalg.eigvals(system.matrix()).abs().max().item())


def test_the_rate_is_the_slow_teachers():
    """eta much larger than 1 - a: 1 - (1 - a) / (1 + w)."""
    system = System(eta=0.3, w=2.0, a=0.999)
    assert system.rate() == pytest.approx(1 - 0.001 / 3, rel=1e-5)
    s, t = torch.ones(2, 1, 2, dtype=torch.float64).unbind()
    students, _ = simulate(system, s, t, 3000, generator())
    measured = (students[3000].norm() / students[2000].norm()) ** (1 / 1000)
    assert measured == pytest.approx(system.rate(), rel=1e-6)


def test_diversity_of_the_three_starts():
    """0 where student and teacher are one, 1 on opposite sides; a teacher of its own start keeps apart for longest."""
    one, other = torch.ones(2, 30, 4, 2, dtype=torch.float64).unbind()
    assert diversity(one, one).tolist() == [0.0] * 4 and diversity(one, -3 * other).tolist() == pytest.approx([1.0] * 4)
    system = System()
    starts = starting_points(system, 500, generator())
    assert torch.equal(starts["copy"][0], starts["copy"][1]) and torch.equal(starts["copy"][0], starts["moved"][0])
    apart = {n: diversity(*simulate(system, *starts[n], 60, generator())).median() for n in STARTS}
    assert apart["independent"] > 1.5 * max(apart["copy"], apart["moved"])


def test_both_analyses_of_dkel_write_a_table_and_a_picture(tmp_path, capsys):
    for name in ("dkel-geometry", "dkel-monte-carlo"):
        assert main(["analyze", name, "--out", str(tmp_path)]) == 0
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000
        assert capsys.readouterr().out.count(f"{name}: ") == 2
    lines = (tmp_path / "dkel-geometry.csv").read_text().splitlines()
    assert lines[0].split(",")[:2] == ["start", "step"] and len(lines) == 1 + 3 * 401
    first = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
    assert first["start"] == "copy" and float(first["apart"]) == 0 < float(first["away"])


def test_quantiles_are_those_of_the_runs_and_a_seed_repeats_them(tmp_path):
    (tmp_path / "b").mkdir()
    for folder in (tmp_path, tmp_path / "b"):
        monte_carlo(folder, runs=50, steps=20)
    text = (tmp_path / "dkel-monte-carlo.csv").read_text()
    assert text == (tmp_path / "b" / "dkel-monte-carlo.csv").read_text()
    rows = [line.split(",") for line in text.splitlines()[1:]]
    assert all(float(r[2]) <= float(r[3]) <= float(r[4]) and 0 <= float(r[5]) <= 1 for r in rows)
    start = starting_points(System(), 50, generator())["copy"][0].norm(dim=1)
    assert float(rows[0][3]) == pytest.approx(start.quantile(0.5).item())


SMALL = "--train-size 60 --teacher plain2:width=0.25 --assistants plain2:width=0.125 --student plain2:width=0.0625"


def effects(folder):
    with open(folder / "roles-hard.csv", newline="") as file:
        header, *rows = csv.reader(file)
    assert tuple(header) == Effect._fields
    return [Effect(r[0], int(r[1]), *r[2:4], int(r[4]), *map(float, r[5:])) for r in rows]


def test_the_pivot_without_intensive_teaching_gains_nothing(tmp_path):
    """The identity of the measure: what is measured is that teaching's effect alone."""
    run = tmp_path / "orc"
    argv = ["--method", "orc", "--epochs", "1", "--quiet", "--out", str(run), *SMALL.split()]
    assert main(["train", *argv, "--options.teach", "[private, group]"]) == 0
    assert main(["analyze", "roles", str(run), "--out", str(tmp_path / "roles")]) == 0
    found = effects(tmp_path / "roles")
    assert len(found) == 4
    assert all((e.loss, e.accuracy) == (e.loss_before, e.accuracy_before) for e in found if e.number)


def test_hard_samples_are_those_that_a_network_of_the_group_gets_wrong(tmp_path):
    run = tmp_path / "orc"
    options = "--teacher plain2:width=0.25 --assistants plain2:width=0.25 --student plain2:width=0.25 --train-size 200"
    argv = ["--method", "orc", "--epochs", "6", "--keep", "2", "--quiet", "--out", str(run), *options.split()]
    assert main(["train", *argv]) == 0
    assert main(["analyze", "roles", str(run), "--out", str(tmp_path / "roles")]) == 0
    found = effects(tmp_path / "roles")
    assert [(e.epoch, e.images, e.samples) for e in found] == [
        (epoch, images, samples) for epoch in (5, 6) for images in ("train", "test") for samples in ("hard", "others")
    ]
    (one,) = read(run)
    with revisited(one) as again:
        method, data = again.fit(6).method.eval(), again.runner.data
        before = again.earlier["teacher"].network.eval()
    images = (data.train.store.images[torch.from_numpy(data.train.rows)] - data.train.mean) / data.train.std
    labels = torch.from_numpy(data.train.labels)
    with torch.no_grad():
        hard = torch.stack([student(images).argmax(1) != labels for student in method.students]).any(0)
        now, then = (network(images)[hard].double() for network in (method.pivot, before))
    loss, loss_before = (torch.nn.functional.cross_entropy(z, labels[hard]).item() for z in (now, then))
    (effect,) = [e for e in found if (e.epoch, e.images, e.samples) == (6, "train", "hard")]
    assert effect.number == hard.sum() and 0 < effect.number < 200 and loss != loss_before
    assert (effect.loss, effect.loss_before) == pytest.approx((loss, loss_before), rel=1e-5)
    assert effect.accuracy == pytest.approx((now.argmax(1) == labels[hard]).double().mean().item())


def test_roles_of_a_run_of_orc(tmp_path, capsys):
    run = tmp_path / "orc"
    assert main(["train", "--method", "orc", "--epochs", "3", "--quiet", "--out", str(run), *SMALL.split()]) == 0
    assert main(["analyze", "roles", str(run), "--out", str(tmp_path / "roles")]) == 0
    rows = [line.split(",") for line in (tmp_path / "roles" / "roles.csv").read_text().splitlines()]
    assert rows[0][0] == "epoch" and [row[0] for row in rows[1:]] == ["1", "2", "3"]
    last = read_csv(run / "metrics.csv")[-1]
    for column, name in enumerate(rows[0][1:], 1):
        assert sum(int(row[column]) for row in rows[1:]) == last[f"promotions_{name}"]
    assert len({sum(map(int, row[1:])) for row in rows[1:]}) == 1  # one a step
    assert (tmp_path / "roles" / "roles.png").stat().st_size > 10_000 and math.isfinite(last["test_accuracy"])
    capsys.readouterr()
    wrong = {
        ("roles",): "fastkd analyze roles needs the folder (--out) of a run",
        ("role",): "there is no analysis 'role': did you mean roles?",
        ("dkel-geometry", str(run)): "fastkd analyze dkel-geometry takes no run",
        ("dkel-geometry", "--out", str(run)): "holds a run: name another folder",
        ("roles", str(tmp_path / "no")): "there is no folder",
        ("dkel-geometry", "--sed", "1"): "unknown option --sed",
    }
    for argv, message in wrong.items():
        assert main(["analyze", *argv]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1
