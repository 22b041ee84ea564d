"""Two local teachers in Hugging Face's Trainer, with gradient accumulation: `compute_loss` is all that changes.

Run: python examples/lm/trainer.py (seconds on a CPU). After 4 steps of 4 micro-batches the weights are those of the
formula, written out in plain PyTorch on whole batches.
"""

import copy
import tempfile

import torch
import torch.nn.functional as F
from tiny import frozen, model, same, samples, stack
from transformers import Trainer, TrainingArguments

from fastkd.functional import linear_multi_teacher_kd

STEPS, ACCUMULATION, BATCH, RATE, ALPHA = 4, 4, 2, 0.5, 0.6


class Distiller(Trainer):
    def __init__(self, *arguments, teachers, **options):
        super().__init__(*arguments, **options)
        self.teachers = [teacher.to(self.args.device) for teacher in teachers]

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        target = inputs["labels"][:, 1:]  # the labels are shifted, not the logits: the last position has no label
        inputs = {name: rows[:, :-1] for name, rows in inputs.items() if name != "labels"}
        with torch.no_grad():
            taught = [(t.model(**inputs).last_hidden_state, t.lm_head.weight) for t in self.teachers]
        # Under DDP go through `model` itself; `logits_to_keep=1` makes one row of logits and keeps the rest away.
        out = model(**inputs, output_hidden_states=True, logits_to_keep=1)
        loss = linear_multi_teacher_kd(
            out.hidden_states[-1], self.model.lm_head.weight, taught, target,
            kd_weight=1 - ALPHA, ce_weight=ALPHA, num_items=num_items_in_batch,
        )  # fmt: skip
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            loss = loss * self.accelerator.num_processes  # the number is of all processes, and DDP averages gradients
        return (loss, out) if return_outputs else loss


def plain(student, teachers, data):
    """What the Trainer must do: mean over all labels of a step, no micro-batches."""
    optimizer = torch.optim.SGD(student.parameters(), lr=RATE)
    for start in range(0, len(data), BATCH * ACCUMULATION):
        batch = stack(data[start : start + BATCH * ACCUMULATION])
        keep = batch["labels"][:, 1:] != -100
        log_q = student(input_ids=batch["input_ids"]).logits[:, :-1][keep].log_softmax(-1)
        loss = ALPHA * F.nll_loss(log_q, batch["labels"][:, 1:][keep])
        for teacher in teachers:
            log_p = teacher(input_ids=batch["input_ids"]).logits[:, :-1][keep].log_softmax(-1)
            loss = loss + (1 - ALPHA) / len(teachers) * F.kl_div(log_q, log_p, reduction="batchmean", log_target=True)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return student


student, teachers = model(16, seed=0), [frozen(24, seed=1), frozen(40, seed=2)]
data = samples(STEPS * ACCUMULATION * BATCH)
expected = plain(copy.deepcopy(student), teachers, data)
arguments = TrainingArguments(
    tempfile.mkdtemp(), per_device_train_batch_size=BATCH, gradient_accumulation_steps=ACCUMULATION, max_steps=STEPS,
    optim="sgd", learning_rate=RATE, lr_scheduler_type="constant", max_grad_norm=0.0,
    train_sampling_strategy="sequential", remove_unused_columns=False, report_to="none", save_strategy="no",
    logging_steps=1, use_cpu=True, disable_tqdm=True,
)  # fmt: skip
trainer = Distiller(student, arguments, train_dataset=data, data_collator=stack, teachers=teachers)
trainer.train()
apart = same(trainer.model, expected)
steps = f"{trainer.state.global_step} steps of {ACCUMULATION} micro-batches"
print(f"Trainer: {steps}, weights {apart:.1e} from the formula's")
