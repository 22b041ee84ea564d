"""How alike networks are: the four measures against NumPy, whose networks they are, and that they change nothing."""

import math

import numpy as np
import pytest
import torch
from train_helpers import assert_same, config, last_state, one_thread, rows_without_times, run  # noqa: F401

from fastkd import methods, models
from fastkd._core.messages import UserError
from fastkd.runs.config import CompareConfig
from fastkd.runs.job import CompareJob
from fastkd.train import Runner
from fastkd.train.diversity import measure, networks_of
from fastkd.train.metrics import read_csv

CPU = torch.device("cpu")


class Fixed(torch.nn.Module):
    """Gives the rows of a table; its inputs are their numbers."""

    def __init__(self, table):
        super().__init__()
        self.table = torch.as_tensor(table, dtype=torch.float32)

    def forward(self, rows):
        return self.table[rows]


def softmax(z):
    e = np.exp(z - z.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_measures_are_numpys():
    draw = np.random.default_rng(0)
    tables = [draw.normal(size=(40, 5)).astype(np.float32) * 2 for _ in range(3)]
    labels = draw.integers(0, 5, 40)
    counted = np.arange(40) % 7 != 0
    target = torch.from_numpy(np.where(counted, labels, -100))
    networks = {name: Fixed(table) for name, table in zip("abc", tables, strict=True)}
    batches = [(torch.arange(40)[part], target[part]) for part in (slice(0, 15), slice(15, 40))]
    found = measure(networks, batches, CPU)
    p = [softmax(table.astype(np.float64))[counted] for table in tables]
    y = labels[counted]
    wrong = [q.argmax(1) != y for q in p]
    for i in range(3):
        for j in range(3):
            apart = np.linalg.norm(p[i] - p[j], axis=1).mean()
            assert found.distance[i, j].item() == pytest.approx(apart, abs=1e-6)
            assert found.common[i, j].item() == pytest.approx((wrong[i] & wrong[j]).sum() / wrong[i].sum())
            said = [q[np.arange(len(y)), y] for q in (p[i], p[j])]
            assert found.homogeneity[i, j].item() == pytest.approx(np.corrcoef(*said)[0, 1], abs=1e-6)
        mean, each = p[i].mean(0), -(p[i] * np.log(p[i])).sum(1).mean()
        expected = 1 - (-(mean * np.log(mean)).sum() - each) / math.log(5)
        assert found.collapse[i].item() == pytest.approx(expected, abs=1e-6)
    assert len(found.row()) == 3 + 3 + 3 + 6
    assert found.row()["diversity_common.c.a"] == found.common[2, 0].item() != found.common[0, 2].item()


def test_ends_of_the_scales():
    """Sure and right of every class: no collapse; the same for every image: collapse; opposite, sure: sqrt(2)."""
    target = torch.arange(12) % 4
    right, constant = 100.0 * torch.nn.functional.one_hot(target, 4), torch.tensor([[100.0, 0, 0, 0]]).expand(12, 4)
    other = 100.0 * torch.nn.functional.one_hot((target + 1) % 4, 4)
    networks = {"right": Fixed(right), "constant": Fixed(constant), "other": Fixed(other)}
    found = measure(networks, [(torch.arange(12), target)], CPU)
    assert found.collapse.tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-9)
    assert found.distance[0].tolist() == pytest.approx([0.0, 0.75 * math.sqrt(2), math.sqrt(2)])
    assert found.common[2].tolist()[1:] == [0.75, 1.0] and found.common[1].tolist()[1:] == [1.0, 1.0]
    assert found.common[0].isnan().all()  # it has no errors
    assert found.homogeneity[0].isnan().all() and found.homogeneity[1, 1].item() == pytest.approx(1)


def network(width=0.0625):
    return models.create("plain2", 10, image_size=8, width=width)


def names_of(method, first="student", others=(), guides=()):
    return list(networks_of(method, first, {name: network() for name in others}, {name: network() for name in guides}))


def test_which_networks_a_method_has():
    branched = models.branched("plain2", 10, branches=2, image_size=8, width=0.0625)
    peers, averages = ["peer1", "peer2"], ["mean_teacher1", "mean_teacher2"]
    assert names_of(methods.DKEL(branched)) == peers + averages
    assert names_of(methods.ONE(branched)) == peers
    assert names_of(methods.MeanTeacher(network())) == ["student", "mean_teacher"]
    method = methods.MeanTeacher(network())
    assert list(networks_of(method, "student", {}, {}).values()) == [method.student, method.teacher]
    assert names_of(methods.KD(network(), network()), guides=["teacher"]) == ["student", "teacher"]
    dml = methods.DML([network(), network()])
    assert names_of(dml, others=["assistant1"]) == ["student", "assistant1"]


@pytest.mark.parametrize("method", ["kd", "dkel", "orc"])
def test_a_run_that_measures_is_the_same_run(tmp_path, method):
    options = dict(method=method, epochs=2, eval_every=2)
    run(config(tmp_path, out=str(tmp_path / "plain"), **options))
    run(config(tmp_path, out=str(tmp_path / "measured"), diversity=True, **options))
    assert_same(last_state(tmp_path / "measured"), last_state(tmp_path / "plain"))
    rows = rows_without_times(tmp_path / "measured")
    own = [{k: v for k, v in row.items() if not k.startswith("diversity_")} for row in rows]
    assert str(own) == str(rows_without_times(tmp_path / "plain"))
    measured = [sum(math.isfinite(v) for k, v in row.items() if k.startswith("diversity_")) for row in rows]
    assert measured[0] == 0 < measured[1]  # as the test images are evaluated
    last = read_csv(tmp_path / "measured" / "metrics.csv")[-1]
    pairs = [name for name in last if name.startswith("diversity_distance.")]
    assert len(pairs) == {"kd": 1, "dkel": 15, "orc": 3}[method] and all(0 < last[name] < 1.5 for name in pairs)


def test_one_network_alone_has_no_diversity(tmp_path):
    with pytest.raises(UserError, match=r"^--diversity: ce has one network alone: leave the option out$"):
        Runner(config(tmp_path, diversity=True))
    jobs = CompareJob.of(CompareConfig(methods=["ce", "kd"], seeds=[0], diversity=True, out=str(tmp_path))).runs()
    assert [job.config.diversity for job in jobs.values()] == [False, True]
