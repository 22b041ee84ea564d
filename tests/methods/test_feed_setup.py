"""What FEED and FT are made of: channels read off the networks, initialisation of the transforms, wrong set-ups."""

import pytest
import torch
import torch.nn.functional as torch_functional
from feed_helpers import Net, batch, bn_net, images, step
from methods_helpers import CLASSES, mlp, same, snapshot
from torch import nn

from fastkd.methods import FEED, FT
from fastkd.models import create, with_features


@pytest.mark.parametrize("wrap", [lambda n: n, with_features], ids=["network", "with_features"])
def test_making_the_method_changes_no_network(wrap):
    """Channels are read off a forward pass: modes, buffers and the global generator stay."""
    networks = [wrap(bn_net(seed)) for seed in (1, 2)]
    for network in networks:
        network.train()
        next(m for m in network.modules() if isinstance(m, nn.BatchNorm2d)).eval()
    modes, states = [[m.training for m in n.modules()] for n in networks], [snapshot(n) for n in networks]
    random = torch.get_rng_state()
    method = FEED(networks[0], networks[1:])
    assert torch.equal(torch.get_rng_state(), random)
    assert [m.training for m in networks[0].modules()] == modes[0] and not all(modes[0])
    assert not any(m.training for m in networks[1].modules())  # it is a teacher now
    assert all(same(snapshot(n), state) for n, state in zip(networks, states, strict=True))
    assert all(p.grad is None for p in method.parameters())


