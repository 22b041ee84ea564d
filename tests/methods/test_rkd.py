"""RKD against the formulas of the paper, typed again in plain PyTorch in float64."""

import copy
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from group_helpers import group_of_one
from learning_helpers import assert_learnt, digits, fit
from methods_helpers import CLASSES, batch, gradients, images, mlp, plain_ce, run, same, snapshot, train
from peers_helpers import (
    ConvNet,
    Net,
    assert_gradients,
    plain_angle,
    plain_distance,
    plain_step,
)
from torch import nn

from fastkd.methods import CE, RKD
from fastkd.models import Outputs, create, with_features

WEIGHTS = [
    {},
    {"distance": 2.0, "angle": 0.0},
    {"distance": 0.0, "angle": 3.0},
    {"distance": 0.5, "angle": 0.7, "ce_weight": 0.3},
    {"distance": 1.0, "angle": 2.0, "ce_weight": 0.0},
]


def teacher_of():
    return Net(9, width=11, classes=3)  # of other width and classes


def paper(teacher, distance=25.0, angle=50.0, ce_weight=1.0):
    def loss(networks, x, y):
        z, f, _ = networks[0].forward_features(x)
        t = teacher.forward_features(x).features.detach()
        return ce_weight * plain_ce(z, y) + distance * plain_distance(f, t) + angle * plain_angle(f, t)

    return loss


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("weights", WEIGHTS)
def test_loss_and_gradients_are_the_papers(weights, chunks):
    """With chunks the relations are those of each chunk."""
    x, y = batch()
    student, teacher = Net(1), teacher_of()
    loss = run(RKD(student, teacher, **weights), x, y, chunks)
    value, grads = plain_step([student], paper(teacher, **weights), x, y, chunks)
    assert abs(loss - value) < 1e-10
    assert_gradients([student], grads)


def test_without_relations_it_is_cross_entropy():
    x, y = batch()
    student, alone = mlp(1), mlp(1)  # no embedding is needed then
    assert run(RKD(student, mlp(2), distance=0, angle=0), x, y, 2) == run(CE(alone), x, y, 2)
    assert_gradients([student], [gradients(alone)], 0)


@pytest.mark.parametrize("change", [lambda f: 3 * f, lambda f: f + 5, lambda f: f @ torch.linalg.qr(f.T @ f)[0]])
def test_a_student_with_the_teachers_relations_has_nothing_to_learn(change):
    """Relations do not see scale, shift or rotation."""
    teacher, (x, y) = Net(1), batch()
    (phase,) = RKD(Moved(teacher, change), teacher_of_same(teacher), ce_weight=1.0).phases(x, y)
    assert abs(phase.parts["distance"]) < 1e-12 and abs(phase.parts["angle"]) < 1e-12


class Moved(nn.Module):
    def __init__(self, network, change):
        super().__init__()
        self.network, self.change = copy.deepcopy(network), change

    def forward(self, inputs):
        z, f, _ = self.network.forward_features(inputs)
        return SimpleNamespace(logits=z, features=self.change(f))


