"""`python -m benchmarks --scaling` with networks, batches and classes that compute quickly."""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import pytest

from fastkd import methods

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from benchmarks import guard, measure, other, report, scaling, steps  # noqa: E402

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(scaling, "NETWORK", "plain2")
    monkeypatch.setattr(scaling, "IMAGE_SIZE", 8)
    monkeypatch.setattr(scaling, "BASE", scaling.Point(2, 6, 5))
    monkeypatch.setattr(scaling, "AXES", {"networks": (2, 3), "batch": (4, 6), "classes": (5, 7)})
    monkeypatch.setattr(guard, "require_passing", lambda name, tests, **rest: f"{tests} passed")
    once = measure.interleave
    monkeypatch.setattr(measure, "interleave", lambda calls, **how: once(calls, device="cpu", seconds=0, least=1))


def options(folder, **changes):
    given = {"device": "cpu", "results": str(folder), "keyword": "", "large": False, "deadline": None}
    return argparse.Namespace(**(given | {"quick": False, "brief": True} | changes))


def networks_of(method, number):
    group = steps.Group("plain2", 4, 5, image_size=8)
    return steps.TrainingStep(method, group, "cpu", number=number)


def test_each_method_grows_by_what_is_said():
    dgkd, orc, ctsl, feed = (networks_of(name, 5).method for name in ("DGKD", "ORC", "CTSL-MKT", "FEED"))
    assert len(dgkd.guides) == 5 and len(orc.students) == 5 and len(feed.teachers) == 5
    assert len(ctsl.peers) == len(ctsl.self_teachers) == 5
    dkel = networks_of("DKEL", 5)
    assert len(dkel.method.student.peers) == 5 and len(dkel.images) == 5
    assert set(scaling.GROWS) == set(steps.METHODS) and isinstance(dgkd, methods.DGKD)


def test_points_share_their_base_and_are_each_measured_once():
    wanted = scaling.chosen("")
    assert len(wanted) == len(set(wanted)) == len(scaling.GROWS) * (5 + 4 + 4 - 2)
    assert scaling.chosen("orc networks=8") == [("ORC", scaling.Point(8, 64, 100))]
    assert {p.networks for _, p in scaling.chosen("", quick=True)} == {2, 3, 4}
    assert all(scaling.BASE in scaling.points(axis) for axis in scaling.AXES)


@pytest.mark.slow
def test_it_writes_its_file_and_chart_and_prints_the_tables(tmp_path, tiny, capsys):
    assert other.run("scaling", options(tmp_path)) == 0
    said = capsys.readouterr().out
    assert "| method   | networks 2 " in said and "| method   | classes 5 " in said and "plain2, [N, 3, 8, 8]" in said
    (file,) = tmp_path.glob("scaling/*.json")
    result = json.loads(file.read_text())
    report.validate(result, scaling.LAYOUT)
    assert len(result["steps"]) == 5 * 4
    for entry in result["steps"]:
        times = {name: q["p50"] for name, q in entry["milliseconds"].items()}
        assert times["networks"] == pytest.approx(max(0, times["fused"] - times["fused loss"]), rel=1e-2, abs=1e-2)
        assert entry["losses"] >= 1 and entry["extra_bytes"]["fused"] > 0
    sizes = {axis: {m: list(own) for m, own in scaling.series(result, axis)} for axis in scaling.AXES}
    assert sizes["networks"] == {key: [2, 3] for key in scaling.GROWS} and sizes["batch"]["FEED"] == [4, 6]
    peers = dict(scaling.series(result, "networks"))["CTSL-MKT"]  # all of them learn: memory is that of all
    assert peers[3]["extra_bytes"]["fused"] > 1.3 * peers[2]["extra_bytes"]["fused"]
    picture = file.with_suffix(".png").read_bytes()
    assert picture[:8] == b"\x89PNG\r\n\x1a\n" and len(picture) > 20_000
    again = subprocess.run(
        [sys.executable, "-m", "benchmarks.scaling", str(file)], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert again.stdout.strip() in said


def test_the_cells_are_those_of_the_file(tmp_path):
    def entry(networks, milliseconds):
        names = ("networks", "fused loss", "reference loss", "fused", "reference")
        times = {n: dict.fromkeys(("p20", "p50", "p80"), t) for n, t in zip(names, milliseconds, strict=True)}
        size = {"networks": networks, "batch": 64, "classes": 100}
        return {"method": "DGKD", **size, "milliseconds": times, "extra_bytes": {"fused": networks * 10**6}} | {
            "losses": 1, "rounds": 1, "others_cores": None,
        }  # fmt: skip

    found = scaling.result([entry(4, (30.0, 2.04, 12.4, 32.0, 43.0)), entry(2, (15.0, 0.5, 3.0, 15.5, 18.0))])
    said = scaling.table(found | report.header("cpu", {"a": "b"}), tmp_path)
    assert "| DGKD   | 15 + 0.5 (3) | 30 + 2 (12) | 2.0, 4.1     | 2 > 4 |" in said
    assert "batch" not in said and "GPU: not measured" in said


def test_nothing_is_measured_while_tests_fail(tmp_path, tiny, monkeypatch):
    seen = []

    def fails(name, tests, **rest):
        seen.append(name)
        raise guard.Refused(f"{name}: no speed-up is reported")

    monkeypatch.setattr(guard, "require_passing", fails)
    with pytest.raises(guard.Refused, match="no speed-up"):
        other.run("scaling", options(tmp_path))
    assert seen and not list(tmp_path.rglob("*.json"))


def test_the_methods_own_tests_must_pass(monkeypatch):
    asked = {}
    monkeypatch.setattr(guard, "require_all_passing", lambda tests, keyword="": asked.update(tests) or {})
    other._tested("scaling", scaling.chosen("dkel networks=8"), "cpu", less=False)
    assert asked.pop("DKEL") == steps.TESTS["DKEL"] and not set(asked) & set(steps.TESTS)
