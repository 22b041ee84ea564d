"""AE-KD: Adaptive Ensemble Knowledge Distillation in Gradient Space (Du et al., NeurIPS 2020)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastkd._core.checks import check_integer, check_number
from fastkd._core.labels import counted
from fastkd._core.messages import wrong_value
from fastkd.methods._checks import check_networks
from fastkd.methods.dgkd import DGKD


class AEKD(DGKD):
    """Several teachers, each batch weighted so that their gradients agree: the shortest vector between them.

        (1 - lam) * CE + lam * sum_k a_k * KD_T(z, z_k)
        a = argmin || sum_k a_k g_k ||^2 over sum_k a_k = 1, 0 <= a_k <= cap;  g_k = mean_b T * (p_T(z) - p_T(z_k))

    g_k [C] is the gradient of KD_T(z, z_k) with respect to the logits, meaned over the batch: it is known without a
    backward pass. Each default is marked (P) published, (C) our choice.

    >>> student, teachers = torch.nn.Linear(4, 3), [torch.nn.Linear(4, 3) for _ in range(3)]
    >>> method = fastkd.methods.AEKD(student, teachers, cap=0.5)
    >>> sorted(method.step(torch.optim.SGD(method.parameter_groups(lr=0.1)), torch.randn(8, 4), torch.arange(8) % 3))
    ['ce', 'kd']

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teachers: K networks with the same classes; frozen in place.
        temperature: T > 0; 4 (C).
        lam: weight of the teachers, in [0, 1]; 0.9 (C).
        cap: the largest weight of one teacher, in [1 / K, 1]: the paper's tolerance for teachers that disagree. None:
            1, where the weights may leave all teachers but one out (C).
        steps: of the search by projected gradients, on the device; 50 (C).

    With chunks > 1, and under data parallelism, the weights are those of each chunk and of each process's rows.
    Errors: ValueError or TypeError in one sentence, before training; at the first batch for teachers of other classes.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Sequence[nn.Module],
        *,
        temperature: float = 4.0,
        lam: float = 0.9,
        cap: float | None = None,
        steps: int = 50,
    ):
        name = self._name()
        teachers = check_networks(name, "teachers", teachers)
        least = 1 / len(teachers)
        expected = f"a number in [1 / K, 1] = [{least:.3g}, 1]"
        cap = 1.0 if cap is None else check_number(name, "cap", cap, expected, least, 1)
        steps = check_integer(name, "steps", steps, 0)
        super().__init__(student, teachers, temperature=temperature, lam=lam)
        self.cap, self.search_steps = cap, steps

    @property
    def no_topk(self) -> str:
        """Why the teachers' k likeliest classes are not enough."""
        return "the teachers' weights come from their logits of all classes"

    def _argument(self, guide: int) -> str:
        return f"teachers[{guide}]"

    def weights(self, classes: int) -> tuple[float, float]:
        """The weight of the teachers' divergences, each times its own of them, and that of the cross-entropy."""
        return self.lam, 1 - self.lam

    def teachers_weights(self, logits: Tensor, taught: list[Tensor], target: Tensor | None) -> Tensor:
        """[K]: those whose gradients agree best on this batch."""
        if target is None and self.lam < 1:
            raise wrong_value(self._name(), "target", "class indices where lam is below 1", None)
        return agreeing_weights(logits, taught, target, self.temperature, self.cap, self.search_steps)


@torch.no_grad()
def agreeing_weights(
    logits: Tensor, teachers: Sequence[Tensor], target: Tensor | None, temperature: float, cap: float, steps: int
) -> Tensor:
    """The weights a [K] of logits [B, C] and K teachers' [B, C], in float32 at least, on their device."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    q, *p = ((z.to(wide).flatten(0, -2) / temperature).softmax(-1) for z in (logits, *teachers))
    counts = q.new_ones(q.shape[0], dtype=torch.bool) if target is None else counted(target).flatten()
    share = counts.to(wide) / counts.sum().clamp(min=1)  # [B]
    gradients = temperature * torch.stack([((q - one) * share[:, None]).sum(0) for one in p])  # [K, C]
    gram = gradients @ gradients.T  # [K, K]
    weights = gram.new_full((len(p),), 1 / len(p))
    rate = 1 / gram.diagonal().sum().clamp(min=torch.finfo(wide).tiny)  # the trace bounds the largest eigenvalue
    for _ in range(steps):
        weights = on_capped_simplex(weights - rate * (gram @ weights), cap)
    return weights


def on_capped_simplex(point: Tensor, cap: float) -> Tensor:
    """The nearest [K] with sum 1 and elements in [0, cap]: `point` less a shift, clamped.

    Between the 2 K shifts at which an element reaches 0 or cap the sum falls on straight lines.
    """
    shifts = torch.cat([point - cap, point]).sort().values
    sums = (point - shifts[:, None]).clamp(0, cap).sum(1)  # from K cap, at least 1, down to 0
    after = (sums > 1).sum(0, keepdim=True).clamp(1, sums.numel() - 1)
    before = after - 1
    above, below = sums.gather(0, before), sums.gather(0, after)
    part = ((above - 1) / (above - below).clamp(min=torch.finfo(point.dtype).tiny)).clamp(0, 1)
    found = (point - torch.lerp(shifts.gather(0, before), shifts.gather(0, after), part)).clamp(0, cap)
    return found / found.sum()
