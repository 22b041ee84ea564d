"""ORC as the tests need it: small groups, and the paper typed again in plain PyTorch."""

import copy
import random
import unittest.mock

import torch
from methods_helpers import CLASSES, mlp, plain_ce, plain_kd
from torch import nn

from fastkd.methods import ORC
from fastkd.methods._feedback import mixed
from fastkd.methods._state import unpack

T, BETA = 3.0, 0.3


def bn_mlp(seed: int, hidden: int = 6, classes: int = CLASSES) -> nn.Module:
    """float64 with batch statistics, so that train and eval mode differ."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, classes)
        ).double()


def orc(make=mlp, students: int = 3, **options) -> ORC:
    """A method whose networks differ in width."""
    group = [make(20 + i, hidden=4 + 2 * i) for i in range(students)]
    return ORC(make(10, hidden=12), group, **{"temperature": T, "beta": BETA, "seed": 3} | options)


def optimizer_of(method: ORC, lr: float = 0.3) -> torch.optim.Optimizer:
    return torch.optim.SGD(method.parameter_groups(lr), momentum=0.9, weight_decay=0.01)


def next_share(method: ORC) -> float:
    """The l of the method's next iteration, drawn again from a copy of its random state."""
    generator = torch.Generator()
    generator.set_state(unpack("ORC", method.get_extra_state())[1])
    return random.Random(int(torch.randint(2**63 - 1, (), generator=generator))).betavariate(method.alpha, method.alpha)


def networks_of(method: ORC) -> list[nn.Module]:
    return [method.pivot, *method.students]


def eval_logits(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(network).eval()(x)


class Mixed(ORC):
    """Keeps what intensive teaching is given."""

    def _lesson(self, batch, stats, share):
        with unittest.mock.patch("fastkd.methods.orc.mixed", self._keep):
            return super()._lesson(batch, stats, share)

    def _keep(self, name, batch, feedback, share, pool):
        self.feedback, self.share = feedback, share
        self.mixed = mixed(name, batch, feedback, share, pool)
        return self.mixed


class Table(nn.Module):
    """Logits by heart, whatever the weights; x[:, 0] is the row's number."""

    def __init__(self, logits):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros((), dtype=torch.float64))
        self.logits = torch.tensor(logits, dtype=torch.float64)

    def forward(self, x):
        return self.logits[x[:, 0].long() % len(self.logits)] + 0 * self.weight


def table(ces, classes=3):
    """A network of these cross-entropies with label 0 and `classes` classes."""
    return Table([[-ce] + [torch.tensor((1 - 2.718281828459045**-ce) / (classes - 1)).log().item()] * (classes - 1)
                  for ce in ces])  # fmt: skip


def rows_of_table(n):
    return torch.arange(n, dtype=torch.float64)[:, None], torch.zeros(n, dtype=torch.int64)


# --- the paper, typed again -------------------------------------------------------------------------------------------


def plain_ranking(students, x, y, by):
    """Best first, with the per-sample cross-entropies K x [B] and errors K x [B]."""
    ces, wrongs, keys = [], [], []
    for student in students:
        z = eval_logits(student, x)
        ces.append([-torch.log_softmax(row, 0)[label].item() for row, label in zip(z, y, strict=True)])
        wrongs.append((z.argmax(1) != y).tolist())
        better = (z > z[torch.arange(len(y)), y][:, None]).sum(1)
        mean = {"ce": sum(ces[-1]) / len(y), "accuracy": sum(wrongs[-1]) / len(y)}
        keys.append(mean | {"top5": (better >= 5).double().mean().item()})
    return sorted(range(len(students)), key=lambda i: keys[i][by]), ces, wrongs


def plain_feedback(ces, wrongs, errors_only):
    rows = range(len(ces[0]))
    allowed = [[b for b in rows if wrong[b]] for wrong in wrongs] if errors_only else [list(rows)] * len(ces)
    if not any(allowed):
        allowed = [list(rows)] * len(ces)
    means = torch.tensor([sum(ce) / len(ce) for ce in ces], dtype=torch.float64)
    shares = torch.softmax(means, 0) * torch.tensor([float(bool(some)) for some in allowed])
    quotas = shares / shares.sum() * len(ces[0])
    counts = quotas.floor()
    while counts.sum() < len(ces[0]):  # largest remainder
        counts[(quotas - counts).argmax()] += 1
    picked = []
    for ce, some, count in zip(ces, allowed, counts.tolist(), strict=True):
        hardest = sorted(some, key=lambda b: -ce[b])
        picked += [hardest[n % len(hardest)] for n in range(int(count))]
    return torch.tensor(picked)


def plain_taught(learners, teachers, x, y, combine="each"):
    targets = [eval_logits(teacher, x) for teacher in teachers]
    if combine == "mean":
        targets = [sum(targets) / len(targets)]
    total = 0
    for learner in learners:
        z = learner(x)
        total = total + (1 - BETA) * plain_ce(z, y) + BETA * sum(plain_kd(z, t, T) for t in targets)
    return total


def plain_phases(pivot, students, x, y, l, promote=1, rank_by="ce", intensive="pivot", errors_only=True,  # noqa: E741
                 teach=("intensive", "private", "group"), combine="each", mix="mixup"):  # fmt: skip
    """(loss, networks that it trains) of each phase."""
    order, ces, wrongs = plain_ranking(students, x, y, "ce" if rank_by == "fixed" else rank_by)
    if rank_by == "fixed":
        order = [*range(1, promote + 1), 0, *range(promote + 1, len(students))]
    tts, rest = [students[i] for i in order[:promote]], [students[i] for i in order[promote:]]
    feedback = plain_feedback(ces, wrongs, errors_only)
    l = {"mixup": l, "feedback": 0.0, "batch": 1.0}[mix]  # noqa: E741
    mixed = l * x + (1 - l) * x[feedback]
    group = [pivot] if intensive == "pivot" else [pivot, *tts]
    if "intensive" in teach:
        logits = [n(mixed) for n in group]
        yield sum(l * plain_ce(z, y) + (1 - l) * plain_ce(z, y[feedback]) for z in logits), group
    if "private" in teach:
        yield plain_taught(tts, [pivot], x, y, combine), tts
    if "group" in teach:
        yield plain_taught(rest, [pivot, *tts], x, y, combine), rest
