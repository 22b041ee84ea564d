"""torchdistill's own loss modules, called as its training box calls them: https://github.com/yoshitomo-matsubara/torchdistill"""

from __future__ import annotations

from functools import cache

from torch import Tensor

DISTRIBUTION, MODULE, NEEDS_GPU = "torchdistill", "torchdistill.losses.mid_level", False
PATHS = {"teacher_output_path": "z", "student_output_path": "z"}


def _io(tensor: Tensor) -> dict:
    return {"z": {"output": tensor}}


@cache
def _kd(temperature: float, alpha: float, beta: float):
    from torchdistill.losses.mid_level import KDLoss

    return KDLoss("z", "output", "z", "output", temperature=temperature, alpha=alpha, beta=beta)


@cache
def _rkd(distance: float, angle: float):
    from torchdistill.losses.mid_level import RKDLoss

    return RKDLoss(dist_factor=distance, angle_factor=angle, reduction="mean", **PATHS)


@cache
def _factor_transfer():
    from torchdistill.losses.mid_level import FTLoss

    return FTLoss(p=1, reduction="mean", paraphraser_path="z", translator_path="z")


def multi_teacher(student, teachers, target, weights, temperature, ce_weight) -> Tensor:
    """Its KDLoss knows one teacher: a term for each, the cross-entropy shared out among them."""
    io, total = _io(student), 0
    for teacher, weight in zip(teachers, weights, strict=True):
        total = total + _kd(temperature, ce_weight / len(teachers), weight)(io, _io(teacher), target)
    return total


def feature_ensemble(students, teachers) -> Tensor:
    return sum(_factor_transfer()(_io(a), _io(b)) for a, b in zip(students, teachers, strict=True))


def rkd_distance(student, teacher) -> Tensor:
    return _rkd(1.0, 0.0)(_io(student), _io(teacher))


def rkd_angle(student, teacher) -> Tensor:
    return _rkd(0.0, 1.0)(_io(student), _io(teacher))
