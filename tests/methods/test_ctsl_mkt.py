"""CTSL-MKT against the formulas of the paper, typed again in plain PyTorch in float64."""

import copy
from functools import partial

import pytest
import torch
from group_helpers import group_of_one
from learning_helpers import assert_example_runs, assert_learnt, digits, fit
from methods_helpers import batch, gradients, images, mlp, plain_ce, plain_kd, run, same, snapshot, train
from peers_helpers import (
    ConvNet,
    Net,
    assert_gradients,
    plain_angle,
    plain_distance,
    plain_step,
)
from torch import nn

from fastkd import functional
from fastkd.methods import CE, CTSLMKT, RKD
from fastkd.models import create, with_features

WEIGHTS = {"alpha": 0.8, "beta": 0.7, "beta1": 1.5, "beta2": 0.6, "gamma": 0.3}
OFF = {"mutual_response": False, "mutual_relation": False, "self_learning": False}
SWITCHES = [
    {},
    {"mutual_response": False},
    {"mutual_relation": False},
    {"self_learning": False},
    {"mutual_response": False, "self_learning": False},
    {"mutual_relation": False, "self_learning": False},
    OFF,
]


def peers(count=2):
    return [Net(seed=k, width=4 + k) for k in range(count)]  # embeddings of different widths


def former(count=2):
    return [mlp(seed=20 + k) for k in range(count)]  # self-teachers need no embedding


def paper(
    alpha, beta, beta1, beta2, gamma, t, mutual_t=1.0, former=(), response=True, relation=True, own=True, t2=True
):  # fmt: skip
    """The loss of all peers."""

    def loss(networks, x, y):
        outputs = [network.forward_features(x) for network in networks]
        total = 0
        for k, (z, f, _) in enumerate(outputs):
            partners = [other for i, other in enumerate(outputs) if i != k]
            total = total + alpha * plain_ce(z, y)
            for partner in partners:
                zp, fp = partner.logits.detach(), partner.features.detach()
                if relation:
                    bracket = plain_distance(f, fp) + beta1 * plain_angle(f, fp)
                    total = total + beta * bracket / len(partners)
                if response:
                    total = total + beta * beta2 * plain_kd(z, zp, mutual_t) / len(partners)
            if own:
                total = total + (gamma if t2 else gamma / t**2) * plain_kd(z, former[k](x).detach(), t)
        return total

    return loss


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("switches", SWITCHES, ids=lambda s: "no " + " ".join(s) if s else "all")
def test_loss_and_gradients_are_the_papers(switches, count, chunks):
    """With chunks the relations are those of each chunk."""
    x, y = batch(rows=8)
    networks, selves = peers(count), former(count)
    method = CTSLMKT(networks, selves, **WEIGHTS, temperature=3.0, **switches)
    on = {
        short: switches.get(name, True)
        for short, name in (("response", "mutual_response"), ("relation", "mutual_relation"), ("own", "self_learning"))
    }
    loss = run(method, x, y, chunks)
    value, grads = plain_step(networks, paper(**WEIGHTS, t=3.0, former=selves, **on), x, y, chunks)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


def test_defaults():
    x, y = batch()
    networks, selves = peers(), former()
    loss = run(CTSLMKT(networks, selves), x, y)
    value, grads = plain_step(networks, paper(1.0, 1.0, 2.0, 1.0, 0.5, 4.0, 1.0, selves), x, y)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


def test_self_learning_without_the_squared_temperature_is_the_printed_loss():
    x, y = batch()
    networks, selves = peers(), former()
    loss = run(CTSLMKT(networks, selves, temperature=3.0, scale_by_t2=False), x, y)
    value, grads = plain_step(networks, paper(1.0, 1.0, 2.0, 1.0, 0.5, 3.0, 1.0, selves, t2=False), x, y)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


def test_temperature_of_the_mutual_response():
    x, y = batch()
    networks = peers(3)
    method = CTSLMKT(networks, mutual_relation=False, self_learning=False, mutual_temperature=2.5)
    loss = run(method, x, y)
    expected = paper(1, 1, 2, 1, 0, 1.0, mutual_t=2.5, relation=False, own=False)
    value, grads = plain_step(networks, expected, x, y)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


