"""The reconstruction error of a network's last feature map."""

import copy
import math

import pytest
import torch
import torch.nn.functional as torch_functional
from feed_helpers import Net, batch, bn_net, images, step
from methods_helpers import mlp, same, snapshot, train
from torch import nn

from fastkd.methods.reconstruction import Reconstruction


def plain_autoencoder(layers, x):
    """Three convolutions and three transposed ones, typed again."""
    kinds = [type(layer) for layer in layers]
    assert kinds == [nn.Conv2d, nn.LeakyReLU] * 3 + [nn.ConvTranspose2d, nn.LeakyReLU] * 3
    for layer in layers[::2]:
        run = torch_functional.conv2d if isinstance(layer, nn.Conv2d) else torch_functional.conv_transpose2d
        x = run(x, layer.weight, layer.bias, padding=1)
        x = torch.where(x > 0, x, 0.1 * x)
    return x


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("labels", [False, True])
def test_loss_and_gradients_are_the_formula(labels, chunks):
    x, y = batch()
    y[[0, 4]] = -100
    method = Reconstruction(Net(1))
    twin, target = copy.deepcopy(method), Net(1)(x).maps[-1].detach()
    loss, grads = step(method, x, y if labels else None, chunks)
    rows = (plain_autoencoder(twin.autoencoder, target) - target).abs().mean((1, 2, 3))
    value = rows[y != -100].mean() if labels else rows.mean()
    expected = torch.autograd.grad(value, list(twin.autoencoder.parameters()))
    assert abs(loss - value) < 1e-12
    for grad, other in zip(grads.values(), expected, strict=True):
        torch.testing.assert_close(grad, other, rtol=0, atol=1e-12)
    error = method.error(x)
    torch.testing.assert_close(error.absolute, rows.detach())
    torch.testing.assert_close(error.relative, rows.detach() / target.abs().mean((1, 2, 3)))


def test_the_published_widths():
    method = Reconstruction(Net(1, channels=64))
    widths = [(layer.in_channels, layer.out_channels) for layer in method.autoencoder[::2]]
    assert widths == [(64, 64), (64, 32), (32, 32), (32, 32), (32, 64), (64, 64)]
    assert method.autoencoder(torch.zeros(2, 64, 5, 7, dtype=torch.float64)).shape == (2, 64, 5, 7)


def test_the_error_falls_and_the_network_stays():
    x, y = images(rows=16)
    network = bn_net(1)
    before, method = snapshot(network), Reconstruction(network).train()
    first = method.error(x)
    state = snapshot(method)
    assert first.absolute.shape == first.relative.shape == (16,) and not first.absolute.requires_grad
    train(method, x, None, steps=60, optimizer=torch.optim.SGD(method.parameter_groups(0.1), momentum=0.9))
    assert method.error(x).relative.mean() < 0.8 * first.relative.mean()
    assert same(snapshot(network), before) and not network.training
    assert not same(snapshot(method), state) and method.deployable() is method.autoencoder
    assert math.isclose(step(method, x, y)[0], method.error(x).absolute.mean(), rel_tol=1e-6)


def test_wrong_set_ups():
    maps = r"a network that gives its feature maps \(fastkd.models.with_features"
    with pytest.raises(ValueError, match=f"^Reconstruction: network must be {maps}.*, got one without a Conv2d"):
        Reconstruction(mlp(1))
    with pytest.raises(ValueError, match=r"^Reconstruction: channels must be an integer of at least 1, got 0$"):
        Reconstruction(Net(1), channels=0)
    with pytest.raises(ValueError, match=r"^Reconstruction: channels must be that of the last feature map, 4, got 5$"):
        next(Reconstruction(Net(1), channels=5).phases(batch()[0]))
