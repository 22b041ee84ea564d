"""timm: three of its networks, mix-up and CutMix, NativeScaler with clipping, a moving average, bfloat16.

Run: python examples/frameworks/timm_loop.py (seconds on a CPU; pip install timm). What is ours: the teachers, the loss
function and its call. The mixed labels are probabilities [B, C], which the loss takes as they are; the teachers see the
mixed images. Each loss is compared with the formula in plain PyTorch.
"""

import numpy as np
import timm.optim
import torch
import torch.nn.functional as F
from timm.data import Mixup
from timm.utils import ModelEmaV3, NativeScaler

import fastkd

torch.manual_seed(0)
np.random.seed(0)  # Mixup draws from it
images, labels = torch.randn(96, 3, 32, 32), torch.randint(10, (96,))

student = timm.create_model("test_resnet", num_classes=10)
teachers = fastkd.models.Teachers(
    [timm.create_model("test_convnext", num_classes=10), timm.create_model("test_vit", num_classes=10, img_size=32)]
)
loss_function = fastkd.MultiTeacherKD(temperature=3.0, ce_weight=0.5)

optimizer = timm.optim.create_optimizer_v2(student, opt="momentum", lr=0.01, weight_decay=0.0)
mixup = Mixup(mixup_alpha=0.2, cutmix_alpha=1.0, label_smoothing=0.1, num_classes=10)
scaler, average = NativeScaler(device="cpu"), ModelEmaV3(student, decay=0.9)


def plain(z: torch.Tensor, taught: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    loss = 0.5 * F.cross_entropy(z, y)
    for t in taught:
        loss += 9 / len(taught) * F.kl_div(F.log_softmax(z / 3, -1), F.softmax(t / 3, -1), reduction="batchmean")
    return loss


losses = []
for _ in range(4):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        x, y = mixup(x, y)  # y: probabilities [32, 10]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits, taught = student(x), teachers(x)
            loss = loss_function(logits, taught, y)
        optimizer.zero_grad()
        scaler(loss, optimizer, clip_grad=5.0, parameters=student.parameters())
        average.update(student)
        torch.testing.assert_close(loss, plain(logits.float(), [t.float() for t in taught], y.float()))
        losses.append(loss.item())

assert sum(losses[-3:]) < sum(losses[:3])
assert not torch.equal(average.module.fc.weight, student.fc.weight)
print(f"timm: loss {losses[0]:.3f} -> {losses[-1]:.3f}, each that of the plain formula")
