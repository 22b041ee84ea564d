"""timm: a method that compares embeddings (RKD), from a vision transformer to a convolutional network.

Run: python examples/frameworks/timm_relations.py (seconds on a CPU; pip install timm torchvision). What is ours: the
method, and `with_features`, which names the layer whose output is the embedding (by hooks, where a network cannot be
traced). The embeddings are those that timm calls pre-logits.
"""

import timm
import torch
from torch import Tensor, nn

from fastkd.methods import RKD
from fastkd.models import with_features

torch.manual_seed(0)
images, labels = torch.randn(96, 3, 32, 32), torch.randint(10, (96,))


def pre_logits(network: nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return network.eval().forward_head(network.forward_features(x), pre_logits=True)


student = timm.create_model("test_resnet", num_classes=10)
teacher = timm.create_model("test_vit", num_classes=10, img_size=32)
method = RKD(with_features(student, ["global_pool"]), with_features(teacher, ["fc_norm"]))
for network, seen in ((student, method.student), (teacher, method.teacher)):
    expected = pre_logits(network, images[:8])
    torch.testing.assert_close(seen.eval()(images[:8]).features, expected)  # [8, 96] and [8, 64]

optimizer, losses = torch.optim.SGD(method.parameter_groups(0.01), momentum=0.9), []
method.train()
for _ in range(4):
    for x, y in zip(images.split(32), labels.split(32), strict=True):
        parts = method.step(optimizer, x, y)
        losses.append(parts["distance"].item() + parts["angle"].item())
assert losses[-1] < losses[0]
print(f"timm: relations {losses[0]:.3f} -> {losses[-1]:.3f}, from embeddings of 64 to one of 96")
