"""Small branched networks, views of a batch, and the losses of DKEL and PCL typed again in plain PyTorch."""

import copy
import math

import torch
from methods_helpers import plain_ce, plain_kd
from torch import nn

from fastkd.methods import DKEL
from fastkd.models import Branched, Network, Outputs, branched

CLASSES, T = 7, 3.0
LATE = 200  # an epoch of 300 after ramp-up and decay


class Tiny(Network):
    """A float64 network without batch statistics, so that a batch in parts is the batch."""

    features_width = 4

    def __init__(self):
        super().__init__()
        self.body, self.last, self.fc = nn.Linear(5, 6), nn.Linear(6, 4), nn.Linear(4, CLASSES)

    def stem_layers(self):
        return ("body",)

    def forward_stem(self, x):
        return (torch.tanh(self.body(x)),)

    def forward_branch(self, stem):
        features = torch.tanh(self.last(stem[-1]))
        return Outputs(3 * self.fc(features), features, None)


def tiny(seed: int, branches: int = 3) -> Branched:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return Branched([Tiny() for _ in range(branches)]).double()


def bn_student(seed: int = 0, branches: int = 3, **options) -> Branched:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return branched("resnet8", CLASSES, branches, image_size=8, channels=1, width=0.25, **options)


def rows_of_views(rows: int = 10, views: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(rows, 5, generator=generator, dtype=torch.float64) for _ in range(views)]
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def image_views(rows: int = 8, views: int = 3, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    x = [torch.randn(rows, 1, 8, 8, generator=generator) for _ in range(views)]
    return x, torch.randint(CLASSES, (rows,), generator=generator)


def dkel(student=None, teacher=None, epoch=None, epochs=300, **options) -> DKEL:
    """One that does not warn, over float64 networks, in the given epoch."""
    student = tiny(1) if student is None else student
    teacher = tiny(2, len(student.peers)) if teacher is None else teacher
    method = DKEL(student, teacher=teacher, **options)
    method.initialised = True
    if epoch is not None:
        method.start_epoch(epoch, epochs)
    return method


def run(method, views, y=None, chunks=1) -> torch.Tensor:
    """One iteration without a step: gradients are left in the networks, the average does not move. Returns the loss."""
    total = torch.zeros((), dtype=torch.float64)
    for phase in method.phases(views, y, chunks=chunks):
        method.zero_grad(set_to_none=True)
        for loss in phase.losses:
            loss.backward()
            total += loss.detach()
        phase.skipped = True
    return total


def plain_loss(student, classifier, teacher, views, y, w, lam, t=T, c=None):
    """The papers' loss, peer by peer; c of the teachers' ensemble, w where it is ramped up as well."""
    outputs = student(views)
    z = [o.logits for o in outputs]
    taught = [o.logits.detach() for o in teacher(views)]
    z_e = classifier(torch.cat([o.features for o in outputs], 1))
    loss = plain_ce(z_e, y)
    for j in range(len(z)):
        others = [taught[k] for k in range(len(z)) if k != j]
        one_by_one = sum(plain_kd(z[j], other, t) for other in others) / len(others)
        together = plain_kd(z[j], torch.stack(others).mean(0), t)
        loss = loss + plain_ce(z[j], y) + w * plain_kd(z[j], z_e.detach(), t)
        loss = loss + (w if c is None else c) * lam * together + w * (1 - lam) * one_by_one
    return loss


def plain_pcl(student, classifier, teacher, views, y, w):
    """PCL's loss (Wu and Gong, eq. 9), typed on its own."""
    outputs, mean = student(views), [o.logits.detach() for o in teacher(views)]
    z_e = classifier(torch.cat([o.features for o in outputs], 1))
    total, m = plain_ce(z_e, y), len(outputs)
    for j, output in enumerate(outputs):
        ensemble = plain_kd(output.logits, z_e.detach(), 3.0)
        peers = sum(plain_kd(output.logits, mean[k], 3.0) for k in range(m) if k != j) / (m - 1)
        total = total + plain_ce(output.logits, y) + w * (ensemble + peers)
    return total


def assert_is(method, formula, views, y, chunks=1):
    """Loss and gradients of one iteration are those of formula(student, classifier, teacher)."""
    student, classifier, teacher = (copy.deepcopy(n) for n in (method.student, method.classifier, method.teacher))
    loss = run(method, views, y, chunks)
    value = formula(student, classifier, teacher)
    value.backward()
    assert abs(loss - value.detach()) < 1e-10
    for mine, plain in ((method.student, student), (method.classifier, classifier)):
        for (name, p), q in zip(mine.named_parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.grad, q.grad, rtol=0, atol=1e-8, msg=lambda m, n=name: f"{n}: {m}")
    assert all(p.grad is None for p in method.teacher.parameters())


def w_of(epoch, c=0.1, ramp=80):
    return c * math.exp(-5 * (1 - epoch / ramp) ** 2) if epoch <= ramp else c
