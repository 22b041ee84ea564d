"""The public functions, each documented where it is defined."""

from fastkd.ops.multi_teacher import multi_teacher_kd
from fastkd.ops.relational import rkd_angle, rkd_distance

__all__ = ["multi_teacher_kd", "rkd_angle", "rkd_distance"]
