"""The public functions, each documented where it is defined."""

from fastkd.ops.multi_teacher import multi_teacher_kd

__all__ = ["multi_teacher_kd"]