def teacher_of_same(network):
    return copy.deepcopy(network)


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(chunks):
    x, y = batch()
    student, teacher = Net(1), teacher_of()
    (phase,) = RKD(student, teacher).phases(x, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    assert phase.parts.keys() == {"ce", "distance", "angle"}
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(sum(phase.parts.values()) - total) < 1e-10
    assert abs(phase.parts["ce"] - plain_ce(student(x), y)) < 1e-10
    if chunks == 1:
        f, t = student.body(x), teacher.body(x)
        assert abs(phase.parts["distance"] - 25 * plain_distance(f, t)) < 1e-10
        assert abs(phase.parts["angle"] - 50 * plain_angle(f, t)) < 1e-10
    assert phase.networks == (student,)


@pytest.mark.parametrize("chunks", [1, 2])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch(rows=12)
    y[[0, 2, 7, 9]] = -100
    rows = y != -100
    student = Net(1)
    loss = run(RKD(student, teacher_of()), x.where(rows[:, None], 100.0), y, chunks)
    got = gradients(student)
    assert abs(run(RKD(student, teacher_of()), x[rows], y[rows], chunks) - loss) < 1e-12
    assert_gradients([student], [got], 1e-12)
    assert run(RKD(student, teacher_of()), x, torch.full_like(y, -100), chunks) == 0
    assert not any(grad.any() for grad in gradients(student))


def test_a_row_with_one_labelled_token_counts():
    class Tokens(nn.Module):
        """Logits of two tokens a row [B, 2, C]."""

        def __init__(self, seed):
            super().__init__()
            self.network = Net(seed)

        def forward(self, inputs):
            z, f, _ = self.network.forward_features(inputs)
            return Outputs(torch.stack([z, 2 * z], 1), f)

    x, y = batch()
    y = torch.stack([y, y], 1)
    y[3], y[5, 0] = -100, -100
    (phase,) = RKD(Tokens(1), teacher_of()).phases(x, y)
    kept = [i for i in range(10) if i != 3]
    (other,) = RKD(Net(1), teacher_of(), ce_weight=0).phases(x[kept])
    assert abs(phase.parts["distance"] - other.parts["distance"]) < 1e-12
    assert abs(phase.parts["angle"] - other.parts["angle"]) < 1e-12


def test_no_labels_are_needed_without_cross_entropy():
    x, y = batch()
    student = Net(1)
    loss = run(RKD(student, teacher_of(), ce_weight=0), x, y, 3)
    expected = gradients(student.body)
    assert abs(run(RKD(student, teacher_of(), ce_weight=0), x, None, 3) - loss) < 1e-12
    assert_gradients([student.body], [expected], 1e-12)
    assert all(p.grad is None for p in student.head.parameters())


def test_only_the_student_changes():
    method, (x, y) = RKD(ConvNet(1), ConvNet(2, 7)), images()
    teacher, student = snapshot(method.teacher), snapshot(method.student)
    method.train()
    optimizer = train(method, x, y, steps=2)
    method.teacher.train()  # as an evaluation elsewhere would do
    train(method, x, y, steps=2, optimizer=optimizer)
    assert same(snapshot(method.teacher), teacher)
    assert not method.teacher.training and method.student.training
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    changed = snapshot(method.student)
    assert not any(torch.equal(changed[key], student[key]) for key in student)


def test_resumes_to_the_same_bits(tmp_path):
    x, y = batch()
    whole = RKD(Net(1), teacher_of())
    train(whole, x, y, steps=7)
    first = RKD(Net(1), teacher_of())
    optimizer = train(first, x, y, steps=3)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = RKD(Net(5), teacher_of())
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, x, y, steps=4, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict()) and second.iterations == 7


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    x, y = batch()
    plain, compiled = RKD(Net(1), teacher_of()), RKD(Net(1), teacher_of())
    compiled.map_learners(partial(torch.compile, backend=backend))
    assert abs(run(plain, x, y) - run(compiled, x, y)) < 1e-12
    assert_gradients([compiled.student], [gradients(plain.student)], 1e-12)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_low_precision_autocast_is_close():
    x, y = images(rows=32)
    exact, low = (RKD(ConvNet(1).eval(), ConvNet(2, 7), distance=1.0, angle=2.0) for _ in range(2))
    loss = run(exact, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = low.phases(x, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32
    assert 0 < abs(phase.loss - loss) < 0.02 * loss
    first, second = (torch.cat([g.flatten() for g in gradients(m.student)]) for m in (low, exact))
    assert nn.functional.cosine_similarity(first, second, dim=0) > 0.99


def test_networks_of_other_families():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, CLASSES))
    student, teacher = with_features(network, ["2"]), create("resnet8", 10, image_size=8, channels=1)
    method = RKD(student, teacher)
    assert run(method, torch.randn(6, 1, 8, 8), torch.randint(CLASSES, (6,))).isfinite()
    assert method.deployable() is student and network[1].weight.grad.any()


def test_the_group_reaches_the_relations(tmp_path):
    x, y = batch()
    with group_of_one(tmp_path):
        alone, grouped = (
            RKD(Net(1), teacher_of()),
            RKD(Net(1), teacher_of(), process_group=torch.distributed.group.WORLD),
        )
        grouped.map_learners(nn.parallel.DistributedDataParallel)
        assert abs(run(alone, x, y) - run(grouped, x, y)) < 1e-12
        assert_gradients([grouped.student], [gradients(alone.student)], 1e-12)
    with pytest.raises((ValueError, TypeError), match="process_group"):
        run(RKD(Net(1), teacher_of(), process_group="all"), x, y)


SHARED = Net(4)
BAD = {
    "no network": (lambda: RKD("resnet20", Net(2)), "student"),
    "no teacher": (lambda: RKD(Net(1), [Net(2)]), "teacher"),
    "the same": (lambda: RKD(SHARED, SHARED), "teacher"),
    "distance": (lambda: RKD(Net(1), Net(2), distance=-1.0), "distance"),
    "angle": (lambda: RKD(Net(1), Net(2), angle=float("inf")), "angle"),
    "ce_weight": (lambda: RKD(Net(1), Net(2), ce_weight=None), "ce_weight"),
    "nothing": (lambda: RKD(Net(1), Net(2), distance=0, angle=0, ce_weight=0), "ce_weight"),
    "student without embedding": (lambda: next(RKD(mlp(1), Net(2)).phases(*batch())), "student"),
    "teacher without embedding": (lambda: next(RKD(Net(1), mlp(2)).phases(*batch())), "teacher"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_set_up_is_one_sentence(case):
    make, argument = BAD[case]
    with pytest.raises((ValueError, TypeError), match=rf"^RKD: {argument} must be .*, got ") as error:
        make()
    assert "\n" not in str(error.value)


def test_digits_are_learnt():
    (x, y), (x_test, y_test) = digits()

    def network(seed, width):
        return Net(seed, width, classes=10, inputs=64).float()

    teacher = fit(CE(network(1, 32)), x, y)
    assert_learnt(fit(RKD(network(2, 12), teacher), x, y, lr=0.02, epochs=30), x_test, y_test, network(2, 12))
