"""FSDP2: a method whose student is sharded over the processes.

Run: torchrun --standalone --nproc-per-node 2 examples/frameworks/fsdp2_method.py (seconds on a CPU). What is ours:
`map_learners(shard)`, and the optimiser's groups, which are asked for after it: sharding replaces the parameters. The
weights that come out, put together again, are those of one process with the whole batch and the formula written out.
"""

import copy

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastkd.methods import AVER

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
batches = list(zip(images.split(32), labels.split(32), strict=True))


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


dist.init_process_group("gloo")
rank, world = dist.get_rank(), dist.get_world_size()
mesh = init_device_mesh("cpu", (world,))


def shard(student: nn.Module) -> nn.Module:
    for layer in (student[0], student[3]):
        fully_shard(layer, mesh=mesh)
    return fully_shard(student, mesh=mesh)


student, teachers = network(4), [network(16), network(8)]
copied = copy.deepcopy(student)
method = AVER(student, teachers, temperature=4.0, lam=0.9)
method.map_learners(shard)
optimizer = torch.optim.SGD(method.parameter_groups(0.05), momentum=0.9)
for x, y in batches * 4:
    method.step(optimizer, x.chunk(world)[rank], y.chunk(world)[rank])

losses, optimizer = [], torch.optim.SGD(copied.parameters(), lr=0.05, momentum=0.9)
for x, y in batches * 4:
    z = copied(x)
    loss = 0.1 * F.cross_entropy(z, y)
    for teacher in teachers:
        p = F.softmax(teacher(x) / 4, -1)
        loss += 0.9 * 16 / 2 * F.kl_div(F.log_softmax(z / 4, -1), p, reduction="batchmean")
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    losses.append(loss.item())
for ours, plain in zip(student.parameters(), copied.parameters(), strict=True):
    assert ours.to_local().numel() < plain.numel() or world == 1
    torch.testing.assert_close(ours.full_tensor(), plain)
assert losses[-1] < losses[0]
if rank == 0:
    print(f"FSDP2: {world} processes, loss {losses[0]:.3f} -> {losses[-1]:.3f}, weights those of one process")
dist.destroy_process_group()
