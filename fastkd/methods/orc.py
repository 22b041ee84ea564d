"""ORC: Network Group-based Knowledge Distillation using Online Role Change (arXiv 2206.01186, ICCV 2023).

A teacher group holds the pivot teacher PT, trained before and still learning; a student group holds the target student
S_1 and larger immature networks S_2 .. S_K. In every iteration the k best of the student group change their role: they
are temporary teachers TT for this iteration, and members of the student group again after it. Step by step, for a
batch of B samples x_t with labels y_t:

    0. evaluation           ce[i, b] = CE(S_i(x_t), y_t) of every network and sample, without an update; who is promoted
    1. intensive teaching   PT learns from what the student group gets wrong, the feedback samples x_F, mixed with x_t
    2. private teaching     each TT learns from PT
    3. group teaching       everybody else in the student group learns from PT and from every TT

The authors published no code. What the sources leave open is an option below, or marked as our choice.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, ClassVar, Literal, get_args

import torch
from torch import Tensor, nn

from fastkd import functional
from fastkd._core.checks import check_choice, check_integer, check_number, check_temperature
from fastkd._core.messages import wrong_type, wrong_value
from fastkd.functional import GroupStats
from fastkd.methods._calls import as_argument, logits_in
from fastkd.methods._checks import check_boolean, check_network, check_networks
from fastkd.methods._feedback import hardest, mixed
from fastkd.methods._observe import observe, read_later
from fastkd.methods._pool import gather_pool
from fastkd.methods._standardize import distil_standardized
from fastkd.methods.base import Batch, Method, Phase, Terms, cross_entropy
from fastkd.ops.ranking import BY, By
from fastkd.ops.shared import check_process_group

Intensive = Literal["pivot", "group"]
Feedback = Literal["local", "global"]
Combine = Literal["each", "mean"]
Mix = Literal["mixup", "feedback", "batch"]

TEACHINGS = ("intensive", "private", "group")


class ORC(Method):
    """A pivot teacher and a student group of K networks; the k best of the group teach the others, anew in every batch.

    With sg = detached and KD_T(z, t) = T^2 * mean_b sum_c p_T(t) * (log p_T(t) - log p_T(z)), three updates:

        intensive   x~ = l * x_t + (1 - l) * x_F,  l ~ Beta(a, a)
                    L_PT   = l * CE(PT(x~), y_t) + (1 - l) * CE(PT(x~), y_F)
        private     L_TT_j = (1 - b) * CE + b * KD_T(TT_j, sg PT)                                   j = 1 .. k
        group       L_S_i  = (1 - b) * CE + b * (KD_T(S_i, sg PT) + sum_j KD_T(S_i, sg TT_j))       the K - k others

    Teachers' outputs are computed after their own update, in eval mode. The temporary teachers are those of lowest
    mean CE on the batch (C). Feedback samples (C, after a line (S) that a softmax sets the proportions): with r the
    softmax of the K mean CEs, S_i contributes the round(r_i * B) samples that it gets most wrong, its highest CEs; in
    all B, so that x_F pairs one to one with x_t. A sample that is hard for two networks is taken twice. l is one
    number an iteration (C).

    The group is evaluated in eval mode; each module's mode is restored and no buffer changes. While batch normalisation
    has poor running statistics, in the first iterations, promotions are arbitrary. A row with target -100 counts in no
    ranking and no loss and is no feedback. Floating-point tensors of the inputs are mixed, others (masks, indices) stay
    those of x_t.

    On a GPU the host reads one thing an iteration, the indices of the promoted networks. The copy is started after the
    evaluation and read after intensive teaching was enqueued, so that the GPU does not run dry. With
    intensive="group" it is read before it.

    Each default is marked (P) published, (S) from a summary of the paper, (C) our choice.

    >>> pivot, *students = [torch.nn.Linear(4, 3) for _ in range(4)]
    >>> method = fastkd.methods.ORC(pivot, students)
    >>> parts = method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.randn(8, 4), torch.arange(8) % 3)
    >>> method.promotions.sum().item(), method.deployable() is students[0]
    (1, True)

    Args:
        pivot: the pivot teacher, trained before; it learns on. Logits [B, C] or an object with `.logits`.
        students: K >= 2 networks with the pivot's classes; students[0] is the target student, the one to ship.
        temperature: T > 0. 4 (C).
        beta: b, weight of the teachers, in [0, 1]. 0.5 (C).
        alpha: a > 0 of the mix-up. 1 (C).
        promote: k in [1, K - 1]. 1 (S: better than 2).
        rank_by: "ce" | "accuracy" | "top5", who is best on the batch. "ce" (C). "fixed": the temporary teachers are
            students[1] .. students[k] in every iteration, the paper's ablation without role change; which they are is
            ours (C): with the command line's order the largest networks.
        intensive: who is trained by intensive teaching. "pivot" (P) | "group": the whole teacher group, as the abstract
            has it (P): the pivot and the temporary teachers, each by the same loss.
        teach: which of "intensive", "private", "group" take place, in the paper's order whatever the order here. All
            (S). A teaching that is left out updates nothing and has no phase: the paper's ablation.
        combine: how private and group teaching take their teachers: "each" by a KD_T of its own (S), or the "mean" of
            their logits by one KD_T of weight b (C), the paper's ablation.
        mix: what intensive teaching shows: the "mixup" of batch and feedback (S), "feedback" alone, CE(PT(x_F), y_F),
            or the "batch" alone, CE(PT(x_t), y_t): the paper's ablation.
        errors_only: only misclassified samples are feedback, the abstract's "error samples"; a network without one
            leaves its share to the others, and where no network has one, the highest CEs are taken. True (P). False:
            each network's highest CEs, wrong or not.
        standardize: private and group teaching distil the z-scores of the logits, as in DGKD. False.
        pivot_lr: the pivot's learning rate as a multiple of the others', >= 0. 0.1 (C).
        seed: of l.
        process_group: a torch.distributed group under data parallelism: who is promoted and the proportions r are then
            those of all ranks' batches, and every rank promotes the same networks. Every rank of it must take every
            iteration. Needed with DistributedDataParallel.
        feedback: with a process_group: "local": each rank's hardest of its own samples, in the global proportions |
            "global": the hardest of all ranks' samples, as one process with the whole batch would take them. The
            images of the batch are gathered over the group for it, and the host reads how many rows each rank has.
            "local" (C).

    Attributes:
        promotions: int64 [K], how often each network was promoted; in the state dict.

    Phases: "intensive", "private", "group", by `phase.name`, as far as `teach` has them. Under gradient accumulation
    ranking, feedback and mix-up are those of the whole batch.

    Errors: ValueError or TypeError in one sentence, before training for all of the above; at the first batch for
    missing labels, inputs without a floating-point tensor, and networks whose logits differ in shape.
    """

    one_loss = False
    kept_as: ClassVar = {"teach": "teach_by"}
    pivot: nn.Module
    students: nn.ModuleList
    promotions: Tensor
    counted: ClassVar[dict[str, str]] = {"promotions": "Steps in which a network was a temporary teacher"}

    def __init__(
        self,
        pivot: nn.Module,
        students: Sequence[nn.Module],
        *,
        temperature: float = 4.0,
        beta: float = 0.5,
        alpha: float = 1.0,
        promote: int = 1,
        rank_by: By | Literal["fixed"] = "ce",
        intensive: Intensive = "pivot",
        teach: Sequence[str] = TEACHINGS,
        combine: Combine = "each",
        mix: Mix = "mixup",
        errors_only: bool = True,
        standardize: bool = False,
        pivot_lr: float = 0.1,
        seed: int = 0,
        process_group: torch.distributed.ProcessGroup | None = None,
        feedback: Feedback = "local",
    ):
        name = self._name()
        check_network(name, "pivot", pivot)
        students = check_networks(name, "students", students)
        if len(students) < 2:
            raise wrong_value(name, "students", "a sequence of at least two networks", "one")
        promote = check_integer(name, "promote", promote, 1, len(students) - 1)
        check_choice(name, "rank_by", rank_by, (*BY, "fixed"))
        check_choice(name, "intensive", intensive, get_args(Intensive))
        teach = _check_teach(name, teach)
        check_choice(name, "combine", combine, get_args(Combine))
        check_choice(name, "mix", mix, get_args(Mix))
        errors_only = check_boolean(name, "errors_only", errors_only)
        check_process_group(name, process_group)
        _check_one_process(name, process_group)
        check_choice(name, "feedback", feedback, get_args(Feedback))
        temperature = check_temperature(name, temperature)
        beta = check_number(name, "beta", beta, "a number in [0, 1]", 0, 1)
        alpha = check_number(name, "alpha", alpha, "a finite number > 0", sys.float_info.min)
        pivot_lr = check_number(name, "pivot_lr", pivot_lr, "a finite number >= 0", 0)
        super().__init__(learners={"pivot": pivot, "students": students}, seed=seed)
        self.temperature, self.beta, self.alpha, self.promote = temperature, beta, alpha, promote
        self.rank_by, self.intensive, self.errors_only = rank_by, intensive, errors_only
        self.teach_by, self.combine, self.mix = teach, combine, mix
        self.standardize = check_boolean(name, "standardize", standardize)
        self.pivot_lr, self.process_group = pivot_lr, process_group
        self.feedback_scope = feedback if process_group is not None else "local"
        self.register_buffer("promotions", torch.zeros(len(students), dtype=torch.int64))

    def iteration(self, batch: Batch, generator: torch.Generator) -> Iterator[Phase]:
        """The paper's phases in their order: intensive, private and group teaching."""
        _check_one_process(self._name(), self.process_group)
        # 0. Evaluation: who is promoted, and what the student group gets wrong.
        stats, classes = self._evaluate(batch)
        read_promoted = self._promoted(stats)
        share = random.Random(_seed(generator)).betavariate(self.alpha, self.alpha)  # l

        # 1. Intensive teaching: the pivot, or the teacher group, by the batch mixed with feedback.
        if "intensive" in self.teach_by:
            group = ["pivot"] if self.intensive == "pivot" else ["pivot", *_names(read_promoted())]
            terms = partial(self._intensive_terms, group, classes, share)
            yield self._phase("intensive", group, terms, self._lesson(batch, stats, share))

        # 2. Private teaching: each temporary teacher, by the pivot.
        promoted = read_promoted()
        temporary = _names(promoted)
        teachers = [self._observe("pivot", batch)]  # each [B, C]
        if "private" in self.teach_by:
            terms = partial(self._taught_terms, "private", temporary)
            yield self._phase("private", temporary, terms, _beside(batch, teachers))

        # 3. Group teaching: everybody else, by the pivot and every temporary teacher.
        if "group" in self.teach_by:
            others = _names(i for i in range(len(self.students)) if i not in promoted)
            teachers += [self._observe(name, batch) for name in temporary]
            terms = partial(self._taught_terms, "group", others)
            yield self._phase("group", others, terms, _beside(batch, teachers))

        # Demotion: roles were local to this call.
        for i in promoted:
            self.promotions[i] += 1

    def deployable(self) -> nn.Module:
        """The target student, students[0]."""
        return self.students[0]

    def counts(self) -> dict[str, dict[str, int]]:
        """How often each network was promoted, for the log."""
        return {"promotions": {f"students.{i}": count for i, count in enumerate(self.promotions.tolist())}}

    def parameter_groups(self, lr: float) -> list[dict[str, Any]]:
        """The student group at `lr`, then the pivot at `pivot_lr * lr`."""
        rates = {"students": lr, "pivot": self.pivot_lr * lr}
        return [
            {"params": [p for p in self.get_submodule(name).parameters() if p.requires_grad], "lr": rate}
            for name, rate in rates.items()
        ]

    def _phase(self, name: str, networks: Sequence[str], terms: Callable[[Any, Any], Terms], batch: Batch) -> Phase:
        return Phase([self.learner(network) for network in networks], terms, batch, name)

    def _evaluate(self, batch: Batch) -> tuple[GroupStats, int]:
        """Statistics [K, B] of the student group on the batch, and the number of classes."""
        if not isinstance(batch.target, Tensor):
            raise wrong_type(self._name(), "target", "class indices [B]", type(batch.target).__name__)
        names, parts, classes = _names(range(len(self.students))), [], 0
        for inputs, target, _ in batch:
            logits = [self._observed(name, inputs) for name in names]  # K x [B, C]
            classes = logits[0].shape[-1]
            for name, z in zip(names, logits, strict=True):
                self._check_logits(name, z, [len(target), classes])
            parts.append(functional.group_stats(logits, target))
        return GroupStats(*(torch.cat(column, 1) for column in zip(*parts, strict=True))), classes

    def _promoted(self, stats: GroupStats) -> Callable[[], list[int]]:
        """What waits for the k networks that are temporary teachers in this iteration, best first, and tells them."""
        if self.rank_by == "fixed":
            return lambda: list(range(1, self.promote + 1))
        order = functional.rank_networks(stats, self.rank_by, self.process_group)  # [K], best first
        return read_later(order[: self.promote])

    def _lesson(self, batch: Batch, stats: GroupStats, share: float) -> Batch:
        """What intensive teaching shows, its targets a pair (y_t, y_F)."""
        if self.mix == "batch":
            return Batch(batch.inputs, (batch.target, batch.target), batch.chunks, name=self._name())
        pool = gather_pool(batch, stats, self.process_group) if self.feedback_scope == "global" else None
        if pool is None:
            samples = hardest(stats, self.errors_only, self.process_group)  # [B]
        else:
            samples = pool.mine(hardest(pool.stats, self.errors_only, None))
        return mixed(self._name(), batch, samples, share if self.mix == "mixup" else 0.0, pool)

    def _intensive_terms(self, names: Sequence[str], classes: int, share: float, inputs: Any, targets: Any) -> Terms:
        own, feedback = targets  # y_t, y_F
        share = {"mixup": share, "feedback": 0.0, "batch": 1.0}[self.mix]
        loss: Tensor = 0  # type: ignore[assignment]  # until the first network
        for name in names:
            logits = self.learned_logits(name, inputs)  # [B, C]
            self._check_logits(name, logits, [len(own), classes])
            parts = [(share, own), (1 - share, feedback)]
            loss = loss + sum(weight * cross_entropy(logits, target) for weight, target in parts if weight > 0)
        return loss, {"intensive": loss.detach()}

    def _taught_terms(self, phase: str, names: Sequence[str], inputs: Any, target: Tensor) -> Terms:
        inputs, teachers = inputs
        distil = distil_standardized if self.standardize else functional.multi_teacher_kd
        losses: list[Tensor] = []
        kds: list[Tensor] = []
        ces: list[Tensor] = []
        shipped = None
        for name in names:
            logits = self.learned_logits(name, inputs)  # [B, C]
            shipped = logits if name == "students.0" else shipped
            one, terms = distil(
                logits,
                teachers,
                target,
                weights=[1.0 if self.combine == "each" else 1 / len(teachers)] * len(teachers),
                kd_weight=self.beta,
                temperature=self.temperature,
                combine="losses" if self.combine == "each" else "logits",
                ce_weight=1 - self.beta,
                return_terms=True,
            )
            losses.append(one)
            ces.append((1 - self.beta) * terms.ce)
            kds.append(self.beta * terms.kd)
        loss, ce, kd = (sum(each[1:], each[0]) for each in (losses, ces, kds))
        parts = {f"{phase}_ce": ce, f"{phase}_kd": kd}
        return (loss, parts) if shipped is None else (loss, parts, shipped)

    def _observe(self, name: str, batch: Batch) -> Tensor:
        """Logits [B, C] of a network for the batch, part by part."""
        return torch.cat([self._observed(name, inputs) for inputs, *_ in batch])

    def _observed(self, name: str, inputs: Any) -> Tensor:
        output = observe(self.get_submodule(name), self.learner(name), inputs)
        return logits_in(output, self._name(), as_argument(name))

    def _check_logits(self, name: str, logits: Tensor, shape: list[int]) -> None:
        if list(logits.shape) != shape:
            expected = f"a network whose logits have shape {shape}, [B, C] with the classes of students[0]"
            got = f"logits of shape {list(logits.shape)}"
            raise wrong_value(self._name(), as_argument(name), expected, got)


