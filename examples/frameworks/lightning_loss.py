"""Lightning: `fastkd.MultiTeacherKD` in a LightningModule, with two teachers.

Run: python examples/frameworks/lightning_loss.py (seconds on a CPU; pip install lightning). What is ours: the module's
two lines in `__init__` and one in `training_step`. The weights that come out are those of a plain loop, to rounding.
"""

import copy

import lightning as L
import torch
import torch.nn.functional as F
from torch import nn

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
batches = list(zip(images.split(32), labels.split(32), strict=True))


def network() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(288, 10))


class Distillation(L.LightningModule):
    def __init__(self, student: nn.Module, teachers: list[nn.Module]):
        super().__init__()
        self.student = student
        self.teachers = fastkd.models.Teachers(teachers)  # frozen, moved with the module, always in eval mode
        self.loss = fastkd.MultiTeacherKD(temperature=4.0, ce_weight=0.1)

    def training_step(self, batch, index):
        x, y = batch
        loss = self.loss(self.student(x), self.teachers(x), y)
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.student.parameters(), lr=0.1)


def plain_loop(student: nn.Module, teachers: list[nn.Module]) -> list[float]:
    """The same training written out."""
    losses, optimizer = [], torch.optim.SGD(student.parameters(), lr=0.1)
    for x, y in batches * 3:
        z = student(x)
        loss = 0.1 * F.cross_entropy(z, y)
        for teacher in teachers:
            p = F.softmax(teacher(x).detach() / 4, -1)
            loss = loss + 16 / len(teachers) * F.kl_div(F.log_softmax(z / 4, -1), p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


teachers = [network(), network()]
module = Distillation(network(), teachers)
student = copy.deepcopy(module.student)
trainer = L.Trainer(
    max_epochs=3, accelerator="cpu", logger=False, enable_checkpointing=False, enable_model_summary=False
)
trainer.fit(module, torch.utils.data.DataLoader(batches, batch_size=None))

losses = plain_loop(student, teachers)
for ours, plain in zip(module.student.state_dict().values(), student.state_dict().values(), strict=True):
    torch.testing.assert_close(ours, plain)
assert losses[-1] < losses[0]
print(f"Lightning: loss {losses[0]:.3f} -> {trainer.callback_metrics['loss']:.3f}, weights those of the plain loop")
