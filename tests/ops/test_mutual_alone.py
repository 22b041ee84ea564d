"""mutual_kd network by network: `losses[m]` has a graph of its own, and gradients belong to who gets them."""

import copy
import gc
import io
import weakref

import pytest
import torch
from conftest import PLACES
from mutual_helpers import make

import fastkd

F = fastkd.functional
BACKENDS = ["native", "reference"]


def networks_and_data(device="cpu"):
    torch.manual_seed(0)
    networks = [torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.ReLU(), torch.nn.Linear(8, 6)) for _ in range(3)]
    return [n.to(device) for n in networks], torch.randn(7, 5, device=device), torch.randint(0, 6, (7,), device=device)


def detached_losses(logits, target):
    """The loop that people write: each loss with the other networks detached."""
    for m, z in enumerate(logits):
        peers = [p.detach() for k, p in enumerate(logits) if k != m]
        yield F.multi_teacher_kd(z, peers, target, temperature=2.0, ce_weight=1.0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("place", PLACES)
def test_three_networks_with_an_optimizer_each(place, backend, at):
    networks, inputs, target = networks_and_data(at(place))
    loop = copy.deepcopy(networks)
    optimizers = [[torch.optim.SGD(n.parameters(), 0.1, momentum=0.9) for n in group] for group in (networks, loop)]
    for _ in range(3):
        with fastkd.use_backend(backend):
            losses = F.mutual_kd([n(inputs) for n in networks], target, temperature=2.0, ce_weight=1.0)
        expected = list(detached_losses([n(inputs) for n in loop], target))
        for group in optimizers:
            for optimizer in group:
                optimizer.zero_grad(set_to_none=True)
        for m in range(3):
            losses[m].backward()
            assert all((p.grad is None) == (k > m) for k, n in enumerate(networks) for p in n.parameters())
            expected[m].backward()
            for group in optimizers:
                group[m].step()
    for a, b in zip(networks, loop, strict=True):
        torch.testing.assert_close(list(a.parameters()), list(b.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_every_way_to_one_loss(reduction, backend):
    logits, _, target = make(3, 4, 6)
    with fastkd.use_backend(backend):
        losses = F.mutual_kd(logits, target, ce_weight=0.5, reduction=reduction)
    whole = torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    for m, (a, b, c) in enumerate(zip(losses, losses.unbind(), [losses[k - 3] for k in range(3)], strict=True)):
        for loss in (a, b, c, losses[m] + losses[m]):
            grads = torch.autograd.grad(loss.sum(), logits, allow_unused=True, retain_graph=True)
            assert [g is None for g in grads] == [k != m for k in range(3)]
        torch.testing.assert_close(grads[m], 2 * whole[m])
        assert torch.equal(a.detach(), losses.detach()[m])
    both = torch.autograd.grad((losses[0] * 2).sum() + losses.sum(), logits)
    torch.testing.assert_close(both, (3 * whole[0], *whole[1:]))


def test_what_is_not_a_loss_alone():
    logits, _, target = make(3, 4, 6)
    losses = F.mutual_kd([logits[0], logits[1].detach(), logits[2]], target)
    assert not losses[1].requires_grad and losses[0].requires_grad
    assert type(losses.sum()) is type(losses * 2) is type(losses[:2]) is type(losses.detach()) is torch.Tensor
    with pytest.raises(IndexError):
        losses[3]
    losses = F.mutual_kd(logits, target)
    expected = 2 * losses.detach()
    losses.mul_(2)  # a part of what it is now
    assert torch.equal(losses[0].detach(), expected[0])
    (grad,) = torch.autograd.grad(losses[0], logits[0])
    torch.testing.assert_close(grad, 2 * torch.autograd.grad(F.mutual_kd(logits, target)[0], logits[0])[0])
    assert type(F.mutual_kd([z.detach() for z in logits], target)) is torch.Tensor
    stream = io.BytesIO()
    torch.save(losses, stream)
    stream.seek(0)
    assert torch.equal(torch.load(stream, weights_only=True), losses.detach())


def test_a_stack_network_by_network():
    logits, _, target = make(3, 4, 6)
    stacked = torch.stack([z.detach() for z in logits]).requires_grad_()
    losses = F.mutual_kd(stacked, target, ce_weight=1.0)
    for m in range(3):
        losses[m].backward()
    expected = torch.autograd.grad(F.mutual_kd(logits, target, ce_weight=1.0).sum(), logits)
    torch.testing.assert_close(stacked.grad, torch.stack(expected))


def test_a_network_that_was_changed_in_the_graph_is_a_part_of_all():
    """Its loss alone would go through what the network has become."""
    logits, _, target = make(2, 4, 6)
    moved = [z * 1.0 for z in logits]
    losses = F.mutual_kd(moved, target)
    expected = torch.autograd.grad(F.mutual_kd(logits, target)[0], logits[0])[0]
    moved[0].mul_(3)
    torch.testing.assert_close(torch.autograd.grad(losses[0], logits[0])[0], expected)


@pytest.mark.parametrize("create_graph", [False, True])
def test_a_freed_graph_says_so(create_graph):
    logits, _, target = make(2, 4, 6)
    losses = F.mutual_kd(logits, target)
    losses[0].backward(create_graph=create_graph)
    losses[1].backward()
    loss = F.mutual_kd(logits, target)
    first = loss[0]
    first.backward()
    with pytest.raises(RuntimeError, match="second time"):
        first.backward()
    loss = F.mutual_kd(logits, target)
    loss.sum().backward()
    for again in (loss[0], loss.sum()):
        with pytest.raises(RuntimeError, match="second time"):
            again.backward()


def test_the_stored_gradients_go_with_the_graph():
    logits, _, target = make(3, 4, 6)
    losses = F.mutual_kd(logits, target)
    for m in range(3):
        torch.autograd.grad(losses[m], logits[m])
    assert losses.grad_fn.state.rows is None
    losses = F.mutual_kd(logits, target)
    torch.autograd.grad(losses.sum(), logits, retain_graph=True)
    assert losses.grad_fn.state.rows is not None
    torch.autograd.grad(losses.sum(), logits)
    assert losses.grad_fn.state.rows is None


@pytest.mark.parametrize("stacked", [False, True])
def test_a_gradient_belongs_to_who_gets_it(stacked):
    logits, _, target = make(2, 4, 6)
    given = [torch.stack([z.detach() for z in logits]).requires_grad_()] if stacked else logits
    loss = F.mutual_kd(given[0] if stacked else given, target, ce_weight=1.0)
    expected = [g.clone() for g in torch.autograd.grad(loss.sum(), given, retain_graph=True)]
    handles = [z.register_hook(lambda g: g.mul_(2)) for z in given]
    for _ in range(2):  # scaling in place, with the graph kept
        grads = torch.autograd.grad(loss.sum(), given, retain_graph=True)
        torch.testing.assert_close(grads, [2 * e for e in expected] if not stacked else (2 * expected[0],))
    for handle in handles:
        handle.remove()
    one, two = (torch.autograd.grad(loss.sum(), given, retain_graph=True) for _ in range(2))
    assert all(a.data_ptr() != b.data_ptr() for a, b in zip(one, two, strict=True))
    torch.testing.assert_close(list(torch.autograd.grad(loss.sum(), given)), expected)


def test_under_compile_the_losses_are_one_tensor():
    logits, _, target = make(2, 4, 6)
    torch._dynamo.reset()
    losses = torch.compile(lambda zs, y: F.mutual_kd(zs, y), backend="aot_eager", fullgraph=True)(logits, target)
    assert type(losses) is torch.Tensor
    losses.sum().backward()

    @torch.compile(backend="eager")
    def total(losses):
        return losses.sum() * 2

    torch.testing.assert_close(total(F.mutual_kd(logits, target)), 2 * losses.sum())


def test_losses_that_are_dropped_free_their_networks_at_once():
    """Without a collector: an evaluation under enabled gradients would keep the logits of many batches."""
    networks = [torch.randn(4, 5, requires_grad=True) * 1 for _ in range(3)]
    alive = [weakref.ref(z) for z in networks]
    gc.disable()
    try:
        losses = F.mutual_kd(networks)
        assert losses[0].requires_grad
        del losses, networks
        assert [z() for z in alive] == [None] * 3
    finally:
        gc.enable()