def _check_one_process(method: str, process_group: Any) -> None:
    """However the networks are made parallel, processes that rank apart would promote different ones."""
    if process_group is not None or not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return
    if torch.distributed.get_world_size() > 1:
        expected = (
            "given where torch.distributed has several processes, so that all promote the same networks "
            "(torch.distributed.group.WORLD, or a group of this process alone to train apart)"
        )
        raise wrong_value(method, "process_group", expected, None)


def _check_teach(method: str, teach: object) -> tuple[str, ...]:
    """The teachings that take place, in the paper's order."""
    expected = "a sequence of " + ", ".join(repr(teaching) for teaching in TEACHINGS) + ", at least one of them"
    if isinstance(teach, str) or not isinstance(teach, Sequence):
        raise wrong_type(method, "teach", expected, repr(teach))
    if not teach or any(teaching not in TEACHINGS for teaching in teach):
        raise wrong_value(method, "teach", expected, list(teach))
    return tuple(teaching for teaching in TEACHINGS if teaching in teach)


def _names(indices: Iterable[int]) -> list[str]:
    return [f"students.{i}" for i in indices]


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator, device="cpu"))


def _beside(batch: Batch, teachers: Sequence[Tensor]) -> Batch:
    """The batch with the teachers' logits beside its inputs, to be cut alike."""
    return Batch((batch.inputs, tuple(teachers)), batch.target, batch.chunks)
