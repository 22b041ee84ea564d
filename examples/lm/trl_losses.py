"""TRL's GKDTrainer and DistillationTrainer with their losses replaced: the same weights, no copies of logits.

Run: python examples/lm/trl_losses.py (under a minute on a CPU). Both train with TRL's own loss and with the one here,
beta 0 (forward KL), 0.5 and 1 (reverse KL). TRL's chunked loss works in float32, so there the two agree to its digits.
"""

import tempfile

import torch
from datasets import Dataset
from tiny import PROMPT, VOCABULARY, frozen, model, same, samples, stack
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from trl import DistillationConfig, DistillationTrainer
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer import distillation_trainer

from fastkd import Head
from fastkd.functional import linear_multi_teacher_kd, multi_teacher_kd

REDUCTIONS = {"batchmean": "mean", "sum": "sum", "none": "none"}  # of tokens


class FusedGKD(GKDTrainer):
    """Logits [B, T, V] of both networks, which the trainer has shifted. Several teachers go into the list."""

    @staticmethod
    def generalized_jsd_loss(
        student_logits, teacher_logits, labels=None, beta=0.5, temperature=1.0, reduction="batchmean",
        num_items_in_batch=None,
    ):  # fmt: skip
        return multi_teacher_kd(
            student_logits, [teacher_logits], labels, divergence="jsd", divergence_beta=beta, temperature=temperature,
            scale_by_t2=False, num_items=num_items_in_batch,
            reduction="mean" if num_items_in_batch is not None else REDUCTIONS[reduction],
        )  # fmt: skip


def chunked_divergence(
    student_hidden, teacher_hidden, student_weight, teacher_weight, completion_mask, beta, num_items_in_batch=None,
    student_lm_head_bias=None, teacher_lm_head_bias=None, student_logit_scale=1.0, teacher_logit_scale=1.0,
    student_final_logit_softcapping=None, teacher_final_logit_softcapping=None, temperature=1.0,
):  # fmt: skip
    """(loss, sum of the student's entropies, tokens), of which the trainer only logs the second: here it is 0."""
    teacher = Head(
        teacher_hidden, teacher_weight, bias=teacher_lm_head_bias, softcap=teacher_final_logit_softcapping,
        logit_scale=teacher_logit_scale,
    )  # fmt: skip
    loss = linear_multi_teacher_kd(
        student_hidden, student_weight, [teacher], mask=completion_mask != 0, bias=student_lm_head_bias,
        softcap=student_final_logit_softcapping, logit_scale=student_logit_scale, divergence="jsd",
        divergence_beta=beta, temperature=temperature, scale_by_t2=False, num_items=num_items_in_batch,
    )  # fmt: skip
    return loss, loss.new_zeros(()), completion_mask.ne(0).sum()


def tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{k}": k for k in range(VOCABULARY)}
    split = Tokenizer(models.WordLevel(words, unk_token="w3"))
    split.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=split, pad_token="w0", bos_token="w1", eos_token="w2")


def options(beta: float, **more) -> dict:
    return dict(
        output_dir=tempfile.mkdtemp(), beta=beta, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        max_steps=2, optim="sgd", learning_rate=0.5, lr_scheduler_type="constant", max_grad_norm=0.0, use_cpu=True,
        report_to="none", save_strategy="no", bf16=False, gradient_checkpointing=False, disable_tqdm=True, **more,
    )  # fmt: skip


def gkd(trainer: type[GKDTrainer], beta: float):
    def collate(batch):
        batch = stack(batch)
        return batch | {"attention_mask": torch.ones_like(batch["input_ids"])}

    arguments = GKDConfig(**options(beta, lmbda=0.0, max_length=64))  # lmbda 0: no sampling
    made = trainer(
        model(16, seed=0), frozen(24, seed=1), arguments, data_collator=collate,
        train_dataset=Dataset.from_list(samples(16)), processing_class=tokenizer(),
    )  # fmt: skip
    made.train()
    return made.model


def distillation(loss, beta: float):
    theirs = distillation_trainer._chunked_divergence_loss
    distillation_trainer._chunked_divergence_loss = loss or theirs
    prompts = [" ".join(f"w{k}" for k in sample["input_ids"][:PROMPT]) for sample in samples(16)]
    arguments = DistillationConfig(**options(beta, max_completion_length=8, temperature=1.5, seed=3))
    made = DistillationTrainer(
        model(16, seed=0), frozen(24, seed=1), arguments, train_dataset=Dataset.from_dict({"prompt": prompts}),
        processing_class=tokenizer(),
    )  # fmt: skip
    made.train()
    distillation_trainer._chunked_divergence_loss = theirs
    return made.model


for beta in (0.0, 0.5, 1.0):
    off = same(gkd(FusedGKD, beta), gkd(GKDTrainer, beta))
    on = same(distillation(chunked_divergence, beta), distillation(None, beta), digits=1e-5)
    print(f"TRL, beta {beta}: GKD's weights differ by {off:.1e}, DistillationTrainer's by {on:.1e}")
