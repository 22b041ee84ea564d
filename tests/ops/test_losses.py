"""The loss modules: outputs of networks in the place of logits, hyper-parameters that change, states old and new."""

import copy
import inspect
import typing
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import fastkd
from fastkd import functional as F
from fastkd.models import Outputs
from fastkd.ops import _keywords

MODULES = {
    "MultiTeacherKD": (fastkd.MultiTeacherKD, {"weights": [0.25, 0.75], "temperature": 3.0}),
    "MutualKD": (fastkd.MutualKD, {"weights": [[0.0, 0.5], [0.75, 0.0]], "temperature": 3.0}),
    "FeatureEnsemble": (fastkd.FeatureEnsemble, {"weights": [0.25, 0.75]}),
    "LinearMultiTeacherKD": (fastkd.LinearMultiTeacherKD, {"weights": [0.25, 0.75], "temperature": 3.0}),
}
EVERY = pytest.mark.parametrize("name", MODULES)


def tensors(shape=(6, 5), count=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(count)]


def value(name, module):
    if name == "FeatureEnsemble":
        a, b, c = tensors((6, 2, 3, 3))
        return module([a, b], [c, a])
    z, a, b = tensors()
    if name == "LinearMultiTeacherKD":
        return module(z, b[:4], [a[:, :4], (a, a[:4])])
    return module(z, [a, b]) if name == "MultiTeacherKD" else module([z, a])


def made(name, as_tensors):
    kind, options = MODULES[name]
    return kind(**{key: torch.tensor(v) if as_tensors else v for key, v in options.items()})


@EVERY
def test_a_number_may_take_the_place_of_a_tensor_and_a_tensor_that_of_a_number(name):
    module, expected = made(name, as_tensors=True), made(name, as_tensors=False)
    for key in MODULES[name][1]:
        setattr(module, key, getattr(expected, key))
        setattr(expected, key, torch.tensor(getattr(expected, key)))
    assert list(module.state_dict()) == [] and list(expected.state_dict()) == list(MODULES[name][1])
    torch.testing.assert_close(value(name, module), value(name, expected), rtol=0, atol=1e-12)
    moved = copy.deepcopy(expected).to(torch.float64)
    assert all(tensor.dtype == torch.float64 for tensor in moved.state_dict().values())
    module.weights = None
    assert value(name, module).isfinite().all()


def test_a_parameter_may_be_set_and_replaced():
    module = fastkd.MultiTeacherKD(temperature=2.0)
    module.temperature = nn.Parameter(torch.tensor(2.0))
    assert [name for name, _ in module.named_parameters()] == ["temperature"]
    module.temperature = torch.tensor(3.0)
    assert list(module.parameters()) == [] and list(module.state_dict()) == ["temperature"]


@pytest.mark.parametrize("saved", [False, True])
@pytest.mark.parametrize("loads", [False, True])
@EVERY
def test_states_load_whatever_was_a_tensor(name, saved, loads):
    """Strictly, in a larger module too: what a state holds is in force, what it lacks stays."""
    whole = nn.ModuleDict({"criterion": made(name, saved), "net": nn.Linear(2, 2)})
    other = nn.ModuleDict({"criterion": made(name, loads), "net": nn.Linear(2, 2)})
    expected = value(name, whole["criterion"])
    if saved and loads:
        other["criterion"].weights.fill_(9.0)
    assert not any(other.load_state_dict(whole.state_dict(), strict=True))
    torch.testing.assert_close(value(name, other["criterion"]), expected, rtol=0, atol=1e-12)


def test_a_parameter_that_a_state_lacks_is_missed():
    module = fastkd.MultiTeacherKD(temperature=nn.Parameter(torch.tensor(2.0)))
    with pytest.raises(RuntimeError, match="temperature"):
        module.load_state_dict({})
    with pytest.raises(RuntimeError, match="size mismatch for weights"):
        made("MultiTeacherKD", True).load_state_dict({"weights": torch.ones(3)})


OBJECTS = {
    "Outputs": Outputs,
    "an object": lambda logits: SimpleNamespace(logits=logits, loss=None),
    "a dict": lambda logits: {"loss": None, "logits": logits},
}


@pytest.mark.parametrize("kind", OBJECTS)
def test_logits_come_as_what_a_network_returns(kind):
    wrap, (z, a, b), y = OBJECTS[kind], tensors(), torch.arange(6) % 5
    loss = fastkd.MultiTeacherKD(ce_weight=1.0)
    expected = F.multi_teacher_kd(z, [a, b], y, ce_weight=1.0)
    assert torch.equal(loss(wrap(z), [wrap(a), b], y), expected)
    assert torch.equal(loss(wrap(z), torch.stack([a, b]), y), expected)
    assert torch.equal(loss(wrap(z), wrap(a), y), F.multi_teacher_kd(z, [a], y, ce_weight=1.0))
    mutual = fastkd.MutualKD(teacher_weights=[[0.5], [0.5]])
    expected = F.mutual_kd([z, a], y, teachers=[b], teacher_weights=[[0.5], [0.5]])
    assert torch.equal(mutual([wrap(z), wrap(a)], y, teachers=wrap(b)), expected)
    with pytest.raises(TypeError, match=r"^multi_teacher_kd: teachers\[1\] must be .* got SimpleNamespace$"):
        loss(wrap(z), [wrap(a), SimpleNamespace(scores=b)], y)


def test_what_a_module_is_shows():
    for module in (fastkd.MultiTeacherKD(), fastkd.MutualKD(), fastkd.RKDDistance(), fastkd.RKDAngle()):
        assert isinstance(module, nn.modules.loss._Loss) and "reduction='mean'" in repr(module)
    assert "weights=tensor[2], temperature=tensor(3.)" in repr(made("MultiTeacherKD", True))


def test_the_statistics_come_beside_the_loss_and_a_module_compiles():
    z, a, b = tensors()
    loss, stats = fastkd.MultiTeacherKD(return_stats=True)(z, [a, b], torch.arange(6) % 5)
    assert loss.dim() == 0 and stats.kl.shape == (2,)
    compiled = torch.compile(fastkd.MultiTeacherKD(weights=torch.tensor([0.3, 0.7])), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(Outputs(z), [a, Outputs(b)]), F.multi_teacher_kd(z, [a, b], weights=[0.3, 0.7]))


def test_the_types_of_the_overloads_know_every_keyword():
    def keywords(function):
        parameters = inspect.signature(function).parameters.values()
        return {p.name for p in parameters if p.kind is p.KEYWORD_ONLY} - {"return_terms", "return_stats"}

    assert set(typing.get_type_hints(_keywords.DistillationCall)) == keywords(F.multi_teacher_kd)
    assert set(typing.get_type_hints(_keywords.MutualCall)) == keywords(F.mutual_kd)
    assert set(typing.get_type_hints(_keywords.Distillation)) == keywords(fastkd.MultiTeacherKD.__init__)
