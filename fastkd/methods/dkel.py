"""DKEL: Decoupled Knowledge with Ensemble Learning for Online Distillation (arXiv 2312.11218), and PCL, its base.

m peers grow on one stem, each sees its own augmentation of the image, and three sources teach them: the labels, an
ensemble classifier on the features of all peers, and a mean teacher: the same networks with averaged weights. PCL
(Wu and Gong, "Peer Collaborative Learning for Online Knowledge Distillation", AAAI 2021) starts the teacher as a copy
of the student; DKEL decouples it by weights and first steps of its own, and lets its peers teach as an ensemble early.

    student = fastkd.models.branched("resnet32", 100)
    method = DKEL(student)
    method.initialise(loader, lr)                  # before the first epoch
    for views, target in loader:                   # m views of each image: fastkd.data.load(..., views=3)
        for phase in method.phases(views, target): ...
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number, check_temperature
from fastkd._core.labels import counted
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.methods._checks import check_apart, check_boolean, check_network
from fastkd.methods._fresh import weights_from
from fastkd.methods._mean_teacher import Averaging, average_gradients, check_precision, fresh_like, ramp_up, shapes
from fastkd.methods.base import Batch, Phase, Terms
from fastkd.models import Branched

NEGLIGIBLE = 0.01  # a weight of the teachers' ensemble that counts as 0 (P, code)
INIT_LR_FACTOR, INIT_WEIGHT_DECAY = 0.01, 5e-4  # of the teacher's first steps (P, code)
Variant = Literal["intended", "released"]


class DKEL(Averaging):
    """Peers on a shared stem, taught by their ensemble and by a decoupled mean teacher.

    With z_j the logits [B, C] of peer j on view j, t_k those of the teacher's peer k on view k, z_e those of the
    ensemble classifier on the peers' concatenated features, KD as in fastkd.methods.dgkd with `temperature`:

        L = CE(z_e) + sum_j [ CE(z_j) + w * KD(z_j, z_e) + E_j + M_j ]
        E_j = c * lam * KD(z_j, mean of t_k over k != j)               the teachers' decaying ensemble
        M_j = w * (1 - lam) * mean over k != j of KD(z_j, t_k)         the mean teachers, one by one
        w(epoch) = c * exp(-5 * (1 - epoch / R)^2) up to epoch R = ramp * epochs / of, then c
        lam(epoch) = exp(-decay * epoch), and 0 once it is at most 0.01

    No gradient goes into a target. The teacher runs in train mode and without a graph: its batch statistics are those
    of its own forward passes. After each step its parameters become a * teacher + (1 - a) * student; where the loop
    took no step (`phase.skipped`) they stay. Inputs are m views of the images, a tuple or list of m tensors.
    Nothing here waits for a GPU. With several processes each rank's teacher keeps batch statistics of its own part.

    `variant="intended"` is the method as described: the teacher starts from random weights of its own, takes a few
    cross-entropy steps (`initialise`), and a is constant from the first step on. That E_j is not ramped up is ours (C):
    the abstract wants a strong teacher early, and with w in the place of c (`ensemble_ramp=True`, as the released code
    writes it) E_j never weighs more than 0.0067 c. `variant="released"` does what the
    authors' code does: the teacher starts as a copy of the student and takes those steps; the ramp-up divides the epoch
    by c instead of R, over `ramp` epochs of any run: w is e^-5 * c in epoch 0 and nothing (below 1e-170) until epoch
    `ramp`; so lam, which has gone by then, has no effect; and a = min(1 - 1 / (g + 1), momentum) is 0 in step g = 0,
    which overwrites the teacher.

    An average with a = 0.999 follows about 1000 steps behind: in a run of 2,340 steps the deployed network was up to
    2.3 points below plain cross-entropy. So a follows the length of the run, which `start_epoch(epoch, epochs, steps)`
    tells: 1 - a = 117 / steps of the run, between 0.001 and 0.5 (C); 300 epochs of 390 steps have the paper's 0.999.

    Each default is marked (P) published in paper or code, (C) our choice.

    >>> student = fastkd.models.branched("plain2", 10, branches=3, image_size=8)
    >>> method = fastkd.methods.DKEL(student, init=None)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> views = [torch.randn(4, 3, 8, 8) for _ in range(3)]
    >>> sorted(method.step(optimizer, views, torch.arange(4)))
    ['ce', 'ensemble_ce', 'kd']
    >>> method.steps
    1

    Args:
        student: a fastkd.models.Branched of m peers; 3 (P). Its parameters must be float32 or float64.
        teacher: a Branched of the same shapes, trained in place by averaging. None: as `variant` says, random weights
            (where the student was made by fastkd.models.branched) or a copy.
        classifier: the ensemble classifier, a network [B, m * D] -> [B, C]; it learns with the student and is not
            deployed. None: one linear layer (P).
        temperature: T > 0; 3 (P).
        ce_weight: weight of all cross-entropies, >= 0; 1 (P).
        c: weight of the distillation after the ramp-up, >= 0; 0.1 (P, code).
        ramp: epochs of the ramp-up, >= 0, in a run of `of` epochs; 80 (P).
        of: 300 (P, the CIFAR schedule); a shorter run ramps up in the same fraction of its epochs (C). None: `ramp` is
            in epochs of any run. "released" does not look at it.
        decay: rate of lam per epoch, >= 0, not scaled; 0.5 (P, code). None: no teachers' ensemble, lam = 0.
        init: the teacher takes init + 1 steps in `initialise`; 1 (P, code). None: no initialisation: the teacher is
            PCL's, a copy of the student with the a of "released".
        variant: "intended" (C) | "released".
        ensemble_ramp: True: w instead of c before the teachers' ensemble, too. False (C). "released" always has it.
        momentum: a, in [0, 1]. None: by the length of the run (C), or 0.999 (P) with "released" and where no loop has
            told the number of steps.
        seed: of the random weights of teacher and classifier. Take the same on every rank.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch for
    inputs that are not m views and for a missing target. RuntimeWarning at the first batch without `initialise`.
    """

    teacher: Branched

    def __init__(
        self,
        student: Branched,
        *,
        teacher: Branched | None = None,
        classifier: nn.Module | None = None,
        temperature: float = 3.0,
        ce_weight: float = 1.0,
        c: float = 0.1,
        ramp: float = 80,
        of: float | None = 300,
        decay: float | None = 0.5,
        init: int | None = 1,
        variant: Variant = "intended",
        ensemble_ramp: bool = False,
        momentum: float | None = None,
        seed: int = 0,
    ):
        name = self._name()
        self._check_branched("student", student)
        seed = check_integer(name, "seed", seed)
        check_choice(name, "variant", variant, get_args(Variant))
        temperature = check_temperature(name, temperature)
        ce_weight = check_number(name, "ce_weight", ce_weight, "a finite number >= 0", 0)
        c = check_number(name, "c", c, "a finite number >= 0", 0)
        ramp = check_number(name, "ramp", ramp, "a finite number >= 0", 0)
        of = None if of is None else check_number(name, "of", of, "a number >= 1, or None", 1)
        decay = None if decay is None else check_number(name, "decay", decay, "a number >= 0, or None", 0)
        init = None if init is None else check_integer(name, "init", init, 0)
        check_boolean(name, "ensemble_ramp", ensemble_ramp)
        momentum = None if momentum is None else check_number(name, "momentum", momentum, "a number in [0, 1]", 0, 1)
        with weights_from(seed):  # the classifier first: the same one whatever the teacher
            classifier = _classifier_of(name, student) if classifier is None else classifier
            if teacher is None:
                copied = variant == "released" or init is None
                teacher = copy.deepcopy(student) if copied else fresh_like(name, student)
        check_network(name, "classifier", classifier)
        self._check_branched("teacher", teacher)
        if shapes(teacher) != shapes(student):
            raise wrong_value(name, "teacher", "a network of the student's shapes", "one of other shapes")
        learners = {"student": student, "classifier": classifier}
        check_apart(name, learners, {"teacher": teacher}, tied=False)
        super().__init__(learners=learners, seed=seed)
        self.teacher = teacher.requires_grad_(False)
        self.temperature, self.ce_weight, self.momentum, self.variant = temperature, ce_weight, momentum, variant
        self.c, self.ramp, self.of, self.decay, self.init = c, ramp, of, decay, init
        self.ensemble_ramp = ensemble_ramp or variant == "released"
        self.steps, self.initialised = 0, False

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """One phase: the step of student and classifier; the mean teacher moves where it was not skipped."""
        self._check_views("inputs", batch.inputs)
        check_precision(self._name(), self.teacher)
        if self.init is not None and not self.initialised and self.steps == 0:
            warnings.warn(
                f"{self._name()}: initialise(batches, lr) was not called before training: the teacher goes without its "
                "first steps (init=None says so on purpose)",
                RuntimeWarning,
                stacklevel=3,
            )
        weights = self.distillation_weight(self.epoch, self.epochs), *self.teachers_weights(self.epoch, self.epochs)
        networks = [self.learner("student"), self.learner("classifier")]
        phase = Phase(networks, partial(self._terms, *weights), batch)
        yield phase
        self.follow(phase)

    def deployable(self) -> nn.Module:
        """The teacher's first peer (P, PCL): an ordinary network, image -> logits, in the teacher's own storages.

        Its parameters do not require grad.
        """
        return self.teacher.peer(0)

    def initialise(self, batches: Iterable[tuple[Sequence[Tensor], Tensor]], lr: float, *, chunks: int = 1) -> None:
        """The teacher's first steps: SGD on the mean of its peers' cross-entropies, for init + 1 of `batches`.

        To be called before the first epoch, with the training set's (views, target) and the base learning rate: steps
        of lr / 100, weight decay 5e-4, no momentum (P, code). It takes no batch and returns at once where it has run
        before (saved in the state dict), and with init=None. With several processes every rank calls it: gradients are
        those of the mean over the rows of the default group. `chunks` as in `phases`, each of two rows at least.
        """
        if self.init is None or self.initialised:
            return
        lr = check_number(self._name(), "lr", lr, "a finite number >= 0", 0)
        check_integer(self._name(), "chunks", chunks, 1)
        device, training, done = next(self.teacher.parameters()).device, self.teacher.training, 0
        self.teacher.requires_grad_(True).train()
        optimizer = torch.optim.SGD(self.teacher.parameters(), lr * INIT_LR_FACTOR, weight_decay=INIT_WEIGHT_DECAY)
        try:
            for views, target in islice(batches, self.init + 1):
                self._check_views("batches", views)
                views, target = [view.to(device, non_blocking=True) for view in views], target.to(device)
                optimizer.zero_grad(set_to_none=True)
                for part, labels, share in Batch(views, target, max(1, min(chunks, len(target) // 2))):
                    losses = functional.cross_entropy([o.logits for o in self.teacher(part)], labels)
                    Batch.weigh(losses.mean(), share).backward()
                average_gradients(self.teacher, counted(target).sum())
                optimizer.step()
                done += 1
        finally:
            self.teacher.requires_grad_(False).train(training)
            self.teacher.zero_grad(set_to_none=True)
        if done == 0:
            raise wrong_value(self._name(), "batches", "an iterable of at least one (views, target)", "none")
        self.initialised = True

    def distillation_weight(self, epoch: int, epochs: int) -> float:
        """w in epoch 0, 1, ... of a run of `epochs`."""
        if self.variant == "intended":
            return self.c * ramp_up(epoch, self.ramp if self.of is None else self.ramp * epochs / self.of)
        if epoch > self.ramp or self.c == 0:
            return self.c
        left = 1 - epoch / self.c  # by c instead of the length
        return self.c * math.exp(-5 * left * left)

    def ensemble_weight(self, epoch: int) -> float:
        """lam in epoch 0, 1, ..."""
        weight = 0.0 if self.decay is None else math.exp(-self.decay * epoch)
        return weight if weight > NEGLIGIBLE else 0.0

    def teachers_weights(self, epoch: int, epochs: int) -> tuple[float, float]:
        """The weights of the mean teachers' ensemble and of each peer's KD to them one by one, in this epoch."""
        weight, lam = self.distillation_weight(epoch, epochs), self.ensemble_weight(epoch)
        return (weight if self.ensemble_ramp else self.c) * lam, weight * (1 - lam)

    def momentum_at(self, step: int) -> float:
        """a, the teacher's share in itself after step 0, 1, ... that was taken."""
        warms_up = self.variant == "released" or self.init is None
        return super().momentum_at(step) if warms_up else self.whole_momentum()

    def whole_momentum(self) -> float:
        """a without its warm-up: that of the released code is 0.999 in runs of any length."""
        return 0.999 if self.momentum is None and self.variant == "released" else super().whole_momentum()

    def extra(self) -> dict[str, Any]:
        """The base's, and whether `initialise` was called."""
        return super().extra() | {"initialised": self.initialised}

    def set_extra(self, extra: dict[str, Any]) -> None:
        """The way back of `extra`."""
        super().set_extra(extra)
        self.initialised = extra["initialised"]

    def _terms(self, weight: float, together: float, one_by_one: float, views: Any, target: Any) -> Terms:
        if target is None:
            raise wrong_value(self._name(), "target", "class indices [B]", None)
        # Also where nothing is distilled: its batch statistics follow.
        with torch.no_grad():
            running, _ = self._teaching.get(self.teacher, (self.teacher, None))
            teachers = [o.logits for o in running(views)]  # m x [B, C]
        outputs = self.learner("student")(views)
        peers = [o.logits for o in outputs]  # m x [B, C]
        joint = self.learned_logits("classifier", torch.cat([o.features for o in outputs], 1))  # [B, C]
        if joint.shape != peers[0].shape:
            expected = f"a network whose logits have the peers' shape {list(peers[0].shape)}"
            raise wrong_value(self._name(), "classifier", expected, f"logits of shape {list(joint.shape)}")
        m = len(peers)
        columns, column_weights = _teaching(teachers, together, one_by_one)
        # All of L in one pass: m + 1 learners, of which the last, z_e, learns from the labels and teaches the others.
        losses, terms = functional.mutual_kd(
            [*peers, joint],
            target,
            weights=[*([0.0] * m + [weight] for _ in range(m)), [0.0] * (m + 1)],
            teachers=columns,
            teacher_weights=[*column_weights, [0.0] * len(columns)] if columns else None,
            temperature=self.temperature,
            ce_weight=self.ce_weight,
            return_terms=True,
        )  # each [m + 1]
        ce = self.ce_weight * terms.ce
        return losses.sum(), {"ce": ce[:m].sum(), "ensemble_ce": ce[m], "kd": terms.kd.sum()}, teachers[0]

    def _check_branched(self, argument: str, value: object) -> None:
        if not isinstance(value, Branched):
            expected = "peers on a shared stem, a fastkd.models.Branched (fastkd.models.branched makes one)"
            raise wrong_type(self._name(), argument, expected, type(value).__name__)

    def _check_views(self, argument: str, views: object) -> None:
        m = len(self.teacher.peers)
        expected = f"{m} views of the images, a tuple or list of {m} tensors (fastkd.data.load(..., views={m}))"
        if not isinstance(views, (tuple, list)) or not all(isinstance(view, Tensor) for view in views):
            got = "one tensor" if isinstance(views, Tensor) else type(views).__name__
            raise wrong_type(self._name(), argument, expected, got)
        if len(views) != m:
            raise wrong_value(self._name(), argument, expected, f"{len(views)} views")


