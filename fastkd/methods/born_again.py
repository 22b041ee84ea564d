"""BAN: Born-Again Neural Networks (arXiv 1805.04770, ICML 2018): a chain of equal networks, each taught by the last.

generations = [train(CE(network()))]
for _ in range(k):
    generations.append(train(BAN(network(), generations[-1])))
"""

from __future__ import annotations

from torch import nn

from fastkd.methods.baselines import KD


class BAN(KD):
    """A network that learns from the previous generation of itself: `KD` without a temperature.

        (1 - lam) * CE + lam * KL(p_teacher || p_student)

    The student is of the teacher's architecture (P) and freshly initialised (S): a copy of the teacher would have
    nothing to learn from it. The twin by logits of `FEED(mode="sequential")`. (P) published in the paper, (S) from a
    summary of it, (C) our choice.

    >>> method = fastkd.methods.BAN(torch.nn.Linear(4, 3), torch.nn.Linear(4, 3))
    >>> method.temperature, method.weights(classes=3)
    (1.0, (0.5, 0.5))

    Args:
        student: the network to train; logits [B, C] or an object with `.logits`.
        teacher: the previous generation; frozen in place.
        temperature: T > 0; 1 (S). Another T brings its T^2, as in KD.
        lam: weight of the divergence, in [0, 1]; 0.5 (C). With 1 there is no cross-entropy, and labels are not needed.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, *, temperature: float = 1.0, lam: float = 0.5):
        super().__init__(student, teacher, temperature=temperature, lam=lam)
