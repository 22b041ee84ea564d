"""Hugging Face Trainer: a classifier of sequences, two teachers, gradient accumulation.

Run: python examples/frameworks/trainer_classification.py (seconds on a CPU; pip install transformers accelerate). What
is ours: the class `Distillation`. Its loss divides by `num_items_in_batch`, the labels of the four batches that make a
step; a mean over each batch would count four times. Labels of -100 count nowhere. The weights that come out are those
of a plain loop over the whole batches.
"""

import copy
import tempfile

import torch
import torch.nn.functional as F
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import fastkd

torch.manual_seed(0)
ids, labels = torch.randint(1, 50, (64, 12)), torch.randint(3, (64,))
labels[:5] = -100
rows = [{"input_ids": ids[i], "labels": labels[i]} for i in range(len(ids))]


def network(width: int) -> BertForSequenceClassification:
    sizes = dict(hidden_size=width, intermediate_size=2 * width, num_hidden_layers=1, num_attention_heads=2)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return BertForSequenceClassification(BertConfig(vocab_size=50, num_labels=3, **sizes, **dropout))


class Distillation(Trainer):
    def __init__(self, *args, teachers, loss, **kwargs):
        super().__init__(*args, compute_loss_func=self.distil, **kwargs)
        self.teachers, self.loss = fastkd.models.Teachers(teachers).to(self.args.device), loss

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.taught = self.teachers(**{name: value for name, value in inputs.items() if name != "labels"})
        return super().compute_loss(model, inputs, *args, **kwargs)

    def distil(self, outputs, labels, num_items_in_batch=None):
        return self.loss(outputs, self.taught, labels, num_items=num_items_in_batch)


def plain_loop(student, teachers, steps: int) -> list[float]:
    """The same training written out; a step takes all 64 rows."""
    losses, optimizer, counted = [], torch.optim.SGD(student.parameters(), lr=0.5), labels >= 0
    for _ in range(steps):
        z = student(ids).logits[counted]
        loss = 0.5 * F.cross_entropy(z, labels[counted])
        for teacher in teachers:
            p = F.softmax(teacher(ids).logits[counted].detach() / 2, -1)
            loss = loss + 4 / len(teachers) * F.kl_div(F.log_softmax(z / 2, -1), p, reduction="batchmean")
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


student, teachers = network(16), [network(24), network(32)]
copied = copy.deepcopy(student)
with tempfile.TemporaryDirectory() as folder:
    arguments = TrainingArguments(
        folder, per_device_train_batch_size=16, gradient_accumulation_steps=4, max_steps=5, learning_rate=0.5,
        optim="sgd", lr_scheduler_type="constant", max_grad_norm=0.0, save_strategy="no", report_to="none",
        logging_steps=1, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    loss = fastkd.MultiTeacherKD(temperature=2.0, ce_weight=0.5)
    trainer = Distillation(student, arguments, train_dataset=rows, eval_dataset=rows, teachers=teachers, loss=loss)
    trainer.train()
    held_out = trainer.evaluate()["eval_loss"]

losses = plain_loop(copied, teachers, 5)
logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
torch.testing.assert_close(torch.tensor(logged), torch.tensor(losses), rtol=1e-4, atol=1e-4)
for ours, plain in zip(student.parameters(), copied.parameters(), strict=True):
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-5)
assert losses[-1] < losses[0]
print(f"Trainer: loss {logged[0]:.3f} -> {logged[-1]:.3f} (evaluated {held_out:.3f}), weights those of the plain loop")
