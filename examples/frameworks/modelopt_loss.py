"""ModelOpt: `mtd.convert` with a fastkd loss as its criterion, and two teachers.

Run: python examples/frameworks/modelopt_loss.py (seconds on a CPU; pip install nvidia-modelopt). What is ours: the
criterion, `Teachers`, since ModelOpt has a place for one teacher, and `target=` in `compute_kd_loss`, which hands the
labels on: the cross-entropy comes from the same pass. Each loss is compared with the formula in plain PyTorch.
"""

import modelopt.torch.distill as mtd
import torch
import torch.nn.functional as F
from torch import nn

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))


class Network(nn.Module):  # not an nn.Sequential: ModelOpt puts the teacher among the student's children
    def __init__(self, width: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


teachers = fastkd.models.Teachers([Network(16), Network(8)])
criterion = fastkd.MultiTeacherKD(temperature=2.0, ce_weight=0.5)
student = mtd.convert(Network(4), mode=[("kd_loss", {"teacher_model": teachers, "criterion": criterion})])


def plain(z: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    loss = 0.5 * F.cross_entropy(z, y)
    for t in teachers(x):
        loss += 4 / 2 * F.kl_div(F.log_softmax(z / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
    return loss


optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.05, momentum=0.9), []
student.train()
for _ in range(4):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        logits = student(x)  # runs the teachers, too
        loss = student.compute_kd_loss(target=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss, plain(logits, x, y))
        losses.append(loss.item())

assert losses[-1] < losses[0]
shipped = mtd.export(student)  # the student alone
assert type(shipped) is Network and len(shipped.state_dict()) == 4
print(f"ModelOpt: loss {losses[0]:.3f} -> {losses[-1]:.3f}, each that of the plain formula")
