"""A data set with a teacher's k most probable classes a token, written once and learnt from without the teacher.

Run: python examples/lm/cached_topk.py (seconds on a CPU). With as many classes as the vocabulary has, the weights are
those of the teacher itself; with 8 of 96 the rest is one class, whose probability is a column.
"""

import copy
import tempfile

import torch
from datasets import Dataset, load_from_disk
from tiny import VOCABULARY, frozen, model, same, samples

import fastkd
from fastkd.functional import multi_teacher_kd


@torch.no_grad()
def with_topk(data: Dataset, teacher, k: int) -> Dataset:
    """Columns topk_ids [T, k], topk_log_probs [T, k] and tail [T]: log of what the other classes have together."""

    def add(batch):
        log_p = teacher(input_ids=torch.tensor(batch["input_ids"])).logits.log_softmax(-1)  # [B, T, V]
        found = log_p.topk(k)
        rest = log_p.scatter(-1, found.indices, -torch.inf).logsumexp(-1)
        columns = {"topk_ids": found.indices.int(), "topk_log_probs": found.values.float(), "tail": rest.float()}
        return {name: values.tolist() for name, values in columns.items()}

    return data.map(add, batched=True, batch_size=8)


def train(student, data: Dataset, teacher_of):
    optimizer = torch.optim.SGD(student.parameters(), lr=0.5)
    for start in range(0, len(data), 8):
        batch = {name: torch.tensor(column) for name, column in data[start : start + 8].items()}
        logits = student(input_ids=batch["input_ids"]).logits[:, :-1]
        loss = multi_teacher_kd(logits, teacher_of(batch), batch["labels"][:, 1:], temperature=1.0, ce_weight=0.5)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


def cached(batch):
    """What stands at a position is the teacher's forecast for the next one: shifted as logits are, not as labels."""
    ids, log_probs, tail = (batch[name][:, :-1] for name in ("topk_ids", "topk_log_probs", "tail"))
    return fastkd.TopK(ids, log_probs.double(), mode="tail", tail_log_prob=tail.double())


student, teacher = model(16, seed=0), frozen(24, seed=1)
data, folder = Dataset.from_list(samples(32)), tempfile.mkdtemp()
whole = train(copy.deepcopy(student), data, lambda batch: teacher(input_ids=batch["input_ids"]).logits[:, :-1])
for k in (VOCABULARY, 8):
    with_topk(data, teacher, k).save_to_disk(f"{folder}/{k}")
    with fastkd.use_backend("auto"):  # sparse teachers are plain PyTorch
        learnt = train(copy.deepcopy(student), load_from_disk(f"{folder}/{k}"), cached)
    apart = same(learnt, whole, digits=1e-5 if k == VOCABULARY else 0.1)
    print(f"top-k: {k} of {VOCABULARY} classes a token, weights {apart:.1e} from those of the teacher's logits")