@pytest.mark.parametrize("chunks", [1, 3])
def test_without_any_transfer_it_is_cross_entropy(chunks):
    x, y = batch()
    networks = peers(3)
    loss = run(CTSLMKT(networks, **OFF), x, y, chunks)
    alone = [copy.deepcopy(network) for network in networks]
    assert abs(loss - sum(run(CE(network), x, y, chunks) for network in alone)) < 1e-12
    assert_gradients(networks, [gradients(network) for network in alone], 1e-12)


def test_a_peer_whose_switches_are_off_learns_by_cross_entropy():
    """It still teaches: the other peers do not change."""
    x, y = batch()
    names = ("mutual_response", "mutual_relation", "self_learning")
    networks, others = peers(3), peers(3)
    run(CTSLMKT(networks, former(3), **{key: [True, False, True] for key in names}), x, y)
    run(CTSLMKT(others, former(3)), x, y)
    alone = peers(3)[1]
    run(CE(alone), x, y)
    expected = [gradients(others[0]), gradients(alone), gradients(others[2])]
    assert_gradients(networks, expected, 1e-12)


def test_one_relation_is_rkd():
    """A peer that only learns relations from its partner does what RKD does with the partner frozen."""
    x, y = batch()
    networks = peers()
    method = CTSLMKT(networks, beta=25.0, beta1=2.0, mutual_response=False, self_learning=False)
    method.map_learners(lambda network: network)
    run(method, x, y)
    for k in range(2):
        student, teacher = peers()[k], peers()[1 - k]
        run(RKD(student, teacher, distance=25.0, angle=50.0), x, y)
        assert_gradients([networks[k]], [gradients(student)], 1e-12)


