"""timm: its LogitDistillationTask with K teachers.

Run: python examples/frameworks/timm_task.py (seconds on a CPU; pip install timm). What is ours: the class
`MultiTeacherTask`. It keeps the task's weights, temperature, DistributedDataParallel and moving average, gives each
teacher the normalisation that it was trained with, and replaces one divergence by those to all teachers. With one
teacher its numbers are timm's.
"""

import timm
import torch
from timm.task import LogitDistillationTask
from timm.task.distillation import DistillationTeacher
from torch import nn

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(96, 3, 32, 32), torch.randint(10, (96,))


class MultiTeacherTask(LogitDistillationTask):
    def __init__(self, student, teachers, **options):
        super().__init__(student, teachers[0], **options)
        self.teachers = fastkd.models.Teachers([self.teacher, *map(DistillationTeacher, teachers[1:])])

    def forward(self, input, target):  # noqa: A002
        logits = self.trainable_module(input)
        taught = [t(t.normalize_input(input, self.student_mean, self.student_std)) for t in self.teachers]
        weights = dict(kd_weight=self.distill_loss_weight, ce_weight=self.task_loss_weight)
        loss, terms = fastkd.functional.multi_teacher_kd(
            logits, taught, target, temperature=self.temperature, return_terms=True, **weights
        )
        return {"loss": loss, "output": logits, "task_loss": terms.ce, "kd_loss": terms.kd}


def network(name: str, **options) -> nn.Module:
    return timm.create_model(name, num_classes=10, **options)


student, teachers = network("test_resnet"), [network("test_convnext"), network("test_vit", img_size=32)]
options = dict(task_loss_weight=0.3, temperature=4.0, verbose=False)
one, theirs = MultiTeacherTask(student, teachers[:1], **options), LogitDistillationTask(student, teachers[0], **options)
student.eval()  # so that the two see the same batch norm
for name, value in theirs(images, labels).items():
    torch.testing.assert_close(one(images, labels)[name], value)

task = MultiTeacherTask(student, teachers, **options)
task.train()
average = task.setup_ema(decay=0.9)
optimizer = torch.optim.SGD(task.get_trainable_module().parameters(), lr=0.01, momentum=0.9)
losses = []
for _ in range(4):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        result = task(x, y)
        optimizer.zero_grad()
        result["loss"].backward()
        optimizer.step()
        average.update(task.get_trainable_module())
        losses.append(result["loss"].item())
assert sum(losses[-3:]) < sum(losses[:3])
print(f"timm: {len(teachers)} teachers, loss {losses[0]:.3f} -> {losses[-1]:.3f}; with one teacher that of timm's task")
