"""sentence-transformers: relational distillation (RKD) from several teachers with embeddings of other widths.

Run: python examples/frameworks/sentence_embeddings.py (seconds on a CPU; pip install "sentence-transformers[train]").
What is ours: the class `RelationalLoss`, in the place of the library's own losses. As these do, it takes the teachers'
embeddings, computed once, from the label column; relations need no projection between widths. Its value is compared
with the paper's formula in plain PyTorch.
"""

import random
import tempfile
from itertools import combinations

import torch
import torch.nn.functional as F
from datasets import Dataset
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers.models import StaticEmbedding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn

import fastkd

torch.manual_seed(0)
words = "the a old new red cat dog bird house tree sees finds likes leaves near under".split()
sentences = [" ".join(chosen) for chosen in random.Random(0).sample(list(combinations(words, 3)), 128)]
tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(["[UNK]", *words])}, unk_token="[UNK]"))
tokenizer.pre_tokenizer = Whitespace()


def network(width: int) -> SentenceTransformer:
    """A tiny one with random weights: nothing is downloaded."""
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, embedding_dim=width)], device="cpu")


class RelationalLoss(nn.Module):
    """mean over the teachers of RKD's distance loss + 2 * its angle loss (arXiv 1904.05068)."""

    def __init__(self, model: SentenceTransformer, widths: list[int]):
        super().__init__()
        self.model, self.widths = model, widths
        self.distance, self.angle = fastkd.RKDDistance(), fastkd.RKDAngle()

    def forward(self, sentence_features, labels: Tensor) -> Tensor:
        student = self.model(sentence_features[0])["sentence_embedding"]  # [N, D]
        teachers = labels.split(self.widths, dim=1)  # K x [N, D_k]
        return sum(self.distance(student, t) + 2 * self.angle(student, t) for t in teachers) / len(teachers)


def plain(student: Tensor, teachers: list[Tensor]) -> Tensor:
    def distances(x: Tensor) -> Tensor:
        d = (x[:, None] - x[None]).norm(dim=2)
        return d / d[d > 0].mean()

    def angles(x: Tensor) -> Tensor:
        e = F.normalize(x[None] - x[:, None], dim=2)
        return e @ e.transpose(1, 2)

    def loss(t: Tensor) -> Tensor:
        angle = F.smooth_l1_loss(angles(student), angles(t))
        return F.smooth_l1_loss(distances(student), distances(t)) + 2 * angle

    return sum(map(loss, teachers)) / len(teachers)


student, teachers = network(8), [network(24), network(16)]
taught = [teacher.encode(sentences, convert_to_tensor=True) for teacher in teachers]  # K x [N, D_k]
rows = Dataset.from_dict({"sentence": sentences, "label": torch.cat(taught, dim=1).tolist()})
loss = RelationalLoss(student, [t.shape[1] for t in taught])

features = [student.preprocess(sentences)]
before = loss(features, torch.cat(taught, dim=1))
torch.testing.assert_close(
    before, plain(student.encode(sentences, convert_to_tensor=True), taught), rtol=1e-4, atol=1e-6
)
with tempfile.TemporaryDirectory() as folder:
    arguments = SentenceTransformerTrainingArguments(
        folder, per_device_train_batch_size=32, num_train_epochs=5, learning_rate=0.02, save_strategy="no",
        report_to="none", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    SentenceTransformerTrainer(student, arguments, train_dataset=rows, loss=loss).train()
after = loss(features, torch.cat(taught, dim=1))
assert after < 0.9 * before
print(f"sentence-transformers: loss {before:.4f} -> {after:.4f}, that of the plain formula")
