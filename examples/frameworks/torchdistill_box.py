"""torchdistill: a DistillationBox from a YAML file, with K teachers.

Run: python examples/frameworks/torchdistill_box.py (seconds on a CPU; pip install torchdistill). What is ours: the
class `MultiTeacherKD`, which the YAML file beside this one names as its criterion, and `Teachers`, since a box has a
place for one teacher. The weights that come out are those of a plain loop.
"""

import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchdistill.common.yaml_util import load_yaml_file
from torchdistill.core.distillation import get_distillation_box
from torchdistill.losses.registry import register_mid_level_loss

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
rows = torch.utils.data.TensorDataset(images, labels)


@register_mid_level_loss
class MultiTeacherKD(nn.Module):
    def __init__(self, **options):
        super().__init__()
        self.loss = fastkd.MultiTeacherKD(**options)

    def forward(self, student_io_dict, teacher_io_dict, targets):
        return self.loss(student_io_dict["."]["output"], teacher_io_dict["."]["output"], targets)


def network(width: int) -> nn.Module:
    layers = nn.Conv2d(3, width, 3), nn.BatchNorm2d(width), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10)
    return nn.Sequential(*layers)


student, teachers = network(4), fastkd.models.Teachers([network(16), network(8)])
copied = copy.deepcopy(student)
config = load_yaml_file(str(Path(__file__).with_suffix(".yaml")))
box = get_distillation_box(teachers, student, {"made/train": rows}, config, torch.device("cpu"), None, False, 1)
losses = []
for epoch in range(box.num_epochs):
    box.pre_epoch_process(epoch=epoch)
    for x, y, supplement in box.train_data_loader:
        box.pre_forward_process()
        loss = box.forward_process(x, y, supplement)
        box.post_forward_process(loss)
        losses.append(loss.item())
    box.post_epoch_process()

optimizer = torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
for x, y in list(zip(images.split(32), labels.split(32), strict=True)) * 4:
    z = copied(x)
    loss = 0.5 * F.cross_entropy(z, y)
    for weight, teacher in zip((0.75, 0.25), teachers, strict=True):
        p = F.softmax(teacher(x) / 4, -1)
        loss += 16 * weight * F.kl_div(F.log_softmax(z / 4, -1), p, reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
for ours, plain in zip(student.parameters(), copied.parameters(), strict=True):
    torch.testing.assert_close(ours, plain)
assert losses[-1] < losses[0]
print(f"torchdistill: loss {losses[0]:.3f} -> {losses[-1]:.3f}, weights those of the plain loop")
