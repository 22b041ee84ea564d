"""Several teachers as one module."""

import copy

import pytest
import torch
from torch import nn

import fastkd
from fastkd import methods, models


def networks(count: int = 2) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)) for _ in range(count)]


def test_they_give_a_list_without_a_graph_and_stay_frozen():
    several = networks(3)
    x = torch.randn(5, 4)
    expected = [network.eval()(x) for network in copy.deepcopy(several)]
    holder = nn.ModuleDict({"teachers": models.Teachers(several)}).train()
    assert holder.training and not any(module.training for module in holder.teachers.modules())
    found = holder.teachers(x)
    assert isinstance(found, list) and all(map(torch.equal, found, expected))
    assert not any(output.requires_grad for output in found)
    assert not any(p.requires_grad for network in several for p in network.parameters())
    assert all(network[1].num_batches_tracked == 0 for network in several)


def test_the_loss_and_the_methods_take_them():
    teachers, student, x = models.Teachers(networks()), nn.Linear(4, 3), torch.randn(5, 4)
    y = torch.arange(5) % 3
    logits = [network(x) for network in teachers]
    expected = fastkd.functional.multi_teacher_kd(student(x), logits, y, temperature=4.0, kd_weight=0.9, ce_weight=0.1)
    assert fastkd.MultiTeacherKD(kd_weight=0.9, ce_weight=0.1)(student(x), teachers(x), y) == expected
    assert methods.AVER(student, teachers, temperature=4.0, lam=0.9)(x, y).item() == pytest.approx(expected.item())


def test_arguments_go_to_each_and_outputs_come_as_they_are():
    class Named(nn.Module):
        def forward(self, x, *, scale):
            return {"logits": x * scale}

    found = models.Teachers([Named(), Named()])(torch.ones(1, 2), scale=3.0)
    assert [output["logits"].tolist() for output in found] == [[[3.0, 3.0]]] * 2


@pytest.mark.parametrize(
    "value, got", [([], "an empty one"), (nn.Linear(1, 1), "Linear"), ([nn.Linear(1, 1), 3], "one of type int")]
)
def test_what_is_no_sequence_of_networks_is_refused(value, got):
    with pytest.raises(TypeError, match=rf"^Teachers: networks must be a sequence of one network .*, got {got}$"):
        models.Teachers(value)
