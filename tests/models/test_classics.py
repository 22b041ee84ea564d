"""AlexNet, SqueezeNet, ShuffleNetV1: sizes from their papers' tables, how much they shrink an image, the shuffle."""

import pytest
import torch

from fastkd import models
from fastkd.models.classics import ShuffleUnit, shuffled

pytestmark = pytest.mark.usefixtures("one_thread")


def conv(inputs, outputs, kernel, groups=1):
    """Parameters of a convolution with its normalisation."""
    return inputs // groups * outputs * kernel**2 + 2 * outputs


def fire(inputs, squeeze, expand):
    return conv(inputs, squeeze, 1) + conv(squeeze, expand, 1) + conv(squeeze, expand, 3)


def unit(inputs, outputs, stride):
    inner, own = outputs // 4, outputs - inputs if stride == 2 else outputs
    first = conv(inputs, inner, 1, 1 if inputs == 24 else 3)
    return first + conv(inner, inner, 3, inner) + conv(inner, own, 1, 3)


FIRES = ((64, 16, 64), (128, 16, 64), (128, 32, 128), (256, 32, 128))
FIRES += ((256, 48, 192), (384, 48, 192), (384, 64, 256), (512, 64, 256))
UNITS = [(24, 240, 2), *[(240, 240, 1)] * 3, (240, 480, 2), *[(480, 480, 1)] * 7, (480, 960, 2), *[(960, 960, 1)] * 3]
ALEX = ((3, 64, 3), (64, 192, 5), (192, 384, 3), (384, 256, 3), (256, 256, 3))
COUNTS = {
    "alexnet": sum(conv(*each) for each in ALEX) + 256 * 10 + 10,
    "squeezenet": conv(3, 64, 3) + sum(fire(*each) for each in FIRES) + 512 * 10 + 10,
    "shufflenet_v1": conv(3, 24, 3) + sum(unit(*each) for each in UNITS) + 960 * 10 + 10,
}
SIDES = {  # of the maps, by the image's side
    "alexnet": {8: (8, 4, 4), 32: (32, 16, 8), 224: (56, 28, 14)},
    "squeezenet": {8: (8, 4, 4, 4), 32: (32, 16, 8, 4), 224: (112, 56, 28, 14)},
    "shufflenet_v1": {8: (8, 4, 2, 1), 32: (32, 16, 8, 4), 224: (56, 28, 14, 7)},
}


@pytest.mark.parametrize("name", COUNTS)
def test_parameters_are_those_of_the_table(name):
    assert models.parameters_count(models.create(name, 10)) == COUNTS[name]


@pytest.mark.parametrize("name", SIDES)
def test_maps_keep_what_a_small_image_has(name):
    for image, sides in SIDES[name].items():
        network = models.create(name, 10, image_size=image).eval()
        with torch.no_grad():
            maps = network.forward_features(torch.zeros(1, 3, image, image)).maps
        assert [each.shape[-1] for each in maps] == list(sides)


def test_a_shuffle_spreads_each_group_over_all():
    x = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffled(x, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
    assert torch.equal(shuffled(shuffled(x, 3), 2), x)


def test_the_shortcut_of_a_unit_of_stride_two_is_pooled_beside_it():
    block = ShuffleUnit(24, 48, 3, 2, torch.nn.BatchNorm2d, first=True).eval()
    x = torch.rand(1, 24, 4, 4)
    with torch.no_grad():
        y = block(x)
    assert y.shape == (1, 48, 2, 2)
    torch.testing.assert_close(y[:, :24], torch.nn.functional.avg_pool2d(x, 3, 2, 1))


def test_they_are_cut_into_peers():
    assert len(models.branched("squeezenet", 10, branches=2, image_size=8, width=0.25).peers) == 2
