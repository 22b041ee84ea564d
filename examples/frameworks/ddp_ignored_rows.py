"""DistributedDataParallel: rows without a label, of which each process has another number.

Run: torchrun --standalone --nproc-per-node 2 examples/frameworks/ddp_ignored_rows.py (seconds on a CPU). What is ours:
the loss, and `num_items`. DistributedDataParallel takes the mean of the processes' gradients; with the rows that count
in all of them, divided by the processes, as `num_items`, that is the gradient of one process with the whole batch.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastkd

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
labels[torch.rand(128) < torch.linspace(0, 1, 32).repeat(4)] = -100  # few in a batch's first half, most in its second


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
student, teachers = network(4), fastkd.models.Teachers([network(16), network(8)])
copied = copy.deepcopy(student)
loss_function = fastkd.MultiTeacherKD(temperature=2.0, ce_weight=0.5)
model = DistributedDataParallel(student)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
for x, y in list(zip(images.split(32), labels.split(32), strict=True)) * 4:
    x, y = x.chunk(world)[rank], y.chunk(world)[rank]
    counted = (y != -100).sum()
    dist.all_reduce(counted)
    loss = loss_function(model(x), teachers(x), y, num_items=counted / world)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()

losses, optimizer = [], torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
for x, y in list(zip(images.split(32), labels.split(32), strict=True)) * 4:  # one process, the formula in plain PyTorch
    x, y = x[y != -100], y[y != -100]
    z = copied(x)
    loss = 0.5 * F.cross_entropy(z, y)
    for t in teachers(x):
        loss += 4 / 2 * F.kl_div(F.log_softmax(z / 2, -1), F.softmax(t / 2, -1), reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
for ours, plain in zip(student.parameters(), copied.parameters(), strict=True):
    torch.testing.assert_close(ours, plain)
assert losses[-1] < losses[0]
if rank == 0:
    print(f"DDP: {world} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}, weights those of one process")
dist.destroy_process_group()
