"""PCL: Peer Collaborative Learning for Online Knowledge Distillation (Wu and Gong, AAAI 2021)."""

from __future__ import annotations

from typing import Any

from fastkd.methods._signature import takes
from fastkd.methods.dkel import DKEL, Variant  # noqa: F401  # of the signature
from fastkd.models import Branched


class PCL(DKEL):
    """Peer Collaborative Learning (AAAI 2021): DKEL without initialisation and decaying ensemble, and with c = 1.

        L = CE(z_e) + sum_j [ CE(z_j) + w * KD(z_j, z_e) + w * mean over k != j of KD(z_j, t_k) ]

    The teacher starts as a copy of the student and averages with a = min(1 - 1 / (g + 1), momentum) after step g, so
    that it is the student after the first one (S). `initialise` does nothing.

    >>> student = fastkd.models.branched("plain2", 10, branches=2, image_size=8)
    >>> method = fastkd.methods.PCL(student)
    >>> optimizer = torch.optim.SGD(method.parameter_groups(lr=0.1))
    >>> parts = method.step(optimizer, [torch.randn(4, 3, 8, 8)] * 2, torch.arange(4))
    >>> torch.equal(method.teacher.peer(0).fc.weight, student.peer(0).fc.weight)  # after the first step
    True

    Args:
        student, teacher, classifier, temperature, ce_weight, ramp, of, momentum, seed: as in `DKEL`; T = 3, ramp = 80
            epochs of 300 (S), momentum None; the scaling of both to other lengths of a run is ours (C).
        c: weight of the distillation after the ramp-up; 1 (S).
        variant: "intended" | "released": the ramp-up of the reproduction that the authors of DKEL released.
    """

    @takes(DKEL, without=("decay", "ensemble_ramp", "init"), c=1.0)
    def __init__(self, student: Branched, **options: Any):
        super().__init__(student, decay=None, init=None, **options)
