"""A column of the data set says which teacher speaks about a sample: each runs on its own samples alone.

Run: python examples/lm/routing.py (seconds on a CPU). The weights are those of a call for each teacher on its samples.
"""

import copy

import torch
from datasets import Dataset
from tiny import frozen, model, same, samples

import fastkd
from fastkd.functional import linear_multi_teacher_kd

TEACHERS = {"maths": frozen(24, seed=1), "code": frozen(40, seed=2)}
COLUMN = ["maths", "code", "code", "maths", "code", "none"]  # the last has labels alone
student = model(16, seed=0)
data = Dataset.from_list([s | {"teacher": COLUMN[k % 6]} for k, s in enumerate(samples(24))])


def batches():
    for start in range(0, len(data), 8):
        rows = data[start : start + 8]
        names = rows.pop("teacher")
        yield {name: torch.tensor(values) for name, values in rows.items()}, names


def routed(student, batch, names):
    """One call: the student's rows are [B * T], and a head has hidden states for its own rows alone."""
    ids, target = batch["input_ids"][:, :-1], batch["labels"][:, 1:]
    heads = []
    for name, teacher in TEACHERS.items():
        own = torch.tensor([k for k, n in enumerate(names) if n == name], dtype=torch.int64)
        if len(own):
            with torch.no_grad():
                hidden = teacher.model(input_ids=ids[own]).last_hidden_state  # [b, T, H_k]
            rows = (own[:, None] * ids.shape[1] + torch.arange(ids.shape[1])).flatten()
            heads.append(fastkd.Head(hidden.flatten(0, 1), teacher.lm_head.weight, rows=rows))
    hidden = student.model(input_ids=ids).last_hidden_state
    return linear_multi_teacher_kd(hidden, student.lm_head.weight, heads, target, kd_weight=0.5, ce_weight=0.5)


def by_sample(student, batch, names):
    """The same, sample by sample, by `multi_teacher_kd` on whole logits."""
    target, total = batch["labels"][:, 1:], 0.0
    for k, name in enumerate(names):
        logits = student(input_ids=batch["input_ids"][k : k + 1]).logits[:, :-1]
        teacher = TEACHERS.get(name)
        taught = (teacher or student)(input_ids=batch["input_ids"][k : k + 1]).logits[:, :-1].detach()
        total = total + fastkd.functional.multi_teacher_kd(
            logits, [taught], target[k : k + 1], temperature=1.0, kd_weight=0.5 if teacher else 0.0, ce_weight=0.5,
            reduction="sum",
        )  # fmt: skip
    return total / (target != -100).sum()


def train(student, loss):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for batch, names in batches():
        value = loss(student, batch, names)
        value.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


expected = train(copy.deepcopy(student), by_sample)
apart = same(train(student, routed), expected)
print(f"routing: {len(data)} samples to {len(TEACHERS)} teachers, weights {apart:.1e} from those of single calls")