@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(chunks):
    x, y = batch()
    networks, selves = peers(3), former(3)
    method = CTSLMKT(networks, selves, **WEIGHTS, mutual_relation=[True, False, True])
    (phase,) = method.phases(x, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    terms = ("ce", "mutual", "distance", "angle", "self")
    assert phase.parts.keys() == {f"peers.{k}.{name}" for k in range(3) for name in terms}
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(sum(phase.parts.values()) - total) < 1e-10
    for k, network in enumerate(networks):
        z = network(x)
        assert abs(phase.parts[f"peers.{k}.ce"] - 0.8 * plain_ce(z, y)) < 1e-10
        assert abs(phase.parts[f"peers.{k}.self"] - 0.3 * plain_kd(z, selves[k](x), 4.0)) < 1e-10
        mutual = sum(plain_kd(z, other(x), 1.0) for other in networks if other is not network) / 2
        assert abs(phase.parts[f"peers.{k}.mutual"] - 0.42 * mutual) < 1e-10
    assert phase.parts["peers.1.distance"] == 0 < phase.parts["peers.0.distance"]
    assert phase.networks == tuple(networks)


def test_only_terms_with_a_weight_are_parts():
    def names(**options):
        (phase,) = CTSLMKT(peers(), former(), **options).phases(*batch())
        return {name.removeprefix("peers.0.") for name in phase.parts if name.startswith("peers.0")}

    assert names(beta=0) == {"ce", "self"}
    assert names(alpha=0, gamma=0) == {"mutual", "distance", "angle"}
    assert names(beta1=0, beta2=0) == {"ce", "distance", "self"}


@pytest.mark.parametrize("chunks", [1, 3])
def test_no_labels_are_needed_without_cross_entropy(chunks):
    x, y = batch()
    networks = peers()
    with_labels = run(CTSLMKT(networks, former(), alpha=0), x, y, chunks)
    expected = [gradients(network) for network in networks]
    assert abs(run(CTSLMKT(networks, former(), alpha=0), x, None, chunks) - with_labels) < 1e-12
    assert_gradients(networks, expected, 1e-12)


@pytest.mark.parametrize("chunks", [1, 2])
def test_ignored_rows_count_nowhere(chunks):
    x, y = batch(rows=12)
    y[[0, 2, 7, 9]] = -100  # as many in each of two chunks
    rows = y != -100
    networks = peers()
    loss = run(CTSLMKT(networks, former()), x.where(rows[:, None], 100.0), y, chunks)
    got = [gradients(network) for network in networks]
    assert abs(run(CTSLMKT(networks, former()), x[rows], y[rows], chunks) - loss) < 1e-12
    assert_gradients(networks, got, 1e-12)


def test_a_batch_of_ignored_rows_is_zero():
    x, y = batch()
    networks = peers()
    for chunks in (1, 3):
        assert run(CTSLMKT(networks, former()), x, torch.full_like(y, -100), chunks) == 0
        assert all(not grad.any() for network in networks for grad in gradients(network))


def test_a_single_row_has_no_relations():
    x, y = batch(rows=4)
    for chunks in (1, 4):
        networks = peers()
        loss = run(CTSLMKT(networks, self_learning=False), x[:chunks], y[:chunks], chunks)
        other = run(CTSLMKT(peers(), self_learning=False, mutual_relation=False), x[:chunks], y[:chunks], chunks)
        assert abs(loss - other) < 1e-12
        assert all(grad.isfinite().all() for network in networks for grad in gradients(network))


def test_every_peer_has_its_view():
    (x, y), (x2, _) = batch(), batch(seed=1)
    networks, selves = peers(), former()
    loss = run(CTSLMKT(networks, selves, views=True), (x, x2), y)
    outputs = [networks[0].forward_features(x), networks[1].forward_features(x2)]
    expected = 0
    for k, view in enumerate((x, x2)):
        (z, f, _), (zp, fp, _) = outputs[k], outputs[1 - k]
        expected = expected + plain_ce(z, y) + plain_distance(f, fp) + 2 * plain_angle(f, fp) + plain_kd(z, zp, 1.0)
        expected = expected + 0.5 * plain_kd(z, selves[k](view), 4.0)
    assert abs(loss - expected) < 1e-10
    method = CTSLMKT(networks, selves, views=True, mutual_relation=False)
    assert abs(run(method, (x, x2), y, chunks=3) - run(method, (x, x2), y)) < 1e-12
    with pytest.raises(ValueError, match=r"^CTSLMKT: inputs must be a tuple or list of 2 views, .*, got 3 of them$"):
        next(method.phases((x, x, x), y))
    with pytest.raises(TypeError, match=r"^CTSLMKT: inputs must be a tuple or list of 2 views, .*, got Tensor$"):
        next(method.phases(x, y))


def conv(count=2):
    return [ConvNet(k, 3 + k) for k in range(count)]


def test_only_the_peers_change():
    method, (x, y) = CTSLMKT(conv(), [ConvNet(8, 5), ConvNet(9, 2)]), images()
    selves, before = snapshot(method.self_teachers), snapshot(method.peers)
    method.train()
    optimizer = train(method, x, y, steps=2)
    method.self_teachers[0].train()  # as an evaluation elsewhere would do
    train(method, x, y, steps=2, optimizer=optimizer)
    assert same(snapshot(method.self_teachers), selves)
    method.train()
    assert not any(m.training for m in method.self_teachers.modules()) and method.peers[0].training
    assert all(p.grad is None and not p.requires_grad for p in method.self_teachers.parameters())
    after = snapshot(method.peers)
    assert not any(torch.equal(after[key], before[key]) for key in before)


def test_without_self_learning_self_teachers_are_left_alone():
    teachers = [ConvNet(8).train(), ConvNet(9).train()]
    method = CTSLMKT(conv(), teachers, self_learning=False)
    assert all(t.training and next(t.parameters()).requires_grad for t in teachers)
    assert all(name.startswith("peers.") or name == "_extra_state" for name in method.state_dict())


def test_resumes_to_the_same_bits(tmp_path):
    def fresh(seed=0):
        return CTSLMKT([Net(seed), Net(seed + 1, width=9)], former())

    x, y = batch()
    whole = fresh()
    train(whole, x, y, steps=7)
    first = fresh()
    optimizer = train(first, x, y, steps=3)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = fresh(seed=5)
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, x, y, steps=4, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict()) and second.iterations == 7


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiled_networks_give_the_same(backend):
    torch.compiler.reset()
    x, y = batch()
    plain, compiled = CTSLMKT(peers(), former()), CTSLMKT(peers(), former())
    compiled.map_learners(partial(torch.compile, backend=backend))
    assert abs(run(plain, x, y) - run(compiled, x, y)) < 1e-12
    assert_gradients(compiled.peers, [gradients(network) for network in plain.peers], 1e-12)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


