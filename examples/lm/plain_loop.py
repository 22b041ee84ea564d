"""Two teachers and a student in a plain PyTorch loop, from hidden states and heads: no logits are held.

Run: python examples/lm/plain_loop.py (seconds on a CPU). The step of a whole batch and the step of its halves, each
divided by the labels of the whole, give the same weights.
"""

import copy

import torch
from tiny import frozen, model, same, samples, stack

from fastkd.functional import linear_multi_teacher_kd

teachers = [frozen(24, seed=1), frozen(40, seed=2)]  # hidden sizes differ, the vocabulary does not
student = model(16, seed=0)


def loss_of(student, batch, num_items=None):
    ids, target = batch["input_ids"][:, :-1], batch["labels"][:, 1:]  # labels are shifted by whoever has them
    with torch.no_grad():
        taught = [(t.model(input_ids=ids).last_hidden_state, t.lm_head.weight) for t in teachers]
    hidden = student.model(input_ids=ids).last_hidden_state
    return linear_multi_teacher_kd(
        hidden, student.lm_head.weight, taught, target,
        combine="probs", temperature=2.0, kd_weight=0.7, ce_weight=0.3, num_items=num_items,
    )  # fmt: skip


def train(student, pieces):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for start in range(0, 24, 8):
        batch = stack(samples(24)[start : start + 8])
        items, losses = (batch["labels"][:, 1:] != -100).sum(), []
        for piece in range(pieces):
            part = {name: rows.chunk(pieces)[piece] for name, rows in batch.items()}
            losses.append(loss_of(student, part, num_items=items))
            losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
        print(f"{pieces} piece(s): loss {sum(loss.item() for loss in losses):.4f}")
    return student


other = train(copy.deepcopy(student), pieces=2)
apart = same(train(student, pieces=1), other)
print(f"plain loop: weights of whole batches and of halves differ by {apart:.1e}")
