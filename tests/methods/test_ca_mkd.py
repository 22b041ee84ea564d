"""CA-MKD: typed again in float64 with its gradients, its identity, the heads that it reads through."""

import copy

import pytest
import torch
import torch.nn.functional as torch_functional
from methods_helpers import run
from torch import nn

from fastkd import models
from fastkd.methods import AVER, CAMKD
from fastkd.methods.ca_mkd import resized

CLASSES = 7


def net(name, seed, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return models.create(name, CLASSES, image_size=8, norm="group", **options).double()


def batch(rows=6):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def networks():
    """A student of 2x2 maps, teachers of 2x2 and 4x4 ones."""
    return net("plain2", 0, width=0.25), [net("resnet8", 1, width=0.25), net("plain4", 2, width=0.125)]


def plain_loss(method, x, y, weight, lam, temperature):
    """All of it, with the terms of each image and teacher in loops."""
    rows = (y != -100).nonzero()[:, 0].tolist()
    own = method.student.forward_features(x)
    total, count = torch_functional.cross_entropy(own.logits, y), len(method.teachers)
    guides = [teacher.forward_features(x) for teacher in method.teachers]
    made = []
    for k, guide in enumerate(guides):
        size, convolution = guide.maps[-1].shape[-2:], method.transforms.each[k][0]
        like = torch_functional.interpolate(own.maps[-1], size=size, mode="bilinear", align_corners=False)
        made.append(torch_functional.conv2d(like, convolution.weight, convolution.bias).relu())
    heads = [method.teachers[0].fc(made[0].mean((2, 3))), method.teachers[1].fc(made[1].flatten(1))]
    for b in rows:
        ce = torch.stack([-guide.logits[b].log_softmax(0)[y[b]] for guide in guides])
        read = torch.stack([-head[b].log_softmax(0)[y[b]] for head in heads])
        w, v = ((1 - each.softmax(0)) / (count - 1) for each in (ce, read))
        for k, guide in enumerate(guides):
            p, q = ((z[b] / temperature).log_softmax(0) for z in (guide.logits, own.logits))
            kd = temperature**2 * (p.exp() * (p - q)).sum()
            error = (made[k][b] - guide.maps[-1][b]).square().mean()
            total = total + (lam * w[k] * kd + weight * v[k] * error) / count / len(rows)
    return total


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_loss_and_gradients_are_the_formula(masked, chunks):
    x, y = batch()
    y[[0, 3]] = -100 if masked else y[[0, 3]]
    method = CAMKD(*networks(), feature_weight=7.0, temperature=3.0, lam=0.6, batch_norm=False)
    twin = copy.deepcopy(method)
    loss = run(method, x, y, chunks)
    expected = plain_loss(twin, x, y, 7.0, 0.6, 3.0)
    expected.backward()
    assert abs(loss - expected.item()) < 1e-10
    for name in ("student", "transforms"):
        pairs = zip(method.get_submodule(name).parameters(), twin.get_submodule(name).parameters(), strict=True)
        for mine, other in pairs:
            torch.testing.assert_close(mine.grad, other.grad, rtol=0, atol=1e-9)
    assert all(p.grad is None for p in method.teachers.parameters())


def test_without_its_maps_it_is_aver_with_confidence():
    x, y = batch()
    y[2] = -100
    one, other = CAMKD(*networks(), feature_weight=0.0), AVER(*networks(), weights="confidence")
    assert run(one, x, y) == run(other, x, y) and one.teaches_logits
    for mine, its in zip(one.student.parameters(), other.student.parameters(), strict=True):
        assert torch.equal(mine.grad, its.grad)
    assert not hasattr(one, "transforms") and one.deployable() is one.student


def test_defaults_are_the_papers():
    student, teachers = networks()
    method = CAMKD(student, teachers)
    assert (method.feature_weight, method.temperature, method.lam) == (50.0, 4.0, 1.0)
    assert [type(layer) for layer in method.transforms.each[0]] == [nn.Conv2d, nn.BatchNorm2d, nn.ReLU]
    assert [each[0].kernel_size for each in method.transforms.each] == [(1, 1)] * 2
    again = CAMKD(*networks())
    assert all(map(torch.equal, method.transforms.state_dict().values(), again.transforms.state_dict().values()))


def test_sizes():
    x = torch.arange(16.0).view(1, 1, 4, 4)
    assert resized(x, x) is x
    assert resized(x, torch.zeros(1, 5, 2, 2)).tolist() == [[[[2.5, 4.5], [10.5, 12.5]]]]
    assert resized(x[..., :1, :1] + 3, torch.zeros(1, 2, 2, 2)).tolist() == [[[[3.0, 3.0], [3.0, 3.0]]]]


@pytest.mark.parametrize("name", ["plain4", "plain8", "resnet8", "wrn10_1", "vgg8", "resnet18", "densenet40_12"])
def test_a_head_reads_what_the_network_says(name):
    network = models.create(name, CLASSES, image_size=8).eval()
    with torch.no_grad():
        whole = network.forward_features(torch.randn(2, 3, 8, 8))
        features, logits = network.forward_head(whole.maps[-1])
    assert torch.equal(features, whole.features) and torch.equal(logits, whole.logits)


def test_wrong_set_ups():
    student, teachers = networks()
    with pytest.raises(ValueError, match=r"^CAMKD: teachers must be at least two networks, got one$"):
        CAMKD(student, teachers[:1])
    shuffle = models.create("shufflenet_v2_x0_5", CLASSES, image_size=32)
    with pytest.raises(ValueError, match=r"^CAMKD: teachers\[1\] must be a network with forward_head, .*ShuffleNetV2$"):
        CAMKD(student, [teachers[0], shuffle])
    with pytest.raises(ValueError, match=r"^CAMKD: target must be class indices \[B\], got None$"):
        run(CAMKD(student, teachers), batch()[0], None)
