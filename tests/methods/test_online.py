"""DML and KDCL against the formulas of the papers, typed again in plain PyTorch in float64."""

import copy
from functools import partial

import pytest
import torch
from learning_helpers import assert_learnt, digits, fit
from methods_helpers import batch, bn_net, gradients, images, mlp, plain_ce, plain_kd, run, same, snapshot, train
from peers_helpers import assert_gradients, plain_step
from torch import nn

from fastkd.methods import CE, CTSLMKT, DML, KDCL
from fastkd.methods.online import linear_weights, relative_logits

ENSEMBLES = ("naive", "linear", "minlogit")


def peers(count=2):
    return [mlp(seed=k, hidden=5 + k) for k in range(count)]


def dml_paper(temperature=1.0):
    def loss(networks, x, y):
        logits = [network(x) for network in networks]
        total = 0
        for k, z in enumerate(logits):
            partners = [other.detach() for i, other in enumerate(logits) if i != k]
            total = total + plain_ce(z, y) + sum(plain_kd(z, p, temperature) for p in partners) / len(partners)
        return total

    return loss


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("options", [{}, {"temperature": 2.5}])
def test_dml_is_the_papers(options, count, chunks):
    x, y = batch()
    networks = peers(count)
    loss = run(DML(networks, **options), x, y, chunks)
    value, grads = plain_step(networks, dml_paper(**options), x, y)  # no term mixes rows: chunks change nothing
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


@pytest.mark.parametrize("count", [2, 3])
def test_dml_is_ctsl_mkt_without_relations_and_self_learning(count):
    x, y = batch()
    first, second = peers(count), peers(count)
    method = DML(first)
    assert run(method, x, y, 2) == run(CTSLMKT(second, mutual_relation=False, self_learning=False), x, y, 2)
    assert_gradients(first, [gradients(network) for network in second], 0)
    (phase,) = method.phases(x, y)
    assert phase.parts.keys() == {f"peers.{k}.{name}" for k in range(count) for name in ("ce", "mutual")}


# --- KDCL ---------------------------------------------------------------------------------------------------------


def plain_ensemble(kind, logits, y, weights=None):
    """One row after another."""
    rows = []
    for b, label in enumerate(y):
        z = torch.stack([network[b] for network in logits])  # [M, C]
        if kind == "naive":
            ce = -torch.log_softmax(z, 1)[:, label]
            rows.append(z[ce.argmin()])
        elif kind == "minlogit":
            rows.append((z - z[:, label : label + 1]).min(0).values)
        else:
            rows.append(weights @ z)
    return torch.stack(rows).detach()


def kdcl_paper(kind, temperature=2.0, lam=(1.0, 1.0, 1.0), steps=20):
    def loss(networks, x, y):
        logits = [network(x) for network in networks]
        weights = linear_weights(relative_logits([z.detach() for z in logits], y), y, steps)
        target = plain_ensemble(kind, logits, y, weights)
        return sum(plain_ce(z, y) + w * plain_kd(z, target, temperature) for z, w in zip(logits, lam, strict=False))

    return loss


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_kdcl_is_the_papers(ensemble, count, chunks):
    """With chunks the weights of the linear ensemble are those of each chunk; the others choose row by row."""
    x, y = batch()
    networks, lam = peers(count), [0.5, 0.0, 2.0][:count]
    loss = run(KDCL(networks, ensemble=ensemble, temperature=3.0, lam=lam), x, y, chunks)
    formula = kdcl_paper(ensemble, 3.0, lam)
    value, grads = plain_step(networks, formula, x, y, chunks if ensemble == "linear" else 1)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


def test_kdcl_defaults():
    x, y = batch()
    networks = peers()
    loss = run(KDCL(networks), x, y)
    value, grads = plain_step(networks, kdcl_paper("naive"), x, y)
    assert abs(loss - value) < 1e-10
    assert_gradients(networks, grads)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_peer_with_lam_zero_learns_by_cross_entropy(ensemble):
    x, y = batch()
    networks, alone = peers(3), peers(3)[1]
    run(KDCL(networks, ensemble=ensemble, lam=[1.0, 0.0, 1.0]), x, y)
    run(CE(alone), x, y)
    assert_gradients([networks[1]], [gradients(alone)], 1e-12)
    networks, others = peers(3), peers(3)
    loss = run(KDCL(networks, ensemble=ensemble, lam=0), x, y)
    assert abs(loss - sum(run(CE(network), x, y) for network in others)) < 1e-12
    assert_gradients(networks, [gradients(network) for network in others], 1e-12)


