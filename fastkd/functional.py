"""The public functions, each documented where it is defined."""

from fastkd.ops.multi_teacher import multi_teacher_kd
from fastkd.ops.mutual import mutual_kd

__all__ = ["multi_teacher_kd", "mutual_kd"]