def test_low_precision_autocast_is_close():
    x, y = images(rows=32)
    exact, low = (CTSLMKT([n.eval() for n in conv()], conv()) for _ in range(2))
    loss = run(exact, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = low.phases(x, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32
    assert 0 < abs(phase.loss - loss) < 0.02 * loss
    for network, other in zip(low.peers, exact.peers, strict=True):
        first, second = (torch.cat([g.flatten() for g in gradients(n)]) for n in (network, other))
        assert nn.functional.cosine_similarity(first, second, dim=0) > 0.99


def test_families_may_differ():
    torch.manual_seed(0)
    networks = [
        create("resnet8", 7, image_size=8, channels=1, width=0.5),
        create("plain2", 7, image_size=8, channels=1, width=0.25),
        with_features(nn.Sequential(nn.Flatten(), nn.Linear(64, 5), nn.ReLU(), nn.Linear(5, 7)), ["2"]),
    ]
    method = CTSLMKT(networks, [create("resnet8", 7, image_size=8, channels=1, width=0.5) for _ in range(3)], deploy=1)
    x, y = torch.randn(6, 1, 8, 8), torch.randint(7, (6,))
    assert run(method, x, y).isfinite()
    assert all(p.grad.any() for network in networks for p in list(network.parameters())[-2:])
    assert method.deployable() is networks[1]


def test_relations_of_the_whole_group(tmp_path, monkeypatch):
    """Where the rest is tested: the relations themselves. Here: that the group reaches every one of them."""
    calls = []

    def spy(function, student, teacher, process_group=None):
        calls.append(process_group)
        return function(student, teacher, process_group=process_group)

    for name in ("rkd_distance", "rkd_angle"):
        monkeypatch.setattr(functional, name, partial(spy, getattr(functional, name)))
    x, y = batch()
    with group_of_one(tmp_path):
        group = torch.distributed.group.WORLD
        alone = run(CTSLMKT(peers(), former()), x, y)
        assert calls == [None] * 4
        method = CTSLMKT(peers(), former(), process_group=group)
        method.map_learners(nn.parallel.DistributedDataParallel)
        assert abs(run(method, x, y) - alone) < 1e-12
        assert calls[4:] == [group] * 4


SHARED = Net(4)
BAD = {
    "one peer": (lambda: CTSLMKT([Net(1)], [Net(2)]), "peers"),
    "no list": (lambda: CTSLMKT(Net(1), [Net(2)]), "peers"),
    "no network": (lambda: CTSLMKT([Net(1), "resnet20"]), r"peers\[1\]"),
    "the same peer": (lambda: CTSLMKT([SHARED, SHARED], self_learning=False), r"peers\.1"),
    "no self-teachers": (lambda: CTSLMKT(peers()), "self_teachers"),
    "self-teachers None": (lambda: CTSLMKT(peers(), None), "self_teachers"),
    "one self-teacher": (lambda: CTSLMKT(peers(), [Net(8)]), "self_teachers"),
    "three self-teachers": (lambda: CTSLMKT(peers(), former(3)), "self_teachers"),
    "the peer itself": (lambda: CTSLMKT([SHARED, Net(2)], [SHARED, Net(3)]), r"self_teachers\.0"),
    "alpha": (lambda: CTSLMKT(peers(), former(), alpha=-1.0), "alpha"),
    "beta": (lambda: CTSLMKT(peers(), former(), beta="1"), "beta"),
    "beta1": (lambda: CTSLMKT(peers(), former(), beta1=float("nan")), "beta1"),
    "beta2": (lambda: CTSLMKT(peers(), former(), beta2=-0.5), "beta2"),
    "gamma": (lambda: CTSLMKT(peers(), former(), gamma=torch.tensor(1.0)), "gamma"),
    "t2": (lambda: CTSLMKT(peers(), former(), scale_by_t2=2), "scale_by_t2"),
    "temperature": (lambda: CTSLMKT(peers(), former(), temperature=0), "temperature"),
    "mutual temperature": (lambda: CTSLMKT(peers(), former(), mutual_temperature=-1.0), "mutual_temperature"),
    "switch": (lambda: CTSLMKT(peers(), former(), mutual_response=1), "mutual_response"),
    "switches": (lambda: CTSLMKT(peers(), former(), mutual_relation=[True] * 3), "mutual_relation"),
    "switch of one": (lambda: CTSLMKT(peers(), former(), self_learning=[True, None]), r"self_learning\[1\]"),
    "deploy": (lambda: CTSLMKT(peers(), former(), deploy=2), "deploy"),
    "views": (lambda: CTSLMKT(peers(), former(), views=2), "views"),
    "nothing to learn from": (lambda: CTSLMKT(peers(), alpha=0, **OFF), "alpha"),
    "nothing for one": (lambda: CTSLMKT(peers(), former(), alpha=0, beta=0, self_learning=[True, False]), "alpha"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_wrong_set_up_is_one_sentence(case):
    make, argument = BAD[case]
    with pytest.raises((ValueError, TypeError), match=rf"^CTSLMKT: {argument} must be .*, got ") as error:
        make()
    assert "\n" not in str(error.value)


MISFITS = [
    ([Net(1), Net(2, classes=9)], former(), r"peers\[1\] must be .*\[10, 7\] of .*got .*\[10, 9\]$"),
    (peers(), [mlp(1), mlp(2, classes=9)], r"self_teachers\[1\] must be .*\[10, 7\] of .*got .*\[10, 9\]$"),
    ([Net(1), mlp(2)], former(), r"peers\[1\] must be .*pooled embedding.*with_features.*, got Tensor instead"),
]


@pytest.mark.parametrize("networks, selves, message", MISFITS, ids=["peer", "self-teacher", "no embedding"])
def test_networks_that_do_not_fit_are_found_at_the_first_batch(networks, selves, message):
    with pytest.raises((ValueError, TypeError), match=f"^CTSLMKT: {message}"):
        next(CTSLMKT(networks, selves).phases(*batch()))


def test_without_relations_no_embedding_is_needed():
    for options in ({"mutual_relation": False}, {"beta": 0}):
        assert run(CTSLMKT([mlp(1), mlp(2)], former(), **options), *batch()).isfinite()


def test_a_method_can_be_copied():
    x, y = batch()
    method = CTSLMKT(peers(), former())
    train(method, x, y, steps=2)
    twin = copy.deepcopy(method)
    train(method, x, y, steps=2)
    train(twin, x, y, steps=2)
    assert same(snapshot(method), snapshot(twin))


def test_digits_are_learnt():
    """Stage 1: two peers alone; stage 2: two fresh ones together."""
    (x, y), (x_test, y_test) = digits()

    def network(seed, width):
        return Net(seed, width, classes=10, inputs=64).float()

    selves = [fit(CE(network(k, 16 + 8 * k)), x, y) for k in range(2)]
    method = CTSLMKT([network(2, 16), network(3, 24)], selves)
    assert_learnt(fit(method, x, y), x_test, y_test, network(2, 16))
    assert_learnt(method.peers[1], x_test, y_test, network(3, 24))


def test_the_example_runs(capsys):
    assert_example_runs("ctsl_mkt", "together", capsys)
