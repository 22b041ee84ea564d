"""torchvision: a segmentation network taught by two, maps [B, C, H, W], pixels without a label.

Run: python examples/frameworks/torchvision_segmentation.py (seconds on a CPU). What is ours: the loss function, with
`class_dim=1` and the data set's `ignore_index`, and its call. No map is copied for it. Each loss is compared with the
formula in plain PyTorch.
"""

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models.segmentation import lraspp_mobilenet_v3_large

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(8, 3, 64, 64), torch.randint(5, (8, 64, 64))
labels[:, :8] = 255  # a border that nobody labelled


def network() -> nn.Module:
    return lraspp_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=5)


student, teachers = network(), fastkd.models.Teachers([network(), network()])
loss_function = fastkd.MultiTeacherKD(temperature=2.0, ce_weight=0.5, class_dim=1, ignore_index=255)


def plain(z: torch.Tensor, taught: list[torch.Tensor], y: torch.Tensor) -> torch.Tensor:
    loss, counted = 0.5 * F.cross_entropy(z, y, ignore_index=255), y != 255
    log_q = F.log_softmax(z / 2, 1)
    for t in taught:
        pixels = F.kl_div(log_q, F.softmax(t / 2, 1), reduction="none").sum(1)  # [B, H, W]
        loss = loss + 4 / len(taught) * pixels[counted].mean()
    return loss


optimizer, losses = torch.optim.SGD(student.parameters(), lr=0.02, momentum=0.9), []
for _ in range(4):
    for x, y in zip(images.split(4), labels.split(4), strict=True):
        logits, taught = student(x)["out"], [output["out"] for output in teachers(x)]  # [B, C, H, W]
        loss = loss_function(logits, taught, y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        torch.testing.assert_close(loss, plain(logits, taught, y))
        losses.append(loss.item())
assert losses[-1] < losses[0]
print(f"torchvision segmentation: loss {losses[0]:.3f} -> {losses[-1]:.3f}, each that of the plain formula")
