"""accelerate: a method in several processes, its state saved and taken up again.

Run: torchrun --standalone --nproc-per-node 2 examples/frameworks/accelerate_method.py (seconds on a CPU; pip install
accelerate). What is ours: `map_learners(accelerator.prepare_model)`, `register_for_checkpointing(method)` and
`method.step(..., accelerator.backward)`. Two processes with half of
each batch end with the weights of one with the whole.
"""

import tempfile

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import nn

from fastkd.methods import DGKD

torch.manual_seed(0)
images, labels = torch.randn(128, 3, 8, 8), torch.randint(10, (128,))
rows = list(zip(images, labels, strict=True))


def network(width: int) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, width, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * width, 10))


def new_method() -> DGKD:
    torch.manual_seed(1)
    return DGKD(network(4), [network(16), network(8)], lam=0.5, drop="bernoulli", seed=0)  # one seed on every rank


def train(method: DGKD, optimizer, loader, epochs: range, backward=None) -> list[float]:
    losses = []
    for epoch in epochs:
        method.start_epoch(epoch, 4, len(loader))
        method.train()
        for x, y in loader:
            losses.append(sum(method.step(optimizer, x, y, backward).values()).item())
    return losses


accelerator = Accelerator(cpu=True)
method = new_method().to(accelerator.device)
method.map_learners(accelerator.prepare_model)  # DistributedDataParallel; before the optimiser
optimizer = torch.optim.SGD(method.parameter_groups(0.02), momentum=0.9)
loader = torch.utils.data.DataLoader(rows, batch_size=32 // accelerator.num_processes)
optimizer, loader = accelerator.prepare(optimizer, loader)
accelerator.register_for_checkpointing(method)  # its counters and random state, beside the networks

folder = [tempfile.mkdtemp()]
broadcast_object_list(folder)
first = train(method, optimizer, loader, range(2), accelerator.backward)
accelerator.save_state(folder[0])
last = train(method, optimizer, loader, range(2, 4), accelerator.backward)
ended = {name: value.clone() for name, value in method.state_dict().items()}

accelerator.load_state(folder[0])
assert method.iterations == len(first)
assert train(method, optimizer, loader, range(2, 4), accelerator.backward) == last
assert all(torch.equal(value, ended[name]) for name, value in method.state_dict().items())

alone = new_method()
train(
    alone, torch.optim.SGD(alone.parameter_groups(0.02), momentum=0.9), torch.utils.data.DataLoader(rows, 32), range(4)
)
for ours, whole in zip(method.student.parameters(), alone.student.parameters(), strict=True):
    torch.testing.assert_close(ours, whole)
assert last[-1] < first[0]
accelerator.print(f"accelerate: {accelerator.num_processes} processes, loss {first[0]:.3f} -> {last[-1]:.3f}")
