"""examples/lm/distil.py: its three forms of the loss are one, and a stopped run goes on where it was."""

import csv
import importlib
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[2] / "examples" / "lm"
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def distil():
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module("distil")
    sys.path.remove(str(FOLDER))


def small_text(files):
    generator = torch.Generator().manual_seed(files)
    return tuple(torch.randint(32, 120, (n,), generator=generator).to(torch.uint8) for n in (4000, 900))


@pytest.mark.parametrize("name", ["one teacher", "two teachers", "two teachers, reverse"])
def test_three_forms_are_one_loss(distil, name):
    count, options = distil.STUDENTS[name]
    torch.manual_seed(0)
    student, *guides = (distil.Network(*size, 9).double() for size in ((8, 1), (16, 1), (24, 1)))
    ids = torch.randint(256, (2, 10))
    taught = [(guide(ids[:, :-1]).detach(), guide.head.weight.detach()) for guide in guides[:count]]
    results = []
    for way in distil.WAYS:
        loss = distil.loss_of(way, student, student(ids[:, :-1]), taught, ids[:, 1:], options)
        results.append((loss.detach(), torch.autograd.grad(loss, list(student.parameters()))))
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], rtol=1e-9, atol=1e-12)


def test_a_stopped_run_goes_on(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "text", small_text)
    table = distil.main(["--tiny", "--out", str(tmp_path)])
    rows = list(csv.DictReader((tmp_path / "rows.csv").open()))
    students, measures = len(distil.STUDENTS), distil.TINY.measures
    assert len(rows) == measures * (2 + distil.TINY.seeds * students)
    assert all(0 < float(row["bits a byte"]) < 20 for row in rows)
    assert (tmp_path / "curves.png").stat().st_size > 1000
    assert table.count("| alone |") == 1
    assert (tmp_path / "table.md").read_text() == table
    # Stopped in the last seed: its rows are made again, the others' and the teachers are not.
    whole = (tmp_path / "rows.csv").read_text()
    (tmp_path / "rows.csv").write_text("".join(whole.splitlines(keepends=True)[:-3]))
    trained, train = [], distil.train
    monkeypatch.setattr(distil, "train", lambda *given: trained.append(given[2]) or train(*given))
    distil.main(["--tiny", "--out", str(tmp_path)])
    assert trained == [distil.TINY.seeds - 1]
    assert (tmp_path / "rows.csv").read_text() == whole


def test_text_is_split_by_file(distil):
    data, held_out = distil.text(distil.TINY.files)
    assert data.dtype == torch.uint8
    assert len(held_out) > 1000
    assert len(data) > 3 * len(held_out)
