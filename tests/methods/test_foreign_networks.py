"""Networks of other libraries: dicts go in, objects come out, features have other names, bases are shared."""

import copy
from collections import OrderedDict, namedtuple
from types import SimpleNamespace

import pytest
import torch
from group_helpers import group_of_one
from methods_helpers import batch, bn_net, images, mlp, run, same, snapshot, train
from test_all_methods import CASES, iterate, net, optimizer_of
from test_all_methods import batch as image_batch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastkd import methods
from fastkd.methods import CE, DGKD, KD, RKD
from fastkd.models import Outputs


class ModelOutput(OrderedDict):
    """A dict whose values are attributes, too, as Hugging Face's networks return."""

    def __getattr__(self, name):
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None


class Named(nn.Module):
    """A network that takes its inputs by name and returns an object, with features where the inner one has them."""

    def __init__(self, network, returned=ModelOutput):
        super().__init__()
        self.network, self.returned = network, returned
        self.image_size = 8

    def forward_features(self, pixel_values, mask=None):
        assert mask is None or mask.dtype == torch.bool
        return self.network.forward_features(pixel_values)

    def forward(self, pixel_values, mask=None):
        assert mask is None or mask.dtype == torch.bool
        return self.returned(logits=self.network(pixel_values))


# CAMKD reads maps through its teachers' classifiers, which a wrapper does not have.
@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize(
    "case", [case for case in CASES if CASES[case].learner is net and not CASES[case].views and case != "CAMKD"]
)
def test_a_dict_goes_in_as_keywords(case, chunks):
    make = CASES[case].make
    plain = make(lambda i: net(i, norm="group"), lambda i: net(100 + i, norm="group"))
    named = make(lambda i: Named(net(i, norm="group")), lambda i: Named(net(100 + i, norm="group"), dict))
    inputs, target = image_batch(case)
    values = {"mask": torch.ones(len(target), dtype=torch.bool), "pixel_values": inputs}
    expected = iterate(plain, optimizer_of(plain), inputs, target, chunks)
    assert iterate(named, optimizer_of(named), values, target, chunks) == expected
    assert all(map(torch.equal, named.parameters(), plain.parameters()))


class Wrong(nn.Module):
    """Returns what no method can use."""

    def __init__(self, output):
        super().__init__()
        self.weight, self.output = nn.Parameter(torch.ones(())), output

    def forward(self, inputs):
        return self.output