def test_the_best_peer_of_every_row_learns_nothing_from_the_naive_ensemble():
    x, y = batch()
    networks = peers()
    ce = torch.stack([nn.functional.cross_entropy(network(x), y, reduction="none") for network in networks])
    rows = ce.argmin(0) == 0
    assert 0 < rows.sum() < len(rows)
    (phase,) = KDCL(networks).phases(x[rows], y[rows])
    assert abs(phase.parts["peers.0.kd"]) < 1e-12 < phase.parts["peers.1.kd"]


def test_no_peer_is_surer_of_the_label_than_the_minlogit_ensemble():
    x, y = batch()
    networks = peers(3)
    logits = [network(x).detach() for network in networks]
    method = KDCL(networks, ensemble="minlogit")
    ensemble = method.ensemble_of(logits, y)
    assert (ensemble[torch.arange(len(y)), y] == 0).all()
    sure = [torch.softmax(z, 1)[torch.arange(len(y)), y] for z in (*logits, ensemble)]
    assert all((sure[-1] >= s - 1e-12).all() for s in sure)


def hard_logits(seed, count, classes=10, rows=64):
    """Of networks that differ in how much and how well they know."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.randint(classes, (rows,), generator=generator)
    label = nn.functional.one_hot(y, classes)
    noise = [torch.randn(rows, classes, generator=generator, dtype=torch.float64) for _ in range(count)]
    return [(0.5 + k) * noise[k] + (1 + (seed * k) % 4) * label for k in range(count)], y


@pytest.mark.parametrize("count", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_linear_weights_minimise_the_cross_entropy_of_the_ensemble(seed, count):
    optimize = pytest.importorskip("scipy.optimize")
    logits, y = hard_logits(seed, count)

    def ce(a):
        return plain_ce(sum(float(w) * z for w, z in zip(a, logits, strict=True)), y).item()

    equal = [1 / count] * count
    simplex = {"type": "eq", "fun": lambda a: sum(a) - 1}
    best = optimize.minimize(ce, equal, bounds=[(0, 1)] * count, constraints=simplex, method="SLSQP", tol=1e-12)
    for steps, rest in ((20, 0.05), (200, 1e-4)):  # of what can be gained over equal weights
        weights = linear_weights(relative_logits(logits, y), y, steps)
        assert abs(weights.sum() - 1) < 1e-9 and (weights > 0).all()
        assert ce(weights) - best.fun < rest * (ce(equal) - best.fun)
    losses = [ce(linear_weights(relative_logits(logits, y), y, steps)) for steps in range(12)]
    assert losses[0] == pytest.approx(ce(equal)) and sorted(losses, reverse=True) == losses


def test_linear_weights_of_a_network_that_is_always_best():
    y = torch.tensor([0, 1, 2, 3])
    good = 4.0 * nn.functional.one_hot(y, 4).double()
    weights = linear_weights(relative_logits([good, -good], y), y, 20)
    assert weights[0] > 0.999


def test_linear_weights_of_equal_networks_are_equal():
    y, z = torch.tensor([0, 1, 2]), torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    for logits in ([z, z], [z, z + 3], [z * 0, z * 0]):
        weights = linear_weights(relative_logits(logits, y), y, 20)
        torch.testing.assert_close(weights, torch.full((2,), 0.5), rtol=0, atol=1e-3)


def test_linear_weights_ignore_rows_without_a_label():
    logits, y = hard_logits(1, 3)
    y[10:20] = -100
    expected = linear_weights(relative_logits([z[y >= 0] for z in logits], y[y >= 0]), y[y >= 0], 20)
    logits = [torch.where((y < 0)[:, None], float("nan") * z, z) for z in logits]
    torch.testing.assert_close(linear_weights(relative_logits(logits, y), y, 20), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_masked_class_stays_masked(ensemble):
    """A class that is -inf in all networks takes no part."""
    logits, y = hard_logits(2, 2)
    logits = [torch.cat([z, torch.full_like(z[:, :1], -torch.inf)], 1) for z in logits]
    method = KDCL(peers(), ensemble=ensemble)
    got = method.ensemble_of(logits, y)
    assert (got[:, -1] == -torch.inf).all()
    torch.testing.assert_close(got[:, :-1], method.ensemble_of([z[:, :-1] for z in logits], y))


# --- both ---------------------------------------------------------------------------------------------------------

METHODS = {"dml": DML, "naive": KDCL, "linear": partial(KDCL, ensemble="linear")}
METHODS |= {"minlogit": partial(KDCL, ensemble="minlogit")}
every = pytest.mark.parametrize("make", METHODS.values(), ids=METHODS.keys())


@every
@pytest.mark.parametrize("chunks", [1, 3])
def test_parts_are_the_terms_of_the_loss(make, chunks):
    x, y = batch()
    networks = peers(3)
    (phase,) = make(networks).phases(x, y, chunks=chunks)
    total = sum(loss.detach() for loss in phase.losses)
    assert all(part.dim() == 0 and not part.requires_grad for part in phase.parts.values())
    assert abs(sum(phase.parts.values()) - total) < 1e-10 and len(phase.parts) == 6
    for k, network in enumerate(networks):
        assert abs(phase.parts[f"peers.{k}.ce"] - plain_ce(network(x), y)) < 1e-10
    assert phase.networks == tuple(networks)


@every
def test_ignored_rows_count_nowhere(make):
    x, y = batch(rows=12)
    y[[0, 2, 7, 9]] = -100
    rows, networks = y != -100, peers(3)
    # The search of weights ends where its loss is flat: in weights, and so in gradients, at the root of its rounding.
    exact = 1e-12 if make is not METHODS["linear"] else 1e-8
    for chunks in (1, 2):
        loss = run(make(networks), x.where(rows[:, None], 100.0), y, chunks)
        got = [gradients(network) for network in networks]
        assert abs(run(make(networks), x[rows], y[rows], chunks) - loss) < exact
        assert_gradients(networks, got, exact)
        assert run(make(networks), x, torch.full_like(y, -100), chunks) == 0
        assert not any(grad.any() for network in networks for grad in gradients(network))


@every
def test_token_logits_are_rows(make):
    x, y = batch(rows=12)
    networks = peers()
    flat = run(make(networks), x, y)
    expected = [gradients(network) for network in networks]
    assert abs(run(make(networks), x.reshape(3, 4, -1), y.reshape(3, 4)) - flat) < 1e-12
    assert_gradients(networks, expected, 1e-12)


@every
def test_every_peer_has_its_view(make):
    (x, y), (x2, _) = batch(), batch(seed=1)
    networks = peers()

    class On(nn.Module):  # a network that takes one of two views
        def __init__(self, network, view):
            super().__init__()
            self.network, self.view = copy.deepcopy(network), view

        def forward(self, inputs):
            return self.network(inputs[self.view])

    seen = [On(network, view) for view, network in enumerate(networks)]
    method = make(networks, views=True)
    assert run(method, [x, x2], y) == run(make(seen), (x, x2), y)
    assert_gradients(networks, [gradients(network) for network in seen], 0)
    if method.__class__ is DML or method.ensemble != "linear":
        assert abs(run(method, (x, x2), y, chunks=3) - run(method, (x, x2), y)) < 1e-12
    with pytest.raises(ValueError, match=r"inputs must be a tuple or list of 2 views, .*, got 1 of them$"):
        next(method.phases([x], y))


@every
def test_resumes_to_the_same_bits(make, tmp_path):
    x, y = batch()
    whole = make(peers())
    train(whole, x, y, steps=7)
    first = make(peers())
    optimizer = train(first, x, y, steps=3)
    torch.save({"method": first.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    second = make([mlp(8, hidden=5), mlp(9, hidden=6)])
    optimizer = torch.optim.SGD(second.parameter_groups(0.05), momentum=0.9, weight_decay=0.01)
    second.load_state_dict(saved["method"])
    optimizer.load_state_dict(saved["optimizer"])
    train(second, x, y, steps=4, optimizer=optimizer)
    assert same(whole.state_dict(), second.state_dict()) and second.iterations == 7


@every
def test_all_peers_change_with_their_statistics(make):
    method, (x, y) = make([bn_net(1), bn_net(2)], deploy=1), images()
    before = snapshot(method.peers)
    train(method.train(), x, y, steps=2)
    after = snapshot(method.peers)
    assert not any(torch.equal(after[key], before[key]) for key in before)
    assert method.deployable() is method.peers[1]


@every
def test_compiled_networks_give_the_same(make):
    torch.compiler.reset()
    x, y = batch()
    plain, compiled = make(peers()), make(peers())
    compiled.map_learners(partial(torch.compile, backend="aot_eager"))
    assert abs(run(plain, x, y) - run(compiled, x, y)) < 1e-12
    assert_gradients(compiled.peers, [gradients(network) for network in plain.peers], 1e-12)
    assert compiled.state_dict().keys() == plain.state_dict().keys()


@every
def test_low_precision_autocast_is_close(make):
    x, y = images(rows=32)
    exact, low = (make([bn_net(1).eval(), bn_net(2).eval()]) for _ in range(2))
    loss = run(exact, x, y)
    with torch.autocast("cpu", torch.bfloat16):
        (phase,) = low.phases(x, y)
    phase.loss.backward()
    assert phase.loss.dtype == torch.float32
    assert 0 < abs(phase.loss - loss) < 0.02 * loss
    for network, other in zip(low.peers, exact.peers, strict=True):
        first, second = (torch.cat([g.flatten() for g in gradients(n)]) for n in (network, other))
        assert nn.functional.cosine_similarity(first, second, dim=0) > 0.99


def test_autocast_leaves_the_search_of_the_weights():
    logits, y = hard_logits(3, 3)
    logits = [z.float() for z in logits]
    expected = linear_weights(relative_logits(logits, y), y, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(linear_weights(relative_logits(logits, y), y, 20), expected)


SHARED = mlp(4)
BAD = {
    "one peer": (lambda make: make([mlp(1)]), "peers"),
    "no list": (lambda make: make(mlp(1)), "peers"),
    "no network": (lambda make: make([mlp(1), torch.relu]), r"peers\[1\]"),
    "the same peer": (lambda make: make([SHARED, SHARED]), r"peers\.1"),
    "frozen": (lambda make: make([mlp(1), mlp(2).requires_grad_(False)]), r"peers\.1"),
    "temperature": (lambda make: make(peers(), temperature=0), "temperature"),
    "temperature of text": (lambda make: make(peers(), temperature="2"), "temperature"),
    "deploy": (lambda make: make(peers(), deploy=-1), "deploy"),
    "views": (lambda make: make(peers(), views=None), "views"),
    "classes": (lambda make: next(make([mlp(1), mlp(2, classes=9)]).phases(*batch())), r"peers\[1\]"),
}
BAD_KDCL = {
    "ensemble": (lambda make: make(peers(), ensemble="general"), "ensemble"),
    "lam": (lambda make: make(peers(), lam=-1.0), "lam"),
    "lam nan": (lambda make: make(peers(), lam=float("nan")), "lam"),
    "lams": (lambda make: make(peers(), lam=[1.0] * 3), "lam"),
    "one lam": (lambda make: make(peers(), lam=[1.0, None]), r"lam\[1\]"),
    "steps": (lambda make: make(peers(), linear_steps=1.5), "linear_steps"),
    "no labels": (lambda make: next(make(peers()).phases(batch()[0])), "target"),
    "labels of other rows": (lambda make: next(make(peers()).phases(batch()[0], batch(9)[1])), "target"),
    "soft labels": (lambda make: next(make(peers()).phases(batch()[0], torch.rand(10))), "target"),
}


@pytest.mark.parametrize("make, case", [
    *[(DML, case) for case in BAD], *[(KDCL, case) for case in BAD], *[(KDCL, case) for case in BAD_KDCL],
])  # fmt: skip
def test_wrong_set_up_is_one_sentence(make, case):
    build, argument = (BAD | BAD_KDCL)[case]
    with pytest.raises((ValueError, TypeError), match=rf"^{make.__name__}: {argument} must be .*, got ") as error:
        build(make)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("ensemble", ENSEMBLES)
def test_a_label_out_of_range_is_told(ensemble):
    x, y = batch()
    y[3] = 7
    with pytest.raises(ValueError, match=r"target must be class indices in .*, got index 7"):
        next(KDCL(peers(), ensemble=ensemble).phases(x, y))


@every
def test_digits_are_learnt(make):
    (x, y), (x_test, y_test) = digits()

    def network(seed, hidden):
        return mlp(seed, 64, 10, hidden).float()

    method = make([network(1, 12), network(2, 24)])
    assert_learnt(fit(method, x, y), x_test, y_test, network(1, 12))
    assert_learnt(method.peers[1], x_test, y_test, network(2, 24))