def _teaching(teachers: list[Tensor], together: float, one_by_one: float) -> tuple[list[Tensor], list[list[float]]]:
    """What the mean teacher gives to mutual_kd: columns N x [B, C] and weights [m, N]; N = 0, m or 2m."""
    m = len(teachers)
    columns: list[Tensor] = []
    rows: list[list[float]] = [[] for _ in teachers]
    if together != 0:  # both kinds of columns in one dtype, and a mean that is not rounded to half precision
        teachers = [t.to(torch.promote_types(t.dtype, torch.float32)) for t in teachers]
    if one_by_one != 0:
        columns += teachers
        for j, row in enumerate(rows):
            row += [0.0 if k == j else one_by_one / (m - 1) for k in range(m)]
    if together != 0:
        others = [[t for k, t in enumerate(teachers) if k != j] for j in range(m)]
        columns += [sum(ts[1:], ts[0]) / (m - 1) for ts in others]
        for j, row in enumerate(rows):
            row += [together if k == j else 0.0 for k in range(m)]
    return columns, rows


def _classifier_of(name: str, student: Branched) -> nn.Module:
    peer, like = student.peer(0), next(student.parameters())
    head = getattr(peer, "fc", getattr(peer, "classifier", None))
    head = head[-1] if isinstance(head, nn.Sequential) else head
    if not isinstance(head, nn.Linear):
        expected = "given where the peers have no linear layer `fc` or `classifier` that tells the number of classes"
        raise wrong_value(name, "classifier", expected, None)
    return nn.Linear(len(student.peers) * peer.features_width, head.out_features).to(like.device, like.dtype)