Z = torch.zeros(10, 7)
OUTPUTS = {
    "a tuple": ((Z, Z), "got tuple"),
    "another dict": ({"out": Z}, "got a dict of out"),
    "None": (None, "got NoneType"),
    "labels": (Z.argmax(1), "got dtype torch.int64"),
    "an object": (SimpleNamespace(scores=Z), "got SimpleNamespace"),
}
USES = {
    "student of KD": ("KD: student", lambda n: KD(n, mlp(1))),
    "student of CE": ("CE: student", CE),
    "teacher of KD": ("KD: teacher", lambda n: KD(mlp(1), n)),
    "teacher of BAN": ("BAN: teacher", lambda n: methods.BAN(mlp(1), n)),
    "guide": (r"DGKD: guides\[1\]", lambda n: DGKD(mlp(1), [mlp(2), n])),
    "teacher of AVER": (r"AVER: teachers\[1\]", lambda n: methods.AVER(mlp(1), [mlp(2), n])),
    "guide of TAKD": (r"TAKD: guides\[-1\]", lambda n: methods.TAKD(mlp(1), [mlp(2), n])),
    "peer of DML": (r"DML: peers\[1\]", lambda n: methods.DML([mlp(1), n])),
    "peer of KDCL": (r"KDCL: peers\[1\]", lambda n: methods.KDCL([mlp(1), n])),
    "self-teacher": (
        r"CTSLMKT: self_teachers\[1\]",
        lambda n: methods.CTSLMKT([mlp(1), mlp(2)], [mlp(3), n], mutual_relation=False),
    ),
    "pivot": ("ORC: pivot", lambda n: methods.ORC(n, [mlp(1), mlp(2)])),
    "student of ORC": (r"ORC: students\[1\]", lambda n: methods.ORC(mlp(1), [mlp(2), n])),
    "student of RKD": ("RKD: student", lambda n: RKD(n, mlp(1), distance=0, angle=0)),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("output", OUTPUTS)
def test_an_error_names_the_network_whose_output_was_wrong(use, output):
    who, make = USES[use]
    returned, got = OUTPUTS[output]
    with pytest.raises(TypeError, match=rf"^{who} must be a network that returns logits .*, {got}$"):
        next(make(Wrong(returned)).phases(*batch()))


def test_a_shape_that_differs_is_told_of_the_argument_too():
    for who, make in list(USES.items())[2:7]:
        with pytest.raises(ValueError, match=f"^{make[0]} must be .* got logits of shape"):
            next(make[1](mlp(9, classes=4)).phases(*batch()))
        assert who


class OwnFeatures(nn.Module):
    """As in timm: `forward_features` gives a map, `forward` is its own; here it gives Outputs as well."""

    def __init__(self, seed):
        super().__init__()
        self.network, self.calls = bn_net(seed), 0

    def forward_features(self, x):
        self.calls += 1
        return self.network[:3](x)

    def forward(self, x):
        features = self.forward_features(x)
        return Outputs(self.network[3:](features), features.flatten(1), (features,))


@pytest.mark.parametrize("wrapped", [False, True])
def test_forward_features_that_give_a_tensor_are_the_networks_own(wrapped, tmp_path):
    """The pass that shows it leaves no statistics behind."""
    x, y = images()
    method, plain = RKD(OwnFeatures(1), OwnFeatures(2)), OwnFeatures(1)
    if wrapped:
        with group_of_one(tmp_path):
            method.map_learners(DistributedDataParallel)
            losses = [run(method, x, y) for _ in range(2)]
    else:
        losses = [run(method, x, y) for _ in range(2)]
    assert all(loss.isfinite() for loss in losses)
    plain.train()
    for _ in range(2):
        plain(x)
    assert torch.equal(method.student.network[1].running_mean, plain.network[1].running_mean)
    assert method.student.network[1].num_batches_tracked == 2 and method.student.calls == 3


Heads = namedtuple("Heads", ["logits", "aux_logits"])


class Auxiliary(nn.Module):
    """A network that trains a second classifier beside its own, as GoogLeNet."""

    aux_logits = True

    def __init__(self, seed):
        super().__init__()
        self.network, self.auxiliary = mlp(seed), mlp(seed + 50)

    def forward(self, x):
        return Heads(self.network(x), self.auxiliary(x)) if self.training else self.network(x)


def test_auxiliary_heads_in_data_parallel(tmp_path):
    x, y = batch()
    plain, parallel = KD(Auxiliary(1), mlp(3)), KD(Auxiliary(1), mlp(3))
    assert parallel.leaves_unused
    train(plain, x, y, steps=3)
    with group_of_one(tmp_path):
        parallel.map_learners(lambda n: DistributedDataParallel(n, find_unused_parameters=parallel.leaves_unused))
        train(parallel, x, y, steps=3)
        assert all(p.grad is None for p in parallel.student.auxiliary.parameters())
    assert same(snapshot(parallel), snapshot(plain))
    assert not KD(mlp(1), mlp(2)).leaves_unused


class Adapted(nn.Module):
    """A frozen base with a small part that learns (LoRA)."""

    def __init__(self, base, seed):
        super().__init__()
        self.base, self.adapter = base.requires_grad_(False), mlp(seed)

    def forward(self, x):
        return self.base(x) + self.adapter(x)


def test_a_frozen_base_may_be_shared():
    x, y = batch()
    base = mlp(1)
    shared, apart = KD(Adapted(base, 2), base), KD(Adapted(copy.deepcopy(base), 2), copy.deepcopy(base))
    before = snapshot(base)
    train(shared, x, y, steps=3)
    train(apart, x, y, steps=3)
    assert same(snapshot(shared), snapshot(apart)) and same(snapshot(base), before)
    assert not any(m.training for m in shared.student.base.modules()) and shared.student.adapter.training
    methods.DML([Adapted(base, 2), Adapted(base, 3)])
    teacher = Adapted(base, 4)
    KD(Adapted(base, 2), teacher)
    student = Adapted(base, 5)
    for other in (student, nn.Sequential(base, student.adapter)):
        with pytest.raises(ValueError, match=r"^KD: guides.* must be .* shares parameters with student: .*be shared"):
            KD(student, other)
    assert all(p.requires_grad for p in student.adapter.parameters())  # nothing was frozen


def test_no_statistics_move_in_a_teacher_of_which_a_part_was_put_into_train_mode():
    x, y = images()
    method = KD(bn_net(1), bn_net(2))
    before = snapshot(method.guides[0])
    expected = run(method, x, y)
    method.guides[0][1].train()
    method.guides[0][3].train()  # dropout
    torch.manual_seed(0)
    method.student.eval()
    first = run(method, x, y)
    method.guides[0][1].train()
    torch.manual_seed(1)
    assert run(method, x, y) == first and expected.isfinite()
    assert same(snapshot(method.guides[0]), before)