class Dropping(nn.Module):
    """Its dropout is a function, which a traced graph has with the mode of the tracing."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(108, CLASSES)

    def forward(self, x):
        x = self.bn(self.conv(x))
        return self.fc(torch_functional.dropout(x, 0.5, self.training).flatten(1))


def test_a_traced_network_trains_its_training_graph():
    """with_features has a graph per mode: after the look in eval mode it must be the one of train mode again."""
    network, x = Dropping(), images()[0]
    method = FEED(with_features(network, ["bn"]), [bn_net(2)], example=x)
    before, student = network.bn.running_mean.clone(), method.learner("student")
    assert not torch.equal(student(x).logits, student(x).logits)
    assert not torch.equal(network.bn.running_mean, before)
    method.eval()
    assert torch.equal(student(x).logits, student(x).logits)


def test_transforms_follow_the_seed_and_the_student():
    def transforms(seed, student):
        teachers = [Net(2), Net(3)]
        with torch.device("meta"):  # a default device without numbers
            return FEED(student, teachers, seed=seed, channels=(4, [4, 4])).transforms

    first = transforms(1, Net(1))
    torch.manual_seed(99)
    assert same(snapshot(first), snapshot(transforms(1, Net(5))))
    assert not same(snapshot(first), snapshot(transforms(2, Net(1))))
    assert not torch.equal(first.transforms[0][0].weight, first.transforms[1][0].weight)
    assert {p.dtype for p in first.parameters()} == {torch.float64}
    assert {p.dtype for p in transforms(1, bn_net(1)).parameters()} == {torch.float32}
    assert all(p.is_meta for p in transforms(1, bn_net(1).to("meta")).parameters())


def test_channels_come_from_the_networks():
    torch.manual_seed(0)
    student = create("wrn16_1", CLASSES, image_size=8, channels=1)
    teachers = [
        bn_net(1, "resnet8", 0.5),
        bn_net(2, "vgg8", 0.125),
        with_features(bn_net(3, "plain4", 0.5), ["stages.0"]),
    ]
    method = FEED(student, teachers)
    assert (method.transforms.in_channels, method.transforms.out_channels) == (64, (32, 64, 16))
    assert step(method, *images())[0].isfinite()


def test_channels_may_be_given():
    """Then no network runs before the first batch."""
    student, teachers = Net(1), [Net(2), Net(3, 6)]
    method = FEED(student, teachers, channels=(4, [4, 6]))
    assert [n.calls for n in (student, *teachers)] == [0, 0, 0]
    assert same(snapshot(method), snapshot(FEED(Net(1), [Net(2), Net(3, 6)])))
    method = FT(Net(1), Net(2), channels=(5, [4]))
    sentence = r"^FT: channels must be those of the last feature maps, \(4, \[4\]\), got \(5, \[4\]\)$"
    with pytest.raises(ValueError, match=sentence):
        next(method.phases(*batch()))


def plain_net(size=6):
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(2 * (size - 2) ** 2, CLASSES)).double()


SHARED = Net(1)


class Headless(Net):
    def forward(self, x):
        return super().forward(x)._replace(maps=None)


MAPS = r"a network that gives its feature maps \(fastkd.models.with_features"
SMALL = torch.zeros(1, 1, 6, 6, dtype=torch.float64)
BAD = {
    "no maps": (lambda: FEED(Net(1), [plain_net(32)]), rf"teachers\[0\] must be {MAPS}.*got Tensor"),
    "no maps, its size": (lambda: FEED(plain_net(), [Net(2)], example=SMALL), f"student must be {MAPS}.*got Tensor"),
    "another size": (lambda: FEED(plain_net(), [Net(2)]), f"student must be {MAPS}.*example.*RuntimeError for"),
    "no convolution": (lambda: FEED(mlp(1), [Net(2)]), f"student must be {MAPS}.*got one without a Conv2d"),
    "maps None": (lambda: FT(Net(1), Headless(2)), rf"teachers\[0\] must be {MAPS}.*got Outputs whose maps are None"),
    "wrong example": (lambda: FEED(Net(1), [Net(2)], example="image"), f"student must be {MAPS}.*for the example"),
    "mode": (lambda: FEED(Net(1), [Net(2)], mode="chain"), "mode must be one of 'parallel', 'sequential', got 'chain'"),
    "a chain of two": (
        lambda: FEED(Net(1), [Net(2), Net(3)], mode="sequential"),
        "teachers must be exactly one network, the previous one of the chain, where mode is 'sequential', got 2",
    ),
    "teacher outside a list": (lambda: FEED(Net(1), Net(2)), "teachers must be a sequence .* put it in a list"),
    "no teacher": (lambda: FEED(Net(1), []), "teachers must be a sequence of at least one network"),
    "teachers of FT": (lambda: FT(Net(1), [Net(2)]), "teacher must be a network .*got list"),
    "no network": (lambda: FEED("resnet20", [Net(2)]), "student must be a network"),
    "student as teacher": (lambda: FT(SHARED, SHARED), r"teachers\.0 must be a network of its own"),
    "beta": (lambda: FT(Net(1), Net(2), beta=-1), "beta must be a number >= 0, got -1"),
    "beta tensor": (lambda: FT(Net(1), Net(2), beta=torch.tensor(1.0)), "beta must be a number >= 0, got Tensor"),
    "reduction": (lambda: FT(Net(1), Net(2), reduction="none"), "reduction must be one of 'mean', 'sum', got 'none'"),
    "p": (lambda: FT(Net(1), Net(2), p=3), "p must be 1 or 2, got 3"),
    "norm": (lambda: FT(Net(1), Net(2), norm="batch"), "norm must be one of 'sample', .*, got 'batch'"),
    "layers": (lambda: FT(Net(1), Net(2), layers=0), "layers must be an integer of at least 1, got 0"),
    "slope": (lambda: FT(Net(1), Net(2), negative_slope=2), r"negative_slope must be a number in \[0, 1\], got 2"),
    "batch_norm": (lambda: FT(Net(1), Net(2), batch_norm=nn.BatchNorm2d), "batch_norm must be True or False, got type"),
    "seed": (lambda: FT(Net(1), Net(2), seed=0.5), "seed must be an integer, got float"),
    "channels": (lambda: FT(Net(1), Net(2), channels=4), r"channels must be \(channels of the student's map, .* got 4"),
    "of one": (lambda: FEED(Net(1), [Net(2), Net(3)], channels=(4, [4])), r"channels must be .*, got \(4, \[4\]\)"),
    "zero": (lambda: FT(Net(1), Net(2), channels=(4, [0])), r"channels\[1\]\[0\] must be an integer of at least 1"),
}


@pytest.mark.parametrize("case", BAD)
def test_wrong_set_up_is_one_sentence(case):
    make, sentence = BAD[case]
    with pytest.raises((ValueError, TypeError), match=f"^(FEED|FT): {sentence}") as error:
        make()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("target, got", [(None, "NoneType"), (torch.zeros(6, 2, dtype=torch.int64), r"shape \[6, 2\]")])
def test_labels_are_needed(target, got):
    with pytest.raises(
        (ValueError, TypeError), match=rf"^FEED: target must be class indices of shape \[B\], or .*, got {got}$"
    ):
        next(FEED(Net(1), [Net(2)]).phases(batch()[0], target))


def test_maps_that_are_missing_are_found_at_the_first_batch():
    method = FEED(plain_net(12), [Net(2)], channels=(2, [4]))
    with pytest.raises(TypeError, match=f"^FEED: student must be {MAPS}.*, got Tensor instead of Outputs$"):
        next(method.phases(*batch()))
